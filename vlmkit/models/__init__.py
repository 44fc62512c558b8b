"""The models that come with the course. `vlmkit.models.pebble` is the one to take apart,
`vlmkit.models.cobble` the one with a real language model."""

import importlib

_MODULES = ("pebble", "cobble")


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"vlmkit.models.{name}")
    raise AttributeError(f"module 'vlmkit.models' has no attribute {name!r}")
