"""Chapter 09: what it shows of the run that made pebble and of the recorded recipes.

That it runs and prints what is stored in it is nbval's part (`make test`). It trains pebble, so it
has nothing to do on another family.
"""

from pathlib import Path

import chapters
import pandas as pd
import pytest

import vlmkit as vk
from vlmkit.models import pebble
from vlmkit.models.pebble import connecting

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "stages.py"
STEPS = 500


@pytest.fixture(scope="module")
def notebook():
    return chapters.read("09_making_pebble.ipynb")


@pytest.fixture(scope="module")
def said(notebook):
    return " ".join(chapters.text(notebook).split())


@pytest.fixture(scope="module")
def recorded(benchmark):
    return pd.read_csv(benchmark["OUTPUT"])


@pytest.fixture(scope="module")
def logs():
    first = pd.read_csv(pebble.path().parent / "training_log.csv")
    return first, pd.read_csv(chapters.FOLDER / "data" / "09_second_seed.csv")


@pytest.fixture(scope="module")
def last(recorded):
    """Accuracies at the end of the recipes, a mean over the seeds: a row per recipe and task."""
    ends = recorded[(recorded["steps"] == STEPS) & recorded["n"].notna()]
    return ends.groupby(["recipe", "task"])["accuracy"].mean().unstack()


def test_keeps_to_the_measure_of_a_chapter(notebook):
    chapters.check_measure(notebook, middle=10)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_what_is_recorded_is_of_this_pebble_and_complete(benchmark, recorded):
    """Fails after pebble's weights were exchanged: `make benchmark-stages` records anew."""
    assert set(recorded["weights"]) == {benchmark["digest"]()}
    ends = recorded[(recorded["steps"] == STEPS) & recorded["n"].notna()]
    expected = {
        (recipe, seed, task)
        for recipe in benchmark["RECIPES"]
        for seed in (0, 1)
        for task in (*connecting.TASKS, "all")
    }
    found = list(ends[["recipe", "seed", "task"]].itertuples(index=False, name=None))
    assert set(found) == expected and len(found) == len(expected)
    assert set(ends["n"]) == {300, 1200}
    assert set(benchmark["LESSONS"]) < set(recorded["recipe"])


def test_all_recipes_have_equally_many_steps_in_their_stages(benchmark):
    """A recipe that goes on as it began has one stage less: neither warms up nor cools down."""
    made = {
        name: benchmark["stages_of"](learns, (150, 200, 150), seed=0)
        for name, (_, _, learns) in benchmark["RECIPES"].items()
    }
    assert {sum(stage.steps for stage in stages) for stages in made.values()} == {STEPS}
    assert [stage.steps for stage in made["LLaVA"]] == [150, 350]
    assert [stage.steps for stage in made["no projector stage"]] == [STEPS]
    assert [len(stage.trains) for stage in made["Qwen-VL"]] == [2, 4, 3]


def test_the_benchmark_records_a_run_and_does_not_repeat_it(
    benchmark, tmp_path, capsys, one_thread
):
    output = tmp_path / "runs" / "trial.csv"
    options = ["--steps", "1", "1", "1", "--n", "8", "--seeds", "1", "--workers", "0"]
    main = benchmark["main"]
    main.__globals__["RECIPES"] = {"no vision stage": benchmark["RECIPES"]["no vision stage"]}
    main.__globals__["LESSONS"] = {}
    main([*options, "--output", str(output)])
    table = pd.read_csv(output)
    scored = ["in training", *connecting.TASKS, "all"]
    assert list(table["task"]) == scored * 2
    assert table["steps"].tolist() == [1] * 6 + [3] * 6
    for _, row in table[table["n"].notna()].iterrows():
        wilson = vk.evaluation.wilson(round(row["accuracy"] * row["n"]), row["n"])
        assert (row["low"], row["high"]) == pytest.approx(wilson, abs=1e-4)
    said, written = capsys.readouterr().out, output.read_text()
    assert said.count("no vision stage, seed 0") == 1
    main([*options, "--output", str(output)])
    assert not capsys.readouterr().out and output.read_text() == written


def test_what_is_said_of_the_two_runs_is_so(said, logs):
    first, second = logs
    reached = [int((run["spatial"] >= 0.8).idxmax() + 1) * 100 for run in logs]
    assert "80% of *left of* after 11,700 steps, the first after 19,800" in said
    assert reached == [19_800, 11_700]
    ends = pd.DataFrame([run.loc[:, "caption":"moving"].iloc[-1].astype(float) for run in logs])
    assert "*same color* stayed at chance to the end, where pebble has 100%" in said
    assert ends["same_color"].iloc[0] > 0.995
    assert 0.45 < second.loc[second["stage"] == "final", "same_color"].mean() < 0.55
    assert "All other kinds ended within six points" in said
    assert (ends.diff().iloc[1].abs().drop("same_color") < 0.06).all()
    assert "Words, which could be read in text, start again at nothing" in said
    assert "stood at one half, until a lesson asked for nothing else" in said
    for run in logs:
        words, colors = (run.groupby("stage")[kind].last() for kind in ("word", "color"))
        assert words["language"] > 0.4 and words["projector"] < 0.02
        assert 0.4 < colors["instruct"] < 0.6 and colors["lookups"] > 0.8


def test_what_is_said_of_the_recipes_is_so(said, recorded, last):
    ends = recorded[(recorded["steps"] == STEPS) & (recorded["task"] == "all")]
    ends = ends.set_index(["recipe", "seed"])

    def overlap(name, other, seed):
        a, b = ends.loc[(name, seed)], ends.loc[(other, seed)]
        return a["low"] < b["high"] and b["low"] < a["high"]

    assert "The eyes are missed most**, in both seeds by far more than the intervals" in said
    without = ends.xs("no vision stage")["high"].max()
    assert without < ends.drop("no vision stage", level="recipe")["low"].min()
    assert "150 steps of the projector gave not one right answer" in said
    blind = recorded.query("recipe == 'no text stage' and steps == 150")
    assert len(blind) > 10 and (blind.loc[blind["n"].notna(), "accuracy"] == 0).all()
    assert "350 steps together later it had caught up" in said
    assert "Without the projector's stage** the two came about as far" in said
    for seed in (0, 1):
        assert overlap("LLaVA", "no text stage", seed)
        assert overlap("LLaVA", "no projector stage", seed)
    assert "An encoder that learns too** did not help, nor did Qwen-VL's order" in said
    assert (
        last.loc[["Qwen-VL", "vision encoder learns too"], "all"].max() < last.loc["LLaVA", "all"]
    )
    assert "lie further apart than an interval is wide" in said
    qwen = ends.loc["Qwen-VL"]
    assert qwen["accuracy"].diff().abs().max() > (qwen["high"] - qwen["low"]).max()


def test_what_is_said_of_the_lessons_is_so(said, recorded, logs):
    alone = recorded[recorded["steps"] == 300].set_index("recipe")["accuracy"]

    def in_turn(stage, kind):
        rows = (run[(run["stage"] == stage) & (run["step"] == 300)] for run in logs)
        return [round(100 * row[kind].item()) for row in rows]

    assert "78% after 300 steps, against 72 and 75%" in said
    assert round(100 * alone["where, asked alone"]) == 78 and in_turn("wheres", "where") == [72, 75]
    assert "as far as in the run, 66%, and less far than in the second, 89%" in said
    assert round(100 * alone["relation, asked alone"]) == 66
    assert in_turn("relations", "relation") == [66, 89]
    assert "one run" in said and "450 steps" in said
