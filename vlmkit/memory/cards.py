"""Several cards: the bytes of each, where a model is larger than one.

    vk.memory.predict(name, gpus=2, tokens=512, images=1)                # whole layers on each card
    vk.memory.predict(name, gpus=2, training="lora", tokens=512, images=1)  # FSDP

shard="layers" is transformers' `device_map="auto"`: each card has some of the layers, and one card
computes while the others wait (`vlmkit.memory.layered`). shard="fsdp" is for a training
(`vlmkit.memory.fsdp`).
"""

import re
from dataclasses import dataclass, field

from vlmkit.errors import SizeError, did_you_mean, shown
from vlmkit.memory.allocator import overhead
from vlmkit.memory.ledger import ALL_KINDS, BUFFER, STATE, Ledger
from vlmkit.rows import KINDS

FSDP, LAYERS = "fsdp", "layers"
MOST_CARDS = 1024
IN_LOAD = (*KINDS, STATE, BUFFER)


@dataclass(frozen=True)
class Cards(Ledger):
    """A Ledger for each of several cards, `cards`. By itself it is that of the fullest card."""

    cards: tuple = field(default=(), repr=False)

    def table(self):
        """A pandas DataFrame of bytes: a row for each card, a column for each kind."""
        import pandas as pd

        rows = {f"card {place}": card.by_kind for place, card in enumerate(self.cards)}
        kinds = sorted({k for row in rows.values() for k in row}, key=ALL_KINDS.index)
        table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=kinds).fillna(0)
        table = table.astype(int)
        table["total"] = table.sum(axis=1)
        return table

    def _headline(self):
        return f"{super()._headline()} on the fullest of {len(self.cards)} cards"


def cards_of(text):
    """(how many cards, one of them) of a text such as "2 x RTX 4090", "4x24 GB" or "RTX 4090"."""
    match = isinstance(text, str) and re.fullmatch(r"\s*([0-9]{1,4})\s*[x×]\s*(\S.*?)\s*", text)
    return (int(match[1]), match[2]) if match else (1, text)


def check_cards(gpus, shard, training, prompt):
    """How a model is put on `gpus` cards: FSDP, LAYERS, or None for one card.

    Raises SizeError for numbers of cards and ways that cannot be.
    """
    if isinstance(gpus, bool) or not isinstance(gpus, int) or not 1 <= gpus <= MOST_CARDS:
        raise SizeError(f"gpus is a whole number from 1 to {MOST_CARDS:,}, not {shown(gpus)}.")
    if shard not in (None, FSDP, LAYERS):
        raise SizeError(
            f"{shown(shard)} is not a way to share a model. {did_you_mean(shard, (FSDP, LAYERS))}"
            "The ways are 'fsdp', for a training, and 'layers', which is transformers' "
            "device_map='auto', for a prompt."
        )
    if gpus == 1:
        if shard:
            raise SizeError(f"shard={shard!r} shares a model among cards: give gpus=2 or more.")
        return None
    shard = shard or (LAYERS if training is None else FSDP)
    if shard == LAYERS and training is not None:
        raise SizeError("a training on several cards is predicted for shard='fsdp' alone.")
    if shard == FSDP and prompt and training is None:
        raise SizeError("a prompt on several cards is predicted for shard='layers' alone.")
    return shard


def on_cards(title, ledgers, notes, loads=None):
    """The Cards of lists of entries.

    loads: a CachingAllocator for each card and {component: bytes of its blocks} of the weights that
        lie there already, or None to leave out what an allocator adds.
    """
    if loads is not None:
        for own, load in zip(ledgers, loads, strict=True):
            there = [e for e in own if load[1] and e.kind in IN_LOAD]
            own += overhead(load, there, [e for e in own if not (load[1] and e.kind in IN_LOAD)])
    cards = tuple(Ledger(f"{title}, card {k}", tuple(own)) for k, own in enumerate(ledgers))
    fullest = max(cards, key=lambda card: card.total)
    return Cards(title, fullest.entries, tuple(notes), cards)


def note_on(shard, gpus):
    """A sentence on how the cards share a model."""
    if shard == LAYERS:
        return (
            f"{gpus} cards with whole layers on each (device_map='auto'); one card computes at a "
            "time. Predicted, not measured on GPUs."
        )
    return (
        f"{gpus} cards that share the model by FSDP, batch_size samples on each. NCCL's own memory "
        "is not counted. Peaks measured in two processes are predicted 1 to 3.5% too low, and "
        "PyTorch reserved 0.6 to 2 GB beyond them."
    )
