"""Pictures that nobody drew for this course: photographs, handwriting, and easy-VQA.

Photographs are of ten kinds of things, and come from a folder, parquet files or the hub: CIFAR-10
(Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images"), or others of the same
ten. Handwriting is scikit-learn's copy of the UCI digits. easy-VQA is a published data set of
questions about simple shapes; the package easy-vqa has it.
"""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from vlmkit import images
from vlmkit.errors import ImageError, TaskError, brief, did_you_mean

THINGS = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of CIFAR-10's labels."""

DIGITS = tuple("0123456789")
DIGITS_HELD_OUT = 597
SIDE = 32
HUB = "uoft-cs/cifar10"
HALVES = ("train", "test")
_OTHER_NAMES = {"automobile": "car", "aeroplane": "airplane", "plane": "airplane"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_photographs(source=HUB, split="train", *, skip_broken=False):
    """(pictures, labels) of one split: (n, 32, 32, 3) uint8, and (n,) int64 indices of THINGS.

    source: a folder with a folder for each split ("train", "test") and in it a folder for each
        thing, named as in THINGS; or a folder with parquet files whose names begin with the split
        (columns img or image, and label); or the id of such a data set on the hub. A label is a
        name, or a number: by the names that the file gives the numbers, or else by THINGS.
    skip_broken: leave out files that are no pictures. Otherwise they are an error that names them.

    A picture is read as `vlmkit.images.read` does it. Its middle square is kept, at 32 × 32 pixels.
    In the folder of a thing, files whose names do not end as those of pictures are not read.

    Raises TaskError if the source is not there or has another form, if one of THINGS is missing,
    for a label that is none of THINGS, and for broken files.
    """
    _require_half(split)
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
    elif folder.exists() or not _HUB_ID.fullmatch(str(source)):
        raise TaskError(
            f"{folder} is not a folder. Give a folder with photographs, or a data set on the hub, "
            f"such as {HUB}."
        )
    else:
        found = _on_hub(str(source), split)
    pictures, labels, broken = [], [], []
    for name, content, label in found:
        try:
            pictures.append(_square(images.read(content)))
            labels.append(label)
        except ImageError as error:
            broken.append(str(error) if content is name else f"{name}: {error}")
    if broken and not skip_broken:
        raise TaskError(
            f"{len(broken)} of {len(broken) + len(pictures)} pictures in {source} cannot be read. "
            f"{' '.join(broken[:3])} Remove such files, or leave them out: skip_broken=True."
        )
    there = set(labels)
    missing = [thing for i, thing in enumerate(THINGS) if i not in there]
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
    _require_half(split)
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
    _require_half(split)
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


def photographs(source=HUB, n=100, seed=0, split="evaluation", *, skip_broken=False):
    """`n` rows about photographs as a `datasets.Dataset`, with the columns of `tasks.dataset`. The
    answer is one of THINGS. source, skip_broken: see `read_photographs`, with its errors."""
    pictures, labels = read_photographs(source, _half(split), skip_broken=skip_broken)
    question = "What is in the picture? Answer in one word."
    pairs = [[(question, THINGS[i])] for i in labels]
    return _rows(pictures, pairs, "photographs", "name", n, seed)


def handwriting(n=100, seed=0, split="evaluation"):
    """`n` rows about handwritten digits as a `datasets.Dataset`, with the columns of
    `tasks.dataset`. The answer is the digit. See `read_digits`, with its errors."""
    pictures, labels = read_digits(_half(split))
    question = "Which digit is this? Answer with the digit alone."
    pairs = [[(question, DIGITS[i])] for i in labels]
    return _rows(pictures, pairs, "handwriting", "digit", n, seed)


def easy_vqa(n=100, seed=0, split="evaluation"):
    """`n` rows of easy-VQA as a `datasets.Dataset`, with the columns of `tasks.dataset`. See
    `read_easy_vqa`, with its errors."""
    pictures, questions = read_easy_vqa(_half(split))
    return _rows(pictures, questions, "easy_vqa", "published", n, seed)


def _half(split):
    """The half of published data that a split of `tasks.dataset` is."""
    halves = {"train": "train", "evaluation": "test"}
    if split not in halves:
        raise TaskError(
            f"{split!r} is not a split. {did_you_mean(split, halves)}The splits are "
            f"{', '.join(halves)}."
        )
    return halves[split]


def _require_half(split):
    if split not in HALVES:
        raise TaskError(
            f"{split!r} is not a half of published data. {did_you_mean(split, HALVES)}The halves "
            f"are {', '.join(HALVES)}."
        )


def _rows(pictures, pairs, task, kind, n, seed):
    """pairs: [(question, answer), ...] for each picture."""
    import datasets

    flat = [(i, *pair) for i, of_one in enumerate(pairs) for pair in of_one]
    if isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= len(flat):
        raise TaskError(f"n, the number of rows, must be from 1 to {len(flat):,}, and is {n!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise TaskError(f"seed must be a whole number from 0, and is {seed!r}.")
    chosen = np.random.default_rng(seed).permutation(len(flat))[:n]
    owners, questions, answers = zip(*(flat[i] for i in chosen), strict=True)
    columns = {
        "images": [[Image.fromarray(pictures[i])] for i in owners],
        "question": questions,
        "answer": answers,
        "task": [task] * n,
        "kind": [kind] * n,
    }
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        **dict.fromkeys(("question", "answer", "task", "kind"), datasets.Value("string")),
    )
    return datasets.Dataset.from_dict(columns, features=features)


def _index(label, names, where):
    """The index in THINGS of a label: a name, or a number that stands for one of `names`."""
    if isinstance(label, str):
        name = label.strip().lower()
        name = _OTHER_NAMES.get(name, name)
        if name in THINGS:
            return THINGS.index(name)
    elif isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return _index(names[label], names, where)
    raise TaskError(
        f"{where}: {label!r} is none of the ten things. {did_you_mean(label, THINGS)}They are "
        f"{', '.join(THINGS)}, or the numbers 0 to {len(names) - 1}."
    )


def _in_folders(folder):
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for thing in sorted(path for path in folder.iterdir() if path.is_dir()):
        if thing.name.startswith("."):  # of an operating system or an editor
            continue
        label = _index(thing.name, THINGS, thing)
        for file in sorted(thing.iterdir()):
            if file.suffix.lower() in known and not file.name.startswith("."):
                yield file, file, label


def _in_parquet(files):
    from pyarrow import parquet

    for file in files:
        try:
            table = parquet.read_table(file)
        except Exception as error:  # pyarrow's and the disk's
            raise TaskError(f"{file} cannot be read as parquet: {brief(error)}") from error
        column = _picture_column(table.column_names, file)
        names = _names_in(table.schema) or THINGS
        pairs = zip(table[column].to_pylist(), table["label"].to_pylist(), strict=True)
        for i, (picture, label) in enumerate(pairs):
            where = f"{file}, row {i}"
            yield where, _undecoded(picture), _index(label, names, where)


def _names_in(schema):
    """The names of the labels that `datasets` has written into a parquet file, or None."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        return described["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _on_hub(name, split):
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's, httpx's, a proxy's and the disk's
        raise TaskError(
            f"{name!r} is not a folder here, and as a data set on the hub it cannot be read: "
            f"{brief(error)}. Give a folder with the photographs."
        ) from error
    column = _picture_column(rows.column_names, name)
    names = getattr(rows.features["label"], "names", None) or THINGS
    for i, row in enumerate(images.undecoded(rows)):
        where = f"{name}, row {i}"
        yield where, _undecoded(row[column]), _index(row["label"], names, where)


def _picture_column(columns, source):
    column = next((name for name in ("img", "image") if name in columns), None)
    if column is None or "label" not in columns:
        raise TaskError(
            f"{source} has the columns {', '.join(columns)}. A column img or image and a column "
            "label are needed."
        )
    return column


def _undecoded(picture):
    """A stored picture as `images.read` takes it: the bytes of a file, or what it is."""
    if isinstance(picture, dict):
        return {"bytes": picture.get("bytes"), "path": picture.get("path")}
    return {"bytes": picture, "path": None} if isinstance(picture, bytes) else picture


def _square(picture):
    """(32, 32, 3) uint8: the middle square of an RGB picture, resized."""
    if picture.size != (SIDE, SIDE):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
    return np.asarray(picture)
