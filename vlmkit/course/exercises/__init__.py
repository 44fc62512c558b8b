"""Checks of exercises: an answer in, a sentence out that says "right", or what is wrong.

    vk.course.check("equal cost", 19)

A check computes the right answer from the data that it gets, and names the usual mistakes. Any
answer gives a sentence and never a traceback. To add an exercise, write a function in the module of
its subject, as the docstring of `answers` shows.
"""

import dis
import inspect
import textwrap
import types

from vlmkit.course.exercises import (  # noqa: F401, they fill EXERCISES
    architecture,
    few_bits,
    inputs,
    learning,
    rounding,
    storage,
)
from vlmkit.course.exercises.answers import EXERCISES, Hint
from vlmkit.errors import ExerciseError, brief, did_you_mean


def check(name, answer, /, **given):
    """Print "not attempted yet" for a stub, otherwise "Right: ..." or "Not yet: ...", with why.

    name: of an exercise. given: the data that it is about. Raises ExerciseError for a name that is
    not in EXERCISES, or for data that the exercise does not take.
    """
    print(textwrap.fill(verdict(name, answer, **given), 100, break_on_hyphens=False))


def attempted(answer):
    """Whether an answer is more than its stub: None, or a function without a body."""
    if type(answer) is not types.FunctionType:
        return answer is not None
    steps = list(dis.get_instructions(answer))
    gives_none = any(step.opname.endswith("_CONST") and step.argval is None for step in steps)
    return len(steps) > 3 or not gives_none  # a body without statements only returns None


def verdict(name, answer, /, **given):
    """The sentence that `check` prints."""
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
        return f"{name}: not attempted yet"
    try:
        return f"Right: {judge(answer, **given)}"
    except Hint as hint:
        return f"Not yet: {hint}"
    except Exception as error:  # an answer can be anything, and fail anywhere
        return f"Not yet: this answer cannot be checked ({brief(error)})."
