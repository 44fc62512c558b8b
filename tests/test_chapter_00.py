"""Chapter 00: runs on a model of another family as well, and says what is so.

That it runs on pebble and prints what is stored in it is nbval's part (`make test`).
"""

import re
from pathlib import Path
from statistics import median

import nbformat
import pytest

import vlmkit as vk

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "notebooks" / "00_start_here.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def text(notebook):
    return "\n".join(sources(notebook, "markdown"))


def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("VLMKIT_MODEL", str(other_family))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for cell in notebook.cells:
        cell.outputs = [] if cell.cell_type == "code" else None
    NotebookClient(  # raises at the first cell that does
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(PATH.parent)}},
    ).execute()
    shown = str([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert "Idefics3ForConditionalGeneration" in shown and "LlavaFor" not in shown


def test_keeps_to_the_measure_of_a_chapter(notebook):
    lengths = [len(source.splitlines()) for source in sources(notebook, "code")]
    assert max(lengths) <= 15 and median(lengths) <= 6 and sum(lengths) <= 150
    assert 34 <= len(notebook.cells) <= 44
    assert len(sources(notebook, "markdown")) > len(lengths)
    prose = re.sub(r"^\|.*$|\(https?:[^)]*\)", "", text(notebook), flags=re.M)  # not the tables
    words = re.findall(r"[^\W_][\w'.-]*", prose)
    assert 1000 <= len(words) <= 1500


def test_every_figure_has_a_caption(notebook):
    figures = 0
    for cell, following in zip(notebook.cells, notebook.cells[1:], strict=False):
        shown = [
            output for output in cell.get("outputs", []) if "image/png" in output.get("data", ())
        ]
        figures += len(shown)
        if shown:
            assert len(shown) == 1
            assert following.source.startswith(f"*Figure {figures}. "), following.source
    assert 3 <= figures <= 5


def test_map_of_the_course_is_the_readmes_and_says_what_is_not_written(notebook):
    rows = re.findall(
        r"^\| (\d\d) ([^|]+) \| ([^|]+) \| planned \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert [number for number, *_ in rows] == [f"{n:02d}" for n in range(1, 11)]
    for number, title, question in rows:
        assert f"| {number} {title} | {question} |" in text(notebook)
    assert "not written yet" in text(notebook)


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
