"""The course: what only the chapters use, and a project to begin with. Nothing else in vlmkit knows
a chapter.

vk.course.check("equal cost", 19)
"""

import importlib

_MODULES = ("controls", "exercises", "explorer", "pictures", "project", "suited")
_CHECKS = ("CheckedAnswer", "check", "seed")
_SUITED = ("in_its_words", "number", "questions", "without_adapters")


def __getattr__(name):
    if name in _CHECKS:
        return getattr(importlib.import_module("vlmkit.course.exercises"), name)
    if name in _SUITED:
        return getattr(importlib.import_module("vlmkit.course.suited"), name)
    if name in _MODULES:
        return importlib.import_module(f"vlmkit.course.{name}")
    raise AttributeError(f"module 'vlmkit.course' has no attribute {name!r}")
