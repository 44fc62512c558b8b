"""Checks of exercises: an answer in, a sentence out that says "right", or what is wrong.

    vk.course.check("equal cost", 19)

A check computes the right answer from the data that it gets, and names the usual mistakes. Any
answer gives a sentence and never a traceback. To add an exercise, write a function in the module of
its subject, as the docstring of `answers` shows.

For a teacher: `check` returns a `CheckedAnswer`, and can write it into a file of scores.
"""

import dis
import hashlib
import inspect
import os
import textwrap
import types
from dataclasses import dataclass

from vlmkit.course.exercises import (  # noqa: F401, they fill EXERCISES
    architecture,
    few_bits,
    inputs,
    learning,
    rounding,
    seeing,
    storage,
)
from vlmkit.course.exercises.answers import EXERCISES, Hint
from vlmkit.errors import ExerciseError, brief, did_you_mean


@dataclass(frozen=True)
class CheckedAnswer:
    """What `check` says of an answer. It is true if the answer is right.

    name: of the exercise. right: True, False, or None if there was no attempt. text: the sentence
    that was printed.
    """

    name: str
    right: bool | None
    text: str

    @property
    def points(self):
        """1 for a right answer, else 0."""
        return int(bool(self.right))

    def __bool__(self):
        return bool(self.right)

    def __str__(self):
        return textwrap.fill(self.text, 100, break_on_hyphens=False)

    def _ipython_display_(self):
        """Nothing: a notebook shows the sentence that `check` has printed, and no second line."""


def check(name, answer, /, *, scores=None, **given):
    """Print "not attempted yet" for a stub, otherwise "Right: ..." or "Not yet: ...", with why.
    Returns this `CheckedAnswer`.

    name: of an exercise. given: the data that it is about. scores: a file to write the verdict
    into, .json or .csv (see `scores.record`); by default the one that the environment variable
    VLMKIT_SCORES names, else none. Raises ExerciseError for a name that is not in EXERCISES, for
    data that the exercise does not take, and if the verdict cannot be written.
    """
    found = verdict(name, answer, **given)
    print(found)
    path = scores or os.environ.get("VLMKIT_SCORES")
    if path:
        from vlmkit.course.exercises.scores import record

        record(path, found)
    return found


def seed(student=None):
    """A seed for the data of one student, from 1 to 2**31 - 1. Students with different names get
    different data, so a number cannot be copied from another student.

    student: a name or number. By default the value of the environment variable VLMKIT_STUDENT.
    Without both, the seed is 0, that of the stored outputs. Upper and lower case and spaces at the
    ends do not count.

        rows = vk.tasks.dataset("vqa", n=100, seed=vk.course.seed("Ada Lovelace"))
    """
    student = os.environ.get("VLMKIT_STUDENT", "") if student is None else student
    name = str(student).strip().casefold()
    if not name:
        return 0
    return 1 + int(hashlib.sha256(name.encode()).hexdigest(), 16) % (2**31 - 1)


def attempted(answer):
    """Whether an answer is more than its stub: None, or a function without a body."""
    if type(answer) is not types.FunctionType:
        return answer is not None
    steps = list(dis.get_instructions(answer))
    gives_none = any(step.opname.endswith("_CONST") and step.argval is None for step in steps)
    return len(steps) > 3 or not gives_none  # a body without statements only returns None


def verdict(name, answer, /, **given):
    """The `CheckedAnswer` that `check` prints."""
    if name not in EXERCISES:
        raise ExerciseError(
            f"{name!r} is not an exercise. {did_you_mean(name, EXERCISES)}The exercises are "
            f"{', '.join(sorted(EXERCISES))}."
        )
    judge = EXERCISES[name]
    try:
        inspect.signature(judge).bind(answer, **given)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(judge).parameters)[1:]) or "nothing"
        raise ExerciseError(
            f"The exercise {name!r} takes {takes} beside the answer, not "
            f"{', '.join(given) or 'nothing'} ({error})."
        ) from None
    if not attempted(answer):
        return CheckedAnswer(name, None, f"{name}: not attempted yet")
    try:
        return CheckedAnswer(name, True, f"Right: {judge(answer, **given)}")
    except Hint as hint:
        return CheckedAnswer(name, False, f"Not yet: {hint}")
    except Exception as error:  # an answer can be anything, and fail anywhere
        why = f"Not yet: this answer cannot be checked ({brief(error)})."
        return CheckedAnswer(name, False, why)
