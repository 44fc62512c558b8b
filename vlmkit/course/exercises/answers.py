"""What checks of exercises have in common: their list, and how an answer is read.

A check takes the answer and its data by name. It returns a sentence that says what the right answer
shows, or raises a Hint that names the mistake:

    @exercise("two and two")
    def two_and_two(answer, numbers):
        found = whole(answer, "a sum")
        require(found != 22, "these are two digits side by side; add the numbers.")
        require(found == sum(numbers), f"{found} is not their sum.")
        return "adding is no writing side by side."
"""

import contextlib
import math
from numbers import Real

EXERCISES = {}
"""Of each exercise its check, by name; filled by `exercise`."""


class Hint(Exception):
    """Why an answer is not right. Never leaves this package."""


def exercise(name):
    """Put the decorated check into EXERCISES."""

    def put(judge):
        EXERCISES[name] = judge
        return judge

    return put


def require(condition, hint):
    if not condition:
        raise Hint(hint)


def kind(answer):
    return f"a {type(answer).__name__}"


def told(error):
    """An error in one line, whatever it is."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = ""
    return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__


def number(answer, what):
    """`answer` as a number; `what` says what is asked for, with its unit."""
    with contextlib.suppress(Exception):
        answer = answer.item()  # of a tensor, an array or one of NumPy's numbers
    if isinstance(answer, bool) or not isinstance(answer, Real):
        raise Hint(f"what is asked for is {what}; this is {kind(answer)}.")
    if not math.isfinite(answer):
        raise Hint(f"what is asked for is {what}; this is {answer}.")
    return answer


def whole(answer, what, least=1):
    """`answer` as an int of at least `least`."""
    found = number(answer, what)
    if found != int(found):
        raise Hint(f"what is asked for is {what}, a whole number; this is {found}.")
    if found < least:
        raise Hint(f"what is asked for is {what}, {least} or more; this is {int(found)}.")
    return int(found)


def plan(answer):
    """`answer`, if it is a vk.Plan."""
    from vlmkit.plan import Plan

    if not isinstance(answer, Plan):
        raise Hint(f"what is asked for is a vk.Plan, such as vk.Plan(); this is {kind(answer)}.")
    return answer


def called(function, *arguments):
    """What the answer, a function or module, returns; an error inside it becomes a Hint."""
    if isinstance(function, type):
        raise Hint(f"this is the class {function.__name__}; give an object made of it.")
    if not callable(function):
        raise Hint(f"what is asked for is a function; this is {kind(function)}.")
    try:
        return function(*arguments)
    except Exception as error:
        raise Hint(f"your function stops with {told(error)}.") from None
