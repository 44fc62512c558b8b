"""The kit for teachers: schedules, quiz, slides, and the archive for students."""

import json
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath

import chapters
import nbformat
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import releases  # noqa: E402
import schedules  # noqa: E402
import solutions  # noqa: E402

CHAPTERS = sorted(solutions.CHAPTERS.glob("[0-9][0-9]_*.ipynb"))


def test_schedules_are_those_of_the_cards():
    """Run `python scripts/schedules.py` if this fails."""
    text = schedules.PAGE.read_text(encoding="utf-8")
    assert schedules.written(text) == text


def test_every_chapter_has_a_session_of_the_six_weeks():
    pairs = [number for pair in schedules.WEEKS.values() for number in pair]
    assert pairs == [path.name[:2] for path in CHAPTERS] and len(schedules.WEEKS) == 6


def test_a_timetable_adds_up_and_shortens_what_does_not_fit():
    chapter = {"name": "00_a", "title": "A", "read": 60, "exercises": 15, "run": "a minute"}
    steps = [("00", "read"), ("break", 10), ("00", "exercises")]
    table = schedules.timetable(steps, {"00": chapter}, 0, 80)
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 0:00", "| 1:00", "| 1:10", "| 1:20"]
    assert "first 10 of 15 minutes" in rows[2][2]
    at_most = schedules.timetable([("00", "read", 40), ("break", 10)], {"00": chapter}, 0, 80)
    rows = [line.split(" | ") for line in at_most.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 0:00", "| 0:40", "| 0:50"]
    assert "first 40 of 60 minutes" in rows[0][2]
    with pytest.raises(ValueError, match="no time is left"):
        schedules.timetable(steps, {"00": chapter}, 0, 70)


@pytest.mark.parametrize(
    ("text", "found"), [("half an\nhour", 30), ("about an hour", 60), ("45 minutes", 45)]
)
def test_minutes_in_words(text, found):
    assert schedules.minutes(text) == found


def test_three_questions_a_chapter_with_an_answer_and_why_the_others_tempt():
    text = (ROOT / "docs" / "quiz.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (\d\d) .*$", text, flags=re.M)[1:]
    assert parts[::2] == [path.name[:2] for path in CHAPTERS]
    right = []
    for part in parts[1::2]:
        questions = re.split(r"^\*\*\d\.\*\* ", part, flags=re.M)[1:]
        assert len(questions) == 3
        for question in questions:
            letters = re.findall(r"^- ([A-C])\. \S", question, re.M)
            answer = question.partition("<details><summary>Answer</summary>\n\n")[2]
            right += re.match(r"\*\*([A-C])\.\*\* ", answer)[1]
            assert letters == ["A", "B", "C"]
            assert set(re.findall(r"\*([A-C])\*", answer)) == set(letters) - {right[-1]}
    assert max(map(right.count, "ABC")) <= 18  # no letter gives half of the answers away


def test_the_quiz_about_easy_vqa_has_the_chapters_numbers():
    chapter = nbformat.read(ROOT / "notebooks" / "08_lora_on_vqa.ipynb", as_version=4)
    printed = "".join(o.get("text", "") for c in chapter.cells for o in c.get("outputs", ()))
    share = float(re.search(r"([\d.]+)% right, 95%", printed)[1])
    right, asked = re.search(r"pebble's words +(\d+) of (\d+) right", printed).groups()
    quiz = (ROOT / "docs" / "quiz.md").read_text(encoding="utf-8").partition("## 08 ")[2]
    first, second, third = re.split(r"^\*\*[23]\.\*\* ", quiz.partition("## 09 ")[0], flags=re.M)
    chapters.states(first, round(share), right, asked)

    runs = pd.read_csv(ROOT / "notebooks" / "data" / "08_lora_on_vqa.csv")
    share = (100 * runs["right"] / runs["n"]).groupby([runs["old"], runs["trained"]]).max()
    alone = share[0]
    assert alone["language_model 2"] > 50 > alone["vision_encoder 148 + head 16"]
    both = "projector full + language_model 128"
    chapters.states(third, *(f"{share[old][both]:.1f}" for old in (0, 0.25)))


def test_slides_have_the_figures_the_predictions_and_the_questions():
    pytest.importorskip("nbconvert")
    import slides

    for path in CHAPTERS:
        made = slides.of_chapter(path)
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if "outputs" in cell]
        figures = sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
        text = "\n".join(made)
        assert text.count("<img ") == figures and text.count("<details>") == 3
        assert made[1].count("<pre>") == 1 and "anchor-link" not in text
        assert not re.search(r"(?:src|href)=\"(?!data:)", text)
        assert 'alt=""' not in text

    for first, numbers in slides.sessions().values():
        assert "<table>" in first[0] and "vision_encoder" in first[1] and len(numbers) >= 2


def test_students_get_no_link_to_what_is_left_out():
    files = releases.committed()
    given = releases.for_students(files)
    folders = {str(parent) for path in given for parent in PurePosixPath(path).parents}
    for path, (data, _) in given.items():
        if path.endswith(".md") or releases.CHAPTER.match(path):
            text = data.decode()
            if not path.endswith(".md"):
                cells = nbformat.reads(text, as_version=4).cells
                text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
            for link in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", text):
                there = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
                assert there in given or there in folders, (path, link)


def test_students_get_no_solutions():
    files = {str(path.relative_to(ROOT)): (path.read_bytes(), 0o644) for path in CHAPTERS}
    files |= {f"notebooks/solutions/{CHAPTERS[0].name}": (b"", 0o644), "Makefile": (b"a", 0o644)}
    files |= {"tests/mistakes.py": (b"", 0o644), "docs/quiz.md": (b"", 0o644)}
    given = releases.for_students(files)
    assert set(given) == {"Makefile", *(str(path.relative_to(ROOT)) for path in CHAPTERS)}
    for path in CHAPTERS:
        chapter = nbformat.read(path, as_version=4)
        text = given[str(path.relative_to(ROOT))][0].decode()
        nbformat.validate(nbformat.reads(text, as_version=4))
        assert "](solutions/" not in text
        for stub in solutions.stubs(chapter):
            assert json.dumps(stub.metadata["solution"]["text"], ensure_ascii=False) not in text
            assert stub.source in "".join(c.source for c in nbformat.reads(text, 4).cells)
