"""benchmarks/recipe_text.py: its text, its questions, its rule, and the recorded results."""

import csv
import hashlib
import runpy
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "recipe_text.py"


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(BENCHMARK))


def rows(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_questions(benchmark):
    from vlmkit.models.cobble.instructions import TEXT_PROMPTS

    questions = rows(benchmark["QUESTIONS"])
    asked = {row["question"] for row in questions}
    assert len(asked) == len(questions) == 200
    assert not asked & set(TEXT_PROMPTS)  # cobble-chat was trained on those
    kinds = [row["kind"] for row in questions]
    assert {kinds.count(kind) for kind in kinds} == {40}
    for row in questions:
        if row["kind"] == "sum":
            a, b = row["question"].removeprefix("What is ").partition("?")[0].split(" + ")
            assert int(a) + int(b) == int(row["right"])
        for right in row["right"].split("|"):
            said = f"It is {right}. And so on"
            assert benchmark["is_right"](row["kind"], row["right"], said)


@pytest.mark.parametrize(
    ("kind", "right", "answer", "is_right"),
    [
        ("sum", "13", "4 + 9 = 13\n\nThat is 4 more.", True),
        ("sum", "13", "4 + 9 = 13.", True),
        ("sum", "9", "4 + 9 is a sum.", True),  # the rule is simple: the last number counts
        ("sum", "3", "4 + 9 = 13", False),
        ("capital", "Rome", "The capital is Romesh.", False),
        ("capital", "New Delhi|Delhi", "It is New Delhi, in the north", True),
        ("capital", "Paris", "It is London. Paris is larger.", False),
        ("capital", "Paris", "", False),
    ],
)
def test_the_rule(benchmark, kind, right, answer, is_right):
    assert benchmark["is_right"](kind, right, answer) is is_right


def test_the_text_is_the_recorded_one(benchmark):
    text = benchmark["english"]()
    assert 1_000 < len(text.split()) < 3_000
    if hashlib.sha256(text.encode()).hexdigest().startswith(benchmark["TEXT"]):
        return
    pytest.skip("this scikit-learn has another text than the one of the record")


def test_the_record(benchmark):
    found = {row["format"]: row for row in rows(benchmark["OUTPUT"])}
    assert list(found) == [*benchmark["FORMATS"], benchmark["CHAT"]]
    kinds = {row["kind"] for row in rows(benchmark["QUESTIONS"])}
    for row in found.values():
        assert int(row["questions"]) == 200
        assert int(row["right"]) == sum(int(row[kind]) for kind in kinds)
    bf16 = found["bf16"]
    assert float(bf16["kl"]) == 0 and float(bf16["same_next_token"]) == 1
    perplexity = [float(found[name]["perplexity"]) for name in ("bf16", "nf4", "int4", "int3")]
    assert perplexity == sorted(perplexity)
