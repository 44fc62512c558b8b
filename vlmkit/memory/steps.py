"""Steps: the entries that a prompt and a training step add to those of the weights."""

import re
from dataclasses import dataclass, replace

from vlmkit.adapters import LoRA, adapted, as_stored, parse, resize
from vlmkit.anatomy import component_finder, plain_name
from vlmkit.architectures import LANGUAGE, VISION
from vlmkit.backend import checkpointing
from vlmkit.backend.quiet import quiet
from vlmkit.memory.cache import predicted_cache, stretch
from vlmkit.memory.dry_run import DryRun
from vlmkit.memory.layers import LAST_LAYERS
from vlmkit.memory.ledger import ACTIVATION, INPUT
from vlmkit.memory.parameters import as_loaded, prepare_kbit
from vlmkit.memory.training_state import (
    adapter_entries,
    gradient_entries,
    optimizer_entries,
    paged_bytes,
    step_bytes,
    upcast_entries,
)
from vlmkit.rows import Row
from vlmkit.units import MEGABYTE


@dataclass(frozen=True)
class Training:
    """How a model is trained. what: {component: None, "full" or a LoRA}. bf16: under autocast."""

    what: dict
    gradient_checkpointing: bool
    optim: str
    prepare_kbit: bool
    bf16: bool


@dataclass(frozen=True)
class Passes:
    """What a prompt and the tokens after it need.

    inputs: tensors without data. cache: entries of the keys and values at the end. prefill, decode:
        {component: bytes} live at the peak of the prompt, and of its last token, cache included;
        `decode` is empty if no token follows.
    """

    inputs: dict
    cache: tuple
    prefill: dict
    decode: dict


class DryRuns:
    """The dry runs of a model. What one needs is made once, and kept for the next that needs it.

    build: a function that makes the model on the meta device. device: see `DryRun`.
    adapters: the folder of the checkpoint's adapters, or None; a training step is that of a model
        without them.
    """

    def __init__(self, build, layout, device=None, adapters=None):
        self.build, self.layout, self.device, self.adapters = build, layout, device, adapters
        self.of_prompts, self.how, self.of_training = None, None, {}

    def passes(self, batch):
        """The Passes of a prompt."""
        if self.of_prompts is None:
            model = as_loaded(self.build(), self.layout)
            model = model if self.adapters is None else as_stored(model, self.adapters)
            self.of_prompts = self._dry_run(model)
        run = self.of_prompts
        run.reset()
        inputs = run.inputs(batch)
        cache, prefill = run.prefill(inputs)
        decode = {}
        if batch.new_tokens:
            more = batch.new_tokens - 1
            stretch(cache, run.places, more, run.tracker)
            cache, decode = run.decode(cache, batch.size, batch.length + more)
        return Passes(inputs, tuple(predicted_cache(cache, run.places)), prefill, decode)

    @quiet()
    def prompt(self, batch):
        """(entries, notes) of a prompt, and of the tokens that follow it: inputs, keys and values,
        and activations."""
        passes = self.passes(batch)
        total = sum(entry.bytes for entry in passes.cache)
        beside = {}
        for entry in passes.cache:
            beside[entry.component] = beside.get(entry.component, 0) + entry.bytes
        peak = max(passes.prefill, passes.decode, key=lambda live: sum(live.values()))
        need = max(0, sum(peak.values()) - total)
        entries = [
            *input_entries(passes.inputs),
            *passes.cache,
            *activations(peak, beside, need, "the forward pass"),
        ]
        return entries, []

    @quiet()
    def training_step(self, batch, how, whole=True):
        """(entries, notes) of a training step: adapters, upcasts, gradients and optimizer states
        and, if `whole`, its inputs and activations. how: a Training."""
        run, upcasts, inputs, learnt, peak, left = self.trained(batch, how)
        all_of_them, component_of = run.parameters(), component_finder(run.model)
        parameters = {
            name: (p.numel(), p.element_size()) for name, p in all_of_them.items() if name in learnt
        }
        gradients = list(gradient_entries(learnt, component_of))
        entries = [
            *adapter_entries(all_of_them, component_of),
            *upcasts,
            *gradients,
            *optimizer_entries(how.optim, parameters, component_of),
        ]
        if whole:
            entries += input_entries(inputs)
            stepping = left + step_bytes(how.optim, parameters)
            entries += step_activations(peak, stepping, gradients, parameters, component_of)
        notes = list(without_gradient(all_of_them, learnt))
        paged = paged_bytes(how.optim, parameters)
        if paged:
            notes.append(f"{paged / MEGABYTE:,.1f} MB of the optimizer's states are paged.")
        return entries, notes

    def trained(self, batch, how):
        """(DryRun, entries of upcasts, inputs, and what `DryRun.train` returned for them)."""
        for run, upcasts in self._adapted(how):  # noqa: B007 (of the last)
            run.reset()
            inputs = run.inputs(batch)
            found = run.train(inputs, how.bf16)
            if run.complete:
                break
        return run, upcasts, inputs, *found

    def _adapted(self, how):
        """(DryRun, entries of upcasts) for each of LAST_LAYERS, from the one that sufficed last."""
        if how != self.how:
            if self.how is not None and _without_ranks(how) == _without_ranks(self.how):
                for run, _ in filter(None, self.of_training.values()):
                    resize(run.model, parse(how.what))
                    run.renew()
            else:
                self.of_training = {}
            self.how = how
        for last in LAST_LAYERS[max(0, len(self.of_training) - 1) :]:
            if last not in self.of_training:
                before = {}
                model = as_loaded(self.build(), self.layout)
                if how.prepare_kbit:
                    before = prepare_kbit(model)
                upcasts = list(upcast_entries(model, before, component_finder(model)))
                model = adapted(model, how.what)
                if how.gradient_checkpointing:
                    checkpointing.enable(model)
                    if how.prepare_kbit:  # peft's own function leaves the hook where it is
                        model.enable_input_require_grads()
                self.of_training = dict.fromkeys(self.of_training)  # frees the last
                self.of_training[last] = self._dry_run(model, last), upcasts
            yield self.of_training[last]

    def _dry_run(self, model, last=1):
        return DryRun(model, last, self.device)


def _without_ranks(how):
    """A Training with the same rank wherever it has one."""
    what = {
        component: replace(way, r=1, lora_alpha=None) if isinstance(way, LoRA) else way
        for component, way in parse(how.what).items()
    }
    return replace(how, what=what)


def input_entries(inputs):
    for name, tensor in inputs.items():
        component = VISION if tensor.is_floating_point() else LANGUAGE
        size = tensor.numel() * tensor.element_size()
        yield Row(name, component, INPUT, size)


def activations(peak, beside, need, name, kind=ACTIVATION):
    """Entries of `need` bytes in all. Each component gets its share of what is live at the `peak`
    less what other entries count already (`beside`). Both are {component: bytes}."""
    own = {c: max(0, size - beside.get(c, 0)) for c, size in peak.items()}
    whole, shared = sum(own.values()), 0
    for component in own if need else ():
        share = need * (shared + own[component]) // whole - need * shared // whole
        shared += own[component]
        if share:
            yield Row(name, component, kind, share)


def step_activations(peak, stepping, gradients, parameters, component_of):
    """Entries of what a step holds at most beyond the gradients that exist at its end: at the
    `peak` of the two passes, or when the optimizer is at its largest parameter (`stepping`)."""
    there = sum(entry.bytes for entry in gradients)
    if stepping > sum(peak.values()):
        largest = max(parameters, key=lambda name: parameters[name][0] * parameters[name][1])
        component = component_of(largest)
        return [Row("the optimizer's step", component, ACTIVATION, stepping - there)]
    live = {c: size for c, size in peak.items() if not isinstance(c, tuple)}
    return list(activations(live, {}, sum(peak.values()) - there, "the training step"))


def without_gradient(parameters, learnt):
    """A sentence that names the trained parameters that get no gradient, if there are any."""
    names = [n for n, p in parameters.items() if p.requires_grad and n not in learnt]
    if names:
        # Layers are named as wholes: the path as far as its last number.
        places = dict.fromkeys(re.sub(r"(.*\.\d+)\..*", r"\1", plain_name(name)) for name in names)
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        yield (
            f"{len(names)} trained parameters never get a gradient: those of "
            f"{', '.join(list(places)[:3])}{more}."
        )
