"""Print how long each chapter is: cells, words, lines of code, figures. A part of `make lint`.

No number has a limit: length follows clarity, and nothing fails. Below the table are the cells of
more than `LONG` lines, because such a cell often holds more than one idea.
"""

import re
from pathlib import Path
from statistics import median

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
LONG = 15


def lengths(notebook):
    """{name of a measure: its value} for one chapter."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"^\|.*$|\(https?:[^)]*\)", "", text, flags=re.M)  # no tables, no addresses
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = [len(cell.source.splitlines()) for cell in code]
    outputs = [output for cell in code for output in cell.outputs]
    return {
        "cells": len(notebook.cells),
        "Markdown, %": round(100 * (1 - len(code) / len(notebook.cells))),
        "words": len(re.findall(r"[^\W_][\w'.-]*", prose)),
        "lines of code": sum(lines),
        "longest cell": max(lines),
        "median cell": median(lines),
        "figures": sum("image/png" in output.get("data", ()) for output in outputs),
    }


def long_cells(notebook):
    """[(number of lines, first line)] of the code cells that have more than `LONG` lines."""
    code = [cell.source.splitlines() for cell in notebook.cells if cell.cell_type == "code"]
    return [(len(lines), lines[0]) for lines in code if len(lines) > LONG]


def report():
    """The table of all chapters and the list of long cells, as text."""
    rows, long = {}, []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        rows[path.stem] = lengths(notebook)
        long += [f"{path.stem}: {count} lines, {first}" for count, first in long_cells(notebook)]
    names = next(iter(rows.values()))
    lines = [f"{'':20}" + "".join(f"{name:>15}" for name in names)]
    lines += [f"{n:20}" + "".join(f"{value:>15g}" for value in r.values()) for n, r in rows.items()]
    return "\n".join([*lines, f"Cells of more than {LONG} lines: {len(long)}", *long])


if __name__ == "__main__":
    print(report())
