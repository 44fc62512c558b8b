"""Fitting: which model fits on which graphics card, under which plan.

    vk.fit()                # the catalog on common cards under three plans, one picture asked about
    vk.fit(["Qwen/Qwen2.5-VL-7B-Instruct"], gpus=["RTX 4060", "24 GB"], tokens=2048, images=4)

"Needed" is the total of `vk.memory.predict`. "Usable" is a card's memory less what is reserved,
which is an assumption and not a measurement.
"""

import re
from itertools import product

from vlmkit.backend.quiet import quiet
from vlmkit.catalog import NAMES
from vlmkit.catalog.gpus import GPUS, RESERVED
from vlmkit.errors import AnatomyError, SizeError, did_you_mean, public, shown
from vlmkit.memory.cards import cards_of
from vlmkit.memory.predicting import predict
from vlmkit.plan import Plan
from vlmkit.units import GIGABYTE, MEGABYTE, parse_size

PLANS = {
    "bf16": Plan(),
    "language model int8": Plan(language_model="int8"),
    "language model nf4": Plan.recommended(),
}
"""The plans that are compared by default."""

_SHORT = {"A100": "A100 80GB"}  # what people write: the card to suggest


@public
def fit(
    models=NAMES,
    plans=PLANS,
    gpus=tuple(GPUS),
    *,
    tokens=512,
    images=None,
    allocator="cuda",
    reserved=RESERVED,
    progress=False,
    **use,
):
    """A pandas DataFrame with a row for each model, plan and card: does the model fit?

    models: names, or {label: anything that `vk.memory.predict` takes}.
    plans: anything that `Plan.parse` takes, or {label: that}.
    gpus: names of `vlmkit.catalog.gpus.GPUS`, or sizes such as "12 GB".
    tokens, images, use: what the model has to do, as `vk.memory.predict` takes it: num_frames,
        image_size, batch_size, new_tokens, training, … images is 1 by default, or 0 with
        num_frames. With tokens=0 and images=0 only the weights have to fit.
    allocator: "cuda" counts what PyTorch's caching allocator rounds up to; None leaves it out.
    reserved: a size, taken off every card's memory.
    progress: whether to show a bar.

    The columns needed, memory (of the card), usable and headroom are bytes; headroom is negative
    if the model does not fit. If a model's context is too short for the tokens, or its family
    cannot be predicted, needed is missing and `why` says so.

    Raises SizeError for an unknown card and for a use that no model has room for, and whatever
    `vk.memory.predict` raises.
    """
    import pandas as pd
    from tqdm import tqdm

    images = int(not use.get("num_frames")) if images is None else images
    cards = {_label(gpu): int(memory_of(gpu)) for gpu in gpus}
    lost = parse_size(reserved)
    pairs = list(product(_labelled(models), _labelled(plans)))
    rows, errors = [], []
    for (model, x), (plan, given) in tqdm(pairs, disable=not progress, unit="plan"):
        needed, why = None, ""
        try:
            with quiet():
                ledger = predict(x, given, tokens=tokens, images=images, allocator=allocator, **use)
            needed = ledger.total
        except (AnatomyError, SizeError) as error:
            errors.append(error)
            why = ("too long: " if isinstance(error, SizeError) else "unknown: ") + str(error)
        rows += [(model, plan, gpu, needed, size, why) for gpu, size in cards.items()]
    if errors and len(errors) == len(pairs):
        raise errors[0]
    table = pd.DataFrame(rows, columns=["model", "plan", "gpu", "needed", "memory", "why"])
    table["needed"] = table["needed"].astype("Int64")
    table.insert(5, "usable", table["memory"] - lost)
    table.insert(6, "headroom", table["usable"] - table["needed"])
    table.insert(7, "fits", (table["headroom"] >= 0).fillna(False).astype(bool))
    return table


def _labelled(things):
    return list(things.items()) if isinstance(things, dict) else [(_label(x), x) for x in things]


def _label(x):
    return x if isinstance(x, str) else str(x) if isinstance(x, int) else repr(x)


def room_on(card, reserved=RESERVED):
    """Bytes of a card, or of a size such as "12 GB", less what is reserved.

    Raises SizeError for an unknown card, and if nothing is left.
    """
    room = int(memory_of(card)) - parse_size(reserved)
    if room <= 0:
        raise SizeError(f"{card} has no more memory than the {reserved} that is reserved.")
    return room


def memory_of(gpu):
    """Bytes of a card, or of a size such as "12 GB".

    Raises SizeError for anything else, also for less than a megabyte: "24" is meant as 24 GB, and
    "4090" as a card.
    """
    if isinstance(gpu, str) and gpu in GPUS:
        return GPUS[gpu].bytes
    try:
        size, cause = parse_size(gpu), None
    except SizeError as error:
        size, cause = 0, error
    if size < MEGABYTE:
        named = re.sub(r"nvidia|geforce", "", str(gpu), flags=re.IGNORECASE).strip()
        raise SizeError(
            f"{shown(gpu)} is neither a card of the catalog nor a size with its unit. "
            f"{_several(gpu)}"
            f"{did_you_mean(named, [*GPUS, *_SHORT], 0.6, _SHORT)}The cards are "
            f"{', '.join(GPUS)}. For another card, give its memory, such as '48 GB'."
        ) from cause
    return size


def _several(gpu):
    number, card = cards_of(gpu)
    return f"Only vk.memory.largest takes several cards such as {number} x {card}. " * (number > 1)


def in_gigabytes(size):
    """Bytes of a card as a text: 8, 24.5."""
    return f"{round(size / GIGABYTE, 1):g}"


def summary(table):
    """The table of `fit` as text: a DataFrame with a row for each model and plan.

    It has the GB that are needed and, for each size of card in GB, the GB that are left. "-" means
    that the model does not fit, "too long" that its context is too short for the tokens, "unknown"
    that vlmkit cannot predict it.
    """
    import pandas as pd

    rows = {}
    for (model, plan), own in table.groupby(["model", "plan"], sort=False):
        needed = own["needed"].iloc[0]
        row = rows[model, plan] = {
            "needs": own["why"].iloc[0].partition(":")[0]
            if pd.isna(needed)
            else f"{needed / GIGABYTE:.1f}"
        }
        for card in own.sort_values("memory").itertuples():
            left = f"{card.headroom / GIGABYTE:.1f}" if card.fits else "-"
            row.setdefault(in_gigabytes(card.memory), left)  # of cards about alike, the smaller
    wide = pd.DataFrame.from_dict(rows, orient="index")
    wide.index = pd.MultiIndex.from_tuples(wide.index, names=["model", "plan"])
    return wide
