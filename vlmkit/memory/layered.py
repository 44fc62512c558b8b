"""Whole layers on each of several cards, as transformers' `device_map="auto"` puts them there."""

import contextlib
import logging
from functools import cached_property

import torch
from torch.utils._pytree import tree_leaves

from vlmkit.anatomy import component_finder, plain_name
from vlmkit.architectures import LANGUAGE
from vlmkit.backend.quiet import quiet
from vlmkit.errors import PlanError
from vlmkit.formats import torch_dtype
from vlmkit.memory.allocator import CachingAllocator, loaded
from vlmkit.memory.dry_run import DryRun, named
from vlmkit.memory.steps import DryRuns, activations, input_entries
from vlmkit.memory.tracker import AllocationTracker, storage_of
from vlmkit.rows import Row

UNLIMITED = 2**60
LAST = 1
"""Layers of a kind and of a card that a prompt runs at the end of a stack. See `DryRun`."""


@quiet()
def device_map_of(model, layout, gpus):
    """{name of a module: card}: transformers' own `device_map="auto"` for empty cards.

    model: on the meta device, as it is before a load. It is changed.
    """
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer, config = None, layout.quantization_config()
    whole = getattr(model, "_no_split_modules", None)
    if config is not None:
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        with torch.device("meta"):
            quantizer.preprocess_model(
                model=model, dtype=torch_dtype(layout.load_dtype), device_map="auto"
            )
    with _without_notes():
        room = get_balanced_memory(model, dict.fromkeys(range(gpus), UNLIMITED), whole, quantizer)
        room = room if quantizer is None else quantizer.adjust_max_memory(room)
        found = infer_auto_device_map(
            model, room, whole, hf_quantizer=quantizer,
            no_placement_params=getattr(model, "_no_placement_params", None),
        )  # fmt: skip
    if set(found.values()) - set(range(gpus)):  # cannot be, where cards have no limit
        raise PlanError(f"transformers puts modules on {set(found.values())}.")
    return found


@contextlib.contextmanager
def _without_notes():
    """accelerate (1.15) notes for each card that this machine does not have it."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class PlacedRuns(DryRuns):
    """The dry runs of a model whose layers lie on several cards."""

    def __init__(self, build, layout, gpus, device=None, adapters=None):
        super().__init__(build, layout, device, adapters)
        self.gpus = gpus

    @cached_property
    def map(self):
        return device_map_of(self.build(), self.layout, self.gpus)

    def card_of(self, name):
        """The card of a parameter or a module. What the map has not is computed on card 0."""
        parts = plain_name(name).split(".")
        outer = (".".join(parts[:k]) for k in range(len(parts), -1, -1))
        return next((self.map[module] for module in outer if module in self.map), 0)

    @cached_property
    def loads(self):
        """For each card the allocator after a load, and the bytes of its blocks by component."""
        found = []
        for card in range(self.gpus):
            cuda = CachingAllocator()
            rows = [row for row in self.layout.rows if self.card_of(row.name) == card]
            found.append((cuda, loaded(cuda, self.layout, rows)))
        return found

    def _dry_run(self, model, last=1):
        return PlacedRun(model, self.map, self.card_of, self.device)

    def prompts(self, batch):
        """A list of entries of a prompt for each card."""
        passes = self.passes(batch)
        found = [list(input_entries(passes.inputs)), *([] for _ in range(self.gpus - 1))]
        for card, entries in enumerate(found):
            cache = [_on(e, e.component[0]) for e in passes.cache if _card(e.component) == card]
            beside = {}
            for entry in cache:
                beside[entry.component] = beside.get(entry.component, 0) + entry.bytes
            peaks = (live.get(card, {}) for live in (passes.prefill, passes.decode))
            peak = max(peaks, key=lambda live: sum(live.values()))
            need = max(0, sum(peak.values()) - sum(beside.values()))
            entries += [*cache, *activations(peak, beside, need, "the forward pass")]
        return found


def _on(entry, component):
    return Row(entry.name, component, entry.kind, entry.bytes)


def _card(label):
    return label[1] if isinstance(label, tuple) else 0


class PlacedRun(DryRun):
    """A DryRun that tells the cards apart: what it counts as a component's is (component, card)."""

    def __init__(self, model, placed, card_of, device):
        self.card_of = card_of
        for name, module in model.named_modules():
            module.card = card_of(name)  # layers of different cards are of different kinds
        super().__init__(model, LAST, device)
        for name, module in model.named_modules():
            if plain_name(name) in placed:
                self._copy_inputs(module)

    def _tracker(self):
        return CardTracker(self.device)

    def _label_of(self):
        component_of = component_finder(self.model)
        return lambda name: (component_of(name), self.card_of(name)) if component_of(name) else None

    def _restart(self):
        super()._restart()
        self.tracker.restart_cards()

    def _peak(self):
        return {card: named(parts) for card, parts in self.tracker.peaks.items()}

    def _copy_inputs(self, module):
        """Count copies of inputs that lie on another card while `module` runs, as accelerate makes
        them before each module of a device map."""
        copies, tracker = [], self.tracker

        def enter(module, args, kwargs):
            tensors = {
                id(storage_of(leaf)): leaf
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, torch.Tensor) and tracker.card(leaf) != module.card
            }
            size = sum(leaf.numel() * leaf.element_size() for leaf in tensors.values())
            copies.append(size)
            tracker.shift({(LANGUAGE, module.card): size})

        def leave(module, args, output):
            tracker.shift({(LANGUAGE, module.card): -copies.pop()})

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)


class CardTracker(AllocationTracker):
    """An AllocationTracker that knows the peak of each card.

    peaks: {card: {component: bytes} at the peak of that card}.
    """

    def __init__(self, device=None):
        super().__init__(device)
        self.restart_cards()

    def restart_cards(self):
        self.on, self.most, self.peaks = {}, {}, {}
        for label, size in self.parts.items():
            self.on[_card(label)] = self.on.get(_card(label), 0) + size
        for card in self.on:
            self._top(card)

    def card(self, tensor):
        """The card of a tensor. Inputs are on card 0."""
        return _card(self._owner.get(id(storage_of(tensor))))

    def forget(self):
        super().forget()
        self.restart_cards()

    def _add(self, size, label):
        super()._add(size, label)
        card = _card(label)
        self.on[card] = self.on.get(card, 0) + size
        if self.on[card] > self.most.get(card, 0):
            self._top(card)

    def _top(self, card):
        self.most[card] = self.on[card]
        parts = {}
        for label, size in self.parts.items():
            if _card(label) == card:
                component = label[0] if isinstance(label, tuple) else label
                parts[component] = parts.get(component, 0) + size
        self.peaks[card] = parts
