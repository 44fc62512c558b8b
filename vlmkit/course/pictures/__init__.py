"""Pictures to ask about before you have pictures of your own.

`vlmkit.tasks` drew them in its evaluation split, so pebble was not trained on them. They are among
those that pebble answers correctly: a first example is not a measurement. After a change of a
recipe, `python -m vlmkit.course.pictures` draws them again.

The photographs come with scikit-image.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from vlmkit.errors import DependencyError

SEED = 2024


@dataclass(frozen=True)
class Sample:
    """A picture (`path`, a PNG file), a question about it, and the right answer."""

    name: str
    task: str
    index: int
    question: str
    answer: str

    @property
    def path(self):
        return Path(__file__).parent / f"{self.name}.png"

    def draw(self):
        """The same as a row of `vlmkit.tasks`: images, question, answer, task, kind."""
        from vlmkit import tasks

        return tasks.example(self.task, self.index, seed=SEED)


SAMPLES = (
    Sample("shapes", "vqa", 4104, "What color is the circle?", "green"),
    Sample("sign", "ocr", 0, "What does the sign say?", "HAT"),
    Sample("chart", "chart", 0, "Name the color of the highest bar.", "red"),
)
FIRST = SAMPLES[0]

CAT, CUP = "chelsea.png", "coffee.png"
"""Photographs in scikit-image: a cat, which is one of the ten things that cobble knows, and a cup
of coffee, which is none of them."""
ABOUT_PHOTOGRAPHS = "What is in the picture?"


def photograph(name=CAT):
    """The path of a photograph in scikit-image. Raises DependencyError if it is not installed."""
    if found := importlib.util.find_spec("skimage"):
        path = Path(found.origin).parent / "data" / name
        if path.is_file():
            return path
    raise DependencyError(
        f"The photograph {name} comes with the package scikit-image, which is not installed: "
        "pip install -c constraints.txt scikit-image"
    )


def missing_for_photographs():
    """What to run before cobble can be asked about a photograph, as a sentence; None if both are
    there."""
    from vlmkit.catalog.bundled import BUNDLED

    if not BUNDLED["cobble"].is_current:
        return "To ask cobble about a photograph, fetch it once (93 MB): vlmkit fetch cobble"
    try:
        photograph()
    except DependencyError as error:
        return str(error)
    return None
