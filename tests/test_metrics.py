"""The field's metrics against examples that are computed by hand from their definitions."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vlmkit as vk
from vlmkit.errors import TaskError
from vlmkit.evaluation import METRICS, OF_TASK, Scores, bootstrap, metrics, wilson
from vlmkit.evaluation.metrics import (
    anls,
    direct_answer,
    exact_match,
    normalize_vqa,
    relaxed_accuracy,
    vqa_accuracy,
)

# What visualqa.org/evaluation lists, with its own examples where it gives one.
VQA_TEXTS = {
    "Red": "red",
    "yes.": "yes",
    "2.5": "2.5",
    "u.s.a.": "usa",
    ".5": ".5",
    "two": "2",
    "Ten": "10",
    "eleven": "eleven",
    "none": "0",
    "a dog": "dog",
    "the man and an apple": "man and apple",
    "dont": "don't",
    "don't": "don't",
    "Couldntve": "couldntve",  # both apostrophes missing: not in the evaluation's table
    "couldnt've": "couldn't've",
    "girl's": "girl's",
    "2:50 pm": "2:50 pm",
    "100,978": "100978",
    "red,blue": "red blue",
    "red, blue": "red blue",
    "t-shirt": "t shirt",
    "black - white": "black white",
    "yes!": "yes",
    "(left)": "left",
    "1,000-2,000": "10002000",  # a comma within a number, and no mark becomes a space
    " hot\n dog\t": "hot dog",
    "somebody'd": "somebodyd",  # as the table has it
    "": "",
    "the": "",
}


@pytest.mark.parametrize(("answer", "expected"), VQA_TEXTS.items())
def test_normalizing_as_the_vqa_evaluation_does(answer, expected):
    assert normalize_vqa(answer) == expected


def test_the_contractions_are_those_of_the_evaluation():
    """Counted in its table: 120 entries, of which 4 have a capital and 2 change nothing."""
    assert len(metrics._REPAIRED) == 120 - 4 - 2
    for wrong, right in metrics._REPAIRED.items():
        assert wrong.replace("'", "") == right.replace("'", "")


@pytest.mark.parametrize(
    ("gave_it", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_by_how_many_of_ten_gave_the_answer(gave_it, expected):
    """Over the ten ways to leave one out: 3 who gave it are 2 in three of them, 3 in seven."""
    people = ["two"] * gave_it + [f"other {i}" for i in range(10 - gave_it)]
    assert vqa_accuracy("2", people) == pytest.approx(expected)
    assert vqa_accuracy("The two.", list(reversed(people))) == pytest.approx(expected)
    simple = min(gave_it / 3, 1)
    assert direct_answer(" TWO. ", people) == pytest.approx(simple)


@pytest.mark.parametrize("metric", [vqa_accuracy, direct_answer])
def test_counting_people_needs_people(metric):
    for known in ([], ["yes"], ["yes"] * 3):
        with pytest.raises(TaskError, match=f"{len(known)}: .*exact_match"):
            metric("yes", known)
    assert metric("yes", ["yes"] * 4) == 1


@pytest.mark.parametrize(
    ("predicted", "accepted", "expected"),
    [
        ("Denver Broncos", ["Denver Broncos", "Denver R. Broncos"], 1.0),
        ("12/15/89", ["12/15/88"], 7 / 8),
        ("Dear dr. Lobo", ["Dear Dr. Lobo", "Dr. Lobo"], 1.0),
        ("  ITC   limited ", ["itc limited"], 1.0),
        ("Don't", ["Won't"], 0.8),
        ("Hello Wrld", ["Hello World"], 10 / 11),
        ("ab", ["abcd"], 0.5),  # at the threshold: kept
        ("ab", ["abcde"], 0.0),  # 0.4 is another answer
        ("kitten", ["sitting"], 4 / 7),
        ("", ["yes"], 0.0),
        ("", [""], 1.0),
        ("yes", ["no", "yes."], 0.75),
    ],
)
def test_anls(predicted, accepted, expected):
    assert anls(predicted, accepted) == pytest.approx(expected)


@given(st.text("abAB \n", max_size=6), st.text("abAB \n", max_size=6))
def test_anls_is_the_edit_distance_written_out(first, second):
    a, b = (" ".join(text.lower().split()) for text in (first, second))
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            through = table[i - 1, j - 1] + (x != y)
            table[i, j] = min(through, table[i - 1, j] + 1, table[i, j - 1] + 1)
    likeness = 1 - table[-1, -1] / max(len(a), len(b), 1)
    assert anls(first, [second]) == pytest.approx(likeness if likeness >= 0.5 else 0)


@pytest.mark.parametrize(
    ("predicted", "accepted", "expected"),
    [
        ("14", ["14"], 1),
        ("105", ["100"], 1),  # 5% exactly
        ("106", ["100"], 0),
        ("95", ["100"], 1),
        ("-3.1", ["-3"], 1),
        ("3", ["-3"], 0),
        ("0.21", ["0.2"], 1),
        ("0", ["0"], 1),
        ("0.0", ["0"], 1),
        ("0.01", ["0"], 0),
        ("1.2e3", ["1200"], 1),
        ("12.", ["12"], 1),
        ("0.12", ["12%"], 1),
        ("12", ["12%"], 0),
        ("1,000", ["1,000"], 1),
        ("1000", ["1,000"], 0),  # a number with commas is text, as in pix2struct's
        ("yes", ["Yes"], 1),
        ("Yes.", ["Yes"], 0),
        ("nan", ["nan"], 1),
        ("2010", ["2011"], 1),  # years too: the metric's known weakness
        ("7", ["5", "7"], 1),
    ],
)
def test_relaxed_accuracy(predicted, accepted, expected):
    assert relaxed_accuracy(predicted, accepted) == expected


def test_the_examples_that_pix2struct_is_tested_on():
    """Eight answers, of which its tests expect an ANLS of 47.5 and a relaxed accuracy of 62.5."""
    predicted = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    expected = ["abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"]
    pairs = list(zip(predicted, expected, strict=True))
    assert np.mean([anls(a, [b]) for a, b in pairs]) == pytest.approx(0.475)
    assert np.mean([relaxed_accuracy(a, [b]) for a, b in pairs]) == pytest.approx(0.625)


def test_exact_match():
    assert exact_match(" Red. ", ["red"]) == exact_match("red", ["blue", "Red"]) == 1
    assert exact_match("red", ["dark red"]) == 0


# --- means and intervals --------------------------------------------------------------------------


def test_the_bootstrap_is_that_of_scipy():
    rng = np.random.default_rng(3)
    for scores in (rng.choice([0, 0.3, 0.6, 0.9, 1], 200), rng.random(50)):
        low, high = bootstrap(scores)
        expected = scipy.stats.bootstrap(
            (scores,), np.mean, method="percentile", n_resamples=10_000, rng=rng
        ).confidence_interval
        assert (low, high) == pytest.approx(tuple(expected), abs=0.01)
        assert low < scores.mean() < high
        assert bootstrap(rng.permutation(scores)) == (low, high)


def test_scores_between_wrong_and_right():
    answers = pd.DataFrame({"task": ["a"] * 4 + ["b"] * 2, "kind": "all"})
    answers["score"] = [0.3, 1, 0.6, 0, 1, 0]
    answers["correct"] = answers["score"] == 1
    scores = Scores(answers, "vqa_accuracy")
    assert scores.accuracy == pytest.approx(2.9 / 6)
    assert scores.interval == bootstrap(answers["score"])
    assert scores.by_task.loc["a", "accuracy"] == pytest.approx(1.9 / 4)
    assert tuple(scores.by_task.loc["b", ["low", "high"]]) == wilson(1, 2)
    assert "mean vqa_accuracy 48.3% over 6 answers" in str(scores)


# --- choosing a metric ----------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch):
    """evaluated(rows, predicted, **options) is `vk.evaluate` of a model with these answers."""

    def evaluate(rows, predicted, **options):
        asked = []

        def answers(model, processor, images, questions, **rest):
            asked.extend(questions)
            return [predicted[int(question)] for question in questions]

        monkeypatch.setattr("vlmkit.evaluation.check_processor", lambda processor: None)
        monkeypatch.setattr("vlmkit.evaluation.answers", answers)
        red = Image.new("RGB", (8, 8), "red")
        rows = [{"images": [red], "question": f"{i}", **row} for i, row in enumerate(rows)]
        try:
            return vk.evaluate(None, None, rows, max_new_tokens=4, **options)
        except TaskError:
            assert not asked  # the error comes before the first question
            raise

    return evaluate


def test_a_metric_by_name_by_task_and_by_function(evaluated):
    people = ["red"] * 2 + ["dark red"] * 8
    rows = [
        {"answer": "dark red", "answers": people, "task": "vqav2"},
        {"answer": "limited", "answers": ["limited"], "task": "docvqa"},
        {"answer": "100", "answers": ["100"], "task": "chartqa"},
        {"answer": "red", "answers": ["red", "crimson"], "task": "gqa"},
    ]
    predicted = ["red", "limitid", "103", "Crimson."]
    by_task = evaluated(rows, predicted)
    assert list(by_task.answers["score"]) == pytest.approx([0.6, 6 / 7, 1, 1])
    assert list(by_task.answers["correct"]) == [False, False, True, True]
    assert "mean score" in str(by_task)
    exact = evaluated(rows, predicted, metric="exact_match")
    assert list(exact.answers["correct"]) == [True, False, False, True]
    assert "score" not in exact.answers and exact.interval == wilson(2, 4)
    assert "50.0% of 4 answers right" in str(exact)
    named = evaluated(rows, predicted, metric="anls")
    assert named.metric == "anls" and named.answers["score"][1] == pytest.approx(6 / 7)

    def starts_alike(predicted, accepted):
        return predicted[0].lower() in {answer[0] for answer in accepted}

    own = evaluated(rows, predicted, metric=starts_alike)
    assert own.accuracy == 1 and own.metric == "starts_alike"


def test_without_a_known_task_it_is_exact_match(evaluated):
    rows = [{"answer": "Red", "task": "vqa"}, {"answer": "blue", "task": "ocr"}]
    scores = evaluated(rows, ["red.", "navy"])
    expected = "question answer predicted correct task kind"
    assert " ".join(scores.answers.columns) == expected
    assert list(scores.answers["correct"]) == [True, False] and scores.metric == "exact_match"
    assert not set(OF_TASK) & set(vk.tasks.TASKS)
    assert set(OF_TASK.values()) <= set(METRICS) and set(OF_TASK) <= set(vk.tasks.SCHEMAS)


def test_a_metric_that_cannot_be_used_is_an_error_before_anything_is_asked(evaluated):
    rows = [{"answer": "red", "task": "plain"}]
    with pytest.raises(TaskError, match="'anl' is not a metric. Did you mean 'anls'"):
        evaluated(rows, ["red"], metric="anl")
    with pytest.raises(TaskError, match="a function.*this is a float"):
        evaluated(rows, ["red"], metric=0.5)
    with pytest.raises(TaskError, match="Row 0: VQA accuracy .*has 1"):
        evaluated(rows, ["red"], metric="vqa_accuracy")
    with pytest.raises(TaskError, match="Row 0: .*exact_match"):
        evaluated([{"answer": "red", "task": "vqav2"}], ["red"])
