"""Pictures to ask about before you have pictures of your own.

`vlmkit.tasks` drew them in its evaluation split, so pebble was not trained on them. They are among
those that pebble answers correctly: a first example is not a measurement. After a change of a
recipe, `python -m vlmkit.course.pictures` draws them again.
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
        """The same as a row of `vlmkit.tasks`: images, question, answer, task, kind."""
        from vlmkit import tasks

        return tasks.example(self.task, self.index, seed=SEED)


SAMPLES = (
    Sample("shapes", "vqa", 4104, "What color is the circle?", "green"),
    Sample("sign", "ocr", 0, "What does the sign say?", "HAT"),
    Sample("chart", "chart", 0, "Name the color of the highest bar.", "red"),
)
FIRST = SAMPLES[0]
