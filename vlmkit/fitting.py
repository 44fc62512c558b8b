"""Fitting: which model fits on which graphics card, under which plan.

    vk.fit()                                        # the catalog, common cards, three plans
    vk.fit(["Qwen/Qwen2.5-VL-7B-Instruct"], gpus=["RTX 4060", "24 GB"], tokens=2048, images=1)

Needed is what `vk.memory.predict` gives. Usable is a card's memory, less what is reserved: an
assumption, not a measurement.
"""

import difflib

from vlmkit.catalog import NAMES
from vlmkit.catalog.gpus import GPUS
from vlmkit.errors import SizeError
from vlmkit.memory import parse_size, predict
from vlmkit.plan import Plan

PLANS = {
    "bf16": Plan(),
    "language model int8": Plan(language_model="int8"),
    "language model nf4": Plan.recommended(),
}
"""The plans that are compared unless others are asked for."""

RESERVED = "1 GB"
"""Assumed to be lost to what PyTorch does not count: the CUDA context, its libraries' code and
workspaces, and the desktop. For a process that had computed nothing, 0.78 GB was reported
(pytorch/pytorch issue 34323)."""


def fit(models=NAMES, plans=PLANS, gpus=tuple(GPUS), *, reserved=RESERVED, **use):
    """A pandas DataFrame with a row for each model, plan and card: does it fit?

    models: names, or {label: anything that `vk.memory.predict` takes}.
    plans: anything that `Plan.parse` takes, or {label: that}.
    gpus: names of `vlmkit.catalog.gpus.GPUS`, or sizes such as "12 GB".
    reserved: a size, off every card's memory.
    use: what the model is to do, as `vk.memory.predict` takes it: tokens, images, image_size,
        batch, training, … Without any, it is the weights that are to fit.

    needed, memory (of the card), usable and headroom are bytes; headroom is negative where it does
    not fit.
    Raises SizeError for a card that is unknown, and what `vk.memory.predict` raises.
    """
    import pandas as pd

    cards = {_label(gpu): int(_memory_of(gpu)) for gpu in gpus}
    lost = parse_size(reserved)
    rows = []
    for model, x in _labelled(models):
        for plan, chosen in _labelled(plans):
            needed = predict(x, chosen, **use).total
            rows += [(model, plan, gpu, needed, size) for gpu, size in cards.items()]
    table = pd.DataFrame(rows, columns=["model", "plan", "gpu", "needed", "memory"])
    table["usable"] = table["memory"] - lost
    table["headroom"] = table["usable"] - table["needed"]
    table["fits"] = table["headroom"] >= 0
    return table


def _labelled(things):
    return things.items() if isinstance(things, dict) else [(_label(x), x) for x in things]


def _label(x):
    return x if isinstance(x, str) else str(x) if isinstance(x, int) else repr(x)


def _memory_of(gpu):
    if gpu in GPUS:
        return GPUS[gpu].bytes
    try:
        return parse_size(gpu)
    except SizeError as error:
        known = {name.lower(): name for name in GPUS}
        near = difflib.get_close_matches(str(gpu).lower(), known, n=1, cutoff=0.5)
        hint = f"Did you mean {known[near[0]]!r}? " if near else ""
        raise SizeError(
            f"{gpu!r} is neither a card that the catalog has nor a size of memory such as '12 GB'. "
            f"{hint}The cards are {', '.join(GPUS)}."
        ) from error


def summary(table):
    """The table of `fit` as text in a DataFrame with a row for each model and plan: the GB needed,
    and for each size of card, in GB, how many are left there; "-" where it does not fit."""
    import pandas as pd

    from vlmkit.catalog.gpus import GIGABYTE

    rows = {}
    for (model, plan), own in table.groupby(["model", "plan"], sort=False):
        row = rows[model, plan] = {"needs": f"{own['needed'].iloc[0] / GIGABYTE:.1f}"}
        for card in own.sort_values("memory").itertuples():
            left = f"{card.headroom / GIGABYTE:.1f}" if card.fits else "-"
            row[f"{card.memory / GIGABYTE:g}"] = left
    wide = pd.DataFrame.from_dict(rows, orient="index")
    wide.index = pd.MultiIndex.from_tuples(wide.index, names=["model", "plan"])
    return wide
