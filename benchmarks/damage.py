"""Chapter 05 with more questions: what pebble loses in more formats, and in several at once.

    python benchmarks/damage.py                            # the recorded results, some minutes
    python benchmarks/damage.py --n 60 --output trial.csv  # a trial

Three parts, all with `vlmkit.sensitivity.sweep`: eleven formats on each component, on each two and
on all three; a few of the formats on other questions (`SEEDS`); and as many random weights as the
projector and the vision encoder have, drawn from another component.

The result is notebooks/data/05_sensitivity.csv, which the chapter shows: a row per seed of the
questions, scope, format and kind of question, with how many answers were right, and how many were
regressions and fixes. What is asked of several kinds together is added up from these.
"""

import argparse
import hashlib
import os
import sys
from itertools import combinations
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "05_sensitivity.csv"
SEEDS = (20_260_500, 20_260_501, 20_260_502)  # of the questions; all formats with the first
COMPONENTS = ("vision_encoder", "projector", "language_model")
FORMATS = (
    "int8",
    "int8-tensor",
    "nf4",
    "fp4",
    "int4",
    "int4-row",
    "int4-tensor",
    "int3",
    "int3-row",
    "int2-asym",
    "int2",
)
FEW = ("int4", "int3", "int2-asym", "int2")  # on the other questions
DRAWS = range(5)  # seeds of the random weights


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what pebble loses in many formats.")
    parser.add_argument("--n", type=int, default=1000, help="questions (1000)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)

    import pandas as pd

    import vlmkit as vk

    model, processor = vk.load("pebble", "bf16")

    def swept(seed, formats, scopes):
        questions = vk.tasks.dataset("all", n=args.n, seed=seed)
        table = vk.sensitivity.sweep(model, processor, questions, formats, scopes)
        kinds = vk.sensitivity.by_kind(table)
        kinds["right"] = (kinds["accuracy"] * kinds["n"]).round().astype(int)
        counts = table[["scope", "format", "parameters", "bits", "bytes_saved"]]
        return kinds.merge(counts).assign(weights=digest(), seed=seed)

    parts = [swept(SEEDS[0], FORMATS, scopes_of(COMPONENTS))]
    parts += [swept(seed, FEW, COMPONENTS) for seed in SEEDS[1:]]
    parts += [swept(SEEDS[0], ["int2"], controls())]
    columns = ["weights", "seed", "scope", "format", "parameters", "bits", "bytes_saved"]
    columns += ["task", "kind", "n", "right", "regressions", "fixes", "kl"]
    table = pd.concat(parts)[columns].round({"bits": 4, "kl": 5})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    part = args.output.with_suffix(".part")
    table.to_csv(part, index=False, lineterminator="\n")
    os.replace(part, args.output)


def scopes_of(components):
    """Each component, each two or more of them, and all."""
    sizes = range(1, len(components) + 1)
    several = [list(some) for size in sizes for some in combinations(components, size)]
    return [some[0] if len(some) == 1 else some for some in several]


def controls():
    """As many random weights as a component has, of another one, several times."""
    from vlmkit.sensitivity import random_weights

    pairs = [("projector", "vision_encoder"), ("projector", "language_model")]
    pairs += [("vision_encoder", "language_model")]
    return [random_weights(like=like, of=of, seed=seed) for like, of in pairs for seed in DRAWS]


def digest():
    """What pebble's weights are recognized by."""
    from vlmkit.models import pebble

    return hashlib.sha256((pebble.path() / "model.safetensors").read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
