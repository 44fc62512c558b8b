"""What the checks of exercises share: their list, reading an answer, and naming a mistake.

A check gets the answer, already read, and its data by name. It returns a sentence on what the right
answer shows, or raises a Hint that names the mistake:

    @exercise("two and two", whole, "a sum")
    def two_and_two(found, numbers):
        require(found != 22, "these are two digits side by side; add the numbers.")
        require(found == sum(numbers), f"{found} is not their sum.")
        return "adding is not writing side by side."
"""

import contextlib
import functools
import math
import operator
from decimal import Decimal
from numbers import Real

from vlmkit.errors import brief
from vlmkit.units import GIGABYTE, MEGABYTE

EXERCISES = {}
"""The check of each exercise, by its name. `exercise` fills it."""


class Hint(Exception):
    """Why an answer is not right. Never leaves this package."""


def exercise(name, read, *what, **options):
    """Put the decorated check into EXERCISES. It gets read(answer, *what, **options)."""

    def put(check):
        @functools.wraps(check)
        def judge(answer, **given):
            return check(read(answer, *what, **options), **given)

        EXERCISES[name] = judge
        return check

    return put


# --- naming a mistake -----------------------------------------------------------------------------


def require(condition, hint):
    if not condition:
        raise Hint(hint)


def reject(found, mistakes, same=operator.eq):
    """Raise the hint of the mistake that the answer is. mistakes: {wrong answer: hint}."""
    for wrong, hint in mistakes.items():
        require(not same(found, wrong), hint)


def known(names, there, what):
    """Require that each of `names` is one of `there`."""
    strange = ", ".join(str(name) for name in names if name not in there)
    require(not strange, f"no {what} here is {strange}; there are {', '.join(there)}.")


def below(ledger, budget, hint):
    """The size of a `Ledger` in words, if it is below the budget in bytes."""
    unit, size = ("GB", GIGABYTE) if budget >= GIGABYTE else ("MB", MEGABYTE)
    needed = f"{ledger.total / size:.2f} {unit}"
    require(ledger.total < budget, f"it needs {needed}, the budget is {budget / size:g}. {hint}")
    return needed


# --- reading an answer ----------------------------------------------------------------------------


def kind(answer):
    name = type(answer).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def of_type(answer, types, what):
    """`answer`, if it is of one of `types`; `what` says what the exercise asks for. Where a list is
    asked for, an array, a Series or a tensor is one too."""
    if isinstance(types, tuple) and list in types:
        with contextlib.suppress(Exception):
            answer = answer.tolist()
    require(isinstance(answer, types), f"the answer should be {what}; this is {kind(answer)}.")
    return answer


def number(answer, what):
    """`answer` as a finite int or float."""
    with contextlib.suppress(Exception):
        answer = answer.item()  # of a tensor, an array or one of NumPy's numbers
    require(answer is not None, f"this is None, not {what}: is the `return` missing?")
    require(not isinstance(answer, str), f"the answer should be {what}, without quotes.")
    real = isinstance(answer, (Real, Decimal)) and not isinstance(answer, bool)
    if real and not isinstance(answer, int):
        answer = float(answer)  # of a Fraction or a Decimal, too
    found = answer if real else kind(answer)
    require(real and math.isfinite(answer), f"the answer should be {what}; this is {found}.")
    return answer


def tensor(answer, what):
    """`answer` as a tensor. An array, a list of numbers or a list of tensors is as good."""
    import torch

    require(answer is not None, f"{what} is None: is the `return` missing?")
    with contextlib.suppress(Exception):
        return torch.as_tensor(answer).detach()
    if type(answer) in (list, tuple):  # and not what `sort()` returns, which is a pair
        with contextlib.suppress(Exception):
            return torch.stack([torch.as_tensor(row) for row in answer]).detach()
    raise Hint(f"{what} should be a tensor; this is {kind(answer)}.")


def whole(answer, what, least=1):
    """`answer` as an int of at least `least`."""
    found = number(answer, what)
    require(found == int(found), f"the answer should be {what}, a whole number; this is {found}.")
    require(found >= least, f"the answer should be {what}, at least {least}; this is {found}.")
    return int(found)


def plan(answer):
    """`answer`, if it is a vk.Plan."""
    from vlmkit.plan import Plan

    return of_type(answer, Plan, 'a vk.Plan, such as vk.Plan(language_model="nf4")')


def function(answer):
    """`answer`, a function or module, so that its errors become hints."""
    if isinstance(answer, type):
        raise Hint(f"this is the class {answer.__name__}; give an object made of it.")
    require(callable(answer), f"the answer should be a function; this is {kind(answer)}.")

    @functools.wraps(answer, updated=())
    def called(*arguments):
        try:
            return answer(*arguments)
        except Hint:
            raise  # what the exercise gave to the function found a mistake
        except Exception as error:
            raise Hint(f"your function stops with {brief(error)}.") from None

    return called
