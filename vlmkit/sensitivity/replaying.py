"""What a change cannot have changed is computed once: outputs of modules, kept and given again.

Every module that has returned before the first changed one is called gives what it gave before:
for the language model's layer 3 that is the whole vision encoder, the projector, and layers 0 to 2.
Which modules these are is read off one traced forward pass, so that nothing needs to be known of an
architecture. While a scope is changed, the `forward` of these module objects (not of their class)
gives what it has kept for the batch at hand; the first time, it computes and keeps it.
"""

import collections
import contextlib
import copy
import itertools
import threading
from dataclasses import dataclass, field

LIMIT = 4 * 10**9
"""Bytes that are kept at most; what does not fit is computed each time."""


@dataclass
class Call:
    """The `number`-th call of the module at `path`, from event `start` to event `end`."""

    path: str
    number: int
    start: int
    end: int = None


@dataclass
class Kept:
    """An output, and the version of each tensor in it, which an in-place change would raise."""

    output: object
    tensors: list = field(repr=False)
    versions: list

    @property
    def unchanged(self):
        return [tensor._version for tensor in self.tensors] == self.versions


class Replays:
    """The kept outputs of a model's modules, for batches by number."""

    def __init__(self, model, limit=LIMIT):
        self.model, self.limit = model, limit
        self.calls, self.first, self.bytes = [], {}, 0
        self.wanted, self.kept = set(), {}
        self.now = threading.local()

    def trace(self, run):
        """Learn from `run()`, one forward pass, which modules are called, and when."""
        calls, open_calls, handles, events = [], [], [], itertools.count()
        numbers = collections.Counter()

        def begin(path):
            def hook(module, inputs):
                calls.append(Call(path, numbers[path], next(events)))
                numbers[path] += 1
                open_calls.append(calls[-1])

            return hook

        def end(module, inputs, output):
            open_calls.pop().end = next(events)

        try:
            for path, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(begin(path)))
                handles.append(module.register_forward_hook(end))
            run()
        finally:
            for handle in handles:
                handle.remove()
        self.calls = calls
        self.first = {call.path: call.start for call in reversed(calls)}

    def before(self, parameters):
        """(path, number) of the outermost calls that are over when the first module that holds one
        of `parameters` is called."""
        changed = {id(parameter) for parameter in parameters}
        holders = [
            path
            for path, module in self.model.named_modules()
            if any(id(own) in changed for own in module.parameters(recurse=False))
        ]
        first = min((self._first_call(path) for path in holders), default=0)
        found, covered = set(), -1
        for call in self.calls:
            if call.end is not None and call.end < first and call.start > covered:
                found.add((call.path, call.number))
                covered = call.end
        return found

    def _first_call(self, path):
        """When the module at `path` is first called; the one around it where it never is, since
        that then reads its weight."""
        while path and path not in self.first:
            path = path.rpartition(".")[0]
        return self.first.get(path, 0)

    @contextlib.contextmanager
    def without(self, parameters):
        """Within it, `parameters` are changed, and what they do not reach is replayed."""
        wanted = self.before(parameters)
        for key in [key for key in self.kept if key[1:] not in wanted]:
            self.bytes -= _size(self.kept.pop(key))
        self.wanted = wanted
        modules = {path: self.model.get_submodule(path) for path, _ in wanted}
        own = {path: module.__dict__.get("forward") for path, module in modules.items()}
        try:
            for path, module in modules.items():
                module.forward = self._replaying(path, module.forward)
            yield
        finally:
            for path, module in modules.items():
                module.__dict__.pop("forward", None)
                if own[path] is not None:
                    module.forward = own[path]

    @contextlib.contextmanager
    def batch(self, number):
        """Within it, this thread computes the batch `number`."""
        self.now.batch, self.now.counts = number, {}
        try:
            yield
        finally:
            self.now.batch = None

    def _replaying(self, path, compute):
        def forward(*args, **kwargs):
            batch = getattr(self.now, "batch", None)
            if batch is None:
                return compute(*args, **kwargs)
            number = self.now.counts.get(path, 0)
            self.now.counts[path] = number + 1
            key = (batch, path, number)
            kept = self.kept.get(key)
            if kept is not None and kept.unchanged:
                return _copied(kept.output)
            output = compute(*args, **kwargs)
            if key[1:] in self.wanted and kept is None:
                self._keep(key, output)
            return output

        return forward

    def _keep(self, key, output):
        tensors = list(_tensors(output))
        kept = Kept(_copied(output), tensors, [tensor._version for tensor in tensors])
        if tensors and self.bytes + _size(kept) <= self.limit:
            self.kept[key] = kept
            self.bytes += _size(kept)


def _tensors(x):
    import torch

    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):  # transformers' outputs among them
        for value in x.values():
            yield from _tensors(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from _tensors(value)


def _copied(x):
    """`x` with the containers in it, but not the tensors, made anew: some models put other things
    into the output that they were given."""
    if isinstance(x, dict):
        new = copy.copy(x)
        for key, value in x.items():
            new[key] = _copied(value)
        return new
    return type(x)(map(_copied, x)) if type(x) in (list, tuple) else x


def _size(kept):
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.tensors)
