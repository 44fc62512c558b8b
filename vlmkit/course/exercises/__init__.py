"""Checks of exercises: an answer in, a sentence out that says "right", or what is wrong.

    vk.course.check("equal cost", 19)

A check computes the right answer from the data that it is given, and names the usual mistakes.
Whatever an answer is, a sentence comes out and no traceback; a name that no exercise has, or data
that one does not take, is an `ExerciseError`. To add an exercise, write a function in the module of
its subject, as the docstring of `answers` says.
"""

import inspect
import textwrap

from vlmkit.course.exercises import (  # noqa: F401, they fill EXERCISES
    architecture,
    learning,
    looking,
    on_cards,
    rounding,
    storage,
)
from vlmkit.course.exercises.answers import EXERCISES, Hint, told
from vlmkit.errors import ExerciseError


def check(name, answer, /, **given):
    """Print "not attempted yet" for None, and otherwise "Right: ..." or "Not yet: ...", with why.

    name: of an exercise; given: the data that it is about. Raises ExerciseError for a name that is
    not in EXERCISES, or data that the exercise does not take.
    """
    print(textwrap.fill(verdict(name, answer, **given), 100, break_on_hyphens=False))


def verdict(name, answer, /, **given):
    """The sentence that `check` prints."""
    if name not in EXERCISES:
        known = ", ".join(sorted(EXERCISES))
        raise ExerciseError(f"there is no exercise {name!r}; there are {known}")
    judge = EXERCISES[name]
    try:
        inspect.signature(judge).bind(answer, **given)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(judge).parameters)[1:]) or "nothing"
        raise ExerciseError(
            f"exercise {name!r} takes {takes} beside the answer; found {', '.join(given)} ({error})"
        ) from None
    if answer is None:
        return f"{name}: not attempted yet"
    try:
        return f"Right: {judge(answer, **given)}"
    except Hint as hint:
        return f"Not yet: {hint}"
    except Exception as error:  # an answer can be anything, and fail anywhere
        return f"Not yet: nothing can be done with this answer ({told(error)})."
