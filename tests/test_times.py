"""Execution times: what a chapter's card says is not less than what was recorded."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import times  # noqa: E402


def test_every_chapter_was_timed_as_it_is_on_two_cores():
    rows = times.recorded()
    assert [row["chapter"] for row in rows] == times.chapters()
    assert {column for row in rows for column in row} == set(times.COLUMNS)
    assert {row["cores"] for row in rows} == {"2"}


def test_all_chapters_take_less_than_a_quarter_of_an_hour():
    assert sum(int(row["seconds"]) for row in times.recorded()) < 15 * 60


@pytest.mark.parametrize("chapter", times.chapters())
def test_recorded_time_does_not_exceed_what_the_card_says(chapter):
    (row,) = (row for row in times.recorded() if row["chapter"] == chapter)
    card = times.card(chapter)
    assert int(row["seconds"]) <= times.most_by_card(card), times.said_by_card(card)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("less than a minute on", 60),
        ("about a minute on", 90),
        ("one to two\nminutes on", 150),
        ("two minutes on", 150),
        ("about five minutes on", 330),
    ],
)
def test_what_a_card_says_in_seconds(said, seconds):
    card = f"**Time.** *Run All* takes {said} two CPU cores"
    assert times.most_by_card(card) == seconds
    assert times.said_by_card(card) == " ".join(said.split()).removesuffix(" on")


@pytest.mark.parametrize("said", ["a while", "some minutes", "about an hour"])
def test_time_that_cannot_be_read_is_an_error(said):
    with pytest.raises(ValueError, match="no time that can be read"):
        times.most_by_card(f"*Run All* takes {said}")


def test_table_of_the_page():
    rows = [
        {**dict.fromkeys(times.COLUMNS, "x"), "chapter": "00_start_here", "seconds": "59"},
        {**dict.fromkeys(times.COLUMNS, "x"), "chapter": "04_memory", "seconds": "61"},
    ]
    lines = times.table(rows).splitlines()
    assert lines[2].startswith("| [00 Start here](../notebooks/00_start_here.ipynb) | 0:59 | ")
    assert lines[4].startswith("| all, one after another | 2:00 |")
    assert len([line for line in lines if line.startswith("- x cores of x")]) == 1
