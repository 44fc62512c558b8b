"""What every task recipe is made of: a picture with its facts, and questions about the facts."""

import dataclasses
import random

import numpy as np

NONE = "none"
"""The honest answer to a question about something that is not there."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """What the vision encoder could say about one place of one frame: its pretraining target.

    `what` is a shape, a printed character or "bar"; `value` is the height of a bar, else 0.
    """

    x: int
    y: int
    what: str
    color: str
    value: int = 0


@dataclasses.dataclass
class Picture:
    """One drawn example: `frames` of (SIZE, SIZE, 3) uint8, the `facts` that questions are asked
    of, and per frame its marks."""

    frames: list[np.ndarray]
    facts: object
    marks: list[list[Mark]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A task: `draw(rng)` gives a Picture; each of `kinds` maps (facts, rng) to (question, answer),
    or to None where that question cannot be asked of those facts; `describe(facts)` says in words
    all that the picture shows."""

    name: str
    draw: object
    kinds: dict
    describe: object

    def ask(self, kind, picture, rng):
        return self.kinds[kind](picture.facts, rng)

    def example(self, kind, rng):
        """Draw until a question of this `kind` can be asked: (picture, question, answer)."""
        while True:
            picture = self.draw(rng)
            asked = self.ask(kind, picture, rng)
            if asked is not None:
                return picture, *asked


def generator(*key):
    """A random generator that depends on nothing but `key`, on any machine and in any order.

    Python promises that a string seeds `random.Random` the same in every version (it is hashed
    with SHA-512), and that `random()` and `getrandbits` stay as they are.
    """
    return random.Random("/".join(str(part) for part in key))


def article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listing(parts):
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def balanced(rng, choices):
    """One value, each *answer* equally likely: `choices` maps an answer to the values that give it.

    Answers without values are passed over. Without this, most counts of a color would be 1.
    """
    answer = rng.choice([answer for answer, values in choices.items() if values])
    return answer, rng.choice(choices[answer])
