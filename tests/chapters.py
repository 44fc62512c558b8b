"""What every chapter is held to, for the tests of each."""

import re
from pathlib import Path
from statistics import median

import nbformat

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def text(notebook):
    return "\n".join(sources(notebook, "markdown"))


def shown(cell):
    """The first table that a cell shows: {first cell of a row: the others}, as text."""
    (data,) = (o["data"] for o in cell.outputs if "text/html" in o.get("data", ()))
    table = data["text/html"].partition("<table")[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")]
    return {row[0]: row[1:] for row in rows if row}


def run(notebook, model, monkeypatch):
    """Run a chapter with `VLMKIT_MODEL` set, in place; raises at the first cell that does."""
    from nbclient import NotebookClient

    monkeypatch.setenv("VLMKIT_MODEL", str(model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for cell in notebook.cells:
        cell.outputs = [] if cell.cell_type == "code" else None
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return str([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])


def check_measure(notebook, middle, lines=150):
    """Lengths of cells and of the whole; middle: the most lines that the median cell may have, and
    lines: that all of them may."""
    lengths = [len(source.splitlines()) for source in sources(notebook, "code")]
    assert max(lengths) <= 15 and median(lengths) <= middle and sum(lengths) <= lines
    assert 34 <= len(notebook.cells) <= 44
    assert len(sources(notebook, "markdown")) > len(lengths)
    prose = re.sub(r"^\|.*$|\(https?:[^)]*\)", "", text(notebook), flags=re.M)  # not the tables
    words = re.findall(r"[^\W_][\w'.-]*", prose)
    assert 1000 <= len(words) <= 1500


def check_captions(notebook):
    """Every figure is alone in its cell, and what follows it says in words what it shows."""
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
