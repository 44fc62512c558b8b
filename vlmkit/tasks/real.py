"""Pictures that nobody drew for this course: photographs, handwriting, and easy-VQA.

Photographs are of ten kinds of things, and come from a folder, parquet files or the hub: CIFAR-10
(Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images"), or others of the same
ten. Handwriting is scikit-learn's copy of the UCI digits. easy-VQA is a published data set of
questions about simple shapes; the package easy-vqa has it.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vlmkit.errors import TaskError, brief, did_you_mean

THINGS = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of CIFAR-10's labels."""

DIGITS = tuple("0123456789")
DIGITS_HELD_OUT = 597
SIDE = 32
HUB = "uoft-cs/cifar10"
_OTHER_NAMES = {"automobile": "car", "aeroplane": "airplane", "plane": "airplane"}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_photographs(source=HUB, split="train", *, skip_broken=False):
    """(pictures, labels) of one split: (n, 32, 32, 3) uint8, and (n,) int64 indices of THINGS.

    source: a folder with a folder for each split ("train", "test") and in it a folder for each
        thing, named as in THINGS; or a folder with parquet files whose names begin with the split
        (columns img or image, and label); or the id of such a data set on the hub.
    skip_broken: leave out files that are no pictures. Otherwise they are an error that names them.

    Raises TaskError if the source is not there or has another form, if one of THINGS is missing,
    and for broken files.
    """
    folder = Path(source).expanduser()
    if (folder / split).is_dir():
        found = _in_folders(folder / split)
    elif files := sorted(folder.glob(f"{split}*.parquet")):
        found = _in_parquet(files)
    elif folder.is_dir():
        raise TaskError(
            f"{folder} has neither a folder {split!r} nor parquet files whose names begin with "
            f"{split!r}. Photographs are expected as {split}/cat/1.png or {split}.parquet."
        )
    else:
        found = _on_hub(str(source), split)
    pictures, labels, broken = [], [], []
    for name, content, label in found:
        try:
            pictures.append(_square(content))
            labels.append(label)
        except Exception as error:  # Pillow has many errors for a damaged file
            broken.append(f"{name} ({brief(error)})")
    if broken and not skip_broken:
        raise TaskError(
            f"{len(broken)} of {len(broken) + len(pictures)} files in {source} are no pictures: "
            f"{', '.join(broken[:3])}. Remove them, or leave them out: skip_broken=True."
        )
    missing = [thing for i, thing in enumerate(THINGS) if i not in set(labels)]
    if missing:
        raise TaskError(
            f"{source} has no photographs of {', '.join(missing)} for {split!r}. cobble learns ten "
            f"things: {', '.join(THINGS)}."
        )
    return np.stack(pictures), np.array(labels, dtype=np.int64)


def read_digits(split="train"):
    """(pictures, labels) of scikit-learn's handwritten digits as dark ink on white paper:
    (n, 8, 8, 3) uint8 and (n,) int64. split: "train" (1,200), or "test", the last 597.

    Raises TaskError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise _missing("handwriting", "scikit-learn") from error
    digits = load_digits()
    gray = (255 - digits.images * 255 / 16).round().astype(np.uint8)
    half = slice(-DIGITS_HELD_OUT) if split == "train" else slice(-DIGITS_HELD_OUT, None)
    return np.repeat(gray[..., None], 3, axis=-1)[half], digits.target.astype(np.int64)[half]


def read_easy_vqa(split="train"):
    """(pictures, questions) of a half of easy-VQA: (n, 64, 64, 3) uint8, and for each picture its
    [question, answer] pairs. split: "train" (4,000 pictures) or "test" (1,000).

    Raises TaskError if the package easy-vqa is not installed.
    """
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise _missing("easy-VQA", "easy-vqa") from error
    questions, answers, owners = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    pictures = [np.asarray(Image.open(paths[key]).convert("RGB")) for key in sorted(paths)]
    rows = {key: [] for key in sorted(paths)}
    for question, answer, owner in zip(questions, answers, owners, strict=True):
        rows[owner].append([question, answer])
    return np.stack(pictures), list(rows.values())


def _missing(data, package):
    return TaskError(
        f"{data} comes with the package {package}, which is not installed: pip install {package}"
    )


def photographs(source=HUB, n=100, seed=0, split="evaluation"):
    """`n` rows about photographs as a `datasets.Dataset`, with the columns of `tasks.dataset`. The
    answer is one of THINGS. source: see `read_photographs`, with its errors."""
    pictures, labels = read_photographs(source, _half(split))
    question = "What is in the picture? Answer in one word."
    return _rows(pictures, [(question, THINGS[i]) for i in labels], "photographs", "name", n, seed)


def handwriting(n=100, seed=0, split="evaluation"):
    """`n` rows about handwritten digits as a `datasets.Dataset`, with the columns of
    `tasks.dataset`. The answer is the digit. See `read_digits`, with its errors."""
    pictures, labels = read_digits(_half(split))
    question = "Which digit is this? Answer with the digit alone."
    return _rows(pictures, [(question, DIGITS[i]) for i in labels], "handwriting", "digit", n, seed)


def easy_vqa(n=100, seed=0, split="evaluation"):
    """`n` rows of easy-VQA as a `datasets.Dataset`, with the columns of `tasks.dataset`. See
    `read_easy_vqa`, with its errors."""
    pictures, questions = read_easy_vqa(_half(split))
    flat = [(i, pair) for i, pairs in enumerate(questions) for pair in pairs]
    pictures, pairs = pictures[[i for i, _ in flat]], [pair for _, pair in flat]
    return _rows(pictures, pairs, "easy_vqa", "published", n, seed)


def _half(split):
    if split not in ("train", "evaluation"):
        raise TaskError(f"{split!r} is not a split. The splits are train, evaluation.")
    return "test" if split == "evaluation" else "train"


def _rows(pictures, pairs, task, kind, n, seed):
    import datasets

    if isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= len(pairs):
        raise TaskError(f"n, the number of rows, must be from 1 to {len(pairs):,}, and is {n!r}.")
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:n]
    columns = {
        "images": [[Image.fromarray(pictures[i])] for i in chosen],
        "question": [pairs[i][0] for i in chosen],
        "answer": [pairs[i][1] for i in chosen],
        "task": [task] * n,
        "kind": [kind] * n,
    }
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        **dict.fromkeys(("question", "answer", "task", "kind"), datasets.Value("string")),
    )
    return datasets.Dataset.from_dict(columns, features=features)


def _index(name):
    """The index of a thing by its name."""
    name = _OTHER_NAMES.get(name.lower(), name.lower())
    if name not in THINGS:
        raise TaskError(
            f"{name!r} is none of the ten things. {did_you_mean(name, THINGS)}They are "
            f"{', '.join(THINGS)}."
        )
    return THINGS.index(name)


def _in_folders(folder):
    for thing in sorted(path for path in folder.iterdir() if path.is_dir()):
        label = _index(thing.name)
        for file in sorted(thing.iterdir()):
            if file.suffix.lower() in _PICTURES:
                yield file, file, label


def _in_parquet(files):
    import pandas

    for file in files:
        table = pandas.read_parquet(file)
        column = next((name for name in ("img", "image") if name in table), None)
        if column is None or "label" not in table:
            raise TaskError(
                f"{file} has the columns {', '.join(table)}. A column img or image and a column "
                "label are needed."
            )
        for i, (picture, label) in enumerate(zip(table[column], table["label"], strict=True)):
            content = picture["bytes"] if isinstance(picture, dict) else picture
            index = _index(label) if isinstance(label, str) else int(label)
            yield f"{file}, row {i}", io.BytesIO(content), index


def _on_hub(name, split):
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's, httpx's, a proxy's and the disk's
        raise TaskError(
            f"{name!r} is not a folder here, and as a data set on the hub it cannot be read: "
            f"{brief(error)}. Give a folder with the photographs."
        ) from error
    column = "img" if "img" in rows.column_names else "image"
    names = rows.features["label"].names
    for i, row in enumerate(rows):
        yield f"{name}, row {i}", row[column], _index(names[row["label"]])


def _square(content):
    """(32, 32, 3) uint8: the middle square of a picture, reduced."""
    picture = content if isinstance(content, Image.Image) else Image.open(content)
    picture = picture.convert("RGB")
    if picture.size != (SIDE, SIDE):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
    return np.asarray(picture)
