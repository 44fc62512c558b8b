"""scripts/assignments.py: the exercises for nbgrader, and nbgrader itself where it is installed."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import assignments  # noqa: E402
import solutions  # noqa: E402

from vlmkit.course.exercises import attempted  # noqa: E402

CHAPTERS = sorted(solutions.CHAPTERS.glob("[0-9][0-9]_*.ipynb"))
NBGRADER = os.environ.get("NBGRADER") or shutil.which("nbgrader")


def stubs(path):
    return solutions.stubs(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_an_assignment_has_an_answer_and_a_locked_check_for_each_exercise(path):
    notebook = assignments.assignment(path)
    nbformat.validate(notebook)
    kinds = [cell.metadata["nbgrader"] for cell in notebook.cells]
    assert len({kind["grade_id"] for kind in kinds}) == len(kinds)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "sys.stderr = sys.stdout" in first.source  # a warning costs no points
    answers = [cell for cell in notebook.cells if cell.metadata["nbgrader"]["solution"]]
    checks = [cell for cell in notebook.cells if cell.metadata["nbgrader"]["grade"]]
    assert len(answers) == len(checks) == len(stubs(path))
    for answer, check in zip(answers, checks, strict=True):
        first = answer.source.partition("### BEGIN SOLUTION\n")[0]
        scope = {}
        exec(first, scope)  # `name = None`, or a function without a body
        assert not any(map(attempted, (v for name, v in scope.items() if name[:2] != "__")))
        assert "### BEGIN SOLUTION\n" in answer.source and solutions.CHECK not in answer.source
        assert check.source.count(f"assert {solutions.CHECK}") == 1
        assert check.metadata["nbgrader"]["locked"] and check.metadata["nbgrader"]["points"] > 0


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_carry_the_marks(path):
    """Run `python scripts/assignments.py --mark` if this fails."""
    chapter = nbformat.read(path, as_version=4)
    found = {cell.id: cell.metadata.get("nbgrader") for cell in chapter.cells}
    marks = assignments.marks(chapter)
    assert {name: mark for name, mark in found.items() if mark} == marks
    assert len({mark["grade_id"] for mark in marks.values()}) == len(marks)


def test_marking_changes_nothing_else_and_nothing_the_second_time(tmp_path):
    path = shutil.copy(CHAPTERS[0], tmp_path)
    chapter = nbformat.read(path, as_version=4)
    for cell in chapter.cells:
        cell.metadata.pop("nbgrader", None)
    chapter.cells[0].metadata["nbgrader"] = {"grade_id": "an exercise that is gone"}
    nbformat.write(chapter, path)
    assert assignments.mark(path) is True
    marked = Path(path).read_bytes()
    assert marked == CHAPTERS[0].read_bytes()
    assert assignments.mark(path) is False and Path(path).read_bytes() == marked


def test_points_are_for_minutes():
    texts = ["**1. A.** *(5 minutes)*", "**2. B.** *(20 minutes)* C", "**3.** *(2 minutes)*"]
    assert [assignments.points(text) for text in texts] == [1, 4, 1]


# --- nbgrader itself ------------------------------------------------------------------------------


def submit(course, student, path, answers):
    """Hand in the released notebook with the first `answers` of the solutions in it."""
    folder = course / "submitted" / student / path.stem
    shutil.copytree(course / "release" / path.stem, folder)
    notebook = nbformat.read(folder / path.name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.metadata["nbgrader"]["solution"]]
    for cell, stub in list(zip(cells, stubs(path), strict=True))[:answers]:
        cell.source = stub.metadata["solution"]["code"]
    nbformat.write(notebook, folder / path.name)


@pytest.mark.slow
@pytest.mark.skipif(not NBGRADER, reason="nbgrader is not installed (NBGRADER names its command)")
@pytest.mark.parametrize("path", [CHAPTERS[0], CHAPTERS[4]], ids=lambda path: path.stem)
def test_nbgrader_grades_a_right_a_half_right_and_an_empty_submission(path, tmp_path):
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_PATH": str(tmp_path / "jupyter")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # nbgrader calls alembic, which lies beside it.
    environment["PATH"] = f"{Path(NBGRADER).parent}{os.pathsep}{environment['PATH']}"
    course = tmp_path / "course"
    assignments.write(path, course)

    def nbgrader(*arguments):
        done = subprocess.run(
            [NBGRADER, *arguments], cwd=course, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]

    nbgrader("generate_assignment", path.stem)
    released = (course / "release" / path.stem / path.name).read_text(encoding="utf-8")
    for stub in stubs(path):
        assert json.dumps(stub.metadata["solution"]["code"])[1:-1] not in released
    for student, answers in {"right": None, "half": 1, "empty": 0}.items():
        submit(course, student, path, answers)
    nbgrader("autograde", path.stem)
    nbgrader("generate_feedback", path.stem)

    nbgrader("export")
    with open(course / "grades.csv", encoding="utf-8") as file:
        scores = {row["student_id"]: row for row in csv.DictReader(file)}
    worth = [mark["points"] for mark in assignments.marks(nbformat.read(path, 4)).values()]
    found = {name: float(row["score"]) for name, row in scores.items()}
    assert found == {"right": sum(worth), "half": worth[0], "empty": 0}
    assert {float(row["max_score"]) for row in scores.values()} == {sum(worth)}
    assert len(list(course.glob(f"feedback/*/{path.stem}/{path.stem}.html"))) == 3
