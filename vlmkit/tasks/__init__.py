"""Visual question answering from seeded recipes: pictures, questions and answers, no download.

There are six tasks, for the uses that VLMs are fine-tuned for. Each has several kinds of question,
each kind has four phrasings, and for some questions the right answer is "none". A row depends only
on (split, seed, task, row number): the same seed gives the same bytes on every machine, in any
order and for any `n`. Because the split is part of that key, training and evaluation share no row.

Three more tasks are domains that pebble was not trained on: `clock`, `dutch` and
`dutch_throughout`. "all" means the six tasks.

`handwriting`, `photographs` and `easy_vqa` give pictures that nobody drew for this course.
`from_dataset` gives published data, from a disk or the hub, and your own data in the same form;
`to_messages` turns rows into the layout that TRL reads.
"""

from vlmkit.errors import TaskError, did_you_mean
from vlmkit.tasks.chart import CHART
from vlmkit.tasks.domains import CLOCK, DUTCH, DUTCH_THROUGHOUT
from vlmkit.tasks.drawing import SIZE, to_image
from vlmkit.tasks.ocr import OCR
from vlmkit.tasks.published import SCHEMAS, from_dataset, to_messages
from vlmkit.tasks.questions import NONE, generator
from vlmkit.tasks.real import easy_vqa, handwriting, photographs
from vlmkit.tasks.scenes import CAPTION, VQA
from vlmkit.tasks.several import MULTI_IMAGE, VIDEO

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
    "easy_vqa",
    "example",
    "from_dataset",
    "generator",
    "handwriting",
    "photographs",
    "to_messages",
]

RECIPES = {recipe.name: recipe for recipe in (CAPTION, VQA, OCR, CHART, MULTI_IMAGE, VIDEO)}
TASKS = tuple(RECIPES)
DOMAINS = {recipe.name: recipe for recipe in (CLOCK, DUTCH, DUTCH_THROUGHOUT)}
KINDS = {name: tuple(recipe.kinds) for name, recipe in (RECIPES | DOMAINS).items()}
SPLITS = ("train", "evaluation")


def example(task, index, *, seed, split="evaluation"):
    """Row `index` of a task: a dict with images (PIL), question, answer, task and kind.

    The kinds of question take turns, so they are equally frequent in any run of rows.
    """
    recipe = (RECIPES | DOMAINS)[task]
    kind = KINDS[task][index % len(KINDS[task])]
    picture, question, answer = recipe.example(kind, generator(split, seed, task, index))
    images = [to_image(frame) for frame in picture.frames]
    return {"images": images, "question": question, "answer": answer, "task": task, "kind": kind}


def dataset(task="all", n=100, seed=0, split="evaluation"):
    """`n` rows as a `datasets.Dataset` with columns images, question, answer, task, kind.

    task: one of `TASKS` or `DOMAINS`, a list of them, or "all" for all of `TASKS`. The rows
        alternate between several tasks.
    n: number of rows. seed: any integer. split: "evaluation", or "train" to train on.
    The column images is a list of RGB pictures of SIZE × SIZE pixels: one, two for multi_image, and
    four frames for video.
    Raises TaskError for an unknown task or split, and if `n` is not a positive whole number.
    """
    import datasets

    names = _names(task)
    if split not in SPLITS:
        raise TaskError(
            f"{split!r} is not a split. {did_you_mean(split, SPLITS)}The splits are "
            f"{', '.join(SPLITS)}."
        )
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise TaskError(f"n, the number of rows, must be a positive whole number, and is {n!r}.")
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        **dict.fromkeys(("question", "answer", "task", "kind"), datasets.Value("string")),
    )
    rows = [
        example(names[i % len(names)], i // len(names), seed=seed, split=split) for i in range(n)
    ]
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=features)


def _names(task):
    names = list(TASKS) if task == "all" else [task] if isinstance(task, str) else list(task)
    known = [*TASKS, *DOMAINS]
    for name in names:
        if name not in known:
            raise TaskError(
                f"{name!r} is not a task. {did_you_mean(name, known)}The tasks are "
                f"{', '.join(known)}."
            )
    if not names:
        raise TaskError(f"There is no task in an empty list. The tasks are {', '.join(known)}.")
    return names
