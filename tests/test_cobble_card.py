"""cobble's model card gives the numbers that were recorded, and the settings of the training."""

import csv
import itertools
import re
from pathlib import Path
from statistics import mean

import pytest
from chapters import states
from safetensors.torch import load_file

import vlmkit as vk
from vlmkit.models.cobble import fetching, recipe, train

ROOT = Path(__file__).resolve().parent.parent
COBBLE = ROOT / "vlmkit" / "models" / "cobble"
CARD = (COBBLE / "MODEL_CARD.md").read_text(encoding="utf-8")
KINDS = ("color", "shape", "count", "count_color")


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


def test_the_aims_that_were_missed_are_named_with_the_recorded_shares():
    share = {
        (row["state"], row["task"]): 100 * int(row["right"]) / int(row["n"])
        for row in recorded("cobble.csv")
    }
    aims = {
        "photographs: name": (80, recipe.STATES),
        "handwritten digits": (95, recipe.STATES),
        "photographs: yes/no": (85, recipe.STATES),
        "easy-VQA": (97, ["cobble-chat"]),
        **{f"drawings: {kind}": (90, ["cobble-chat"]) for kind in KINDS},
    }
    missed = [
        (state, value)
        for (state, task), value in share.items()
        if task in aims and state in aims[task][1] and value < aims[task][0]
    ]
    for task in ("photographs: name", "photographs: yes/no"):
        used = f"{task}, used phrasings" if task.endswith("name") else task
        below = {s: share[s, used] - share[s, f"{task}, unseen phrasings"] for s, _ in share}
        missed += [(state, value) for state, value in below.items() if value > 5]
    table = CARD.partition("aims that `cobble-chat` missed")[2].partition("\n\nIn")[0]
    assert {state for state, _ in missed} == {"cobble-chat"}
    assert len(missed) == table.count("\n|") - 2
    states(table, *(f"{value:.1f}" for _, value in missed))
    assert share["cobble-bf16", "photographs: name"] - share["cobble", "photographs: name"] < 2


def test_the_two_by_two_of_formats_is_recorded_with_three_seeds():
    table = rows("Six names, one language model")
    for trained, asked in itertools.product(("bf16", "nf4"), repeat=2):
        cell = table["NF4" if trained == "nf4" else "bf16"][asked == "nf4"]
        rights = named(trained_language=trained, asked_language=asked, n="2000")
        assert [float(text) for text in cell.split(",")] == pytest.approx(rights, abs=0.0501)


def named(**wanted):
    """Photographs named right, in %, of the rows of the recipe's record that have these values."""
    wanted = {
        "trained_vision": "bf16",
        "trained_language": "bf16",
        "hidden": "576",
        "asked_vision": "bf16",
        "asked_language": "bf16",
        "asked_projector": "bf16",
        "question": "name",
    } | wanted
    found = [row for row in recorded("recipe.csv") if wanted.items() <= row.items()]
    assert [row["seed"] for row in found] == ["0", "1", "2"]
    return [100 * int(row["right"]) / int(row["n"]) for row in found]


def test_its_findings_are_those_of_the_recipes_record():
    findings = CARD.partition("Findings on the way:")[2].partition("Not measured")[0]
    rounded = named(asked_vision="int4")
    assert all(abs(a - b) < 1 for a, b in zip(named(), rounded, strict=True))
    lost = [a - b for a, b in zip(named(), named(asked_language="nf4"), strict=True)]
    states(findings, f"{min(lost):.0f}", f"{max(lost):.0f}")
    for width in ("64", "576", "2304"):
        assert round(mean(named(hidden=width))) == 88
        states(findings, f"{mean(named(hidden=width, asked_language='nf4')):.1f}")
    states(findings, f"{mean(named(asked_vision='int2')):.1f}")
    states(findings, f"{mean(named(trained_vision='int2', asked_vision='int2')):.1f}")
    yes_no = [
        named(question="yes/no"),
        named(question="yes/no", asked_language="nf4"),
        named(question="yes/no", trained_language="nf4", asked_language="nf4"),
    ]
    states(findings, *(f"{mean(shares):.1f}" for shares in yes_no))


def test_the_tables_of_the_benchmarks_readme_are_the_recorded_ones():
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")

    def table(head):
        lines = readme.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
        cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        return {first: more for first, *more in cells}

    def shown(**wanted):
        shares = named(**wanted)
        return f"{round(mean(shares), 9):.1f} [{min(shares):.1f}, {max(shares):.1f}]"

    card = rows("What it can do")
    abilities = table("| task | n | cobble-bf16 |")
    assert abilities == {task: card[task] for task in abilities} and len(abilities) == 13
    for trained, cells in (grid := table("| trained with \\ asked in |")).items():
        asked = [shown(trained_language=trained, asked_language=one) for one in grid]
        assert cells == asked and len(cells) == 6
    pairs = [("bf16", "bf16"), ("bf16", "nf4"), ("nf4", "bf16"), ("nf4", "nf4")]
    pairs = [{"trained_language": one, "asked_language": other} for one, other in pairs]
    for question, (_, *cells) in table("| question | n |").items():
        name = {"name, unseen phrasings": "name unseen", "handwritten digit": "digit"}
        name = name.get(question, question.replace(", unseen phrasings", " unseen"))
        assert cells == [shown(question=name, **pairs[i]) for i in (0, 1, 3)]
    for width, (_, *cells) in table("| width | parameters |").items():
        assert cells == [shown(hidden=width.replace(",", ""), **pair) for pair in pairs]
    for trained, cells in (vision := table("| trained with the vision encoder in |")).items():
        assert cells == [shown(trained_vision=trained, asked_vision=one) for one in vision]
    with (ROOT / "notebooks" / "data" / "06_text.csv").open(encoding="utf-8") as stream:
        text = {row["format"]: row for row in csv.DictReader(stream)}
    for name, row in zip(text, table("| language model | perplexity |").values(), strict=True):
        same = f"{100 * float(text[name]['same_next_token']):.1f}"
        kl = f"{float(text[name]['kl']):.3f}"
        assert row[:3] == [text[name]["perplexity"], kl, same]
        assert row[3].partition(" ")[0] == text[name]["right"]
    healed = CARD.partition("heal the language model's own text")[2].partition("\n\n")[0]
    for name in ("bf16", "nf4", "cobble-chat"):
        states(healed, f"{float(text[name]['perplexity']):.1f}", text[name]["right"])


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


def test_the_table_of_measured_numbers_has_the_same_numbers():
    measured = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    table = measured.partition("| questions | cobble-bf16 |")[2].partition("\n\n")[0]
    card, lines = rows("What it can do"), table.splitlines()[2:]
    assert len(lines) >= 5
    for line in lines:
        task, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert cells == card[task][1:]
    sizes = measured.partition("| component | pebble, bf16 |")[2].partition("\n\n")[0]
    total = sizes.splitlines()[-1].strip("|").split("|")[1:]
    ledgers = [vk.memory.predict(m, p) for m in ("pebble", "cobble") for p in ("bf16", None)]
    assert [cell.strip() for cell in total] == [f"{one.total / 1e6:.2f} MB" for one in ledgers]
