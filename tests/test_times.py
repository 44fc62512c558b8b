"""scripts/times.py: recorded times are complete, and no card promises less than was recorded."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import times  # noqa: E402


def test_every_chapter_was_timed_on_two_cores():
    rows = times.recorded()
    assert [row["chapter"] for row in rows] == times.chapters()
    assert {column for row in rows for column in row} == set(times.COLUMNS)
    assert {row["cores"] for row in rows} == {"2"}
    assert sum(int(row["seconds"]) for row in rows) < 17 * 60


@pytest.mark.parametrize("row", times.recorded(), ids=lambda row: row["chapter"])
def test_recorded_time_does_not_exceed_the_time_on_the_card(row):
    assert int(row["seconds"]) <= times.most_by_card(times.card(row["chapter"]))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("less than a minute on", 60),
        ("about a minute on", 90),
        ("one to two\nminutes on", 150),
        ("about five minutes on", 330),
        ("a while", None),
        ("about an hour", None),
    ],
)
def test_the_time_on_a_card_in_seconds(text, seconds):
    card = f"**Time.** *Run All* takes {text} two CPU cores"
    if seconds:
        assert times.most_by_card(card) == seconds
    else:
        with pytest.raises(ValueError):
            times.most_by_card(card)


def test_table_of_the_page():
    rows = [
        {**dict.fromkeys(times.COLUMNS, "x"), "chapter": "00_start_here", "seconds": "59"},
        {**dict.fromkeys(times.COLUMNS, "x"), "chapter": "04_memory", "seconds": "61"},
    ]
    lines = times.table(rows).splitlines()
    assert "(../notebooks/00_start_here.ipynb) | 0:59 | " in lines[2]
    assert " | 2:00 |" in lines[4]  # the sum
    assert len([line for line in lines if line.startswith("- x cores of x")]) == 1
