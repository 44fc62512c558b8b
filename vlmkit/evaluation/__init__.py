"""Asking a vision-language model, and scoring its answers.

asking.py   one question or a batch of them, from pictures and text to the answer's text
metrics.py  the field's metrics: how much an answer is worth against the accepted ones
scores.py   their means and intervals, and the tables by task and by kind of question
"""

import contextlib

from vlmkit.errors import QuestionError, TaskError, VlmkitError
from vlmkit.evaluation.asking import TooLong, answers, ask, check_processor, check_question
from vlmkit.evaluation.metrics import METRICS, OF_TASK, chosen
from vlmkit.evaluation.scores import Scores, compared, normalize
from vlmkit.evaluation.statistics import bootstrap, mcnemar, paired_interval, wilson
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
    "paired_interval",
    "wilson",
]

COLUMNS = ("images", "question", "answer")
"""What a row of a dataset must have; `task`, `kind` and `answers` are used where they are there."""


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
    """Ask every question of a dataset and compare the answers: `Scores`.

    dataset: a `datasets.Dataset` (`vlmkit.tasks.dataset` and `vlmkit.tasks.from_dataset` make one),
    or a list of rows, with the columns images, question, answer, and where known task, kind, and
    answers, a list of all that are accepted.
    metric: how an answer is scored, one of `METRICS` or a function (predicted, accepted answers) to
    a number from 0 to 1. By default what the task's own evaluation uses, see `OF_TASK`, and else
    exact match: an answer counts if it is the expected one, or one of several, after `normalize`.
    max_new_tokens: by default 8 more than the longest expected answer takes; one that is longer is
    wrong, however it goes on. progress: show a progress bar.

    Rows are batched with others of as many images and about as long a question, which only makes
    it faster: padding is masked. Raises `TaskError` where a column is missing, and the errors of
    `ask` with the number of the row. `TaskError` also for a metric that does not exist or needs
    more accepted answers than a row has, before anything is asked.
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
    """The metric of each row, a function; each is tried on the row's own answer first."""
    tasks = _column(dataset, "task") if "task" in _columns(dataset) else [None] * len(dataset)
    metrics = chosen(metric, tasks)
    answers = _column(dataset, "answer")
    for row, (one, accepted) in enumerate(zip(metrics, _accepted(dataset), strict=True)):
        try:
            one(answers[row], accepted)
        except VlmkitError as error:
            raise type(error)(f"Row {row}: {error}") from error
    return metrics


def _accepted(dataset):
    """The accepted answers of each row: those of the column answers, or else the one expected."""
    answers = [[answer] for answer in _column(dataset, "answer")]
    if "answers" not in _columns(dataset):
        return answers
    several = _column(dataset, "answers")
    return [found or one for found, one in zip(several, answers, strict=True)]


def check(processor, dataset, batch_size):
    """Raise the errors of `evaluate` for what can be told before a question is asked."""
    check_processor(processor)
    _check_dataset(dataset)
    if type(batch_size) is not int or batch_size < 1:
        raise TaskError(f"batch_size is a whole number from 1; it is {batch_size!r}.")


def room_for_answers(processor, dataset):
    """How many tokens `evaluate` lets an answer have: 8 more than the longest expected one."""
    expected = processor.tokenizer(_column(dataset, "answer"), add_special_tokens=False)
    return 8 + max(len(ids) for ids in expected["input_ids"])


def batches(dataset, batch_size):
    """The batches in which `evaluate` asks: (row numbers, images of each, question of each)."""
    # A window of rows is held at a time: a dataset of photographs need not fit in memory.
    for start in range(0, len(dataset), 8 * batch_size):
        rows = range(start, min(start + 8 * batch_size, len(dataset)))
        read = {row: _read_row(dataset[row], row) for row in rows}
        for batch in _batches(read, batch_size):
            images, questions = zip(*(read[row] for row in batch), strict=True)
            yield batch, images, questions


@contextlib.contextmanager
def naming_rows(rows):
    """Within it, the error of a prompt that does not fit says which row of the dataset it is."""
    try:
        yield
    except TooLong as error:
        raise QuestionError(f"Row {rows[error.prompt]}: {error}") from error


def scored(dataset, predicted, metrics=None):
    """`Scores` of the answers `predicted`, a text for each row of `dataset`.

    metrics: a function for each row, as `evaluate` chooses them. Without them an answer is right
    if it is the one in the column answer, whatever the task.
    """
    import pandas as pd

    table = pd.DataFrame({name: _column(dataset, name) for name in ("question", "answer")})
    table["predicted"] = predicted
    if metrics is None:
        table["correct"] = table["answer"].map(normalize) == table["predicted"].map(normalize)
        score = table["correct"]
    else:
        rows = zip(metrics, predicted, _accepted(dataset), strict=True)
        score = pd.Series([float(metric(answer, accepted)) for metric, answer, accepted in rows])
        table["correct"] = score == 1
    if not score.isin([0, 1]).all():
        table["score"] = score
    for name in ("task", "kind"):
        table[name] = _column(dataset, name) if name in _columns(dataset) else "all"
    names = {getattr(metric, "__name__", "score") for metric in metrics or ()} or {"exact_match"}
    return Scores(table, names.pop() if len(names) == 1 else "score")


def _columns(dataset):
    names = getattr(dataset, "column_names", None)
    return list(dataset[0]) if names is None else names


def _column(dataset, name):
    if hasattr(dataset, "column_names"):
        # Alone, since a dataset with a transform reads every column for one, pictures too.
        return list(dataset.select_columns([name])[name])
    return [row[name] for row in dataset]


def _check_dataset(dataset):
    if isinstance(dataset, dict):
        raise TaskError(
            f"This holds several datasets: choose one of {', '.join(map(repr, dataset))}."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"A {type(dataset).__name__} has no length or no rows by number: take some of its rows "
            "as a list."
        )
    if len(dataset) == 0:
        raise TaskError("The dataset has no rows, so there is nothing to evaluate.")
    lacking = lacking_columns(_columns(dataset))
    if lacking:
        raise TaskError(lacking)
    for row, answer in enumerate(_column(dataset, "answer")):
        if not isinstance(answer, str):
            raise TaskError(f"Row {row}: an answer is text, and this is a {type(answer).__name__}.")


def lacking_columns(columns):
    """What is wrong with a dataset of these columns, in words; None if it has all of COLUMNS."""
    missing = [name for name in COLUMNS if name not in columns]
    if not missing:
        return None
    return (
        f"The dataset has no column {' and no column '.join(missing)}. It has "
        f"{', '.join(columns)}; needed are {', '.join(COLUMNS)}, and optionally task and kind. "
        "dataset.rename_column gives a column its name."
    )


def _read_row(row, number):
    try:
        check_question(row["question"])
        return read_all(row["images"]), row["question"]
    except VlmkitError as error:
        raise type(error)(f"Row {number}: {error}") from error


def _batches(read, size):
    """Row numbers in batches of rows with as many images and questions of like length."""
    rows = sorted(read, key=lambda row: (len(read[row][0]), len(read[row][1])))
    batch = []
    for row in rows:
        if batch and (len(batch) == size or len(read[row][0]) != len(read[batch[0]][0])):
            yield batch
            batch = []
        batch.append(row)
    yield batch
