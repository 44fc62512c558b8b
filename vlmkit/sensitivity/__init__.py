"""Sensitivity: measurements of what breaks when a component loses bits.

    vk.sensitivity.sweep(model, processor, dataset, formats=["int4", "int2"], scopes=["projector"])

    with vk.sensitivity.quantized(model, "language_model:0", "int3-g32"):
        vk.ask(model, processor, image, question)

scopes.py            which weights: components, kinds of layer, single layers, patterns, random ones
temporary.py         rounding weights in place, and restoring them bit for bit
teacher_forcing.py   the logits for answers that are known, and the visual features for them
baseline.py          the unquantized model's answers, and how those of a changed model differ
sweeping.py          a table of many scopes and formats
records.py           the file that a stopped sweep continues from
layer_scoring.py     cheap estimates of the damage, and how good each is
outlier_channels.py  a control experiment: large models' outliers in a small model
"""

from vlmkit.evaluation.statistics import mcnemar, needed, paired_interval
from vlmkit.sensitivity.baseline import Baseline, Outcome
from vlmkit.sensitivity.layer_scoring import correlation, layer_scores
from vlmkit.sensitivity.outlier_channels import outliers
from vlmkit.sensitivity.scopes import Selection, every, label_of, layers, random_weights, select
from vlmkit.sensitivity.sweeping import by_kind, measured, sweep
from vlmkit.sensitivity.temporary import Rounded, equal_bits, quantized

__all__ = [
    "Baseline",
    "Outcome",
    "Rounded",
    "Selection",
    "by_kind",
    "correlation",
    "equal_bits",
    "every",
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
    "select",
    "sweep",
]

RENAMED = {"chosen": "select", "Chosen": "Selection", "Swap": "Rounded"}


def __getattr__(name):
    hint = f"; it is called {RENAMED[name]} now" if name in RENAMED else ""
    raise AttributeError(f"vlmkit.sensitivity has no {name!r}{hint}")
