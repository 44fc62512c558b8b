"""Sensitivity: what breaks when a component loses bits, measured.

    vk.sensitivity.sweep(model, processor, dataset, formats=["int4", "int2"], scopes=["projector"])

    with vk.sensitivity.quantized(model, "language_model:0", "int3-g32"):
        vk.ask(model, processor, image, question)

scopes.py       which weights: components, kinds of layer, single layers, patterns, random ones
swapping.py     rounding them in place, and putting the original back bit for bit
forcing.py      the logits of answers known beforehand
baseline.py     the unquantized model's answers, and what a changed model's differ in
replaying.py    what a change cannot have changed, computed once
statistics.py   intervals and tests for pairs
sweeping.py     all of it for many scopes and formats, as a table
scores.py       cheap guesses of the damage, and how good each is
records.py      the file that a stopped sweep continues from
injecting.py    a control: large models' outliers in a small one, its function unchanged
controls.py     a control: formats that take as many bits, scales included
"""

from vlmkit.evaluation.statistics import mcnemar, needed, paired_interval
from vlmkit.sensitivity.baseline import Baseline, Outcome
from vlmkit.sensitivity.controls import equal_bits
from vlmkit.sensitivity.injecting import outliers
from vlmkit.sensitivity.scopes import chosen, label_of, layers, random_weights
from vlmkit.sensitivity.scores import correlation, every, layer_scores
from vlmkit.sensitivity.swapping import Swap, quantized
from vlmkit.sensitivity.sweeping import by_kind, measured, sweep

__all__ = [
    "Baseline",
    "Outcome",
    "Swap",
    "by_kind",
    "chosen",
    "correlation",
    "every",
    "equal_bits",
    "label_of",
    "layer_scores",
    "layers",
    "mcnemar",
    "measured",
    "needed",
    "outliers",
    "paired_interval",
    "quantized",
    "random_weights",
    "sweep",
]
