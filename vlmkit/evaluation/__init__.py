"""Asking a vision-language model, and scoring its answers.

asking.py      one question or a batch, from pictures and text to the text of the answer
prompts.py     the prompts and tensors that a processor makes of pictures and text
templates.py   chat templates, which come with a checkpoint and are not always right
metrics.py     the field's metrics for one answer, and the scores of many by task and kind
statistics.py  intervals and tests
columns.py     the columns of a dataset
"""

import contextlib

from vlmkit.errors import QuestionError, TaskError, VlmkitError, public
from vlmkit.evaluation.asking import TooLong, answers, ask, check_processor, check_question
from vlmkit.evaluation.columns import COLUMNS, column, columns_of, lacking_columns
from vlmkit.evaluation.metrics import (
    METRICS,
    OF_TASK,
    Scores,
    compared,
    exact_match,
    metrics_of,
    normalize,
)
from vlmkit.evaluation.prompts import after_thoughts
from vlmkit.evaluation.statistics import bootstrap, mcnemar, paired, paired_interval, wilson
from vlmkit.images import read_all

__all__ = [
    "COLUMNS",
    "METRICS",
    "OF_TASK",
    "Scores",
    "answers",
    "ask",
    "bootstrap",
    "check_question",
    "compared",
    "evaluate",
    "mcnemar",
    "normalize",
    "paired",
    "paired_interval",
    "wilson",
]


@public
def evaluate(
    model,
    processor,
    dataset,
    *,
    metric=None,
    batch_size=64,
    max_new_tokens=None,
    progress=False,
):
    """Ask every question of a dataset and score the answers: returns `Scores`.

    dataset: a `datasets.Dataset` (from `vlmkit.tasks.dataset` or `vlmkit.tasks.from_dataset`, for
        example) or a list of rows, with the columns images, question and answer, and optionally
        task, kind, answers (all accepted answers), and messages: a conversation, whose last answer
        is asked for after the turns before it.
    metric: how an answer is scored: one of `METRICS`, or a function of (predicted answer, accepted
        answers) that returns a number from 0 to 1. By default the metric of the row's task (see
        `OF_TASK`), else exact match: an answer is right if, after `normalize`, it is one of the
        accepted answers.
    max_new_tokens: by default 8 more than the longest expected answer needs. A longer answer is
        wrong anyway, but a model that thinks before it answers needs more. The result counts the
        answers that ended at this limit. progress: show a progress bar.

    Thoughts before an answer (<think>…</think>) are not a part of it.

    A batch holds rows with equally many images and with questions of similar length. This only
    makes the evaluation faster, since padding is masked. Raises `TaskError` for a missing column,
    for a metric that does not exist and for one that needs more accepted answers than a row has,
    all before the first question is asked; and the errors of `ask` with the number of the row.
    """
    from tqdm import tqdm

    check(processor, dataset, batch_size)
    metrics = _metrics(dataset, metric)
    if max_new_tokens is None:
        max_new_tokens = room_for_answers(processor, dataset)
    predicted = [None] * len(dataset)
    with tqdm(total=len(dataset), disable=not progress, unit="question") as bar:
        for rows, images, questions in batches(dataset, batch_size):
            with naming_rows(rows):
                found = answers(model, processor, images, questions, max_new_tokens=max_new_tokens)
            for row, answer in zip(rows, found, strict=True):
                predicted[row] = answer
            bar.update(len(rows))
    return scored(dataset, predicted, metrics)


def _metrics(dataset, metric):
    """The metric of each row, a function. Each one is tried on the row's own answer first."""
    metrics = metrics_of(metric, _labels(dataset, "task"))
    rows = zip(metrics, column(dataset, "answer"), _accepted(dataset), strict=True)
    for row, (one, answer, accepted) in enumerate(rows):
        try:
            one(answer, accepted)
        except VlmkitError as error:
            raise type(error)(f"Row {row}: {error}") from error
    return metrics


def _labels(dataset, name):
    """The column `name`, or "all" for each row if there is none."""
    return column(dataset, name) if name in columns_of(dataset) else ["all"] * len(dataset)


def _accepted(dataset):
    """The accepted answers of each row: the column answers where it is filled, else the answer."""
    answers = [[answer] for answer in column(dataset, "answer")]
    if "answers" not in columns_of(dataset):
        return answers
    several = column(dataset, "answers")
    return [found or one for found, one in zip(several, answers, strict=True)]


def check(processor, dataset, batch_size):
    """Raise the errors of `evaluate` that are known before a question is asked."""
    check_processor(processor)
    if isinstance(dataset, dict):
        raise TaskError(
            f"These are several datasets. Choose one of {', '.join(map(repr, dataset))}."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"A {type(dataset).__name__} has no length or no rows by number. Give a list of its "
            "rows."
        )
    if len(dataset) == 0:
        raise TaskError("The dataset has no rows, so there is nothing to evaluate.")
    lacking = lacking_columns(columns_of(dataset))
    if lacking:
        raise TaskError(lacking)
    for row, answer in enumerate(column(dataset, "answer")):
        if not isinstance(answer, str):
            raise TaskError(f"Row {row}: an answer is text, and this is a {type(answer).__name__}.")
    if type(batch_size) is not int or batch_size < 1:
        raise TaskError(f"batch_size is a whole number from 1, and not {batch_size!r}.")


def room_for_answers(processor, dataset):
    """The most tokens that `evaluate` allows an answer: 8 more than the longest expected answer."""
    expected = processor.tokenizer(column(dataset, "answer"), add_special_tokens=False)
    return 8 + max(len(ids) for ids in expected["input_ids"])


def batches(dataset, batch_size):
    """The batches in which `evaluate` asks: (row numbers, images of each, question of each).

    The rows of a batch have equally many images, and questions of similar length.
    """
    # Only a window of rows is in memory: a dataset of photographs may be larger than memory.
    for start in range(0, len(dataset), 8 * batch_size):
        window = range(start, min(start + 8 * batch_size, len(dataset)))
        read = {row: _read_row(dataset[row], row) for row in window}
        rows = sorted(read, key=lambda row: (len(read[row][0]), len(read[row][1])))
        while rows:
            images = len(read[rows[0]][0])
            batch = [row for row in rows[:batch_size] if len(read[row][0]) == images]
            rows = rows[len(batch) :]
            yield batch, *zip(*(read[row] for row in batch), strict=True)


def _read_row(row, number):
    try:
        check_question(row["question"])
        turns = row.get("messages")
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return read_all(row["images"] or []), turns or row["question"]
    except VlmkitError as error:
        raise type(error)(f"Row {number}: {error}") from error


@contextlib.contextmanager
def naming_rows(rows):
    """In this context, the error of a prompt that is too long names the row of the dataset."""
    try:
        yield
    except TooLong as error:
        raise QuestionError(f"Row {rows[error.prompt]}: {error}") from error


def scored(dataset, predicted, metrics=None):
    """`Scores` of the predicted answers, a text for each row of `dataset`.

    metrics: a function for each row, as `evaluate` chooses them. Without them, an answer is right
    if it is the one in the column answer, whatever the task.
    """
    import pandas as pd

    table = pd.DataFrame({name: column(dataset, name) for name in ("question", "answer")})
    limited = [getattr(answer, "at_limit", False) for answer in predicted]
    # A thought that ends at the limit has no answer after it, and stays as it is.
    predicted = [after_thoughts(answer) for answer in predicted]
    table["predicted"] = predicted
    if any(limited):
        table["at_limit"] = limited
    if metrics is None:
        metrics, accepted = [exact_match] * len(dataset), table["answer"].map(lambda text: [text])
    else:
        accepted = _accepted(dataset)
    accepted = [[after_thoughts(text) for text in texts] for texts in accepted]
    rows = zip(metrics, predicted, accepted, strict=True)
    score = pd.Series([float(metric(answer, right)) for metric, answer, right in rows])
    table["correct"] = score == 1
    if not score.isin([0, 1]).all():
        table["score"] = score
    for name in ("task", "kind"):
        table[name] = _labels(dataset, name)
    names = {getattr(metric, "__name__", "score") for metric in metrics}
    return Scores(table, names.pop() if len(names) == 1 else "score")
