"""All pictures that cobble learns from, decoded once and written as arrays.

Photographs, handwriting and easy-VQA come from `vlmkit.tasks.real`. Drawings are made here.
"""

import concurrent.futures
import json
import os
import shutil

import numpy as np
import torch

from vlmkit import tasks
from vlmkit.models.pebble import batches
from vlmkit.tasks import real

DRAWINGS = 24_000


def prepare_pictures(folder, source, workers=0):
    """Write all pictures to folder/pictures, unless they are there. Returns nothing.

    source: of the photographs, see `tasks.real.read_photographs`, with its errors. workers:
        processes that draw.

    The folder appears when everything is in it. So a kill leaves nothing that looks finished.
    """
    if (folder / "pictures").is_dir():
        return
    part = folder / "pictures.part"
    shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
    part.mkdir(parents=True)
    for split in ("train", "test"):
        _write(part, f"photographs-{split}", *real.read_photographs(source, split))
        _write(part, f"digits-{split}", *real.read_digits(split))
    drawings = _in_processes(draw, range(DRAWINGS), workers)
    _write(part, "drawings-train", np.stack([d[0] for d in drawings]))
    np.save(part / "drawings-marks.npy", np.stack([d[1] for d in drawings]))
    write_json(part / "drawings-questions.json", [d[2] for d in drawings])
    for split in ("train", "test"):
        pictures, questions = real.read_easy_vqa(split)
        _write(part, f"easy_vqa-{split}", pictures)
        write_json(part / f"easy_vqa-{split}-questions.json", questions)
    os.replace(part, folder / "pictures")


def _write(folder, name, pictures, labels=None):
    """pictures: (n, height, width, 3). They are stored as (n, 3, height, width)."""
    np.save(folder / f"{name}.npy", np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    if labels is not None:
        np.save(folder / f"{name}-labels.npy", labels)


def write_json(file, rows):
    file.write_text(json.dumps(rows), encoding="utf-8")


def _in_processes(function, items, workers):
    if not workers:
        return [function(item) for item in items]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, items, chunksize=200))


def draw(index):
    """One drawing for training: (pixels, dense targets, [[kind, question, answer], ...]).

    The pixels are (height, width, 3) uint8. The dense targets are those of pebble's vision encoder
    (`batches.dense_targets`): what is in each of the 49 patches.
    """
    rng = tasks.generator("train", "cobble", index)
    picture = tasks.RECIPES["vqa"].draw(rng)
    asked = []
    for name in ("vqa", "caption"):
        for kind in tasks.KINDS[name]:
            found = [tasks.RECIPES[name].ask(kind, picture, rng) for _ in range(3)]
            asked += [[kind, *pair] for pair in found if pair]
    return picture.frames[0], batches.dense_targets(picture.marks[0]), asked


class Arrays:
    """The arrays of `prepare_pictures` as tensors on a device, and its questions, by name:

    photographs-train, -test           (n, 3, 32, 32) uint8; -labels: (n,) int64, see real.THINGS
    digits-train, -test                (n, 3, 8, 8) uint8;   -labels: (n,) int64
    drawings-train                     (n, 3, 84, 84) uint8
    drawings-marks                     (n, 5, 49) int64: `batches.TARGETS` of each patch
    drawings-questions                 a list of [kind, question, answer] for each drawing
    easy_vqa-train, -test              (n, 3, 64, 64) uint8
    easy_vqa-train-questions, -test-   a list of [question, answer] for each picture

    Each is read when it is first asked for.
    """

    def __init__(self, folder, device):
        self.folder, self.device, self._known = folder / "pictures", device, {}

    def __getitem__(self, name):
        if name not in self._known:
            if (file := self.folder / f"{name}.npy").exists():
                self._known[name] = torch.from_numpy(np.load(file)).to(self.device)
            else:
                text = (self.folder / f"{name}.json").read_text(encoding="utf-8")
                self._known[name] = json.loads(text)
        return self._known[name]
