"""Chapter 06: its record is a copy of the benchmark's, and its claims about the record are true."""

import itertools
import re

import chapters
import pandas as pd
import pytest

import vlmkit as vk
from vlmkit.catalog.bundled import BUNDLED

BENCHMARK = "recipe.py"
FORMATS = ("bf16", "int8", "nf4", "int4", "int3")
THREE = (("bf16", "bf16"), ("bf16", "nf4"), ("nf4", "nf4"))
BETWEEN = [(one, other) for one in FORMATS for other in FORMATS if one != other]
FETCHED = BUNDLED["cobble"].is_current


@pytest.fixture(scope="module")
def every_width():
    table = pd.read_csv(chapters.FOLDER / "data" / "06_recipe.csv")
    return table.assign(percent=100 * table["right"] / table["n"])


@pytest.fixture(scope="module")
def record(every_width):
    return every_width[every_width["hidden"] == 576]


@pytest.fixture(scope="module")
def cells(record):
    """Mean, lowest and highest seed in percent, by question, format of training, format asked in:
    with the vision encoder and the projector in bf16."""
    wide = record[["trained_vision", "asked_vision", "asked_projector"]].eq("bf16").all(axis=1)
    keys = ["question", "trained_language", "asked_language"]
    return record[wide].groupby(keys)["percent"].agg(["mean", "min", "max", "count"])


@pytest.fixture(scope="module")
def naming(cells):
    return cells.loc["name"]


@pytest.fixture(scope="module")
def text():
    return pd.read_csv(chapters.FOLDER / "data" / "06_text.csv", index_col="format")


def test_the_chapters_record_is_that_of_the_benchmark():
    theirs = chapters.FOLDER.parent / "benchmarks" / "results" / "recipe.csv"
    ours = chapters.FOLDER / "data" / "06_recipe.csv"
    assert ours.read_text("utf-8") == theirs.read_text("utf-8")


def test_the_record_is_complete(benchmark, every_width, record, cells):
    columns = ["asked_vision", "asked_language", "asked_projector", "question"]
    keys = ["trained_vision", "trained_language", "hidden", "seed"]
    asked = {key: set(rows[columns].itertuples(index=False, name=None))
             for key, rows in every_width.groupby(keys)}  # fmt: skip
    assert asked == {
        (*kind, seed): set(benchmark["cells"](*kind))
        for *kind, seed in benchmark["trainings"]((0, 1, 2))
    }
    assert (cells["count"] == 3).all()
    assert set(record.loc[record["question"] == "name", "n"]) == {2000}
    assert (record["right"] <= record["n"]).all()


def test_claims_about_the_diagonal(naming, states):
    for format in FORMATS:
        own = naming.loc[(format, format)]
        assert own["min"] > 87 and own["max"] < 89
    states(
        f"{naming.loc[('bf16', 'bf16'), 'mean']:.0f}", f"{naming.loc[('nf4', 'nf4'), 'mean']:.0f}"
    )


def test_claims_beside_the_diagonal(naming, states):
    """Every pair of formats loses, except bf16 and int8; how much depends on the seed."""
    for pair in BETWEEN:
        alike = set(pair) == {"bf16", "int8"}
        assert (naming.loc[pair, "min"] > 87) == alike, pair
        assert alike or naming.loc[pair, "mean"] < 84, pair
    assert naming.loc[("bf16", "int3"), "max"] < 1
    for asked in ("nf4", "int4"):
        row = naming.loc[("bf16", asked)]
        states(*(f"{row[name]:.0f}" for name in ("min", "max")))
        assert row["max"] - row["min"] > 14
    states(
        f"{naming.loc[('bf16', 'nf4'), 'mean']:.0f}", f"{naming.loc[('nf4', 'bf16'), 'mean']:.0f}"
    )
    kept = naming.loc[("bf16", "nf4"), "mean"] / naming.loc[("bf16", "bf16"), "mean"]
    assert kept == pytest.approx(0.8, abs=0.04)  # four of five names are still right


def test_claims_about_double_quantization(naming):
    for trained in ("bf16", "nf4"):
        row = naming.loc[trained]["mean"]
        assert abs(row["nf4-dq"] - row["nf4"]) < 1.5
    six = naming["mean"].unstack()
    share = {
        frozenset(pair)
        for pair in itertools.combinations(six.index, 2)
        if all(six.loc[b, b] - six.loc[a, b] <= 2 for a, b in (pair, pair[::-1]))
    }
    assert len(six) == 6 and share == {frozenset(("bf16", "int8")), frozenset(("nf4", "nf4-dq"))}


def test_claims_about_digits(cells, states):
    digit = cells.loc["digit"]
    states(*(f"{digit.loc[('bf16', 'nf4'), name]:.0f}" for name in ("min", "max")))
    assert digit.loc[("nf4", "nf4"), "min"] > 98


def test_claims_about_what_is_not_repaired(cells, text, states):
    yes_no = cells.loc["yes/no"]
    healed, before = yes_no.loc[("nf4", "nf4")], yes_no.loc[("bf16", "bf16")]
    after = yes_no.loc[("bf16", "nf4")]
    assert after["mean"] < 45  # below guessing
    assert all(
        cells.loc[kind].loc[("bf16", "nf4"), "mean"] > after["mean"]
        for kind in ("name", "name unseen", "digit")
    )
    states(*(f"{row['mean']:.0f}" for row in (before, after, healed)))
    states(*(f"{healed[name]:.0f}" for name in ("min", "max")))
    for kind in ("name", "name unseen", "digit", "yes/no", "yes/no unseen"):
        mean = cells.loc[kind]["mean"]
        assert mean["nf4", "nf4"] > mean["bf16", "bf16"] - 2
    assert cells.loc["animal or vehicle"]["mean"].loc[list(THREE)].max() < 10
    for column in ("perplexity", "right"):
        states(*(f"{text.loc[format, column]:.0f}" for format in ("bf16", "nf4", "cobble-chat")))
    assert text.loc["bf16", "perplexity"] < text.loc["cobble-chat", "perplexity"]
    assert text.loc["cobble-chat", "perplexity"] < text.loc["nf4", "perplexity"]
    assert text.loc["cobble-chat", "right"] > text.loc["nf4", "right"]
    states(f"{text.loc['bf16', 'right'] - text.loc['nf4', 'right']}")
    assert set(text["questions"]) == {200} and text.loc["int3", "right"] == 0
    assert text.loc["nf4", "same_next_token"] == pytest.approx(0.7, abs=0.02)  # three of ten change


def test_claims_about_the_other_components(record, naming):
    """Which of the three has to keep its bits, for cobble."""
    one = record.query("question == 'name' and trained_vision == 'bf16'")
    one = one.query("trained_language == 'bf16' and asked_language == 'bf16'")
    whole = naming.loc[("bf16", "bf16"), "mean"]
    rounded = one[one["asked_projector"] == "bf16"].groupby("asked_vision")["percent"].mean()
    assert whole - rounded["int4"] < 0.5
    assert whole - rounded["int3"] == pytest.approx(2, abs=0.5)
    assert rounded["int2"] == pytest.approx(whole / 2, abs=4)
    after = one[one["asked_vision"] == "bf16"].groupby("asked_projector")["percent"].mean()
    assert (whole - after[["nf4", "int8", "int3"]] < 0.5).all()


def test_claims_about_other_widths_and_a_rounded_vision_encoder(every_width, naming, states):
    names = every_width.query("question == 'name' and asked_projector == 'bf16'")
    keys = ["trained_vision", "trained_language", "hidden", "asked_vision", "asked_language"]
    mean = names.groupby(keys)["percent"].mean()
    whole = naming.loc[("bf16", "bf16"), "mean"]
    rounded = mean["bf16", "bf16", 576, "int2", "bf16"]
    back = (mean["int2", "bf16", 576, "int2", "bf16"] - rounded) / (whole - rounded)
    assert back == pytest.approx(0.75, abs=0.05)
    kept = [mean["bf16", "bf16", wide, "bf16", "nf4"] for wide in (64, 576, 2304)]
    assert kept == sorted(kept)
    states(f"{kept[0]:.0f}", f"{kept[2]:.0f}")
    for wide in (64, 576, 2304):
        for format in ("bf16", "nf4"):
            assert mean["bf16", format, wide, "bf16", format] == pytest.approx(88, abs=0.5)


def test_claims_about_another_quantizer(states):
    """What BLIP-2's language model keeps in 3 bits, in the grid of chapter 05."""
    grid = pd.read_csv(chapters.FOLDER / "data" / "05_blip2.csv")
    grid = grid.set_index(["quantizer", "vision_encoder", "projector", "language_model"])["cider"]
    states(*(f"{100 * grid[q, 16, 16, 3] / grid[q, 16, 16, 16]:.0f}" for q in ("AWQ", "GPTQ")))


def test_the_live_digits_show_no_loss_beyond_chance(notebook):
    """As they were when the chapter was run for the repository."""
    shown = chapters.cell(notebook, "print(vk.evaluation.paired").outputs[0].text
    lost, won = (int(number) for number in re.findall(r"(\d+) (?:lost|won)", shown))
    assert lost < 5 and vk.evaluation.mcnemar(lost, won) > 0.05


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED, reason="cobble is not in the cache: run vlmkit fetch cobble")
def test_claims_about_the_live_figure(notebook):
    """Figure 2 again, by the notebook's own cells: under a minute."""
    import matplotlib

    matplotlib.use("agg")
    scope = {}
    starts = ("import random", "def load", "images = ", "with warnings", "recommended, _")
    for start in (*starts, "content = ", "def hidden_states", "original = ", "lines = "):
        source = chapters.cell(notebook, start).source
        exec("\n".join(line for line in source.splitlines() if "said" not in line), scope)
    lines = [line.get_ydata() for line in scope["ax"].lines]
    visual, words, repaired, another = lines
    assert 0.06 < visual[1] < 0.08 and 0.08 < words[1] < 0.1
    assert abs(visual - words).max() < 0.12 and 0.3 < visual[-1] < 0.5 and 0.3 < words[-1] < 0.5
    assert (repaired[1:] > 1.5 * visual[1:]).all()
    assert (another > visual).all()
