"""What every task is made of: pictures with their facts, and questions about the facts."""

import dataclasses
import functools
import random

import numpy as np

NONE = "none"
"""The right answer to a question about something that is not in the picture."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """What is at one place of one frame. The vision encoder is pretrained to predict it.

    what: a shape, a printed character or "bar". value: the height of a bar, else 0.
    """

    x: int
    y: int
    what: str
    color: str
    value: int = 0


@dataclasses.dataclass
class Drawing:
    """One drawn example: `frames`, each (SIZE, SIZE, 3) uint8; the `facts` that the questions are
    about; and the marks of each frame."""

    frames: list[np.ndarray]
    facts: object
    marks: list[list[Mark]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the rows of a task are made.

    draw: a function of a random generator that returns a Drawing.
    kinds: {kind of question: function}, each made by `phrased`.
    describe: a function of the facts that returns, in words, everything that the picture shows.
    """

    name: str
    draw: object
    kinds: dict
    describe: object

    def ask(self, kind, picture, rng):
        """(question, answer), or None if this kind of question does not fit the picture."""
        return self.kinds[kind](picture.facts, rng)

    def example(self, kind, rng):
        """(picture, question, answer). Draws pictures until one fits this kind of question."""
        while True:
            picture = self.draw(rng)
            asked = self.ask(kind, picture, rng)
            if asked is not None:
                return picture, *asked


def phrased(*phrasings):
    """A decorator that makes one kind of question: it adds the phrasings to a function that finds
    the answer.

    The function takes (facts, rng) and returns the answer and {slot: text} for the slots of the
    phrasings, or None if the question does not fit the facts. With its phrasings it returns
    (question, answer). The phrasing is drawn last. pebble's training data depends on that order.
    """

    def decorate(answer_of):
        @functools.wraps(answer_of)
        def ask(facts, rng):
            found = answer_of(facts, rng)
            if found is None:
                return None
            answer, slots = found
            return rng.choice(phrasings).format(**slots), answer

        return ask

    return decorate


def generator(*key):
    """A random generator that depends on `key` alone, on any machine and in any order.

    Python promises that `random.Random` of a string is the same in every version (the string is
    hashed with SHA-512), and that `random()` and `getrandbits` do not change.
    """
    return random.Random("/".join(str(part) for part in key))


def article(noun):
    """The noun with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listing(parts):
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def balanced(rng, values_of):
    """(answer, value), where every answer is equally likely. values_of: {answer: its values}.

    Answers without values are left out. A plain draw among all values would favor the answer that
    has the most values: most counts of a color, for example, would be 1.
    """
    answer = rng.choice([answer for answer, values in values_of.items() if values])
    return answer, rng.choice(values_of[answer])
