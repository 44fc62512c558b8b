"""Chapter 00: runs on a model of another family as well, and says what is so.

That it runs on pebble and prints what is stored in it is nbval's part (`make test`).
"""

import re

import chapters
import pytest
from chapters import FOLDER, sources, text

import vlmkit as vk

README = (FOLDER.parent / "README.md").read_text()


@pytest.fixture
def notebook():
    return chapters.read("00_start_here.ipynb")


def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "Idefics3ForConditionalGeneration" in shown and "LlavaFor" not in shown


def test_keeps_to_the_measure_of_a_chapter(notebook):
    chapters.check_measure(notebook, middle=6)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_map_of_the_course_is_the_readmes_and_its_links_lead_somewhere(notebook):
    rows = re.findall(r"^\| (\[\d\d .+\]\(notebooks/.+\.ipynb\)) \| (.+) \|$", README, re.M)[1:]
    assert [re.search(r"\d\d", title)[0] for title, _ in rows] == [f"{n:02d}" for n in range(1, 11)]
    for title, question in rows:
        title = title.replace("(notebooks/", "(")
        assert f"| {title} | {question} |" in text(notebook)
        assert all((FOLDER / name).exists() for name in re.findall(r"\((.+\.ipynb)\)", title))


def test_what_is_said_of_bytes_is_so(notebook):
    said = " ".join(text(notebook).split())
    whole, planned = (vk.memory.predict("pebble", plan) for plan in ("bf16", "recommended"))
    assert "three quarters of the bytes are the language model's" in said
    assert whole.by_component["language_model"] / whole.total == pytest.approx(0.75, abs=0.03)
    assert "the whole model is half as large" in said
    assert planned.total / whole.total == pytest.approx(0.5, abs=0.02)
    assert "nearly two thousand times smaller" in said
    assert 1700 < 7_063_427_072 / vk.anatomy("pebble").total < 2000  # LLaVA-1.5-7B's parameters


def test_the_plan_spelled_out_is_the_recommended_one(notebook):
    code = next(s for s in sources(notebook, "code") if s.startswith("plan = vk.Plan("))
    assert eval(code.splitlines()[0].removeprefix("plan = "), {"vk": vk}) == vk.Plan.recommended()
