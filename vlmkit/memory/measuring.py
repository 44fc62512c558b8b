"""Measuring: what a model, its optimizer and its cache hold, and what a call holds at most."""

from vlmkit.anatomy import component_finder, is_adapter, plain_name, unwrapped
from vlmkit.backend.quiet import without_native_notes
from vlmkit.backend.storages import Storages, state_tensors
from vlmkit.memory.cache import measured_cache
from vlmkit.memory.ledger import ADAPTER, BUFFER, GRADIENT, OPTIMIZER, STATE, Ledger
from vlmkit.rows import Row, kind_of


def measure(model, optimizer=None, cache=None):
    """Ledger of what `model` really holds: every distinct storage of a parameter, a buffer, a
    quantization state or a gradient, counted once and at its full size.

    model: any transformers VLM, also inside PEFT's wrapper.
    optimizer: a torch or bitsandbytes optimizer of its parameters, for the optimizer's states.
    cache: of a forward pass (`vk.memory.cache_of`), for its keys and values.
    """
    storages = Storages()
    entries = [*_weights(model, storages)]
    if optimizer is not None:
        entries += _states(optimizer, model, storages)
    if cache is not None:
        entries += measured_cache(cache, model, storages)
    entries = tuple(
        Row(plain_name(e.name), e.component, e.kind, e.bytes) for e in entries if e.bytes
    )
    return Ledger(f"measured on {type(model).__name__}", entries)


def storages_of(model):
    """{full parameter name: Row} with the bytes of each parameter and its quantization state."""
    sizes = {}
    for entry in _weights(model, Storages()):
        if entry.kind not in (BUFFER, GRADIENT):
            before = sizes.get(entry.name)
            total = entry.bytes + (before.bytes if before else 0)
            sizes[entry.name] = Row(entry.name, entry.component, entry.kind, total)
    return sizes


def _weights(model, storages):
    """Entries of parameters, with their quantization states and gradients, and of buffers."""
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


def _states(optimizer, model, storages):
    """Entries of what `optimizer` really holds for the parameters of `model`, in their order."""
    component_of = component_finder(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = {name: i for i, name in enumerate(names.values())}
    states = [(names.get(id(p), "a parameter of no model"), s) for p, s in optimizer.state.items()]
    for name, state in sorted(states, key=lambda item: order.get(item[0], -1)):
        for tensor in state.values():
            if hasattr(tensor, "untyped_storage"):
                yield Row(name, component_of(name), OPTIMIZER, storages.nbytes(tensor))


def measure_peak(function):
    """Bytes that calling `function` allocates at most, over what was there before.

    On a CPU PyTorch's own profiler counts them: it sees every allocation of PyTorch's allocator,
    also inside a kernel. On CUDA they are the caching allocator's statistics.
    """
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with without_native_notes():
        profiler.start()
    try:
        function()
    finally:
        with without_native_notes():
            profiler.stop()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = most = 0
    for _, size in sorted(changes):
        live += size
        most = max(most, live)
    return most
