"""Chapter 03: runs on a model of another family as well, and says what is so.

That it runs on pebble and prints what is stored in it is nbval's part (`make test`).
"""

import chapters
import pytest
import torch
from chapters import sources, text

import vlmkit as vk


@pytest.fixture
def notebook():
    return chapters.read("03_loading.ipynb")


def cell(notebook, start):
    """The code cell that begins with `start`."""
    (found,) = (source for source in sources(notebook, "code") if source.startswith(start))
    return found


def by_hand(notebook):
    """What the reader has after NF4 from scratch."""
    scope = {"torch": torch, "vk": vk, "pd": __import__("pandas")}
    exec(cell(notebook, "offset = "), scope)
    exec(cell(notebook, "pebble, _ = "), scope)
    return scope


def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """With few questions, and a file whose loading is soon timed."""
    for old, new in (("n=300", "n=6"), ('"hidden_size": 1152', '"hidden_size": 384')):
        (found,) = (c for c in notebook.cells if c.cell_type == "code" and old in c.source)
        found.source = found.source.replace(old, new)
    assert "model.connector" in chapters.run(notebook, other_family, monkeypatch)


def test_keeps_to_the_measure_of_a_chapter(notebook):
    chapters.check_measure(notebook, middle=8)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_what_is_said_of_nf4_is_so(notebook):
    said, scope = " ".join(text(notebook).split()), by_hand(notebook)
    exact = 1 - (1 / 32 + 1 / 30) / 2
    assert round(exact, 7) == 0.9677083
    steps = (torch.linspace(exact, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8))
    up, down = (torch.special.ndtri(step) for step in steps)
    levels = torch.cat([up, -down, torch.zeros(1)]).sort().values
    levels = (levels / levels.max()).float()
    assert "twelve of the sixteen differ in the seventh digit" in said
    assert (levels != scope["levels"]).sum() == 12
    assert 0.5e-7 < (levels - scope["levels"]).abs().max() < 5e-7
    assert "in the middle are used five times as often as the ends" in said
    used = scope["used"]
    assert used.max() / used.iloc[[0, -1]].mean() == pytest.approx(5, abs=0.5)


def test_double_quantization_is_bitsandbytes_on_other_numbers_too(notebook):
    scope = by_hand(notebook)
    scope["absmax"] = torch.rand(2**14, generator=torch.manual_seed(1)) ** 4
    exec(cell(notebook, "values = ").rpartition("\n")[0], scope)  # all but the last comparison
