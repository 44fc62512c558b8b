"""Chapter 10: its claims about the run that made pebble and about the recorded recipes are true.

The chapter trains pebble, so it does not run on another family.
"""

import chapters
import pandas as pd
import pytest

import vlmkit as vk
from vlmkit.models import pebble
from vlmkit.models.pebble import connecting

BENCHMARK = "stages.py"
STEPS = 500


@pytest.fixture(scope="module")
def logs():
    """The logs of the run that made pebble and of the second seed."""
    first = pd.read_csv(pebble.path().parent / "training_log.csv")
    return first, pd.read_csv(chapters.FOLDER / "data" / "10_second_seed.csv")


@pytest.fixture(scope="module")
def ends(recorded):
    """What the recipes reach in the end."""
    return recorded[(recorded["steps"] == STEPS) & recorded["n"].notna()]


def test_the_record_is_complete(benchmark, recorded, ends):
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


def test_all_recipes_have_the_same_number_of_steps(benchmark):
    """A recipe that continues as before has one stage fewer, without another warm-up."""
    made = {
        name: benchmark["stages_of"](learns, (150, 200, 150), seed=0)
        for name, (_, _, learns) in benchmark["RECIPES"].items()
    }
    assert {sum(stage.max_steps for stage in stages) for stages in made.values()} == {STEPS}
    assert [stage.max_steps for stage in made["LLaVA"]] == [150, 350]
    assert [stage.max_steps for stage in made["no projector stage"]] == [STEPS]
    assert [len(stage.trains) for stage in made["Qwen-VL"]] == [2, 4, 3]


@pytest.mark.slow
def test_the_benchmark_records_a_run_and_does_not_repeat_it(
    benchmark, tmp_path, capsys, one_thread
):
    output = tmp_path / "runs" / "trial.csv"
    options = ["--steps", "1", "1", "1", "--n", "8", "--seeds", "1", "--workers", "0"]
    options += ["--output", str(output)]
    main = benchmark["main"]
    main.__globals__["RECIPES"] = {"no vision stage": benchmark["RECIPES"]["no vision stage"]}
    main.__globals__["LESSONS"] = {}
    main(options)
    table = pd.read_csv(output)
    scored = ["in training", *connecting.TASKS, "all"]
    assert list(table["task"]) == scored * 2
    assert table["steps"].tolist() == [1] * 6 + [3] * 6
    for _, row in table[table["n"].notna()].iterrows():
        wilson = vk.evaluation.wilson(round(row["accuracy"] * row["n"]), row["n"])
        assert (row["low"], row["high"]) == pytest.approx(wilson, abs=1e-4)
    printed, written = capsys.readouterr().out, output.read_text()
    assert printed.count("no vision stage, seed 0") == 1
    main(options)
    assert not capsys.readouterr().out and output.read_text() == written


def test_claims_about_the_two_runs(logs, states):
    _, second = logs
    reached = [int((run["spatial"] >= 0.8).idxmax() + 1) * 100 for run in logs]
    states(*reached)
    last = pd.DataFrame([run.loc[:, "caption":"moving"].iloc[-1].astype(float) for run in logs])
    assert last["same_color"].iloc[0] > 0.995
    assert 0.45 < second.loc[second["stage"] == "final", "same_color"].mean() < 0.55
    assert (last.diff().iloc[1].abs().drop("same_color") < 0.06).all()
    for run in logs:
        words, colors = (run.groupby("stage")[kind].last() for kind in ("word", "color"))
        assert words["language"] > 0.4 and words["projector"] < 0.02
        assert 0.4 < colors["instruct"] < 0.6 and colors["lookups"] > 0.8


def test_claims_about_the_recipes(recorded, ends):
    table = ends[ends["task"] == "all"].set_index(["recipe", "seed"])

    def overlap(name, other, seed):
        a, b = table.loc[(name, seed)], table.loc[(other, seed)]
        return a["low"] < b["high"] and b["low"] < a["high"]

    # Without the vision stage a recipe is worse than all others, in both seeds.
    without = table.xs("no vision stage")["high"].max()
    assert without < table.drop("no vision stage", level="recipe")["low"].min()
    # Behind a random language model the projector alone learns nothing; later it catches up.
    blind = recorded.query("recipe == 'no text stage' and steps == 150")
    assert len(blind) > 10 and (blind.loc[blind["n"].notna(), "accuracy"] == 0).all()
    for seed in (0, 1):
        assert overlap("LLaVA", "no text stage", seed)
        assert overlap("LLaVA", "no projector stage", seed)
    # To train the encoder too does not help. Qwen-VL's seeds differ by more than an interval.
    means = table.groupby("recipe")["accuracy"].mean()
    assert means[["Qwen-VL", "vision encoder learns too"]].max() < means["LLaVA"]
    qwen = table.loc["Qwen-VL"]
    assert qwen["accuracy"].diff().abs().max() > (qwen["high"] - qwen["low"]).max()


def test_numbers_about_the_lessons(recorded, logs, states):
    alone = recorded[recorded["steps"] == 300].set_index("recipe")["accuracy"]
    for stage, kind in (("wheres", "where"), ("relations", "relation")):
        rows = (run[(run["stage"] == stage) & (run["step"] == 300)] for run in logs)
        reached = [alone[f"{kind}, asked alone"], *(row[kind].item() for row in rows)]
        states(*(f"{100 * accuracy:.0f}" for accuracy in reached))
