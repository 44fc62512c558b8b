"""Chapter 00. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import re

import chapters
import pytest
from chapters import FOLDER, cell, text

import vlmkit as vk


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "Idefics3ForConditionalGeneration" in shown and "LlavaFor" not in shown


def test_its_map_of_the_course_is_the_readmes(notebook):
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\[\d\d .+\]\()notebooks/(.+\.ipynb\)) \|", readme, re.M)
    mapped = re.findall(r"^\| (\[\d\d .+\]\()(.+\.ipynb\)) \|", text(notebook), re.M)
    assert len(mapped) == 10 and set(mapped) <= set(rows)


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
