"""Chapter 02: its connectors, what it shows of the recorded runs, and what it says of them.

That it runs and prints what is stored in it is nbval's part (`make test`). It trains pebble's
connectors, so it has nothing to do on another family.
"""

import ast
from pathlib import Path

import chapters
import pandas as pd
import pytest
import torch

import vlmkit as vk
from vlmkit.models.pebble import connecting

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "connectors.py"
CONNECTORS = ("MLP", "PixelShuffle", "PatchMerger", "Resampler")


@pytest.fixture
def notebook():
    return chapters.read("02_connectors.ipynb")


@pytest.fixture(scope="module")
def made(benchmark):
    """The classes and functions of the notebook by name."""
    return benchmark["connectors_of"](benchmark["NOTEBOOK"])


@pytest.fixture(scope="module")
def recorded(benchmark):
    return pd.read_csv(benchmark["OUTPUT"])


def test_keeps_to_the_measure_of_a_chapter(notebook):
    # What the chapter is about, four connectors written out, comes on top of the usual measure.
    chapters.check_measure(notebook, middle=10, lines=150 + 60)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_a_connector_takes_at_most_thirty_lines(notebook):
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for source in chapters.sources(notebook, "code")
        for node in ast.parse(source).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }
    shared = lengths["blocks"] + lengths["positions"]
    assert all(lengths[name] + shared <= 30 for name in CONNECTORS)


def test_a_resampler_does_not_mind_the_order_of_its_patches(made):
    """Queries find a patch by what is in it and by its place, not by its number."""
    torch.manual_seed(0)
    one, features, order = made["Resampler"](), torch.randn(2, 49, 128), torch.randperm(49)
    before = one(features)
    moved = one(features[:, order])
    assert not torch.allclose(moved, before, atol=1e-3)
    one.patches = one.patches[order]
    torch.testing.assert_close(one(features[:, order]), before)


def test_positions_of_any_number_of_queries_lie_over_the_same_grid(made):
    """A query in the middle of the grid has the code of the patch in the middle."""
    one, patches = made["positions"](1, 64), made["positions"](7, 64)
    torch.testing.assert_close(one[0], patches[24])
    assert len({tuple(code) for code in patches.round(decimals=4).tolist()}) == 49


def test_what_is_recorded_is_of_this_pebble_and_complete(benchmark, recorded):
    """Fails after pebble's weights were exchanged: `make benchmark-connectors` records anew."""
    assert set(recorded["weights"]) == {benchmark["digest"]()}
    longer = recorded[recorded["run"] == "longer"]
    expected = {
        (name, tokens, stage.name, task)
        for name, tokens in benchmark["MORE"]
        for stage in (connecting.FIRST_STAGE, connecting.SECOND_STAGE)
        for task in (*connecting.TASKS, "all")
    }
    by = ["connector", "visual_tokens", "stage", "task"]
    assert set(longer[by].itertuples(index=False, name=None)) == expected
    assert len(longer) == len(expected)


def test_what_is_said_of_the_longer_runs_is_so(notebook, recorded):
    said = " ".join(chapters.text(notebook).split())
    by = ["stage", "connector", "visual_tokens", "task"]
    longer = recorded[recorded["run"] == "longer"].set_index(by)
    first, second = (longer.loc[s.name] for s in (connecting.FIRST_STAGE, connecting.SECOND_STAGE))

    def leads(first, others, task):
        """At 16 tokens, by more than the intervals of both."""
        shares = second.xs((16, task), level=["visual_tokens", "task"])
        return shares.loc[first, "low"].min() > shares.loc[others, "high"].max()

    assert "The right half is higher" in said
    higher = second["accuracy"] - first["accuracy"]
    assert (higher.drop("MLP").xs("all", level="task") > 0.03).all()
    in_place = ["patch merger", "pixel shuffle"]
    assert "Patch merger and pixel shuffle, whose tokens keep their places, lead in capt" in said
    assert leads(in_place, ["resampler"], "caption")
    assert "the resampler, whose queries can all go to the letters, in printed text" in said
    assert leads(["resampler"], in_place, "ocr")
    assert "49 queries give it hardly more" in said
    many, few = (second.loc[("resampler", tokens, "all"), "accuracy"] for tokens in (49, 16))
    assert abs(many - few) < 0.03


def test_the_benchmark_records_a_run_and_does_not_repeat_it(
    benchmark, tmp_path, capsys, one_thread
):
    output = tmp_path / "runs" / "trial.csv"
    options = ["--steps", "2", "1", "--repeats", "0", "--n", "8", "--output", str(output)]
    main = benchmark["main"]
    main.__globals__["MORE"] = {key: benchmark["MORE"][key] for key in (("resampler", 4),)}
    main(options)
    table = pd.read_csv(output)
    assert list(table["task"]) == [*connecting.TASKS, "all"] * 2
    assert table["n"].tolist() == [2, 2, 2, 2, 8] * 2
    assert set(table["parameters"]) == {2 * 2 * 192 + made_without_queries(benchmark)}
    for _, row in table.iterrows():
        wilson = vk.evaluation.wilson(round(row["accuracy"] * row["n"]), row["n"])
        assert (row["low"], row["high"]) == pytest.approx(wilson, abs=1e-4)
    said, written = capsys.readouterr().out, output.read_text()
    assert said.count("resampler, 4 tokens") == 2
    main(options)
    assert not capsys.readouterr().out and output.read_text() == written


def made_without_queries(benchmark):
    resampler = benchmark["connectors_of"](benchmark["NOTEBOOK"])["Resampler"]()
    return sum(p.numel() for name, p in resampler.named_parameters() if name != "queries")
