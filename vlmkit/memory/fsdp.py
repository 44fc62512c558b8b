"""FSDP: what a process holds of a model that PyTorch's `fully_shard` shards, and what it gathers.

The rules are those of torch 2.13 (`torch.distributed.fsdp.fully_shard`) as accelerate 1.15 calls it
(`fsdp2_prepare_model`, with TRANSFORMER_BASED_WRAP):

- Each parameter is cut along its first axis. Every process holds ceil(n / processes) of its n rows;
  the last processes fill up with zeros, and optimizer states have no such rows.
- The codes of 4-bit weights are sharded as bytes, two codes to a byte. accelerate alone shards none
  of them (`whole_4bit`). Quantization states and buffers are whole in every process. Layers in int8
  cannot be sharded.
- With bf16 all floats that are gathered are bf16, as are the gradients and their exchange. What is
  trained is held in float32. A unit that also has codes is gathered as bytes, of the same number.
- Each of the model's repeated layers is a unit, and so are the input embedding and the output head
  (one unit if they are tied). All other parameters are the unit of the root.
- Before a unit runs, its weights are gathered, first into one buffer and then, parameter by
  parameter, out of it. In the forward pass the buffer stays until the next unit is gathered. In
  the backward pass the buffer of the next unit is filled ahead.
- After its forward pass a unit is freed. The head and the root keep their weights until the
  backward pass has gone through them.
- The gradients of a unit go into one buffer to be exchanged, which stays until the next unit's.

accelerate does not put the model under autocast here, and the logits are bf16.

PyTorch's allocator keeps a pool for each CUDA stream, and FSDP gathers on one of its own. This is
not counted: two processes on an H200 reserved 0.6 to 2 GB beyond their peaks (benchmarks/results).
"""

from dataclasses import dataclass, field, replace
from math import ceil, prod

import torch
from torch.utils._pytree import tree_leaves, tree_map

from vlmkit.anatomy import component_finder, plain_name
from vlmkit.architectures import LANGUAGE
from vlmkit.backend.sharding import layers_of
from vlmkit.errors import FinetuningError
from vlmkit.loading.placing import check_shards
from vlmkit.memory.allocator import CachingAllocator
from vlmkit.memory.dry_run import DryRun
from vlmkit.memory.ledger import ADAPTER, BUFFER, GATHERED, GRADIENT, STATE, UPCAST
from vlmkit.memory.parameters import as_loaded
from vlmkit.memory.steps import (
    DryRuns,
    activations,
    input_entries,
    step_activations,
    without_gradient,
)
from vlmkit.memory.training_state import TORCH, gradient_entries, optimizer_entries, step_bytes
from vlmkit.rows import Row


@dataclass(frozen=True)
class Shard:
    """How a parameter is sharded. width: bytes of an element."""

    shape: tuple
    width: int
    gpus: int

    @property
    def elements(self):
        """Elements that every process has room for."""
        return ceil(self.shape[0] / self.gpus) * prod(self.shape[1:])

    @property
    def nbytes(self):
        return self.elements * self.width

    def own(self, rank):
        """Elements of the process `rank`, without what fills its shard up."""
        rows = ceil(self.shape[0] / self.gpus)
        return max(0, min(rows, self.shape[0] - rank * rows)) * prod(self.shape[1:])


def shards_of(model, gpus, bf16, whole_4bit=False):
    """{full name: Shard} of the parameters of `model` that are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        in_4bit = not parameter.is_floating_point()
        if not (in_4bit and whole_4bit):
            wide = bf16 and parameter.requires_grad
            width = 4 if wide else parameter.element_size()
            found[name] = Shard(tuple(parameter.shape), width, gpus)
    return found


@dataclass(eq=False)
class Unit:
    """Parameters that are gathered together.

    modules: those that they are gathered for. names: of the parameters. keeps: whether they stay
    after the forward pass. size, cast: bytes when gathered, and of this process' shards in another
    dtype before that.
    """

    modules: tuple
    names: list
    keeps: bool
    component: str
    size: int = 0
    cast: int = 0
    filled: bool = False  # the buffer
    gathered: bool = False  # the parameters
    backward: bool = False
    done: bool = False
    running: set = field(default_factory=set)
    places: list = field(default_factory=list)  # in the order of the forward pass


def units_of(model, names):
    """The Units of `model`, that of the root last. names: of the parameters that are sharded."""
    owner = {id(model.get_parameter(name)): name for name in names}
    repeated = layers_of(model)
    groups = [
        ((module,), False)
        for _, module in reversed(list(model.named_modules()))
        if type(module).__name__ in repeated
    ]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    groups += [] if tied else [((embedding,), False)]
    groups += [((embedding, head) if tied else (head,), True)] if head is not None else []
    component_of, units = component_finder(model), []
    for modules, keeps in [*groups, ((model,), True)]:
        own = [id(p) for module in modules for p in module.parameters()]
        own = [owner.pop(place) for place in dict.fromkeys(own) if place in owner]
        if own or modules == (model,):
            component = component_of(own[0]) if own else LANGUAGE
            units.append(Unit(modules, own, keeps, component or LANGUAGE))
    return units


class Gathering:
    """What a process gathers in a step: it counts on `tracker` what PyTorch would allocate, at the
    moments at which PyTorch would.

    learnt: {parameter name: bytes of the shard of its gradient}, after a backward pass.
    """

    def __init__(self, model, gpus, bf16, whole_4bit):
        self.model, self.gpus, self.bf16, self.tracker = model, gpus, bf16, None
        self.shards = shards_of(model, gpus, bf16, whole_4bit)
        self.units = units_of(model, self.shards)
        self.component_of = component_finder(model)
        self.measure()
        for unit in self.units[:-1]:
            for module in unit.modules:
                enter, leave = self._entering(unit), self._leaving(unit)
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
                module.register_forward_hook(leave)
        self.restart()

    def measure(self):
        """Look at the parameters, which `vlmkit.adapters.resize` may have changed, and give them
        the dtype in which they are gathered."""
        for name, shard in self.shards.items():
            parameter = self.model.get_parameter(name)
            if not parameter.is_floating_point():
                continue
            self.shards[name] = replace(shard, shape=tuple(parameter.shape))
            if self.bf16 and parameter.dtype != torch.bfloat16:
                parameter.data = parameter.data.bfloat16()
        for unit in self.units:
            unit.size = unit.cast = 0
            for name in unit.names:
                shard = self.shards[name]
                is_float = self.model.get_parameter(name).is_floating_point()
                width = 2 if self.bf16 and is_float else shard.width
                unit.size += shard.elements * self.gpus * width
                unit.cast += shard.elements * width * (width != shard.width)

    def restart(self):
        self.learnt, self.order, self.held, self.exchanged = {}, [], None, None
        for unit in self.units:
            unit.filled = unit.gathered = unit.backward = unit.done = False
            unit.running, unit.places = set(), []

    # --- forward ---------------------------------------------------------------------------------

    def enter(self, inputs):
        """The root is entered with the keyword arguments `inputs`, which are returned."""
        root = self.units[-1]
        return self._entering(root)(root.modules[0], (), inputs)[1]

    def leave(self, outputs):
        """The root has made `outputs`, which are returned."""
        outputs = self._leaving(self.units[-1])(self.units[-1].modules[0], (), outputs)
        self._release()
        return outputs

    def _entering(self, unit):
        def hook(module, args, kwargs):
            args, kwargs = self._cast((args, kwargs))
            if unit.backward:  # a layer under gradient checkpointing runs again
                self._fill(unit)
                self._gather(unit)
                return args, kwargs
            first = not unit.running
            if first:
                unit.running = set(unit.modules)
            self._fill(unit)
            self._gather(unit, forward=True)
            return _listening(lambda: self._after_backward(unit), args, kwargs) if first else (
                args, kwargs
            )  # fmt: skip

        return hook

    def _leaving(self, unit):
        def hook(module, args, output):
            if unit.backward:
                return self._cast(output)
            unit.running.discard(module)
            if not unit.running:
                if not unit.keeps:
                    self._free(unit)
                unit.places.append(len(self.order))
                self.order.append(unit)
                for tensor in _with_gradient(output):
                    tensor.register_hook(lambda _: self._before_backward(unit))
            return self._cast(output)

        return hook

    def _cast(self, tree):
        if not self.bf16:
            return tree

        def cast(leaf):
            is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.to(torch.bfloat16) if is_float else leaf

        return tree_map(cast, tree)

    # --- backward --------------------------------------------------------------------------------

    def _before_backward(self, unit):
        if unit.backward:
            return
        unit.backward = True
        self._fill(unit)
        self._gather(unit)
        place = unit.places.pop() if unit.places else 0
        if place:
            self._fill(self.order[place - 1])

    def _after_backward(self, unit):
        unit.backward, unit.done = False, True
        parameters = ((name, self.model.get_parameter(name)) for name in unit.names)
        learnt = {name: p for name, p in parameters if p.grad is not None}
        self._free(unit)
        self._exchange(None)
        if not learnt:
            return
        narrow = sum(self.shards[n].elements * p.grad.element_size() for n, p in learnt.items())
        self._exchange((unit, narrow * self.gpus))
        for parameter in learnt.values():
            parameter.grad = None
        self._count(unit, narrow)
        for name in learnt:
            self.learnt[name] = self.shards[name].nbytes
            self.tracker.shift({(GRADIENT, self.component_of(name)): self.learnt[name]})
        self._count(unit, -narrow)

    def finish(self):
        """The end of the backward pass."""
        for unit in self.units:
            if not unit.done:  # its inputs need no gradient
                self._after_backward(unit)
        for unit in self.units:
            self._count(unit, -unit.size * unit.filled)
            unit.filled = False
        self._exchange(None)

    # --- memory ----------------------------------------------------------------------------------

    def _count(self, unit, size):
        self.tracker.shift({(GATHERED, unit.component): size})

    def _fill(self, unit):
        """Gather into the buffer."""
        if not (unit.gathered or unit.filled):
            self._count(unit, unit.cast)
            self._count(unit, unit.size)
            self._count(unit, -unit.cast)
            unit.filled = True

    def _gather(self, unit, forward=False):
        """Copy the parameters out of the buffer."""
        if not unit.filled:
            return
        if forward:
            self._release()
        self._count(unit, unit.size)
        unit.gathered, unit.filled = True, False
        if forward:
            self.held = unit
        else:
            self._count(unit, -unit.size)

    def _release(self):
        """Free the buffer that the forward pass holds on to."""
        if self.held:
            self._count(self.held, -self.held.size)
        self.held = None

    def _free(self, unit):
        """Free the gathered parameters."""
        self._count(unit, -unit.size * unit.gathered)
        unit.gathered = False

    def _exchange(self, new):
        """Free the last buffer of gradients, and take a new one: (Unit, bytes), or None."""
        if self.exchanged:
            unit, size = self.exchanged
            self._count(unit, -size)
        if new:
            self._count(*new)
        self.exchanged = new


def _with_gradient(tree):
    return [
        leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.requires_grad
    ]


def _listening(then, args, kwargs):
    """`args` and `kwargs` of a module, which call `then` when all of their gradients are there."""
    tensors = _with_gradient((args, kwargs))
    if not (tensors and torch.is_grad_enabled()):
        return args, kwargs
    new = dict(zip(map(id, tensors), _Listening.apply(then, *tensors), strict=True))
    return tree_map(lambda leaf: new.get(id(leaf), leaf), (args, kwargs))


class _Listening(torch.autograd.Function):
    @staticmethod
    def forward(ctx, then, *tensors):
        ctx.then = then
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        ctx.then()
        return None, *gradients


class ShardedRun(DryRun):
    """The DryRun of one process of `gpus` that share `model`. bf16: as for a Training.
    whole_4bit: whether 4-bit weights are not sharded."""

    def __init__(self, model, last, device, gpus, bf16, whole_4bit):
        self.gathering = Gathering(model, gpus, bf16, whole_4bit)
        super().__init__(model, last, device)
        self.gathering.tracker = self.tracker

    @property
    def shards(self):
        return self.gathering.shards

    def renew(self):
        self.gathering.measure()
        super().renew()

    def train(self, inputs, bf16):
        self.gathering.restart()
        return super().train(inputs, bf16)

    def _outputs(self, inputs, bf16):
        return self.gathering.leave(self._run(self.model, self.gathering.enter(inputs)))

    def _end(self):
        self.gathering.finish()

    def _gradients(self):
        learnt = self.gathering.learnt
        return {
            name: self.shards[name].nbytes
            for name in self.parameters()
            if self._stand_in(name) in learnt
        }


class ShardedRuns(DryRuns):
    """The dry runs of one of several processes that share a model by FSDP.

    Raises PlanError for formats that cannot be in shards.
    """

    def __init__(self, build, layout, gpus, device=None, whole_4bit=False):
        check_shards(layout)
        super().__init__(build, layout, device)
        self.gpus, self.whole_4bit = gpus, whole_4bit

    def _dry_run(self, model, last=1):
        return ShardedRun(model, last, self.device, self.gpus, self.how.bf16, self.whole_4bit)

    @property
    def loads(self):
        """For each card an allocator without weights: shards are given their blocks like all
        else."""
        return [(CachingAllocator(), {})] * self.gpus

    def weights(self, weights):
        """Entries of the weights of each process. weights: entries of the whole model's."""
        model = as_loaded(self.build(), self.layout)
        return list(_held(weights, shards_of(model, self.gpus, False, self.whole_4bit), None))

    def steps(self, batch, how, weights, whole=True):
        """(a list of entries for each process, notes) of a training step. Arguments: as for
        `training_step`. weights: entries of the whole model's.

        Raises FinetuningError for optimizers that FSDP does not take.
        """
        if how.optim != TORCH:
            raise FinetuningError(
                f"optim={how.optim!r} does not train shards of FSDP: bitsandbytes 0.50 takes no "
                f"DTensor. Use {TORCH!r}."
            )
        run, _, inputs, learnt, peak, left = self.trained(batch, how)
        shards, component_of = run.shards, component_finder(run.model)
        gradients = list(gradient_entries(learnt, component_of))
        held, found = [*_held(weights, shards, component_of), *gradients], []
        for rank in range(self.gpus):
            own = {name: (shards[name].own(rank), shards[name].width) for name in learnt}
            entries = [*held, *optimizer_entries(how.optim, own, component_of)]
            if whole:
                entries += input_entries(inputs)
                stepping = left + step_bytes(how.optim, own)
                entries += _step(peak, stepping, gradients, own, component_of)
            found.append(entries)
        return found, list(without_gradient(run.parameters(), learnt))


def _held(weights, shards, component_of):
    """Entries of what a process holds of the weights, of their upcasts and of the adapters."""
    planned = {entry.name: entry for entry in weights if entry.kind not in (STATE, BUFFER)}
    yield from (entry for entry in weights if entry.kind in (STATE, BUFFER))
    for name, shard in shards.items():
        entry = planned.pop(plain_name(name), None)
        if entry is None:
            yield Row(plain_name(name), component_of(name), ADAPTER, shard.nbytes)
            continue
        narrow = shard.elements * entry.bytes // prod(shard.shape)
        yield Row(entry.name, entry.component, entry.kind, narrow)
        if shard.nbytes > narrow:
            yield Row(entry.name, entry.component, UPCAST, shard.nbytes - narrow)
    yield from planned.values()  # 4-bit weights


def _step(peak, stepping, gradients, parameters, component_of):
    """As `step_activations`, with gathered weights as entries of their own."""
    gathered = {key[1]: size for key, size in peak.items() if _kind(key) == GATHERED and size}
    if stepping > sum(peak.values()):
        return step_activations(peak, stepping, gradients, parameters, component_of)
    need = sum(peak.values()) - sum(entry.bytes for entry in gradients)
    weights = min(need, sum(gathered.values()))
    live = {key: size for key, size in peak.items() if not isinstance(key, tuple)}
    return [
        *activations(gathered, {}, weights, "the training step", GATHERED),
        *activations(live, {}, need - weights, "the training step"),
    ]


def _kind(key):
    return key[0] if isinstance(key, tuple) else None
