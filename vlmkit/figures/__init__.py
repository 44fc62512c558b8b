"""Figures: data in, Axes out.

Each function draws into the Axes it is given, or into a new figure, and returns the Axes. Nothing
global is changed, and the data can be read back from what was drawn.
"""

from vlmkit.figures.budgets import frontier, layer_damage, scores_against_damage
from vlmkit.figures.colors import COMPONENT_COLORS
from vlmkit.figures.damage import damage, damage_by_bytes
from vlmkit.figures.numbers import bits, error_by_bits
from vlmkit.figures.pictures import attention, patches, questions
from vlmkit.figures.scores import accuracy, accuracy_against, accuracy_by_tokens, learning
from vlmkit.figures.sizes import (
    architecture,
    bytes_by_component,
    parameters_by_component,
    seconds,
    what_fits,
)

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
    "parameters_by_component",
    "patches",
    "questions",
    "scores_against_damage",
    "seconds",
    "what_fits",
]
