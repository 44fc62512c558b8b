"""Pictures to ask about before there are any of one's own.

`vlmkit.tasks` drew them from its evaluation split, so pebble was not trained on them. They are
among those that it answers rightly: a first example is no measurement.
`python -m vlmkit.course.pictures` draws them anew, where a recipe has changed.
"""

from dataclasses import dataclass
from pathlib import Path

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
        """The row of `vlmkit.tasks` that this is: images, question, answer, task, kind."""
        from vlmkit import tasks

        return tasks.example(self.task, self.index, seed=SEED)


SAMPLES = (
    Sample("shapes", "vqa", 4104, "What color is the circle?", "green"),
    Sample("sign", "ocr", 0, "What does the sign say?", "HAT"),
    Sample("chart", "chart", 0, "Name the color of the highest bar.", "red"),
)
FIRST = SAMPLES[0]
