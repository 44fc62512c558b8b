"""scripts/assignments.py: the exercises for nbgrader, and nbgrader itself where it is installed."""

import ast
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

from vlmkit.course.exercises import attempted, seed  # noqa: E402

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

OTHERWISE = {
    "patches": """
def cut(picture, side):
    return torch.nn.functional.unfold(picture[None], side, stride=side)[0].T""",
    "attention": "attend = torch.nn.functional.scaled_dot_product_attention",
    "heads": """
def attend_in_heads(q, k, v, heads, mask):
    parts = [x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]
    return attend(*parts, mask).transpose(0, 1).flatten(1)""",
    "causal-mask": """
def causal(n):
    return torch.tensor([[0.0 if j <= i else -math.inf for j in range(n)] for i in range(n)])


import math""",
}
"""Right answers to exercises of chapter 01, written in another way than the solutions."""

WRONG = {"heads": "def attend_in_heads(q, k, v, heads, mask):\n    return attend(q, k, v, mask)"}


class Course:
    """A course of nbgrader with the assignment for one chapter."""

    def __init__(self, path, folder):
        self.path, self.folder = path, folder / "course"
        assignments.write(path, self.folder)
        self("generate_assignment", path.stem)

    def __call__(self, *arguments, **environment):
        # nbgrader calls alembic, which lies beside it.
        places = f"{Path(NBGRADER).parent}{os.pathsep}{os.environ['PATH']}"
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [NBGRADER, *arguments],
            cwd=self.folder,
            env=os.environ | environment | {"PATH": places},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def submit(self, student, answers):
        """Hand in the released notebook with `answers`: {exercise: code}."""
        folder = self.folder / "submitted" / student / self.path.stem
        shutil.copytree(self.folder / "release" / self.path.stem, folder)
        notebook = nbformat.read(folder / self.path.name, as_version=4)
        cells = {cell.metadata["nbgrader"]["grade_id"]: cell for cell in notebook.cells}
        for name, code in answers.items():
            cells[f"{name}-answer"].source = code
        nbformat.write(notebook, folder / self.path.name)

    def scores(self):
        """{student: points}, all of them out of the points of the chapter."""
        self("export")
        with open(self.folder / "grades.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert {float(row["max_score"]) for row in rows} == {sum(worth(self.path).values())}
        return {row["student_id"]: float(row["score"]) for row in rows}


def worth(path):
    """{exercise: points} of a chapter."""
    marks = assignments.marks(nbformat.read(path, as_version=4)).values()
    return {mark["grade_id"]: mark["points"] for mark in marks}


def solved(path):
    """{exercise: its solution} of a chapter."""
    return {assignments.grade_id(stub): stub.metadata["solution"]["code"] for stub in stubs(path)}


def nonsense(stub):
    """A wrong answer to an exercise: a function that returns 0, or the number 0."""
    (statement,) = ast.parse(solutions.split(stub)[0]).body
    if isinstance(statement, ast.FunctionDef):
        return f"def {statement.name}(*arguments):\n    return 0"
    return f"{statement.targets[0].id} = 0"


nbgrader = pytest.mark.skipif(
    not NBGRADER, reason="nbgrader is not installed (NBGRADER names its command)"
)


@pytest.mark.slow
@nbgrader
@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_nbgrader_grades_a_right_a_half_right_and_an_empty_submission(number, tmp_path):
    path = CHAPTERS[number]
    course, right = Course(path, tmp_path), solved(path)
    wrong = {assignments.grade_id(stub): nonsense(stub) for stub in stubs(path)}
    released = (course.folder / "release" / path.stem / path.name).read_text(encoding="utf-8")
    for code in right.values():
        assert json.dumps(code)[1:-1] not in released
    first = list(right)[: len(right) // 2]
    half = {name: code if name in first else wrong[name] for name, code in right.items()}
    submissions = {"right": right, "half": half, "wrong": wrong, "empty": {}}
    expected = {"right": list(right), "half": first, "wrong": [], "empty": []}
    if set(OTHERWISE) <= set(right):
        submissions |= {"otherwise": right | OTHERWISE, "one wrong": right | WRONG}
        expected |= {"otherwise": list(right), "one wrong": [n for n in right if n not in WRONG]}
    for student, answers in submissions.items():
        course.submit(student, answers)
    course("autograde", path.stem)
    course("generate_feedback", path.stem)
    points = worth(path)
    assert course.scores() == {s: sum(points[n] for n in names) for s, names in expected.items()}
    pages = list(course.folder.glob(f"feedback/*/{path.stem}/{path.stem}.html"))
    assert len(pages) == len(submissions)


@pytest.mark.slow
@nbgrader
def test_nbgrader_grades_each_student_by_their_own_numbers(tmp_path, monkeypatch):
    """With a name for each student: their own number is right, and a copied one is wrong."""
    course, exercise = Course(CHAPTERS[9], tmp_path), "what-fits"
    sides = {}
    for student in ("ada", "alan"):
        monkeypatch.setenv("VLMKIT_STUDENT", student)
        budget = 100 + seed() % 500  # MB, as the chapter says
        across = int((budget * 1e6 / (4 * 28 * 4 * 128)) ** 0.5)  # tokens a side
        sides[student] = max(n for n in range(28 * across + 28) if round(n / 28) == across)
    handed_in = sides | {"copier": sides["ada"]}
    for student, side in handed_in.items():
        course.submit(student, {exercise: f"my_side = {side}"})
        course("autograde", course.path.stem, "--student", student, VLMKIT_STUDENT=student)
    point = worth(course.path)[exercise]
    assert course.scores() == {"ada": point, "alan": point, "copier": 0}
