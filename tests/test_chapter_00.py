"""Chapter 00. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import csv
import math
import random
import re
import time

import chapters
import pytest
import torch
from chapters import FOLDER, cell, text

import vlmkit as vk
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.course import pictures
from vlmkit.evaluation import mcnemar, wilson
from vlmkit.models.cobble import instructions
from vlmkit.tasks.real import THINGS

needs_cobble = pytest.mark.skipif(
    not BUNDLED["cobble"].is_current, reason="run vlmkit fetch cobble"
)


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "Idefics3ForConditionalGeneration" in shown and "LlavaFor" not in shown


def test_its_map_of_the_course_is_the_readmes(notebook):
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\[\d\d .+\]\()notebooks/(.+\.ipynb\)) \|", readme, re.M)
    mapped = re.findall(r"^\| (\[\d\d .+\]\()(.+\.ipynb\)) \|", text(notebook), re.M)
    assert len(mapped) == 11 and set(mapped) <= set(rows)


def test_claims_about_bytes():
    whole, planned = (vk.memory.predict("pebble", plan) for plan in ("bf16", "recommended"))
    share = whole.by_component["language_model"] / whole.total
    assert share == pytest.approx(0.75, abs=0.03)  # three quarters
    assert planned.total / whole.total == pytest.approx(0.5, abs=0.02)  # half
    llava = vk.anatomy("llava-hf/llava-1.5-7b-hf")
    assert 1700 < llava.total / vk.anatomy("pebble").total < 2000  # nearly two thousand


def test_numbers_of_the_text(states):
    llava = vk.anatomy("llava-hf/llava-1.5-7b-hf")
    share = llava["language_model"].parameters / llava.total
    states(f"{100 * share:.0f}", f"{vk.memory.predict('pebble', 'recommended').total / 1e6:.2f}")


def test_bf16_keeps_between_two_and_three_digits():
    assert 2 < math.log10(2 / torch.finfo(torch.bfloat16).eps) < 3


def test_guessing_yes_or_no_is_right_half_of_the_time(states):
    rng = random.Random(0)
    asked = [
        instructions.about_photograph(n % 10, rng, instructions.YES_NO)[1] for n in range(2000)
    ]
    assert sum(answer.startswith("Yes") for answer in asked) == pytest.approx(1000, abs=60)
    states(50)


def test_the_message_counts_tensors(notebook):
    """The audit's message about a wrong plan, and the text below it."""
    pebble = vk.anatomy("pebble")
    tensors = [pebble[c].tensors for c, count in pebble.by_component.items() if count]
    message = cell(notebook, "try:\n    vk.audit").outputs[0].text
    ((found, of_all),) = re.findall(r"(\d+) of (\d+)", message)
    assert sum(tensors) == int(of_all)
    chapters.states(section(notebook, "PyTorch calls each tensor"), *tensors, found, of_all)


def test_the_plan_that_is_spelled_out_is_the_recommended_one(notebook):
    line = cell(notebook, "plan = vk.Plan(").source.splitlines()[0]
    assert eval(line.removeprefix("plan = "), {"vk": vk}) == vk.Plan.recommended()


# --- statistics -----------------------------------------------------------------------------------


def test_claims_about_chance(states):
    assert mcnemar(5, 0) > 0.05 > mcnemar(6, 0)
    assert mcnemar(5, 0) == 1 / 16
    states(0.05, f"{1 / mcnemar(5, 0):.0f}")
    lost, measurements = 3 / 1000, 1 / 6
    assert (1 - lost) ** 600 == pytest.approx(measurements, abs=0.005)
    for n in (30, 150, 600, 6000):  # "0 of n" is "at most about 4 of n"
        assert n * wilson(0, n)[1] == pytest.approx(4, abs=0.7)
    states(f"{600 * wilson(0, 600)[1]:.1f}")
    assert mcnemar(3, 1) == 10 / 16
    states(10, 16)


def test_bf16_has_nearly_600_right_answers(notebook):
    """So a loss in 600 questions, divided by 6, is about a loss in 100 right answers."""
    rows = chapters.shown(cell(notebook, 'table["p"]'))
    assert 0.95 * 600 < 6 * float(rows["bf16"][1].rstrip("%")) < 600


def test_pebble_loses_nothing_that_the_questions_can_show(notebook):
    """Neither a component nor all of them: no p of the stored table is below 0.05."""
    rows = chapters.shown(cell(notebook, 'table["p"]'))
    changed = {label: (int(row[2]), int(row[3])) for label, row in rows.items() if label}
    assert len(changed) == 5
    for label, (lost, won) in changed.items():
        assert mcnemar(lost, won) > 0.05, label
        assert rows[label][4] == f"{mcnemar(lost, won):.3f}"


# --- the photograph -------------------------------------------------------------------------------


def section(notebook, of):
    """The text of the section that mentions something."""
    (found,) = (s for s in re.split(r"^## ", text(notebook), flags=re.M) if of in s)
    return found


def recorded(name, **wanted):
    """Shares in % of the rows of a recorded table that have the values `wanted`."""
    file = FOLDER.parent / "benchmarks" / "results" / name
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if wanted.items() <= row.items()]
    return [100 * int(row["right"]) / int(row["n"]) for row in rows]


def test_numbers_about_cobble_are_the_recorded_ones(notebook):
    about = section(notebook, "MODEL_CARD.md")
    (share,) = recorded("cobble.csv", state="cobble", task="photographs: yes/no")
    chapters.states(about, f"{share:.0f}", 2000)
    (share,) = recorded("cobble.csv", state="cobble", task="photographs: name", n="10000")
    chapters.states(about, f"{share:.0f}", 10000)
    assert all(thing in about for thing in THINGS)


def test_what_cobble_loses_is_what_was_recorded(notebook):
    about = section(notebook, "SmolLM2-135M-Instruct")
    plain = {"trained_vision": "bf16", "hidden": "576", "asked_vision": "bf16", "n": "2000"}
    plain |= {"asked_projector": "bf16", "question": "name"}
    ends = {
        (trained, asked): recorded(
            "recipe.csv", trained_language=trained, asked_language=asked, **plain
        )
        for trained in ("bf16", "nf4")
        for asked in ("bf16", "nf4")
    }
    assert {len(shares) for shares in ends.values()} == {3}
    for own in (ends["bf16", "bf16"], ends["nf4", "nf4"]):
        chapters.states(about, f"{sum(own) / 3:.0f}")
    lost = ends["bf16", "nf4"]
    chapters.states(about, f"{min(lost):.0f}", f"{max(lost):.0f}", 2000)


def first_cells(notebook):
    """The cells up to the first picture."""
    code = chapters.sources(notebook, "code")
    (last,) = (n for n, source in enumerate(code) if "plt.imread(picture)" in source)
    return code[: last + 1]


def test_without_cobble_the_first_answer_is_about_a_drawing(
    notebook, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path))
    names = {}
    for source in [*first_cells(notebook), cell(notebook, "more = [").source]:
        exec(source, names)
    assert names["answer"] == pictures.FIRST.answer
    assert re.fullmatch(r"[^\n]*vlmkit fetch cobble\n", capsys.readouterr().out)


def test_the_stored_answers_have_a_right_one_and_wrong_ones(notebook):
    (shown,) = cell(notebook, "my_picture = ").outputs
    assert "cat" in shown["data"]["text/plain"]
    (shown,) = cell(notebook, "more = [").outputs
    dog, food, cup = (line.split("?")[1] for line in shown["text"].splitlines())
    assert "dog" in dog and "cat" in food and [thing for thing in THINGS if thing in cup]


@needs_cobble
def test_cobble_says_what_the_chapter_shows():
    model, processor = vk.load("cobble")
    cat, cup = map(pictures.photograph, (pictures.CAT, pictures.CUP))
    assert "cat" in vk.ask(model, processor, cat, pictures.ABOUT_PHOTOGRAPHS)
    assert "dog" in vk.ask(model, processor, cat, "Is this a dog?")
    made_up = vk.ask(model, processor, cup, pictures.ABOUT_PHOTOGRAPHS)
    assert [thing for thing in THINGS if thing in made_up.rstrip(".").split()]


@needs_cobble
@pytest.mark.slow
def test_the_first_answer_comes_within_a_minute(notebook):
    """From the start of a kernel on."""
    from nbclient import NotebookClient

    wanted = set(first_cells(notebook))
    notebook.cells = [one for one in notebook.cells if one.source in wanted]
    start = time.monotonic()
    NotebookClient(notebook, kernel_name="python3").execute()
    assert time.monotonic() - start < 60
