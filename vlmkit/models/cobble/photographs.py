"""Photographs of ten kinds of things, from a folder, parquet files or the hub.

Made for CIFAR-10 (Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images"). Any
photographs of the same ten kinds will do. Each is cropped to a square and reduced to 32 × 32
pixels.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from vlmkit.errors import TaskError, brief, did_you_mean

THINGS = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In the order of CIFAR-10's labels."""

SIDE = 32
HUB = "uoft-cs/cifar10"
_OTHER_NAMES = {"automobile": "car", "aeroplane": "airplane", "plane": "airplane"}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read(source=HUB, split="train", *, skip_broken=False):
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
