"""Figures: data in, Axes out.

Each function draws into the Axes that it is given, or into a new figure, and returns the Axes. It
changes no global setting of matplotlib, and the data can be read back from what it drew.
"""

from vlmkit.figures.damage import damage, damage_by_bytes, layer_damage, scores_against_damage
from vlmkit.figures.pictures import attention, bits, mistakes, patches, questions
from vlmkit.figures.quality import (
    accuracy,
    accuracy_against,
    accuracy_by_tokens,
    error_by_bits,
    frontier,
    learning,
)
from vlmkit.figures.sizes import (
    architecture,
    bytes_by_component,
    parameters_by_component,
    seconds,
    what_fits,
)
from vlmkit.figures.style import COMPONENT_COLORS

__all__ = [
    "COMPONENT_COLORS",
    "accuracy",
    "accuracy_against",
    "accuracy_by_tokens",
    "architecture",
    "attention",
    "bits",
    "bytes_by_component",
    "damage",
    "damage_by_bytes",
    "error_by_bits",
    "frontier",
    "layer_damage",
    "learning",
    "mistakes",
    "parameters_by_component",
    "patches",
    "questions",
    "scores_against_damage",
    "seconds",
    "what_fits",
]
