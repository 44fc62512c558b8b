"""Chapter 07 with more questions: what each layer of pebble loses, what its scores foretell, and
what the planner makes of a budget, for pebble and for cobble.

    python benchmarks/budgets.py                              # recorded; 20 minutes
    python benchmarks/budgets.py --n 120 --output trial       # a trial, in the folder trial
    python benchmarks/budgets.py --model cobble-bf16 --photographs FOLDER       # 15 minutes

For pebble two tables, both of `vlmkit`'s own functions, which the chapter shows:

07_layers.csv    a row per layer, or per Linear layer, and format: the four scores on calibration
                 questions, and on others the true damage (kl_true; difference with its interval)
07_frontier.csv  `Planner.frontier`, planned against uniform: by layer and by component, in formats
                 for experiments

What is in them already for the same weights of pebble is not repeated.

For cobble two more. All plans are for `cobble-bf16`, whose projector was trained with everything in
bf16: the projector fits the unquantized model and none of the plans, so no plan has an advantage.
Calibration and held-out questions, and calibration and held-out paragraphs, have nothing in common.

07_cobble_layers.csv  a row per layer and format, rounded alone: its bytes, and the divergence on
                      handwritten digits, and on text, which has no picture
07_cobble.csv         a row per plan: uniform, recommended, planned by either divergence, and random
                      ones of the same bytes; with the perplexity of held-out text, and right
                      answers about held-out digits and photographs, paired with the recommended
                      plan's. One row is that plan with the projector that was trained on NF4
"""

import argparse
import contextlib
import hashlib
import math
import os
import random
import sys
import warnings
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
COBBLES = ("int8", "nf4")  # formats for cobble's layers, beside bf16; vk.load knows them all
BUDGETS = (None, 135_000_000, 150_000_000)  # bytes; None for those of the recommended plan
ASKED = {"digits": (33, 40), "photographs": (0, 200)}  # to plan, and held out
DRAWS = 6  # random plans for each budget
ROUNDED = {"weight_error": 4, "sqnr": 3, "fisher": 8, "kl": 8, "kl_true": 8, "bits": 4}
ROUNDED |= {"predicted": 8, "joint": 8, "kl_low": 8, "kl_high": 8} | dict.fromkeys(
    ("accuracy", "low", "high", "difference", "difference_low", "difference_high"), 5
)
ROUNDED |= {"kl_text": 6, "perplexity": 3}
ROUNDED |= dict.fromkeys(("ratio", "ratio_low", "ratio_high"), 4)
ROUNDED |= {f"{kind}_p": 8 for kind in ASKED} | {"kl_digits": 6}
ROUNDED |= {
    f"{kind}_{end}": 4
    for kind in ASKED
    for end in ("low", "high", "difference_low", "difference_high")
}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure layers, and planned budgets.")
    parser.add_argument("--n", type=int, default=1000, help="questions for pebble's planner (1000)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a folder")
    parser.add_argument("--model", choices=("pebble", "cobble-bf16"), default="pebble")
    parser.add_argument("--photographs", help="for cobble: a folder, or a data set on the hub")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.model == "cobble-bf16":
        return cobble(args.output, args.photographs)

    import vlmkit as vk

    model, processor = vk.load("pebble", "bf16")
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


def record(path, column, name, measure, weights=None):
    """Add what `measure` returns to the table at `path`, where `column` is to be `name`."""
    import pandas as pd

    before = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["weights", column])
    weights = weights or digest()
    before = before[before["weights"] == weights]
    if name in set(before[column]):
        return
    found = measure().round(ROUNDED)
    found.insert(0, "weights", weights)
    found.insert(1, column, name)
    write(path, pd.concat([before, found]) if len(before) else found)


def write(path, table):
    part = path.with_suffix(".part")
    table.to_csv(part, index=False, lineterminator="\n")
    os.replace(part, path)


def digest(name="pebble"):
    """What the weights of a model that comes with the course are recognized by."""
    from vlmkit import models

    if name == "pebble":
        parts = [models.pebble.path() / "model.safetensors"]
    else:
        weights = Path(models.__file__).parent / "cobble" / "weights"
        names = ("vision_encoder", "projector-bf16", "projector-nf4")
        parts = [weights / f"{part}.safetensors" for part in names]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]


# --- cobble ---------------------------------------------------------------------------------------


def cobble(output, photographs):
    """Record what cobble's layers lose, and what plans make of that."""
    import pandas as pd

    import vlmkit as vk
    from vlmkit.tasks import real

    model, processor = vk.load("cobble-bf16", "bf16")
    few, many = ASKED["digits"]
    questions = real.handwriting(few + many)
    planner = vk.planner.Planner(
        model, processor, questions, formats=COBBLES, by="layer", calibration=few / (few + many)
    )
    planning, held_out = halves(processor.tokenizer)
    on_text = Text(model, planning)
    measure = partial(cobbles_layers, planner, on_text)
    record(output / "07_cobble_layers.csv", "model", "cobble-bf16", measure, digest("cobble"))
    table = pd.read_csv(output / "07_cobble_layers.csv")
    damages = {
        by: {
            scope: dict(zip(rows["format"], rows[f"kl_{by}"], strict=True))
            for scope, rows in table.groupby("scope", sort=False)
        }
        for by in ("digits", "text")
    }

    asked = {"digits": questions.select(planner.split[1])}
    if photographs:
        asked["photographs"] = real.photographs(photographs, ASKED["photographs"][1])
    else:
        print("Without --photographs: only handwriting is asked about.", flush=True)
    measured = Measurement(planner.choices, processor, Text(model, held_out), asked)
    joint = {"digits": planner.joint, "text": partial(on_text.divergence, planner.choices)}
    rows = []
    for row in plans(planner.choices, damages, joint, measured, retrained(model)):
        rows.append(row)
        table = pd.DataFrame(rows).assign(weights=digest("cobble"))
        write(output / "07_cobble.csv", table.round(ROUNDED))


def cobbles_layers(planner, text):
    """The planner's table of damages, on its questions and on a Text."""
    from tqdm import tqdm

    table = planner.table().rename(columns={"kl": "kl_digits"})
    pairs = tqdm(list(zip(table["scope"], table["format"], strict=True)), unit="cell")
    table["kl_text"] = [text.divergence(planner.choices, {scope: name}) for scope, name in pairs]
    return table


def halves(tokenizer):
    """(tokens to plan with, held-out tokens): each a list of the token ids of paragraphs. Every
    third paragraph of recipe_text.py's English is to plan with."""
    from recipe_text import english  # benchmarks/recipe_text.py

    paragraphs = [tokenizer.encode(f"{text}\n\n") for text in english().split("\n\n")]
    return paragraphs[::3], [p for i, p in enumerate(paragraphs) if i % 3]


class Text:
    """Paragraphs that the language model of `model` reads one after another, without a picture."""

    def __init__(self, model, paragraphs):
        import torch

        self.model = model
        self.ids = torch.tensor([sum(paragraphs, [])])
        self.lengths = [len(p) for p in paragraphs]
        self.lengths[0] -= 1  # nothing comes before the first token
        self.unquantized = self.read()

    def read(self):
        from recipe_text import next_tokens

        return next_tokens(self.model, self.ids)

    def losses(self, found):
        """For each paragraph, the sum over its tokens of -log p, in nats."""
        tokens = -found.gather(1, self.ids[0, 1:, None])[:, 0]
        return [part.sum().item() for part in tokens.split(self.lengths)]

    def divergence(self, choices, assignment):
        """Mean divergence from the unquantized model, in nats a token, under {scope: format}."""
        return self.compared(choices, assignment)[0]

    def compared(self, choices, assignment):
        """(the same divergence, the losses of the paragraphs)"""
        from vlmkit.planner.choices import as_loaded

        with as_loaded(self.model, choices, choices.all_in(choices.base) | assignment) as changed:
            same = all(weight.component != "language_model" for weight in changed)
            found = self.unquantized if same else self.read()
        kl = (self.unquantized.exp() * (self.unquantized - found)).sum(-1).mean().item()
        return kl, self.losses(found)


class Measurement:
    """Plans on held-out text and held-out questions. text: a Text; asked: {name: data set}.

    The questions ask for one word, and a name or digit is counted as right in a sentence, too, as
    in benchmarks/cobble.py. `exact` counts those that are nothing but the expected word.
    """

    def __init__(self, choices, processor, text, asked):
        self.choices, self.processor, self.text, self.asked = choices, processor, text, asked
        self.kept = {}

    def row(self, name, assignment, rival=None, questions=True):
        """A dict of numbers, paired with those of `rival`, the name of a plan measured before."""
        from vlmkit.evaluation.statistics import wilson
        from vlmkit.planner.choices import as_loaded

        kl, losses = self.text.compared(self.choices, assignment)
        own = self.kept[name] = {"losses": losses}
        row = {"plan": name, "bytes": self.choices.counted(assignment), "rival": rival}
        row |= {"perplexity": math.exp(sum(losses) / sum(self.text.lengths)), "kl_text": kl}
        row |= self.ratio(losses, rival)
        for kind, dataset in self.asked.items() if questions else ():
            with as_loaded(self.text.model, self.choices, assignment):
                right, exact = self.answered(kind, dataset)
            own[kind] = right
            row |= {f"{kind}_n": len(right), f"{kind}_right": right.sum(), f"{kind}_exact": exact}
            ends = wilson(right.sum(), len(right))
            row |= dict(zip((f"{kind}_low", f"{kind}_high"), ends, strict=True))
            row |= self.paired(kind, right, rival)
        names = (f"{scope} {given}" for scope, given in assignment.items())
        print({key: value for key, value in row.items() if value is not None}, flush=True)
        return row | {"formats": ", ".join(names)}

    def answered(self, kind, dataset):
        """(array of whether each answer names the right one and no other, number of exact ones)"""
        import numpy as np

        import vlmkit as vk
        from vlmkit.models.cobble import instructions as ins

        there = ins.DIGITS if kind == "digits" else ins.THINGS
        scores = vk.evaluate(self.text.model, self.processor, dataset, max_new_tokens=12).answers
        pairs = zip(scores["predicted"], scores["answer"], strict=True)
        right = np.array([ins.is_right(said, true, there) for said, true in pairs])
        return right, scores["correct"].sum()

    def ratio(self, losses, rival):
        """The perplexity as a multiple of the rival's, with the 95% interval of a bootstrap over
        paragraphs, whose tokens are not independent."""
        from vlmkit.evaluation.statistics import bootstrap

        if rival is None:
            return {}
        scale = len(losses) / sum(self.text.lengths)
        pairs = zip(losses, self.kept[rival]["losses"], strict=True)
        each = [scale * (own - other) for own, other in pairs]
        ends = (sum(each) / len(each), *bootstrap(each, one_by_one=True))
        return dict(zip(("ratio", "ratio_low", "ratio_high"), map(math.exp, ends), strict=True))

    def paired(self, kind, right, rival):
        """Answers lost and won against the rival, McNemar's exact test, and the difference's
        interval."""
        from vlmkit.sensitivity import mcnemar, paired_interval
        from vlmkit.sensitivity.sweeping import changes

        if rival is None:
            return {}
        lost, won = changes(self.kept[rival][kind], right)
        low, high = paired_interval(lost, won, len(right))
        found = {"lost": lost, "won": won, "p": mcnemar(lost, won)}
        found |= {"difference_low": low, "difference_high": high}
        return {f"{kind}_{name}": value for name, value in found.items()}


def plans(choices, damages, joint, measured, projector):
    """The rows of all plans of the unquantized model, the rivals first, and one with another
    projector: a context, see `retrained`."""
    from vlmkit.planner import least_damage

    named = {f"uniform {name}": choices.all_in(name) for name in (choices.base, *COBBLES)}
    named["recommended"] = recommended(choices)
    for name, assignment in named.items():
        asked = name != "uniform int8"  # which is slow, and larger than every budget
        yield measured.row(name, assignment, None, asked) | {"kind": name.partition(" ")[0]}
    with projector:
        row = measured.row("projector trained on NF4", recommended(choices), "recommended")
    yield row | {"kind": "retrained"}
    sizes = {item.scope: item.sizes for item in choices.items}
    fixed, rival = sum(choices.fixed.values()), "recommended"
    for budget in BUDGETS:
        budget = budget or choices.counted(named[rival])
        label = f"{budget / 1e6:.0f} MB"
        for by, own in damages.items():
            planned = least_damage(sizes, own, budget - fixed)
            row = measured.row(f"by {by}, {label}", planned, rival)
            row["predicted"] = sum(own[scope][given] for scope, given in planned.items())
            yield row | {"kind": f"by {by}", "budget": budget, "joint": joint[by](planned)}
        for seed in range(DRAWS):
            drawn = at_random(choices, budget, seed)
            row = measured.row(f"random {seed}, {label}", drawn, rival, questions=False)
            yield row | {"kind": "random", "budget": budget}


def recommended(choices):
    """The assignment of the recommended plan: the language model in NF4, the rest as it is."""
    return {
        item.scope: "nf4" if item.component == "language_model" else choices.base
        for item in choices.items
    }


def at_random(choices, budget, seed):
    """Everything in NF4, and random layers of the language model in int8 as long as they fit."""
    found, room = choices.all_in("nf4"), budget - choices.total(choices.all_in("nf4"))
    items = [item for item in choices.items if item.component == "language_model"]
    for item in random.Random(seed).sample(items, len(items)):
        more = item.sizes["int8"] - item.sizes["nf4"]
        if more <= room:
            found[item.scope], room = "int8", room - more
    return found


def retrained(model):
    """A context in which `model` has the projector of `cobble`, which was trained on NF4."""
    import vlmkit as vk

    with warnings.catch_warnings(action="ignore"):  # that projector does not fit bf16
        other, _ = vk.load("cobble", "bf16", processor=False)
    projector = model.model.multi_modal_projector
    own, trained = (
        {name: tensor.clone() for name, tensor in part.state_dict().items()}
        for part in (projector, other.model.multi_modal_projector)
    )

    @contextlib.contextmanager
    def exchanged():
        projector.load_state_dict(trained)
        yield
        projector.load_state_dict(own)

    return exchanged()


if __name__ == "__main__":
    sys.exit(main())
