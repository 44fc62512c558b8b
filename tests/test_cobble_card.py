"""cobble's model card gives the numbers that were recorded, and the settings of the training."""

import csv
import itertools
import re
from pathlib import Path

import pytest
from chapters import states
from safetensors.torch import load_file

import vlmkit as vk
from vlmkit.models.cobble import fetching, recipe, train

ROOT = Path(__file__).resolve().parent.parent
COBBLE = ROOT / "vlmkit" / "models" / "cobble"
CARD = (COBBLE / "MODEL_CARD.md").read_text(encoding="utf-8")


def rows(heading):
    """The rows of all tables of a section: {first cell: the other cells}."""
    section = CARD.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line[:2] == "| "]
    return {first.strip(" `"): [cell.strip() for cell in more] for first, *more in lines}


def recorded(name):
    file = ROOT / "benchmarks" / "results" / name
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_its_abilities_are_the_recorded_ones():
    shown = rows("What it can do")
    place = {"cobble-bf16": 1, "cobble": 2, "cobble-chat": 3}
    found = recorded("cobble.csv")
    assert {row["state"] for row in found} == set(place)
    for row in found:
        n, right = int(row["n"]), int(row["right"])
        low, high = 100 * float(row["low"]), 100 * float(row["high"])
        cells = shown[row["task"]]
        assert cells[0] == f"{n:,}"
        assert cells[place[row["state"]]] == f"{100 * right / n:.1f} [{low:.1f}, {high:.1f}]"


def test_a_row_about_an_aim_that_was_missed_is_a_recorded_one():
    share = {
        (row["state"], row["task"]): 100 * int(row["right"]) / int(row["n"])
        for row in recorded("cobble.csv")
    }
    used, unseen = (f"photographs: name, {kind} phrasings" for kind in ("used", "unseen"))
    missed = CARD.partition("aims that were missed")[2].partition("\n\n`")[0]
    states(
        missed,
        f"{share['cobble', 'photographs: yes/no']:.1f}",
        f"{share['cobble-chat', 'drawings: count']:.1f}",
        f"{share['cobble-chat', 'drawings: count_color']:.1f}",
        f"{share['cobble', used] - share['cobble', unseen]:.1f}",
        f"{share['cobble-chat', used] - share['cobble-chat', unseen]:.1f}",
    )


def test_the_two_by_two_of_formats_is_recorded_with_three_seeds():
    table = rows("Six names, one language model")
    for trained, asked in itertools.product(("bf16", "nf4"), repeat=2):
        wanted = {
            "trained_vision": "bf16",
            "trained_language": trained,
            "hidden": "576",
            "asked_vision": "bf16",
            "asked_language": asked,
            "asked_projector": "bf16",
            "question": "name",
            "n": "2000",
        }
        found = [row for row in recorded("recipe.csv") if wanted.items() <= row.items()]
        cell = table["NF4" if trained == "nf4" else "bf16"][asked == "nf4"]
        rights = [100 * int(row["right"]) / 2000 for row in found]
        assert [float(text) for text in cell.split(",")] == pytest.approx(rights, abs=0.0501)
        assert len(rights) == 3


def test_its_stages_are_those_of_the_training():
    with (COBBLE / "training_log.csv").open(encoding="utf-8", newline="") as stream:
        seconds = {row["stage"]: row["seconds"] for row in csv.DictReader(stream)}
    stages = rows("How it was made")
    for stage in train.STAGES[1:]:
        settings = train.SETTINGS["projector" if stage.startswith("projector") else stage]
        _, steps, batch, rate, took = stages[stage]
        assert (steps, batch) == (f"{settings.max_steps:,}", f"{settings.batch_size:,}")
        assert float(rate) == settings.learning_rate
        assert stage == "teacher" or took == seconds[stage]  # the teacher's log was not kept


def test_its_parameters_and_states_are_those_of_the_recipe():
    whole, components = vk.anatomy("cobble"), rows("What it is")
    for component in ("vision_encoder", "projector", "language_model"):
        assert components[component][1] == f"{whole[component].parameters:,}"
    states(CARD, whole.total)
    weights, names = COBBLE / "weights", rows("Six names, one language model")
    for name, state in recipe.STATES.items():
        files = [weights / f"projector-{state.language_model}.safetensors"]
        if state.adapters:
            files = (weights / "adapters").glob("*.safetensors")
        size = sum(tensor.numel() for file in files for tensor in load_file(file).values())
        assert names[name][1] == f"{size:,}"
    megabytes = [vk.memory.predict("cobble", plan).total / 1e6 for plan in ("bf16", "recommended")]
    states(CARD, *(f"{size:.0f}" for size in megabytes))


def test_it_names_the_language_model_that_is_fetched():
    package, version = fetching.PACKAGE.split("==")
    assert fetching.GGUF in CARD and re.search(rf"{package}` {re.escape(version)}\b", CARD)


def test_the_readmes_table_has_the_same_numbers():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| questions | cobble-bf16 |")[2].partition("\n\n")[0]
    card, lines = rows("What it can do"), table.splitlines()[2:]
    assert len(lines) >= 5
    for line in lines:
        task, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert cells == card[task][1:]
    sizes = readme.partition("| component | pebble, bf16 |")[2].partition("\n\n")[0]
    total = sizes.splitlines()[-1].strip("|").split("|")[1:]
    ledgers = [vk.memory.predict(m, p) for m in ("pebble", "cobble") for p in ("bf16", None)]
    assert [cell.strip() for cell in total] == [f"{one.total / 1e6:.2f} MB" for one in ledgers]
