"""Visual question answering by recipe: seeded pictures, questions and answers, without a download.

Six tasks, for the uses that VLMs are tuned for; each asks several kinds of question, each kind in
four phrasings, and where it makes sense some answers are an honest "none". Every row depends only
on (split, seed, task, row number): the same seed gives the same bytes on every machine, in any
order and for any `n`. The split is part of that key, so training and evaluation never share a draw.

Three more are kept from pebble, which was made on the six: `clock`, `dutch` and `dutch_throughout`,
domains that it can be tuned to. "all" is the six.

Published data, from a disk or the hub, comes in the same shape from `from_dataset`.
"""

import difflib

from vlmkit.errors import TaskError
from vlmkit.tasks.chart import CHART
from vlmkit.tasks.clock import CLOCK
from vlmkit.tasks.drawing import SIZE, to_image
from vlmkit.tasks.dutch import DUTCH, DUTCH_THROUGHOUT
from vlmkit.tasks.ocr import OCR
from vlmkit.tasks.pairs import MULTI_IMAGE
from vlmkit.tasks.published import SCHEMAS, from_dataset
from vlmkit.tasks.recipe import NONE, generator
from vlmkit.tasks.scenes import CAPTION, VQA
from vlmkit.tasks.video import VIDEO

__all__ = [
    "DOMAINS",
    "KINDS",
    "NONE",
    "RECIPES",
    "SCHEMAS",
    "SIZE",
    "SPLITS",
    "TASKS",
    "dataset",
    "example",
    "from_dataset",
    "generator",
]

RECIPES = {recipe.name: recipe for recipe in (CAPTION, VQA, OCR, CHART, MULTI_IMAGE, VIDEO)}
TASKS = tuple(RECIPES)
DOMAINS = {recipe.name: recipe for recipe in (CLOCK, DUTCH, DUTCH_THROUGHOUT)}
KINDS = {name: tuple(recipe.kinds) for name, recipe in (RECIPES | DOMAINS).items()}
SPLITS = ("train", "evaluation")


def example(task, index, *, seed, split="evaluation"):
    """Row `index` of a task: a dict of images (PIL), question, answer, task and kind.

    Kinds take turns, so that any run of rows holds each of them equally often.
    """
    recipe = RECIPES.get(task) or DOMAINS[task]
    kind = KINDS[task][index % len(KINDS[task])]
    rng = generator(split, seed, task, index)
    picture, question, answer = recipe.example(kind, rng)
    images = [to_image(frame) for frame in picture.frames]
    return {"images": images, "question": question, "answer": answer, "task": task, "kind": kind}


def dataset(task="all", n=100, seed=0, split="evaluation"):
    """`n` rows as a `datasets.Dataset` with columns images, question, answer, task, kind.

    task: one of `TASKS` or `DOMAINS`, a list of them, or "all", which is `TASKS`; with several,
        rows alternate between them.
    n: number of rows. seed: any integer. split: "evaluation", or "train" to train on.
    images: a list of SIZE × SIZE RGB pictures (one; two for multi_image; four frames for video).
    Raises TaskError for an unknown task or split, or an n that is no positive whole number.
    """
    import datasets

    names = _names(task)
    if split not in SPLITS:
        raise TaskError(f"split {split!r} does not exist; there are {', '.join(SPLITS)}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise TaskError(f"n must be a positive whole number of rows; it is {n!r}")
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
        task=datasets.Value("string"),
        kind=datasets.Value("string"),
    )
    rows = (
        example(names[i % len(names)], i // len(names), seed=seed, split=split) for i in range(n)
    )
    columns = {name: [] for name in features}
    for row in rows:
        for name, value in row.items():
            columns[name].append(value)
    return datasets.Dataset.from_dict(columns, features=features)


def _names(task):
    names = list(TASKS) if task == "all" else [task] if isinstance(task, str) else list(task)
    there = [*TASKS, *DOMAINS]
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(str(name), there, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TaskError(f"task {name!r} does not exist{hint} There are {', '.join(there)}.")
    if not names:
        raise TaskError(f"no task was named; there are {', '.join(there)}, or 'all'")
    return names
