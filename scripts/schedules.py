"""Write the schedules of docs/teaching.md from the chapters' cards: `python scripts/schedules.py`.

A schedule's minutes are the minutes of reading that the card of a chapter names, and the minutes
that its exercises name. Its points are those of the assignments for nbgrader. Run this after a
change to a card; `tests/test_teaching.py` says when it is needed.
"""

import re
from pathlib import Path

import assignments
import nbformat
import solutions
import times

PAGE = Path(__file__).resolve().parent.parent / "docs" / "teaching.md"
WORDS = {"half an hour": 30, "an hour": 60, "one hour": 60, "two hours": 120, "three hours": 180}
WORDS |= {"three quarters of an hour": 45, "an hour and a half": 90, "one and a half hours": 90}

TWO_HOURS = [("talk", 5, "one idea: components and a plan; predictions are written down")]
TWO_HOURS += [("00", "read"), ("break", 10), ("04", "read", 40)]
TWO_HOURS += [("talk", 5, "predictions against results, and a question of the quiz")]
DAY = [("00", "read"), ("00", "exercises"), ("break", 15), ("01", "read"), ("03", "read")]
DAY += [("lunch", 60), ("04", "read"), ("05", "read"), ("break", 15), ("08", "read")]
DAY += [("talk", 20, "predictions of the day against results; what holds for your model?")]
WEEKS = {
    "What it is": ("00", "01"),
    "How it sees and is loaded": ("02", "03"),
    "What it costs, and what breaks": ("04", "05"),
    "What repairs it, and what fits": ("06", "07"),
    "What learns, and whether it looks": ("08", "09"),
    "How it is made, and large models": ("10", "11"),
}
SESSION, TALK = 90, 15
"""Minutes of one session of the course of six weeks, and how many of them are for predictions, the
quiz and questions."""


def minutes(text):
    """The minutes in words such as "half an hour" or "45 minutes"."""
    text = " ".join(text.split())
    number = re.match(r"(?:about )?(\d+) minutes", text)
    words = text.removeprefix("about ")
    if not number and words not in WORDS:
        raise ValueError(f"there is no time that can be read in {text!r}")
    return int(number[1]) if number else WORDS[words]


def chapters():
    """{"00": {name, title, read, exercises, points, run}} of all chapters. Times are minutes, but
    `run`, which is the card's words for the time of Run All."""
    found = {}
    for name in times.chapters():
        notebook = nbformat.read(times.NOTEBOOKS / f"{name}.ipynb", as_version=4)
        card = notebook.cells[0].source
        time = re.search(r"\*\*Time\.\*\* .*", " ".join(card.split()))[0]
        reading = re.search(r"\breading( and exercises)?(?:,| takes?)\s+([^.;,]+)", time, re.I)
        if not reading:
            raise ValueError(f"the card of {name} does not say how long reading takes: {time!r}")
        texts = [solutions.asked(notebook, stub) for stub in solutions.stubs(notebook)]
        exercises = sum(int(re.search(r"\*\((\d+) minutes?", text)[1]) for text in texts)
        found[name[:2]] = {
            "name": name,
            "title": re.search(r"^\*Chapter \d+\. (.+?)\.\*", card, re.M)[1],
            "read": minutes(reading[2]) - (exercises if reading[1] else 0),
            "exercises": exercises,
            "points": sum(map(assignments.points, texts)),
            "run": times.said_by_card(card),
        }
    return found


def link(chapter):
    return f"[{chapter['name'][:2]} {chapter['title']}](../notebooks/{chapter['name']}.ipynb)"


def timetable(steps, known, start, end):
    """A table of `steps` by the clock. start, end: minutes since midnight. A step is (kind,
    minutes, text) or (chapter, "read" or "exercises", at most so many minutes). A step that is too
    long, or would pass the end, becomes shorter and says so."""
    lines = ["| from | minutes | what | Run All |", "|---|---:|---|---|"]
    clock = start
    for kind, what, *more in steps:
        most = end - clock
        if kind in known:
            chapter, most = known[kind], min(most, *more, most)
            wanted, run = chapter[what], chapter["run"] if what == "read" else ""
            said = link(chapter) if what == "read" else f"the exercises of chapter {kind}"
        else:
            wanted, run, said = what, "", more[0] if more else kind
        given = min(wanted, most)
        if given <= 0:
            raise ValueError(f"no time is left for {said}")
        if given < wanted:
            said += f" (the first {given} of {wanted} minutes; the rest at home)"
        lines.append(f"| {clock // 60}:{clock % 60:02} | {given} | {said} | {run} |")
        clock += given
    return "\n".join([*lines, f"| {clock // 60}:{clock % 60:02} | | end | |"])


def weeks(known):
    """The table of the course of six weeks, two chapters a week, with the sums below it."""
    lines = ["| week | session | reading | exercises | in class | at home | points |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    sums = [0] * 5
    for number, (title, pair) in enumerate(WEEKS.items(), 1):
        for week, chapter in zip((f"{number} {title}", ""), map(known.get, pair), strict=True):
            both = chapter["read"] + chapter["exercises"]
            in_class = min(SESSION - TALK, both)
            row = chapter["read"], chapter["exercises"], in_class, both - in_class
            row += (chapter["points"],)
            sums = [a + b for a, b in zip(sums, row, strict=True)]
            lines.append(f"| {week} | {link(chapter)} | {' | '.join(map(str, row))} |")
    return "\n".join([*lines, f"| all | | {' | '.join(map(str, sums))} |"])


def written(text):
    """The page `text` with its three tables made anew, between their comments."""
    known = chapters()
    tables = {
        "two hours": timetable(TWO_HOURS, known, 0, 120),
        "one day": timetable(DAY, known, 9 * 60, 17 * 60 + 30),
        "six weeks": weeks(known),
    }
    for name, table in tables.items():
        begin, end = f"<!-- schedule: {name} -->", "<!-- end of schedule -->"
        before, found, rest = text.partition(begin)
        if not found:
            raise ValueError(f"{PAGE.name} has no place for {name!r}")
        text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def main():
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
