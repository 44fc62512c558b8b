"""Chapter 09: what it shows of the run that made pebble and of the recorded recipes.

That it runs and prints what is stored in it is nbval's part (`make test`). It trains pebble, so it
has nothing to do on another family.
"""

import math
from pathlib import Path

import chapters
import pandas as pd
import pytest
import torch

import vlmkit as vk
from vlmkit import pebble
from vlmkit.pebble import connecting, states, train

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


def test_the_solutions_pass_the_checks(notebook, said, logs):
    code = chapters.sources(notebook, "code")
    (flows,) = (source for source in code if source.startswith("flows = None"))
    (others,) = (source for source in code if source.startswith("steps_to_80 = None"))
    projector = next(stage for stage in train.STAGES if stage.name == "projector")
    eyes = ("vision_tower",)
    names = {"train": train, "torch": torch, "model": states.after("nothing")}
    names |= {"stages": {stage.name: stage for stage in train.STAGES}}
    names |= {"qwen": train.Stage("projector", 1, 1e-3, eyes + projector.trains)}
    right = (
        '{"LLaVA": {"projector", "language_model"}, '
        '"Qwen-VL": {"vision_encoder", "projector", "language_model"}}'
    )
    assert right in said
    exec(flows.replace("flows = None", f"flows = {right}"), names)
    with pytest.raises(AssertionError):
        exec(
            flows.replace("flows = None", f"flows = {right}".replace('"vision_encoder", ', "")),
            names,
        )

    reached = '[int((run["spatial"] >= 0.8).idxmax() + 1) * 100 for run in (log, second)]'
    assert reached in said
    solution = chapters.text(notebook).split("   def my_rate")[1].split("```")[0]
    names |= dict(zip(("log", "second"), logs, strict=True)) | {"math": math}
    exec("def my_rate" + solution.replace("\n   ", "\n"), names)
    others = others.replace("my_rate = None", "").replace(
        "steps_to_80 = None", f"steps_to_80 = {reached}"
    )
    exec(others, names)
    with pytest.raises(AssertionError):
        exec(others, names | {"my_rate": lambda step, stage: stage.rate})


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
