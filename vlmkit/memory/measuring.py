"""Measuring: what a model, its optimizer and its cache hold, and what a call holds at most."""

from vlmkit.anatomy import component_finder, plain_name
from vlmkit.memory.cache import measured_cache
from vlmkit.memory.ledger import Ledger
from vlmkit.memory.training import measured_optimizer
from vlmkit.memory.weights import Storages, measured_weights
from vlmkit.rows import Row


def measure(model, optimizer=None, cache=None):
    """Ledger of what `model` really holds: every distinct storage of a parameter, a buffer, a
    quantization state or a gradient, counted once and at its full size.

    model: any transformers VLM, also one that PEFT has wrapped.
    optimizer: a torch or bitsandbytes optimizer of its parameters, for the optimizer's states.
    cache: the `past_key_values` of a forward pass, for its keys and values.
    """
    storages = Storages()
    entries = [*measured_weights(model, storages)]
    if optimizer is not None:
        entries += measured_optimizer(optimizer, model, component_finder(model), storages)
    if cache is not None:
        entries += measured_cache(cache, model, storages)
    entries = tuple(
        Row(plain_name(e.name), e.component, e.kind, e.bytes) for e in entries if e.bytes
    )
    return Ledger(f"measured on {type(model).__name__}", entries)


def measure_peak(function):
    """Bytes that calling `function` allocates at most, over what was there before.

    On a CPU they are counted by PyTorch's own profiler, which sees every allocation of its
    allocator, those inside a kernel with them; on CUDA by the caching allocator's statistics.
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

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = most = 0
    for _, size in sorted(changes):
        live += size
        most = max(most, live)
    return most
