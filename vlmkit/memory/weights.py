"""Weights: what a model's parameters, quantization states and buffers cost, predicted and measured.

`model.get_memory_footprint()` leaves the scales of quantized weights out, 5.6% of an nf4 model, and
sums over modules count tied weights twice. So neither is used here.
"""

from vlmkit.anatomy import component_finder, is_adapter, unwrapped
from vlmkit.backend.storages import Storages, state_tensors
from vlmkit.formats import FORMATS, NESTED_BLOCK
from vlmkit.memory.ledger import ADAPTER, BUFFER, GRADIENT, STATE
from vlmkit.rows import Row, kind_of


def predicted_weights(model, layout):
    """Entries of the weights of `model`, on the meta device, under `layout`."""
    component_of = component_finder(model)
    for row in layout.rows:
        weights, state = FORMATS[row.format].parts(row.shape)
        yield Row(row.name, row.component, row.kind, weights)
        for size in state_sizes(row.format, state):
            yield Row(row.name, row.component, STATE, size)
    for name, buffer in model.named_buffers():
        size = buffer.numel() * buffer.element_size()
        yield Row(name, component_of(name), BUFFER, size)


def state_sizes(name, state):
    """Bytes of each tensor of a quantization state of `state` bytes in all, the scales last."""
    if not state or name == "int8":
        return [state] if state else []
    code = 16 * 4
    if not name.endswith("-dq"):
        return [code, state - code]
    nested_code, offset = 256 * 4, 4
    scales = state - code - nested_code - offset
    # a byte for each block, and a float32 for each 256 of them: n + 4 ceil(n / 256) bytes
    nested = 4 * -(-scales // (NESTED_BLOCK + 4))
    return [code, nested_code, offset, nested, scales - nested]


def measured_weights(model, storages):
    """Entries of what `model` really holds: parameters with their quantization states and
    gradients, and buffers. PEFT's wrapper is looked through."""
    base = unwrapped(model)
    component_of = component_finder(model)
    for path, module in model.named_modules():
        dot = path + "." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = dot + leaf
            kind = ADAPTER if is_adapter(name) else kind_of(base, module, leaf)
            component = component_of(name)
            yield Row(name, component, kind, storages.nbytes(parameter))
            for tensor in state_tensors(module, parameter):
                yield Row(name, component, STATE, storages.nbytes(tensor))
            if parameter.grad is not None:
                yield Row(name, component, GRADIENT, storages.nbytes(parameter.grad))
        for leaf, buffer in module.named_buffers(recurse=False):
            yield Row(dot + leaf, component_of(dot + leaf), BUFFER, storages.nbytes(buffer))


def storages_of(model):
    """{full parameter name: Entry} with the bytes of each parameter and its quantization state."""
    sizes = {}
    for entry in measured_weights(model, Storages()):
        if entry.kind not in (BUFFER, GRADIENT):
            before = sizes.get(entry.name)
            total = entry.bytes + (before.bytes if before else 0)
            sizes[entry.name] = Row(entry.name, entry.component, entry.kind, total)
    return sizes
