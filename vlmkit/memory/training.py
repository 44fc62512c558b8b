"""Training: what is there between steps beside the weights, to the byte.

Adapters, gradients and the states of the optimizer. What a step holds for a while is in
`vlmkit.memory.running`.
"""

from itertools import pairwise
from math import ceil

from vlmkit.anatomy import is_adapter, plain_name
from vlmkit.memory.ledger import ADAPTER, GRADIENT, OPTIMIZER, UPCAST
from vlmkit.rows import Row

SMALLEST_8BIT = 4096
"""Parameters of fewer elements keep their states in float32 (bitsandbytes' `min_8bit_size`)."""
STATE_BLOCK, STATE_CODE = 256, 256 * 4
"""Elements that share a scale in an 8-bit state, and bytes of the table of its 256 values."""
SMALLEST_PAGED = 100_000
"""Elements from which on the states of a paged optimizer are paged."""


def adapter_entries(model, component_of):
    """Entries of the adapters that peft has put into `model`."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            size = parameter.numel() * parameter.element_size()
            yield Row(plain_name(name), component_of(name), ADAPTER, size)


def upcast_entries(model, before, component_of):
    """Entries of what is added where parameters were made float32. before: {name: bytes}."""
    for name, size in before.items():
        parameter = model.get_parameter(name)
        added = parameter.numel() * parameter.element_size() - size
        yield Row(name, component_of(name), UPCAST, added)


def gradient_entries(learnt, component_of):
    """Entries of gradients. learnt: {parameter name: bytes of its gradient}."""
    for name, size in learnt.items():
        yield Row(plain_name(name), component_of(name), GRADIENT, size)


def optimizer_entries(optimizer, parameters, component_of):
    """Entries of the states of `optimizer`, one of `vlmkit.backend.optimizers.OPTIMIZERS`.

    parameters: {name: (elements, bytes of an element)} of those that get a gradient, in the model's
        order. The others get no states.
    """
    tables = [STATE_CODE, STATE_CODE] if optimizer.endswith("8bit") else []
    for name, (elements, width) in parameters.items():
        if optimizer == "adamw_torch_fused":
            sizes = [elements * width] * 2 + [4]  # moments in the parameter's dtype, and the step
        elif optimizer.endswith("8bit") and elements >= SMALLEST_8BIT:
            sizes = [elements] * 2 + [4 * ceil(elements / STATE_BLOCK)] * 2 + tables
            tables = []  # one pair for all parameters
        else:
            sizes = [4 * elements] * 2
        for size in sizes:
            yield Row(plain_name(name), component_of(name), OPTIMIZER, size)


def paged_bytes(optimizer, parameters):
    """Bytes of states that the driver may move to the host's memory when a GPU is full."""
    if not optimizer.startswith("paged"):
        return 0
    width = 1 if optimizer.endswith("8bit") else 4
    return sum(2 * n * width for n, _ in parameters.values() if n >= SMALLEST_PAGED)


def step_bytes(optimizer, parameters):
    """Bytes that the optimizer's step needs for a moment, beside the states.

    PyTorch's AdamW goes through the parameters one by one: for each it makes two tensors of its
    size, while the one that it was left with before is still there. bitsandbytes' makes none.
    """
    if optimizer != "adamw_torch_fused":
        return 0
    sizes = [elements * width for elements, width in parameters.values()]
    return max((before + 2 * size for before, size in pairwise([0, *sizes])), default=0)


def measured_optimizer(optimizer, model, component_of, storages):
    """Entries of what `optimizer` really holds for the parameters of `model`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = {name: i for i, name in enumerate(names.values())}
    states = [(names.get(id(p), "a parameter of no model"), s) for p, s in optimizer.state.items()]
    for name, state in sorted(states, key=lambda item: order.get(item[0], -1)):
        for tensor in state.values():
            if hasattr(tensor, "untyped_storage"):
                yield Row(name, component_of(name), OPTIMIZER, storages.nbytes(tensor))
