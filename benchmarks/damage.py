"""Chapter 05 with more questions: what pebble and cobble lose in more formats.

    python benchmarks/damage.py                            # the recorded results, some minutes
    python benchmarks/damage.py --n 60 --output trial.csv  # a trial
    python benchmarks/damage.py --model cobble-bf16 --photographs FOLDER

For pebble three parts, all with `vlmkit.sensitivity.sweep`: eleven formats on each component, on
each two and on all three; a few of the formats on other questions (`SEEDS`); and as many random
weights as the projector and the vision encoder have, drawn from another component.

The result is notebooks/data/05_sensitivity.csv, which the chapter shows: a row per seed of the
questions, scope, format and kind of question, with how many answers were right, and how many were
regressions and fixes. What is asked of several kinds together is added up from these.

For cobble, each component in each format, asked about handwriting and photographs. That result is
notebooks/data/05_cobble.csv. Beside it, 05_outliers.csv has for each Linear layer of both language
models the largest input channel against the median one, while the model reads the question about
a picture that is its first here. A channel's size is its largest magnitude over all tokens.
"""

import argparse
import hashlib
import os
import sys
from itertools import combinations
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "notebooks" / "data"
OUTPUT, COBBLE = DATA / "05_sensitivity.csv", DATA / "05_cobble.csv"
OUTLIERS = "05_outliers.csv"
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
COBBLES = ("int8", "nf4", "int4", "int3", "int2-asym", "int2")  # of cobble, which is slower
FEW = ("int4", "int3", "int2-asym", "int2")  # on the other questions
DRAWS = range(5)  # seeds of the random weights


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what a model loses in many formats.")
    parser.add_argument("--n", type=int, help="questions (1000; for cobble 150 about each source)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", choices=("pebble", "cobble-bf16"), default="pebble")
    parser.add_argument("--photographs", help="for cobble: a folder, or a data set on the hub")
    args = parser.parse_args(argv)
    if args.model == "pebble":
        pebble(args.n or 1000, args.output or OUTPUT)
    else:
        cobble(args.n or 150, args.output or COBBLE, args.photographs)


def pebble(n, output):
    """Record what pebble loses."""

    import pandas as pd

    import vlmkit as vk

    model, processor = vk.load("pebble", "bf16")

    def swept(seed, formats, scopes):
        questions = vk.tasks.dataset("all", n=n, seed=seed)
        table = vk.sensitivity.sweep(model, processor, questions, formats, scopes)
        return counted(table).assign(weights=digest(), seed=seed)

    parts = [swept(SEEDS[0], FORMATS, scopes_of(COMPONENTS))]
    parts += [swept(seed, FEW, COMPONENTS) for seed in SEEDS[1:]]
    parts += [swept(SEEDS[0], ["int2"], controls())]
    write(output, pd.concat(parts)[COLUMNS].round({"bits": 4, "kl": 5}))


def cobble(n, output, photographs):
    """Record what cobble loses, and the outliers in the inputs of both models' layers."""
    import datasets
    import pandas as pd

    import vlmkit as vk
    from vlmkit.tasks import real

    parts = [real.handwriting(n)]
    if photographs:
        parts.append(real.photographs(photographs, n))
    else:
        print("Without --photographs: only handwriting is asked about.", flush=True)
    questions = datasets.concatenate_datasets(parts)
    model, processor = vk.load("cobble-bf16", "bf16")
    path = output.with_suffix(".cells")  # a run that was killed continues
    table = vk.sensitivity.sweep(model, processor, questions, COBBLES, COMPONENTS, path=path)
    table = counted(table).assign(weights=digest("cobble-bf16"), seed=0)
    write(output, table[COLUMNS].round({"bits": 4, "kl": 5}))
    path.unlink()
    found = [input_channels("cobble-bf16", model, processor, questions[0])]
    model, processor = vk.load("pebble", "bf16")
    found.append(input_channels("pebble", model, processor, vk.tasks.example("vqa", 0, seed=0)))
    write(output.with_name(OUTLIERS), pd.concat(found).round({"median": 4, "largest": 2}))


COLUMNS = ["weights", "seed", "scope", "format", "parameters", "bits", "bytes_saved"]
COLUMNS += ["task", "kind", "n", "right", "regressions", "fixes", "kl"]


def counted(table):
    """A sweep's table by kind of question, with counts."""
    import vlmkit as vk

    kinds = vk.sensitivity.by_kind(table)
    kinds["right"] = (kinds["accuracy"] * kinds["n"]).round().astype(int)
    return kinds.merge(table[["scope", "format", "parameters", "bits", "bytes_saved"]])


def input_channels(name, model, processor, row):
    """A row for each Linear layer of the language model: its largest input channel, the magnitude
    of it and of the median channel, while the model reads one question about a picture."""
    import pandas as pd
    import torch

    from vlmkit.evaluation.asking import prepared
    from vlmkit.images import read_all
    from vlmkit.sensitivity import select

    largest, hooks = {}, []
    for weight in select(model, "language_model").weights:

        def look(module, inputs, name=weight.module):
            largest[name] = inputs[0].flatten(0, -2).float().abs().amax(0)

        hooks.append(weight.layer.register_forward_pre_hook(look))
    inputs = prepared(model, processor, [read_all(row["images"])], [row["question"]], 1)
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    rows = []
    for module, channels in largest.items():
        layer, linear = module.partition("layers.")[2].split(".", 1)
        size = float(channels.median()), float(channels.max())
        rows.append((digest(name), name, int(layer), linear, int(channels.argmax()), *size))
    columns = ["weights", "model", "layer", "linear", "channel", "median", "largest"]
    return pd.DataFrame(rows, columns=columns)


def write(output, table):
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    table.to_csv(part, index=False, lineterminator="\n")
    os.replace(part, output)


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


def digest(name="pebble"):
    """What the weights of a model that comes with the course are recognized by."""
    from vlmkit import models

    if name == "pebble":
        parts = [models.pebble.path() / "model.safetensors"]
    else:
        weights = Path(models.__file__).parent / "cobble" / "weights"
        parts = [weights / f"{part}.safetensors" for part in ("vision_encoder", "projector-bf16")]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
