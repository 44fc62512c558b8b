"""Print how long each chapter is: cells, words, lines of code, figures. A part of `make lint`.

A star marks what is outside the usual range. Nothing fails: a chapter that needs more words for a
plain sentence takes them, and a chapter with too many topics shows up here.
"""

import re
from pathlib import Path
from statistics import median

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
USUAL = {
    "cells": (34, 44),
    "Markdown, %": (50, 70),
    "words": (1000, 3000),
    "lines of code": (0, 150),
    "longest cell": (0, 15),
    "median cell": (0, 10),
    "figures": (3, 5),
}


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


def report():
    """The table of all chapters, as text."""
    lines = [f"{'':20}" + "".join(f"{name:>15}" for name in USUAL)]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        row = lengths(nbformat.read(path, as_version=4))
        marks = {n: "" if low <= row[n] <= high else "*" for n, (low, high) in USUAL.items()}
        lines.append(f"{path.stem:20}" + "".join(f"{f'{row[n]:g}{marks[n]}':>15}" for n in USUAL))
    ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in USUAL.items())
    return "\n".join([*lines, f"* outside of the usual range: {ranges}"])


if __name__ == "__main__":
    print(report())
