"""Chapter 07 with more questions: what each layer of pebble loses, what its scores foretell, and
what the planner makes of a budget.

    python benchmarks/budgets.py                              # recorded; 20 minutes
    python benchmarks/budgets.py --n 120 --output trial       # a trial, in the folder trial

Two tables, both of `vlmkit`'s own functions, which the chapter shows:

07_layers.csv    a row per layer, or per Linear layer, and format: the four scores on calibration
                 questions, and on others the true damage (kl_true; difference with its interval)
07_frontier.csv  `Planner.frontier`, planned against uniform: by layer and by component, in formats
                 for experiments

What is in them already for the same weights of pebble is not repeated.
"""

import argparse
import hashlib
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "notebooks" / "data"
SEEDS = {"calibration": 20_260_600, "damage": 20_260_601, "planner": 20_260_602}  # of the questions
BITS = {"layer": ("int3", "int2-asym", "int2"), "linear": ("int3", "int2")}
FORMATS = ("int8", "int6", "int5", "int4", "int3", "int2-asym", "int2")  # of the planner
GAP = 0.15  # a share of the larger
PLANNERS = {  # (by, formats of the planner)
    "layer": ("layer", FORMATS),
    "component": ("component", FORMATS),
}
ROUNDED = {"weight_error": 4, "sqnr": 3, "fisher": 8, "kl": 8, "kl_true": 8, "bits": 4}
ROUNDED |= {"predicted": 8, "joint": 8, "kl_low": 8, "kl_high": 8} | dict.fromkeys(
    ("accuracy", "low", "high", "difference", "difference_low", "difference_high"), 5
)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure pebble's layers and its planner's plans.")
    parser.add_argument("--n", type=int, default=1000, help="questions for the planner (1000)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a folder")
    args = parser.parse_args(argv)

    import vlmkit as vk

    model, processor = vk.load("pebble", "bf16")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (by, formats) in PLANNERS.items():
        measure = partial(frontier, model, processor, by, formats, args.n)
        record(args.output / "07_frontier.csv", "planner", name, measure)
    for by in BITS:
        measure = partial(layers, model, processor, by, args.n)
        record(args.output / "07_layers.csv", "by", by, measure)


def layers(model, processor, by, n):
    """The four scores of each scope on n / 8 questions, and its damage on n / 2 others."""
    import vlmkit as vk

    calibration = vk.tasks.dataset("all", n=n // 8, seed=SEEDS["calibration"])
    questions = vk.tasks.dataset("all", n=n // 2, seed=SEEDS["damage"])
    scores = vk.sensitivity.layer_scores(model, processor, calibration, BITS[by], scopes=by)
    scopes = list(dict.fromkeys(scores["scope"]))
    found = vk.sensitivity.sweep(model, processor, questions, BITS[by], scopes)
    found = found.drop(columns=["parameters", "bits", "bytes_saved", "kinds", "p"])
    table = scores.merge(found, on=["scope", "format"], suffixes=("", "_true"))
    component = {s: vk.sensitivity.select(model, s).weights[0].component for s in scopes}
    table.insert(1, "component", table["scope"].map(component))
    return table


def frontier(model, processor, by, formats, n):
    """The planner's frontier: damages on n / 2 questions, verified on the others. Budgets are the
    sizes of uniform plans, and two between any that are more than GAP apart."""
    import vlmkit as vk

    questions = vk.tasks.dataset("all", n=n, seed=SEEDS["planner"])
    planner = vk.planner.Planner(model, processor, questions, formats=formats, by=by)
    sizes = sorted({planner.choices.counted(plan) for plan in planner.choices.uniform().values()})
    between = [
        small + (large - small) * part // 3
        for small, large in pairwise(sizes)
        for part in (1, 2)
        if small < (1 - GAP) * large
    ]
    return planner.frontier(sorted([*sizes, *between], reverse=True))


def record(path, column, name, measure):
    """Add what `measure` returns to the table at `path`, where `column` is to be `name`."""
    import pandas as pd

    before = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["weights", column])
    before = before[before["weights"] == digest()]
    if name in set(before[column]):
        return
    found = measure().round(ROUNDED)
    found.insert(0, "weights", digest())
    found.insert(1, column, name)
    table = pd.concat([before, found]) if len(before) else found
    part = path.with_suffix(".part")
    table.to_csv(part, index=False, lineterminator="\n")
    os.replace(part, path)


def digest():
    """What pebble's weights are recognized by."""
    from vlmkit.models import pebble

    return hashlib.sha256((pebble.path() / "model.safetensors").read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
