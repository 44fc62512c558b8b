"""A project to begin with: ten pictures, their rows, a training file and a notebook.

    vlmkit new my-task

pebble knows the shapes in these pictures, and nobody has asked it about corners: ten rows can teach
it a new answer about what it sees already. A student replaces the pictures and the rows.

The files beside this one are copied as they are, except for the name of the model in train.yaml.
"""

import json
import shutil
from pathlib import Path

import yaml

from vlmkit.checkpoints import find
from vlmkit.folders import whole_folder
from vlmkit.tasks.drawing import COLORS, to_image
from vlmkit.tasks.questions import generator
from vlmkit.tasks.scenes import CELLS, paint, random_thing

COPIED = ("README.md", "task.ipynb")
MODEL = "model: pebble"
"""The line of train.yaml that names the model."""

CORNERS = {"circle": 0, "triangle": 3, "square": 4, "diamond": 4, "ring": 0}
QUESTION = "How many corners does the shape have?"
PARTS = {"train": ("pictures", 10), "held_out": ("held_out", 20)}
"""{name of the file with the rows: (folder with its pictures, their number)}."""


def write(path, model="pebble"):
    """Write the project to the new folder `path`. Returns its pathlib.Path.

    model: what train.yaml names: as `vk.load` takes it. The path of a folder is written in full,
    because the project is used from another directory.

    The whole folder appears at once, or nothing. Raises CheckpointError if there is no such model,
    or if `path` is taken (a folder may be there if it is empty) or cannot be written.
    """
    folder = find(model, weights=False)
    if folder.resolve() == Path(model).expanduser().resolve():
        model = folder.resolve()
    here, path = Path(__file__).parent, Path(path)
    with whole_folder(path, overwrite=None) as new:
        for name in COPIED:
            shutil.copyfile(here / name, new / name)
        named = yaml.safe_dump({"model": str(model)}, allow_unicode=True, width=10**6).strip()
        text = (here / "train.yaml").read_text(encoding="utf-8").replace(MODEL, named, 1)
        (new / "train.yaml").write_text(text, encoding="utf-8")
        for part, (pictures, count) in PARTS.items():
            (new / pictures).mkdir()
            lines = [_drawn(new, part, pictures, number) for number in range(count)]
            (new / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return path.expanduser().resolve()


def _drawn(folder, part, pictures, number):
    """Draw a picture into `folder`. Returns its row, a line of JSON."""
    rng = generator("project", part, number)
    shape = list(CORNERS)[number % len(CORNERS)]
    color, place = rng.choice(list(COLORS)), (rng.randrange(CELLS), rng.randrange(CELLS))
    image = f"{pictures}/{number + 1:02}.png"
    to_image(paint([random_thing(rng, *place, shape, color)], rng)).save(folder / image)
    row = {"image": image, "question": QUESTION, "answer": str(CORNERS[shape])}
    return json.dumps(row) + "\n"
