"""Repeats: of many layers that are alike, a few are rehearsed.

A decoder of forty layers does forty times the same to memory. In a rehearsal
(`vlmkit.memory.shapes`) layers of a kind are run until two in a row have kept the same, and so are
the last ones; those between hand on a tensor like the one that they are given. What they would have
kept is counted all the same: going forward, as much as their kind was seen to keep; going backward,
as much comes or goes as with two of the last. What a layer needs for a moment is seen in those that
are run: along a stack memory grows or shrinks steadily, so that its peak is at one of the ends. The
tests hold the result against that of running every layer.
"""

import weakref

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

LAST, LAST_IN_TRAINING = 1, 4
"""How many layers of a kind are run at the end of a stack. In training the very last may not be
gone through backward (LLaVA reads the features before it), and the first that is may be unlike the
others."""
PLACE = "layer_idx"
"""The attribute that says which of its kind a layer is, and nothing about what it does."""
PLAIN = (bool, int, float, str, type(None), torch.dtype)


class Shortened:
    """A model in a rehearsal whose stacks of layers are not run in full.

    model: on the meta device. Its tensors are emptied here, those of a layer not before it is run.
    complete: whether the layers left out have given back, going backward, what they kept. If not,
        layers like them were not seen to, and all have to be run.
    stand_ins: {full name of a layer left out: that of a layer that was run and is like it}. A layer
        left out gets no gradients and writes nothing into a cache.
    """

    def __init__(self, rehearsal, model):
        self.rehearsal = rehearsal
        self.waiting, self.failed, self.stand_ins, self.counted = 0, False, {}, []
        self.stacks = {}
        for name, layers in model.named_modules():
            inside = tuple(f"{outer}." for outer in self.stacks)
            if isinstance(layers, torch.nn.ModuleList) and not name.startswith(inside):
                self.stacks[name] = _Stack(self, name, layers)
        rehearsal.empty(model, but=self.stacks)

    def restart(self):
        """Forget what was seen, and what layers left out count for, before another run."""
        for parts in self.counted:
            self.rehearsal.shift({component: -size for component, size in parts.items()})
        self.waiting, self.failed, self.counted = 0, False, []
        self.stand_ins.clear()
        for stack in self.stacks.values():
            stack.restart()

    def count(self, parts):
        """Count bytes by component for a layer that is left out."""
        self.rehearsal.shift(parts)
        self.counted.append(parts)

    @property
    def complete(self):
        return not (self.waiting or self.failed)


class _Stack:
    """Layers that call one another in order, and what each kind of them does to memory."""

    def __init__(self, whole, name, layers):
        self.whole, self.rehearsal, self.name = whole, whole.rehearsal, name
        self.kinds = [_kind(layer) for layer in layers]
        self.emptied = set()
        self.restart()
        for place, layer in enumerate(layers):
            layer.forward = self._forward(place, layer, layer.forward)

    def restart(self):
        self.records = {kind: _Record() for kind in self.kinds}
        # The layer that was called last, and the one that the backward pass has reached, with the
        # bytes that were live then.
        self.called = self.reached = (None, None)

    def _forward(self, place, layer, run):
        later = self.kinds[place + 1 :].count(self.kinds[place])

        def forward(*args, **kwargs):
            self._arrive(place)
            record = self.records[self.kinds[place]]
            hidden = args[0] if args else next(iter(kwargs.values()))
            if record.kept is not None:
                training = torch.is_grad_enabled() and hidden.requires_grad
                if later >= (LAST_IN_TRAINING if training else LAST):
                    return self._left_out(place, record, hidden)
            if place not in self.emptied:
                self.rehearsal.empty(layer)
                self.emptied.add(place)
            output = run(*args, **kwargs)
            self._look_at(place, record, hidden, output)
            return output

        return forward

    def _left_out(self, place, record, hidden):
        self.whole.stand_ins[f"{self.name}.{place}"] = f"{self.name}.{record.place}"
        self.whole.count(record.kept)
        self.whole.waiting += hidden.requires_grad
        leaves, structure = record.output
        hidden = _LeftOut.apply(hidden, self, place)
        return tree_unflatten([hidden if leaf else None for leaf in leaves], structure)

    def _look_at(self, place, record, hidden, output):
        """Note what a layer of this kind returns, and listen for its backward pass."""
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if len(tensors) != 1 or any(leaf is not None for leaf in leaves if leaf is not tensors[0]):
            return
        if tensors[0].shape == hidden.shape and tensors[0].dtype == hidden.dtype:
            record.output = [leaf is not None for leaf in leaves], structure
            record.hidden = weakref.ref(hidden.untyped_storage())
            record.component = self.rehearsal.component
        if tensors[0].requires_grad:
            tensors[0].register_hook(lambda gradient: self.reach(place))

    def _arrive(self, place):
        """The layer at `place` is called: what the one before it kept is known now."""
        before, then = self.called
        self.called = place, self.rehearsal.now()
        if place == 0 or before != place - 1 or f"{self.name}.{before}" in self.whole.stand_ins:
            return
        record = self.records[self.kinds[before]]
        if record.output is None or record.kept is not None:
            return
        hidden = record.hidden()
        kept = self.rehearsal.since(then)
        if hidden is not None:  # which a layer left out keeps by itself
            kept[record.component] -= hidden.nbytes()
        seen = {c: size for c, size in kept.items() if size}, hidden is not None
        if seen == record.seen:
            record.kept, record.keeps_hidden, record.place = *seen, before
        record.seen = seen

    def reach(self, place):
        """The backward pass has come to the layer at `place`."""
        after, then = self.reached
        self.reached = place, self.rehearsal.now()
        if after == place + 1 and f"{self.name}.{after}" not in self.whole.stand_ins:
            record = self.records[self.kinds[after]]
            record.given_back.append(self.rehearsal.since(then))

    def give_back(self, place, hidden):
        """The backward pass has come to a layer that was left out."""
        self.reach(place)
        self.whole.waiting -= 1
        record = self.records[self.kinds[place]]
        if len(record.given_back) < 2 or record.given_back[-1] != record.given_back[-2]:
            self.whole.failed = True
            return
        self.whole.count(record.given_back[-1])
        if hidden:
            self.whole.count({record.component: hidden[0].untyped_storage().nbytes()})


class _Record:
    """What layers of one kind do: bytes by component that they keep, and that come or go going
    backward; what they return; whether the input is among what is kept."""

    def __init__(self):
        self.seen = self.kept = self.output = self.hidden = self.component = self.place = None
        self.keeps_hidden = False
        self.given_back = []


class _LeftOut(torch.autograd.Function):
    """A layer that is left out: it makes a tensor like the one that it is given."""

    @staticmethod
    def forward(ctx, hidden, stack, place):
        ctx.stack, ctx.place = stack, place
        if stack.records[stack.kinds[place]].keeps_hidden:
            ctx.save_for_backward(hidden)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, gradient):
        ctx.stack.give_back(ctx.place, ctx.saved_tensors)
        return gradient, None, None


def _kind(layer):
    """What a layer is, as far as it shows: its modules, their settings, its parameters."""
    parts = [(tuple(p.shape), p.dtype, p.requires_grad) for p in layer.parameters()]
    for module in layer.modules():
        settings = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN) and k != PLACE}
        parts += [type(module), str(sorted(settings.items(), key=str))]
    return hash(tuple(parts))
