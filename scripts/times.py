"""How long *Run All* takes in each chapter: recorded, shown, and compared with the chapter's card.

    make times                       # all chapters, one after another; some fifteen minutes
    python scripts/times.py 00 04    # these

It writes `docs/data/times.csv`, from which the site makes its page of execution times.
"""

import argparse
import csv
import datetime
import importlib.metadata
import platform
import re
import time
from pathlib import Path

from vlmkit.environment import machine

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
FILE = ROOT / "docs" / "data" / "times.csv"
COLUMNS = ("chapter", "seconds", "date", "processor", "cores", "python", "torch", "transformers")

NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
CARD = re.compile(
    r"\*Run All\* takes\s+(?P<how>less than|about)?\s*(?:(?:\w+) to\s+)?(?P<most>\w+)\s+minutes?\b"
)
HALF = 30
"""Seconds by which a time may exceed its card: "about a minute" is up to a minute and a half, "two
to three minutes" up to three and a half. "Less than" allows no more."""


def most_by_card(text):
    """The seconds that the sentence "*Run All* takes ..." of a card allows."""
    found = CARD.search(text)
    if not found or found["most"] not in NUMBERS:
        raise ValueError(f"there is no time that can be read in: {text[:200]}")
    return 60 * NUMBERS[found["most"]] + (0 if found["how"] == "less than" else HALF)


def said_by_card(text):
    """The time in the words of a card, such as "about a minute"."""
    return " ".join(CARD.search(text)[0].split()).removeprefix("*Run All* takes ")


def card(chapter):
    """The text of a chapter's first cell."""
    import nbformat

    return nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4).cells[0].source


def chapters():
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def recorded():
    """The rows of the file, in the order of the chapters."""
    if not FILE.exists():
        return []
    with FILE.open(encoding="utf-8", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["chapter"])


def run(chapter):
    """Seconds to run a chapter in a new kernel, from its start to its last cell."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources)
    begun = time.perf_counter()
    client.execute()
    return time.perf_counter() - begun


def processor():
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measured(chapter):
    """A row of the file."""
    seconds = run(chapter)
    version = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "chapter": chapter,
        "seconds": f"{seconds:.0f}",
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": machine.cores(),
        "python": platform.python_version(),
        **{name: number.partition("+")[0] for name, number in version.items()},
    }


def write(rows):
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: row["chapter"]))


def minutes(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def table(rows):
    """The page's table, in Markdown."""
    lines = ["| chapter | minutes | its card says | recorded |", "|---|---:|---|---|"]
    for row in rows:
        text = card(row["chapter"])
        said, title = said_by_card(text), re.search(r"\*Chapter (\d\d)\. (.+?)\.\*", text)
        link = f"[{title[1]} {title[2]}](../notebooks/{row['chapter']}.ipynb)"
        lines.append(f"| {link} | {minutes(row['seconds'])} | {said} | {row['date']} |")
    total = minutes(sum(int(row["seconds"]) for row in rows))
    conditions = [
        f"{row['cores']} cores of {row['processor'].removesuffix(' Processor')}; "
        f"Python {row['python']}, PyTorch {row['torch']}, transformers {row['transformers']}"
        for row in rows
    ]
    lines += [f"| all, one after another | {total} | | |", "", "Measured on:", ""]
    return "\n".join([*lines, *(f"- {each}" for each in dict.fromkeys(conditions))])


def main():
    parser = argparse.ArgumentParser(description="Record how long Run All takes in each chapter.")
    parser.add_argument("number", nargs="*", help="of the chapters, such as 04; all by default")
    numbers = parser.parse_args().number
    rows = {row["chapter"]: row for row in recorded()}
    rows = {name: row for name, row in rows.items() if name in chapters()}
    for chapter in chapters():
        if not numbers or chapter[:2] in numbers:
            rows[chapter] = measured(chapter)
            write(rows.values())
            print(f"{chapter:24} {minutes(rows[chapter]['seconds'])}", flush=True)


if __name__ == "__main__":
    main()
