"""Chapter 02: its connectors, and its claims about the recorded runs.

The chapter trains pebble's connectors, so it does not run on another family.
"""

import re

import pandas as pd
import pytest
import torch
from chapters import cell, shown

import vlmkit as vk
from vlmkit.models.pebble import connecting

BENCHMARK = "connectors.py"
STAGES = (connecting.FIRST_STAGE, connecting.SECOND_STAGE)


@pytest.fixture(scope="module")
def made(benchmark):
    """{name: class or function} that the notebook defines."""
    return benchmark["connectors_of"](benchmark["NOTEBOOK"])


def test_a_resampler_ignores_the_order_of_its_patches(made):
    """Queries find a patch by its content and its position, not by its index."""
    torch.manual_seed(0)
    one, features, order = made["Resampler"](), torch.randn(2, 49, 128), torch.randperm(49)
    before = one(features)
    moved = one(features[:, order])
    assert not torch.allclose(moved, before, atol=1e-3)
    one.patches = one.patches[order]
    torch.testing.assert_close(one(features[:, order]), before)


def test_positions_of_any_number_of_queries_cover_the_same_grid(made):
    """A single query gets the code of the patch in the middle of the grid."""
    one, patches = made["positions"](1, 64), made["positions"](7, 64)
    torch.testing.assert_close(one[0], patches[24])
    assert len({tuple(code) for code in patches.round(decimals=4).tolist()}) == 49


def test_the_record_is_complete(benchmark, recorded):
    longer = recorded[recorded["run"] == "longer"]
    expected = {
        (name, tokens, stage.name, task)
        for name, tokens in benchmark["MORE"]
        for stage in STAGES
        for task in (*connecting.TASKS, "all")
    }
    by = ["connector", "visual_tokens", "stage", "task"]
    assert set(longer[by].itertuples(index=False, name=None)) == expected
    assert len(longer) == len(expected)


def test_claims_about_the_longer_runs(recorded):
    by = ["stage", "connector", "visual_tokens", "task"]
    longer = recorded[recorded["run"] == "longer"].set_index(by)
    first, second = (longer.loc[stage.name] for stage in STAGES)

    def leads(first, others, task):
        """Whether intervals at 16 tokens do not overlap."""
        shares = second.xs((16, task), level=["visual_tokens", "task"])
        return shares.loc[first, "low"].min() > shares.loc[others, "high"].max()

    # Training the language model too helps each connector.
    higher = second["accuracy"] - first["accuracy"]
    assert (higher.drop("MLP", level="connector").xs("all", level="task") > 0.03).all()
    # Tokens that keep their places lead in captions, queries lead in printed text.
    in_place = ["patch merger", "pixel shuffle"]
    assert leads(in_place, ["resampler"], "caption") and leads(["resampler"], in_place, "ocr")
    # 49 queries are hardly better than 16.
    many, few = (second.loc[("resampler", tokens, "all"), "accuracy"] for tokens in (49, 16))
    assert abs(many - few) < 0.03


def test_claims_about_the_short_training(notebook):
    """Two connectors are better than guessing; captions and printed text stay near zero."""
    (said,) = cell(notebook, "for label, found in scores").outputs
    p = dict(re.findall(r"^(.+?) +\d+ lost.*: p = (\S+),", said.text, re.M))
    table = shown(cell(notebook, "rows = list("))
    assert set(p) == set(table) - {"task", "pebble", "guessing"} and len(p) == 4
    assert {name for name in p if float(p[name]) < 0.001} == {"MLP", "resampler"}
    for name in p:
        right = dict(
            zip(table["task"], (int(text.split(" ")[0]) for text in table[name]), strict=True)
        )
        assert max(right["caption"], right["ocr"]) <= 10


@pytest.mark.slow
def test_the_benchmark_records_a_run_and_does_not_repeat_it(
    benchmark, made, tmp_path, capsys, one_thread
):
    output = tmp_path / "runs" / "trial.csv"
    options = ["--steps", "2", "1", "--repeats", "0", "--n", "8", "--output", str(output)]
    main = benchmark["main"]
    main.__globals__["MORE"] = {key: benchmark["MORE"][key] for key in (("resampler", 4),)}
    main(options)
    table = pd.read_csv(output)
    assert list(table["task"]) == [*connecting.TASKS, "all"] * 2
    assert table["n"].tolist() == [2, 2, 2, 2, 8] * 2
    resampler = made["Resampler"]()
    without = sum(p.numel() for name, p in resampler.named_parameters() if name != "queries")
    assert set(table["parameters"]) == {2 * 2 * 192 + without}
    for _, row in table.iterrows():
        wilson = vk.evaluation.wilson(round(row["accuracy"] * row["n"]), row["n"])
        assert (row["low"], row["high"]) == pytest.approx(wilson, abs=1e-4)
    printed, written = capsys.readouterr().out, output.read_text()
    assert printed.count("resampler, 4 tokens") == 2
    main(options)
    assert not capsys.readouterr().out and output.read_text() == written
