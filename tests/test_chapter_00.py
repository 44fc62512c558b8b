"""Chapter 00. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import csv
import re

import chapters
import pytest
from chapters import FOLDER, cell, text

import vlmkit as vk
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.course import pictures
from vlmkit.tasks.real import THINGS


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


def test_the_plan_that_is_spelled_out_is_the_recommended_one(notebook):
    line = cell(notebook, "plan = vk.Plan(").source.splitlines()[0]
    assert eval(line.removeprefix("plan = "), {"vk": vk}) == vk.Plan.recommended()


# --- the photograph -------------------------------------------------------------------------------


def about_photographs(notebook):
    """The text of the section on photographs."""
    section = text(notebook).partition("## A photograph\n")[2]
    return section.partition("\n## ")[0]


def recorded(name, **wanted):
    """Shares in % of the rows of a recorded table that have the values `wanted`."""
    file = FOLDER.parent / "benchmarks" / "results" / name
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if wanted.items() <= row.items()]
    return [100 * int(row["right"]) / int(row["n"]) for row in rows]


def test_numbers_about_cobble_are_the_recorded_ones(notebook):
    section = about_photographs(notebook)
    (share,) = recorded("cobble.csv", state="cobble", task="photographs: yes/no")
    chapters.states(section, f"{share:.0f}", 2000)
    (share,) = recorded("cobble.csv", state="cobble", task="photographs: name", n="10000")
    chapters.states(section, f"{share:.0f}", 10000)
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
        chapters.states(section, f"{sum(own) / 3:.0f}")
    lost = ends["bf16", "nf4"]
    chapters.states(section, f"{min(lost):.0f}", f"{max(lost):.0f}", 2000)
    assert all(thing in section for thing in THINGS)


def test_the_stored_answers_have_a_right_one_and_a_wrong_one(notebook):
    shown = cell(notebook, "more = [").outputs
    answers = [line.split("?")[1].strip() for out in shown for line in out["text"].splitlines()]
    assert "cat" in answers[0] and answers[1].startswith("Yes") and "cat" in answers[2]


@pytest.mark.skipif(not BUNDLED["cobble"].is_current, reason="run vlmkit fetch cobble")
def test_cobble_says_what_the_chapter_shows():
    model, processor = vk.load("cobble")
    cat, cup = map(pictures.photograph, (pictures.CAT, pictures.CUP))
    assert "cat" in vk.ask(model, processor, cat, pictures.ABOUT_PHOTOGRAPHS)
    assert "dog" in vk.ask(model, processor, cat, "Is this a dog?")
    made_up = vk.ask(model, processor, cup, pictures.ABOUT_PHOTOGRAPHS)
    assert [thing for thing in THINGS if thing in made_up.rstrip(".").split()]


def test_without_cobble_the_cells_say_one_sentence(notebook, monkeypatch, tmp_path, capsys):
    import matplotlib.pyplot as plt

    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path))
    names = {"vk": vk, "plt": plt, "plan": vk.Plan.recommended()}
    exec(cell(notebook, "from vlmkit.course import pictures").source, names)
    exec(cell(notebook, "more = [").source, names)
    assert re.fullmatch(r"[^\n]*vlmkit fetch cobble\n", capsys.readouterr().out)
