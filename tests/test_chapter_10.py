"""Chapter 10: its claims about the run that made pebble and about the recorded recipes are true.

The chapter trains pebble, so it does not run on another family.
"""

import re
from pathlib import Path

import chapters
import pandas as pd
import pytest
from chapters import cell

import vlmkit as vk
from vlmkit.models import cobble, pebble
from vlmkit.models.pebble import connecting, train

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
    first, second = logs
    states(len(train.STAGES))
    assert first["stage"].nunique() == second["stage"].nunique() == len(train.STAGES)
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


def test_claims_about_the_recipes(recorded, ends, states):
    """Differences between recipes are judged by those between two seeds of one recipe."""
    table = ends[ends["task"] == "all"].set_index(["recipe", "seed"])
    points = 100 * table["accuracy"].unstack()
    seeds = points[0].sub(points[1]).abs()
    means = points.mean(axis=1)
    behind = means["LLaVA"] - means
    assert behind["no vision stage"] > 2.5 * seeds.max()
    states(f"{means['no vision stage']:.0f}", f"{means['LLaVA']:.0f}")
    # Behind a random language model the projector alone learns nothing; later it catches up.
    blind = recorded.query("recipe == 'no text stage' and steps == 150")
    assert len(blind) > 10 and (blind.loc[blind["n"].notna(), "accuracy"] == 0).all()
    for recipe in ("no text stage", "no projector stage"):
        assert behind[recipe] < seeds.max()
    # Points between rounded means, as a reader subtracts them from the table.
    rounded = means.round()
    points = rounded["LLaVA"] - rounded
    states(*(int(points[f"no {part} stage"]) for part in ("text", "projector")))
    # To train the encoder too does not help. Qwen-VL's seeds are five points apart.
    assert means[["Qwen-VL", "vision encoder learns too"]].max() < means["LLaVA"]
    assert seeds.idxmax() == "Qwen-VL" and 5 < seeds.max() < 6


def test_the_first_steps_are_those_of_the_run(notebook):
    """The reader's losses, which the chapter's own cell printed, are the run's within 10%."""
    lines = "".join(o.text for o in cell(notebook, "log = pd.read_csv").outputs).splitlines()
    assert len(lines) == 2
    for line in lines:
        yours, run = (float(n) for n in re.findall(r"\d+\.\d+", line))
        assert yours == pytest.approx(run, rel=0.1)


def test_a_step_changes_the_projector_alone(notebook):
    changed = "".join(o.text for o in cell(notebook, "short = ").outputs).split()[1:]
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_numbers_about_cobble(states):
    """As in its model card, its log and its record."""
    folder = Path(cobble.__file__).parent
    card = (folder / "MODEL_CARD.md").read_text("utf-8")
    rows = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("| ")]
    rows = {row[0].strip(): [part.strip() for part in row] for row in rows}
    for stage in ("teacher", "vision_encoder", "projector-nf4", "chat"):
        states(*(rows[stage][column].replace(",", "") for column in (2, 5)))
    names = ("vision_encoder", "projector", "language_model")
    vision, projector, language = (int(rows[f"`{n}`"][2].replace(",", "")) / 1e6 for n in names)
    states(f"{vision + projector:.1f}", f"{language:.1f}")
    log = pd.read_csv(folder / "training_log.csv").set_index(["stage", "step"])["right"]
    states(f"{100 * log['projector-nf4', 1200]:.0f}")
    asked = pd.read_csv(chapters.FOLDER.parent / "benchmarks" / "results" / "cobble.csv")
    share = (100 * asked["right"] / asked["n"]).set_axis([asked["state"], asked["task"]])
    tasks = ("photographs", "easy-VQA", "drawings: color", "drawings: count")
    asked_of = asked[asked["state"].eq("cobble-chat") & asked["task"].str.startswith(tasks)]["n"]
    states(asked_of.min(), asked_of.max())
    states(*re.findall(r"6 hours for\s+the teacher, (\d+) for the vision encoder", card))
    assert share["cobble", "photographs: facts"] == 0
    for task in ("photographs: facts", "easy-VQA"):
        states(f"{share['cobble-chat', task]:.1f}")


def test_numbers_about_the_lessons(recorded, logs, states):
    alone = recorded[recorded["steps"] == 300].set_index("recipe")["accuracy"]
    for stage, kind in (("wheres", "where"), ("relations", "relation")):
        rows = (run[(run["stage"] == stage) & (run["step"] == 300)] for run in logs)
        reached = [alone[f"{kind}, asked alone"], *(row[kind].item() for row in rows)]
        states(*(f"{100 * accuracy:.0f}" for accuracy in reached))


def test_the_earlier_trial_is_the_model_cards(states):
    card = (pebble.path().parent / "MODEL_CARD.md").read_text("utf-8")
    ((share, steps),) = re.findall(r'"where" alone stayed at (\d+)% for (\d+) steps', card)
    states(share, steps)
