"""Weights: what a model's parameters, quantisation states and buffers cost, predicted and measured.

`model.get_memory_footprint()` leaves the scales of quantised weights out, 5.6% of an nf4 model, and
sums over modules count tied weights twice. So neither is used here.
"""

from vlmkit.anatomy import component_finder, is_adapter, unwrapped
from vlmkit.formats import FORMATS, NESTED_BLOCK
from vlmkit.layout import kind_of
from vlmkit.memory.ledger import ADAPTER, BUFFER, GRADIENT, STATE, Entry


def predicted_weights(model, layout):
    """Entries of the weights of `model`, on the meta device, under `layout`."""
    component_of = component_finder(model)
    for row in layout.rows:
        weights, state = FORMATS[row.format].parts(row.shape)
        yield Entry(row.name, row.component, row.kind, weights)
        for size in state_sizes(row.format, state):
            yield Entry(row.name, row.component, STATE, size)
    for name, buffer in model.named_buffers():
        size = buffer.numel() * buffer.element_size()
        yield Entry(name, component_of(name), BUFFER, size)


def state_sizes(name, state):
    """Bytes of each tensor of a quantisation state of `state` bytes in all, the scales last."""
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


class Storages:
    """Distinct storages: each counts once, at its full size, under the name it is first seen by."""

    def __init__(self):
        self.seen = set()

    def entry(self, name, component, kind, tensor):
        """The Entry of `tensor`, of no bytes if its storage has been seen before."""
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        size = 0 if key in self.seen else storage.nbytes()
        self.seen.add(key)
        return Entry(name, component, kind, size)


def measured_weights(model, storages):
    """Entries of what `model` really holds: parameters with their quantisation states and
    gradients, and buffers. PEFT's wrapper is looked through."""
    base = unwrapped(model)
    component_of = component_finder(model)
    for path, module in model.named_modules():
        dot = path + "." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = dot + leaf
            kind = ADAPTER if is_adapter(name) else kind_of(base, module, leaf)
            component = component_of(name)
            yield storages.entry(name, component, kind, parameter)
            for tensor in state_tensors(module, parameter):
                yield storages.entry(name, component, STATE, tensor)
            if parameter.grad is not None:
                yield storages.entry(name, component, GRADIENT, parameter.grad)
        for leaf, buffer in module.named_buffers(recurse=False):
            yield storages.entry(dot + leaf, component_of(dot + leaf), BUFFER, buffer)


def storages_of(model):
    """{full parameter name: Entry} with the bytes of each parameter and its quantisation state."""
    sizes = {}
    for entry in measured_weights(model, Storages()):
        if entry.kind not in (BUFFER, GRADIENT):
            before = sizes.get(entry.name)
            total = entry.bytes + (before.bytes if before else 0)
            sizes[entry.name] = Entry(entry.name, entry.component, entry.kind, total)
    return sizes


def state_tensors(module, parameter):
    """The tensors that a quantised parameter needs beside its own data."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    if parameter is not getattr(module, "weight", None):
        return
    # LLM.int8 keeps scales and a handle to the weights at the parameter until the first forward
    # pass, and in the module's state from then on.
    for owner in (parameter, getattr(module, "state", None)):
        for leaf in ("CB", "SCB"):
            tensor = getattr(owner, leaf, None)
            if tensor is not None:
                yield tensor
