"""Helpers for the tests of chapters: cells, shown tables, and the numbers that the text states.

A test never compares a sentence. It computes a claim from recorded data or from the chapter's own
outputs. `states` then checks that the text still gives the number that was computed.
"""

import re
from decimal import Decimal
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]


def read(name):
    return nbformat.read(FOLDER / name, as_version=4)


def sources(notebook, kind):
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def text(notebook):
    return "\n".join(sources(notebook, "markdown"))


def numbers(text):
    """The set of numbers in a text, without signs: `−1,234.50` is 1234.5, and `twelve` is 12."""
    digits = re.findall(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?!\w|[.,]\d)", text)
    found = {Decimal(number.replace(",", "")) for number in digits}
    return found | {Decimal(WORDS.index(w)) for w in re.findall(r"\w+", text.lower()) if w in WORDS}


def states(text, *values):
    """Fail if a text lacks one of `values`. Round each to the digits that the text gives it.

    values: whole numbers, or strings such as f"{x:.1f}". Signs are ignored, because a text says
    "loses 2 points" for -2.
    """
    known = numbers(text)
    wanted = [abs(Decimal(str(value))) for value in values]
    assert not [str(value) for value in wanted if value not in known], "not a number in the text"


def cell(notebook, start):
    """The one code cell whose source begins with `start`."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (found,) = (cell for cell in code if cell.source.startswith(start))
    return found


def replace(notebook, *changes):
    """Replace text in all code cells, for each pair (old, new); every `old` has to be there."""
    for old, new in changes:
        found = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        assert found, f"no cell has {old!r}"
        for one in found:
            one.source = one.source.replace(old, new)


def shown(cell):
    """The first table that a cell shows, as text: {first cell of a row: the other cells}."""
    (data,) = (o["data"] for o in cell.outputs if "text/html" in o.get("data", ()))
    table = data["text/html"].partition("<table")[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")]
    return {row[0]: row[1:] for row in rows if row}


def run(notebook, model, monkeypatch):
    """Run a chapter on the model in a folder, and return its outputs as one text."""
    from nbclient import NotebookClient

    monkeypatch.setenv("VLMKIT_MODEL", str(model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for cell in notebook.cells:
        cell.outputs = [] if cell.cell_type == "code" else None
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return str([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
