"""Training: what is there between two steps beside the weights, to the byte.

This is adapters, gradients and the states of the optimizer. What a step holds for a moment is in
`vlmkit.memory.steps`.
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
"""Number of elements from which on a paged optimizer pages a state."""
TORCH = "adamw_torch_fused"


def adapter_entries(parameters, component_of):
    """Entries of the adapters that peft has put into a model. parameters: {full name: parameter} of
    the model."""
    for name, parameter in parameters.items():
        if is_adapter(name):
            size = parameter.numel() * parameter.element_size()
            yield Row(plain_name(name), component_of(name), ADAPTER, size)


def upcast_entries(model, before, component_of):
    """Entries of what float32 adds to parameters that had fewer bits. before: {name: bytes}."""
    for name, size in before.items():
        parameter = model.get_parameter(name)
        added = parameter.numel() * parameter.element_size() - size
        yield Row(name, component_of(name), UPCAST, added)


def gradient_entries(gradients, component_of):
    """Entries of gradients. gradients: {parameter name: bytes}."""
    for name, size in gradients.items():
        yield Row(plain_name(name), component_of(name), GRADIENT, size)


def optimizer_entries(optim, parameters, component_of):
    """Entries of the states of the optimizer `optim`, one of `vlmkit.backend.optimizers`.

    parameters: {name: (elements, bytes of an element)} of the parameters that get a gradient, in
        the model's order. The others get no states.
    """
    tables = [STATE_CODE, STATE_CODE] if optim.endswith("8bit") else []
    for name, (elements, width) in parameters.items():
        if optim == TORCH:
            sizes = [elements * width] * 2 + [4]  # moments in the parameter's dtype, and the step
        elif optim.endswith("8bit") and elements >= SMALLEST_8BIT:
            sizes = [elements] * 2 + [4 * ceil(elements / STATE_BLOCK)] * 2 + tables
            tables = []  # one pair for all parameters
        else:
            sizes = [4 * elements] * 2
        for size in sizes:
            yield Row(plain_name(name), component_of(name), OPTIMIZER, size)


def paged_bytes(optim, parameters):
    """Bytes of states that the driver may move to the host's memory when a GPU is full."""
    if not optim.startswith("paged"):
        return 0
    width = 1 if optim.endswith("8bit") else 4
    return sum(2 * n * width for n, _ in parameters.values() if n >= SMALLEST_PAGED)


def step_bytes(optim, parameters):
    """Bytes that the optimizer's step needs for a moment, beside the states.

    PyTorch's AdamW takes the parameters one by one. For each it makes two tensors of its size,
    while the one that is left from the parameter before still exists. bitsandbytes makes none.
    """
    if optim != TORCH:
        return 0
    sizes = [elements * width for elements, width in parameters.values()]
    return max((before + 2 * size for before, size in pairwise([0, *sizes])), default=0)
