"""Layers: of many layers that are alike, a dry run runs a few and counts the others.

A decoder of forty layers does forty times the same to memory. In a dry run, layers of one kind are
run until two in a row keep the same, or until one keeps nothing but its input (gradient
checkpointing). The last layers of a kind are run too. A layer between them only returns a tensor
like its input. The bytes that it would have kept are counted: in the forward pass, as many as
layers of its kind were seen to keep; in the backward pass, as many as two of the last layers were
seen to take or to free. The bytes that a layer needs for a moment are seen in the layers that are
run: along a stack memory grows or shrinks steadily, so that the peak is at one of its ends. The
tests compare the result with that of running every layer.
"""

import weakref

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlmkit.memory.tracker import storage_of

ALL = None
LAST_LAYERS = (3, 4, ALL)
"""How many layers of a kind are run at the end of a stack in training; the next number is tried
where a smaller one shows too little. The very last layer may have no backward pass (LLaVA reads the
features before it), and the first one that has may be unlike the others."""
PLACE = "layer_idx"
"""The attribute that numbers a layer and says nothing about what the layer does."""
PLAIN = (bool, int, float, str, type(None), torch.dtype)


class SkippedLayers:
    """The layers of a model that a dry run does not run.

    model: on the meta device. Its tensors are emptied here; those of a layer just before it runs.
    last: how many layers of a kind are run at the end of a stack, in training.
    complete: whether the backward pass freed what the skipped layers kept. If not, no layer like
        them was seen to do that, and more layers have to be run.
    stand_ins: {full name of a skipped layer: name of a layer like it that was run}. A skipped layer
        gets no gradients and writes nothing into a cache.
    """

    def __init__(self, tracker, model, last):
        self.tracker, self.last = tracker, last
        self.waiting, self.failed, self.stand_ins, self.counted = 0, False, {}, []
        self.stacks = {}
        for name, layers in model.named_modules():
            inside = tuple(f"{outer}." for outer in self.stacks)
            if isinstance(layers, torch.nn.ModuleList) and not name.startswith(inside):
                self.stacks[name] = _Stack(self, name, layers)
        self.model = model
        tracker.empty(model, but=self.stacks)

    def renew(self):
        """Empty the tensors that the model has got since it was last run."""
        self.tracker.empty(self.model, but=self.never_ran())

    def restart(self):
        """Forget what was seen, and what skipped layers count for, before another run."""
        for parts in self.counted:
            self.tracker.shift({component: -size for component, size in parts.items()})
        self.waiting, self.failed, self.counted = 0, False, []
        self.stand_ins.clear()
        for stack in self.stacks.values():
            stack.restart()

    def count(self, parts):
        """Count bytes by component for a skipped layer."""
        self.tracker.shift(parts)
        self.counted.append(parts)

    def layer_of(self, name):
        """The full name of the layer of a stack that a module or a parameter is in, or None."""
        for stack in self.stacks:
            if name.startswith(f"{stack}."):
                return f"{stack}.{name[len(stack) + 1 :].partition('.')[0]}"
        return None

    def never_ran(self):
        """Full names of the layers that no run has needed so far."""
        return {
            f"{name}.{place}"
            for name, stack in self.stacks.items()
            for place in range(len(stack.kinds))
            if place not in stack.emptied
        }

    @property
    def complete(self):
        return not (self.waiting or self.failed)


class _Stack:
    """Layers that call one another in order, and what each kind of them does to memory."""

    def __init__(self, skipped, name, layers):
        self.skipped, self.tracker, self.name = skipped, skipped.tracker, name
        self.kinds = [_kind(layer) for layer in layers]
        self.emptied = set()
        # Attention to one window after another, in kernels that keep no matrix of scores, keeps as
        # much as attention to all at once.
        self.merges = all(
            getattr(part.config, "_attn_implementation", "sdpa") == "sdpa"
            for part in layers.modules() if hasattr(part, "config")
        )  # fmt: skip
        self.restart()
        for place, layer in enumerate(layers):
            layer.forward = self._forward(place, layer, layer.forward)

    def restart(self):
        self.records = {kind: _Record() for kind in self.kinds}
        # The layer that was called last, and the layer that the backward pass has reached, with the
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
                if later >= (self.skipped.last if training else 1):
                    return self._skip(place, record, hidden)
            if place not in self.emptied:
                self.tracker.empty(layer)
                self.emptied.add(place)
            if self.merges and "cu_seqlens" in kwargs:
                kwargs["cu_seqlens"] = _few_windows(kwargs["cu_seqlens"])
            output = run(*args, **kwargs)
            self._look_at(place, record, hidden, output)
            return output

        return forward

    def _skip(self, place, record, hidden):
        self.skipped.stand_ins[f"{self.name}.{place}"] = f"{self.name}.{record.place}"
        self.skipped.count(record.kept)
        self.skipped.waiting += hidden.requires_grad
        leaves, structure = record.output
        hidden = _Skipped.apply(hidden, self, place)
        return tree_unflatten([hidden if leaf else None for leaf in leaves], structure)

    def _look_at(self, place, record, hidden, output):
        """Note what a layer of this kind returns, and listen for its backward pass."""
        leaves, structure = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if len(tensors) != 1 or any(leaf is not None for leaf in leaves if leaf is not tensors[0]):
            return
        if tensors[0].shape == hidden.shape and tensors[0].dtype == hidden.dtype:
            record.output = [leaf is not None for leaf in leaves], structure
            record.hidden = weakref.ref(storage_of(hidden))
            record.component = self.tracker.component
        if tensors[0].requires_grad:
            tensors[0].register_hook(lambda gradient: self.reach(place))

    def _arrive(self, place):
        """The layer at `place` is called: now it is known what the layer before it kept."""
        before, then = self.called
        self.called = place, self.tracker.now()
        if place == 0 or before != place - 1 or f"{self.name}.{before}" in self.skipped.stand_ins:
            return
        record = self.records[self.kinds[before]]
        if record.output is None or record.kept is not None:
            return
        hidden = record.hidden()
        kept = self.tracker.since(then)
        if hidden is not None:  # a skipped layer keeps it by itself
            kept[record.component] -= hidden.nbytes()
        seen = {c: size for c, size in kept.items() if size}, hidden is not None
        checkpointed = seen == ({}, True)  # keeps its input and nothing else
        if seen == record.seen or checkpointed:
            record.kept, record.keeps_hidden, record.place = *seen, before
        record.seen = seen

    def reach(self, place):
        """The backward pass has come to the layer at `place`."""
        after, then = self.reached
        self.reached = place, self.tracker.now()
        if after == place + 1 and f"{self.name}.{after}" not in self.skipped.stand_ins:
            record = self.records[self.kinds[after]]
            record.given_back.append(self.tracker.since(then))

    def give_back(self, place, hidden):
        """The backward pass has come to a skipped layer."""
        self.reach(place)
        self.skipped.waiting -= 1
        record = self.records[self.kinds[place]]
        if len(record.given_back) < 2 or record.given_back[-1] != record.given_back[-2]:
            self.skipped.failed = True
            return
        self.skipped.count(record.given_back[-1])
        if hidden:
            self.skipped.count({record.component: storage_of(hidden[0]).nbytes()})


def _few_windows(ends):
    """Where windows of attention begin and end, with all but the last two of them as one."""
    return ends if len(ends) < 5 else torch.cat([ends[:1], ends[-3:]])


class _Record:
    """What layers of one kind do: bytes by component that they keep, and that come or go in the
    backward pass; what they return; whether they keep their input."""

    def __init__(self):
        self.seen = self.kept = self.output = self.hidden = self.component = self.place = None
        self.keeps_hidden = False
        self.given_back = []


class _Skipped(torch.autograd.Function):
    """A skipped layer: it makes a tensor like its input."""

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
