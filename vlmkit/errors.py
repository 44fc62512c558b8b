"""The errors that vlmkit raises. Each message says what was asked, what was found, what to do next.

All derive from `VlmkitError`. So a program (or the command line) can tell a user's mistake, which
the message helps to correct, from a bug in vlmkit, which needs a traceback.
"""

import difflib
import functools
import importlib.util
import re
import reprlib
import traceback


class VlmkitError(Exception):
    """Base of every error that vlmkit raises on purpose. A very long word in its message, such as
    a name of 5,000 characters, is cut."""

    def __str__(self):
        return re.sub(r"\S{400,}", lambda word: f"{word[0][:100]} …", super().__str__())


class UnexpectedError(VlmkitError, RuntimeError):
    """A library failed on what a public function was given. `__cause__` is the library's error."""


class PlanError(VlmkitError, ValueError):
    """A plan names something that does not exist, or asks for something impossible."""


class AnatomyError(VlmkitError, ValueError):
    """A model or config is not a vision-language model, or has parameters of unknown component."""


class CheckpointError(VlmkitError, OSError):
    """A checkpoint is missing, incomplete, damaged, or in a format that is not safe to read."""


class ConfigError(VlmkitError, ValueError):
    """A quantization config cannot be read, or is not one of bitsandbytes."""


class AuditError(VlmkitError, RuntimeError):
    """What was loaded is not what the plan asked for."""


class SizeError(VlmkitError, ValueError):
    """A number of tokens, images or bytes is impossible, or more than the model has room for."""


class FinetuningError(VlmkitError, ValueError):
    """What is to be trained does not exist, or cannot be trained in that way."""


class SensitivityError(VlmkitError, ValueError):
    """What an experiment is to quantize does not exist, or the experiment cannot show anything."""


class DependencyError(VlmkitError, ImportError):
    """An optional package is needed and not installed."""


class ImageError(VlmkitError, ValueError):
    """An image cannot be read or used."""


class QuestionError(VlmkitError, ValueError):
    """A question is empty, or is too long for the model's context together with its images."""


class TaskError(VlmkitError, ValueError):
    """No dataset can be made from this task, split or size."""


class ExerciseError(VlmkitError, ValueError):
    """No exercise has this check, or the check does not take this data."""


def brief(error, length=200):
    """The message of a library's error on one line, cut to a readable length."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= length else text[:length] + " …"


def failed_import(error):
    """Which package is missing or fails while it is imported, and what to do, if `error` comes from
    that. Otherwise None."""
    while error.__cause__:
        error = error.__cause__
    package = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "<module>":
            package = frame.f_globals.get("__name__", "").partition(".")[0]
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError):
        if not missing or importlib.util.find_spec(missing):
            return None
        return (
            f"The package {missing} is not installed"
            + (f", and {package} needs it" if package not in ("", "__main__", "vlmkit") else "")
            + f". Install it (pip install {missing}), in the version of constraints.txt."
        )
    if package in ("", "__main__", "vlmkit"):
        return None
    return (
        f"The package {package} is installed, and fails while it is imported ({brief(error)}). "
        "Install it again, in the version of constraints.txt; vlmkit doctor says what else does "
        "not work here."
    )


def public(function):
    """A decorator for the functions that people call: a library's error becomes a VlmkitError.

    The functions check what they are given. This is for what they did not foresee: the message
    says which function was called with what, and the library's error stays as the cause. A GPU
    without memory (torch's OutOfMemoryError) stays as it is, since programs catch this error, and
    so does Python's own TypeError for arguments that the function does not have.
    """

    @functools.wraps(function)
    def checked(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            called = error.__traceback__.tb_next is not None
            if isinstance(error, VlmkitError) or not called or _out_of_memory(error):
                raise
            broken = failed_import(error)
            if broken:
                raise UnexpectedError(broken) from error
            module = function.__module__.removeprefix("vlmkit.")
            given = [*map(shown, args), *(f"{k}={shown(v)}" for k, v in kwargs.items())]
            raise UnexpectedError(
                f"{module}.{function.__name__} could not work with what it was given: "
                f"{brief(error)}. It was given {', '.join(given) or 'nothing'}. Check these values "
                "and files first. If they are right, this is a defect of vlmkit: please report it."
            ) from error

    return checked


def _out_of_memory(error):
    return type(error).__name__ == "OutOfMemoryError"


def shown(value):
    """A value that a function was given, in a few words. A whole model would fill pages, and Python
    refuses to write an integer of more than 4,300 digits."""
    if isinstance(value, int) and abs(value) >= 10**100:
        return f"an integer of {value.bit_length():,} bits"
    if value is None or isinstance(value, (str, bytes, int, float, list, tuple, dict, set)):
        return reprlib.repr(value)
    if hasattr(value, "__fspath__"):
        return reprlib.repr(str(value))
    return f"a {type(value).__name__}"


def did_you_mean(word, known, cutoff=0.5, show=None):
    """ "Did you mean 'projector'? " for a word that looks like one of `known`, or an empty string.

    The comparison ignores case. The text ends with a space, so that a message can follow it.
    show: {name: the longer name to suggest in its place}.
    """
    spelled = {str(name).lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), spelled, n=1, cutoff=cutoff)
    if not near:
        return ""
    name = spelled[near[0]]
    return f"Did you mean {(show or {}).get(name, name)!r}? "
