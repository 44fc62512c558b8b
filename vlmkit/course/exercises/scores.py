"""The file of scores: what each student's answers were worth, for a teacher.

    VLMKIT_STUDENT="Ada Lovelace" VLMKIT_SCORES=scores.csv jupyter lab

A check then writes its verdict into the file, besides printing it. A student can write such a file
too: it is a record for the student and a help for the teacher, and no proof.
"""

import csv
import io
import json
import os
from pathlib import Path

from vlmkit.errors import ExerciseError
from vlmkit.folders import write_whole

COLUMNS = ("student", "exercise", "right", "points", "text")


def record(path, verdict):
    """Write a CheckedAnswer into the file `path`, .json or .csv: a row for a student and exercise.

    The row of an earlier answer to the same exercise is replaced. Not attempted counts as an answer
    only if there is no row yet: running a chapter again loses no points. The file is replaced as a
    whole, so it is never half written. Use one file for each notebook that runs at the same time.
    Raises ExerciseError if the file is of another kind, or cannot be read or written.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".json", ".csv"):
        raise ExerciseError(f"A file of scores is called .json or .csv, and not {path.name!r}.")
    student = os.environ.get("VLMKIT_STUDENT", "").strip()
    try:
        rows = {(row["student"], row["exercise"]): row for row in read(path)}
        if verdict.right is None and (student, verdict.name) in rows:
            return
        new = (student, verdict.name, bool(verdict), verdict.points, verdict.text)
        rows[student, verdict.name] = dict(zip(COLUMNS, new, strict=True))
        text = _written(path, list(rows.values()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda part: Path(part).write_text(text, encoding="utf-8", newline=""))
    except OSError as error:
        raise ExerciseError(f"The scores cannot be written: {error}.") from None


def read(path):
    """The rows of a file of scores, each a dict with COLUMNS; none if there is no file. Raises
    ExerciseError for a file that holds something else, and leaves it as it is."""
    path = Path(path).expanduser()
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return [{name: row[name] for name in COLUMNS} for row in json.loads(text)]
        rows = [{name: row[name] for name in COLUMNS} for row in csv.DictReader(io.StringIO(text))]
        return [
            row | {"right": row["right"] == "True", "points": int(row["points"])} for row in rows
        ]
    except (ValueError, KeyError, TypeError):
        raise ExerciseError(
            f"{path} is no file of scores, and was left as it is. Move it away, or name another."
        ) from None


def _written(path, rows):
    if path.suffix == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
