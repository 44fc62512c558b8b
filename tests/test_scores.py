"""The verdict of a check, a student's seed, and the file of scores."""

import csv
import io
import json

import pandas as pd
import pytest

import vlmkit as vk
from vlmkit.course.exercises import scores
from vlmkit.errors import ExerciseError

EXERCISE, GIVEN = "how many questions", {"half": 0.005, "changed": 0.1}
RIGHT = 0.1 * (1.96 / 0.005) ** 2


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    for name in ("VLMKIT_SCORES", "VLMKIT_STUDENT"):
        monkeypatch.delenv(name, raising=False)


def checked(answer, **more):
    return vk.course.check(EXERCISE, answer, **GIVEN, **more)


@pytest.mark.parametrize(
    ("answer", "right", "begin"),
    [(RIGHT, True, "Right: "), (1.0, False, "Not yet: "), (None, None, EXERCISE)],
)
def test_check_prints_one_verdict_and_returns_it(answer, right, begin, capsys):
    found = checked(answer)
    assert isinstance(found, vk.course.CheckedAnswer)
    assert (found.name, found.right, bool(found)) == (EXERCISE, right, bool(right))
    assert found.points == int(bool(right)) and found.text.startswith(begin)
    assert capsys.readouterr().out == f"{found}\n"


def test_a_notebook_shows_the_verdict_once():
    from IPython.core.formatters import DisplayFormatter

    assert DisplayFormatter().format(checked(None)) == ({}, {})


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_scores_have_a_row_for_each_student_and_exercise(suffix, tmp_path, monkeypatch):
    path = tmp_path / "new" / f"scores.{suffix}"
    monkeypatch.setenv("VLMKIT_SCORES", str(path))
    for student, answers in {"Ada, L.": [1.0, RIGHT, None], "Älan": [None]}.items():
        monkeypatch.setenv("VLMKIT_STUDENT", student)
        for answer in answers:
            last = checked(answer)
    first, second = scores.read(path)
    assert set(first) == set(scores.COLUMNS)
    assert (first["student"], first["right"], first["points"]) == ("Ada, L.", True, 1)
    assert (second["student"], second["right"], second["points"]) == ("Älan", False, 0)
    assert second["text"] == last.text
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if suffix == "json" else list(csv.DictReader(io.StringIO(text)))
    assert [row["exercise"] for row in rows] == [EXERCISE] * 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_argument_comes_before_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMKIT_SCORES", str(tmp_path / "variable.csv"))
    checked(RIGHT, scores=tmp_path / "argument.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["argument.csv"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    checked(RIGHT, scores=path)
    before = path.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ExerciseError, match="cannot be written: No space left"):
        checked(1.0, scores=path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{}{"), ("a.json", '{"a": 1}'), ("a.csv", "x,y\n1,2\n")]
)
def test_a_file_of_something_else_is_left_as_it_is(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ExerciseError, match="no file of scores"):
        checked(RIGHT, scores=path)
    assert path.read_text() == text


def test_the_files_of_a_class_become_one_table(tmp_path, monkeypatch):
    """As the page for teachers does it."""
    for student, answer in {"Ada": RIGHT, "Alan": 1.0}.items():
        monkeypatch.setenv("VLMKIT_STUDENT", student)
        checked(answer, scores=tmp_path / f"{student}.csv")
    rows = pd.concat(map(pd.read_csv, tmp_path.glob("*.csv")))
    table = rows.pivot_table(index="student", columns="exercise", values="points")
    assert table[EXERCISE].to_dict() == {"Ada": 1, "Alan": 0}


def test_a_file_of_scores_is_json_or_csv(tmp_path):
    with pytest.raises(ExerciseError, match="called .json or .csv"):
        checked(RIGHT, scores=tmp_path / "scores.xlsx")


def test_seeds_are_a_students_own(monkeypatch):
    assert vk.course.seed() == vk.course.seed("") == 0  # the stored outputs
    ada = vk.course.seed("Ada Lovelace")
    assert ada == vk.course.seed(" ada lovelace ") == 1_075_899_499
    assert len({vk.course.seed(number) for number in range(500)}) == 500
    monkeypatch.setenv("VLMKIT_STUDENT", "Ada Lovelace")
    assert vk.course.seed() == ada


def test_students_with_other_seeds_get_other_questions():
    asked = [vk.tasks.dataset("vqa", n=20, seed=vk.course.seed(name)) for name in ("Ada", "Alan")]
    assert asked[0]["question"] != asked[1]["question"]
