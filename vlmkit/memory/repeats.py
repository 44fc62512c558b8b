"""Repeats: of many layers that are alike, a few are rehearsed.

A decoder of forty layers does forty times the same to memory. In a rehearsal
(`vlmkit.memory.shapes`) the first two layers of a kind are run and the last two, and those between
hand on what they are given. What they would have kept is counted all the same: going forward, as
much as the second layer kept; going backward, as much comes or goes as with the last but one. What
a layer needs for a moment is seen in those that are run: along a stack memory grows or shrinks
steadily, so that its peak is at one of the ends. The tests hold the result against that of running
every layer.
"""

import weakref

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

ENDS = 2
"""Layers of a kind that are run at each end of a stack."""
PLACE = "layer_idx"
"""The attribute that says which of its kind a layer is, and nothing about what it does."""
PLAIN = (bool, int, float, str, type(None), torch.dtype)


class Shortened:
    """A model in a rehearsal whose stacks of layers are run at their ends only.

    complete: whether the layers left out have given back, going backward, what they kept. If not,
        no layer like them went through a backward pass, and all have to be run.
    stand_ins: {full name of a layer left out: that of a layer that is run and is like it}. A layer
        left out gets no gradients and writes nothing into a cache.
    """

    def __init__(self, rehearsal, model):
        self.rehearsal = rehearsal
        self.waiting, self.failed, self.stand_ins = 0, False, {}
        inside = []
        for name, layers in model.named_modules():
            if isinstance(layers, torch.nn.ModuleList) and not name.startswith(tuple(inside)):
                inside.append(f"{name}.")
                _Stack(self, name, layers)

    @property
    def complete(self):
        return not (self.waiting or self.failed)


class _Stack:
    """Layers that call one another in order, and what each kind of them does to memory."""

    def __init__(self, whole, name, layers):
        self.whole, self.rehearsal = whole, whole.rehearsal
        self.kinds = [_kind(layer) for layer in layers]
        self.records = {kind: _Record() for kind in self.kinds}
        # The layer that was called last, and the one that the backward pass has reached, with the
        # bytes that were live.
        self.called = self.reached = (None, None)
        self.second, self.last_but_one, self.left_out = set(), set(), set()
        for kind in self.records:
            same = [place for place, other in enumerate(self.kinds) if other == kind]
            if len(same) > 2 * ENDS:
                self.second.add(same[1])
                self.last_but_one.add(same[-2])
                self.left_out.update(same[ENDS:-ENDS])
                for place in same[ENDS:-ENDS]:
                    whole.stand_ins[f"{name}.{place}"] = f"{name}.{same[1]}"
        for place, layer in enumerate(layers if self.left_out else ()):
            layer.forward = self._forward(place, layer.forward)

    def _forward(self, place, run):
        record = self.records[self.kinds[place]]

        def forward(*args, **kwargs):
            self._arrive(place)
            hidden = args[0] if args else next(iter(kwargs.values()))
            if place not in self.left_out or record.kept is None:
                output = run(*args, **kwargs)
                self._look_at(place, hidden, output)
                return output
            self.rehearsal.shift(record.kept)
            self.whole.waiting += hidden.requires_grad
            leaves, structure = record.output
            hidden = _LeftOut.apply(hidden, self, place)
            return tree_unflatten([hidden if leaf else None for leaf in leaves], structure)

        return forward

    def _look_at(self, place, hidden, output):
        """Note what a layer of this kind returns, and listen for its backward pass."""
        record = self.records[self.kinds[place]]
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
        before, then = self.called
        self.called = place, self.rehearsal.now()
        record = self.records[self.kinds[before]] if before is not None else None
        if record and before in self.second and before == place - 1 and record.output:
            hidden = record.hidden()
            # A layer left out makes a tensor like this one, and keeps the one that it is given.
            record.keeps_hidden = hidden is not None
            record.kept = self.rehearsal.since(then)
            if hidden is not None:
                record.kept[record.component] -= hidden.nbytes()

    def reach(self, place):
        """The backward pass has come to the layer at `place`."""
        after, then = self.reached
        if after in self.last_but_one and after == place + 1:
            self.records[self.kinds[after]].given_back = self.rehearsal.since(then)
        self.reached = place, self.rehearsal.now()

    def give_back(self, place, hidden):
        record = self.records[self.kinds[place]]
        self.reach(place)
        self.whole.waiting -= 1
        if record.given_back is None:
            self.whole.failed = True
            return
        self.rehearsal.shift(record.given_back)
        if hidden:
            self.rehearsal.shift({record.component: hidden[0].untyped_storage().nbytes()})


class _Record:
    """What layers of one kind do: bytes by component that are kept, and given back going backward;
    what is returned; and whether the input is kept, which a layer left out does by itself."""

    kept = given_back = output = hidden = component = None
    keeps_hidden = False


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
