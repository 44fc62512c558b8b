"""The peak of a call, without what PyTorch's kernels for a CPU take for themselves.

    peak_of(run)            # bytes, as `vlmkit.memory.measure_peak`

On a CPU with AMX, oneDNN copies what a convolution reads, and attention packs keys and values: 1.5
of 12.3 MB in a step of a small LLaVA, 3.5 of 24.9 MB in a prompt of a small Florence-2. Attention
also has a buffer for each thread. No prediction counts this: it is freed before the kernel returns,
it depends on the processor, and a GPU's kernels take none of it.
"""

from torch.profiler import ProfilerActivity, profile

KERNELS = (
    "aten::mkldnn_convolution", "aten::convolution_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip


def peak_of(function):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    inside = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in KERNELS]
    live = most = 0
    for _, size in _without_own(changes, sorted(inside)):
        live += size
        most = max(most, live)
    return most


def _without_own(changes, inside):
    """`changes` without the pairs of an allocation and its end that are both in a kernel."""
    skipped, start = set(), 0
    for first, last in inside:
        while start < len(changes) and changes[start][0] < first:
            start += 1
        open_ = {}
        for i in range(start, len(changes)):
            when, size = changes[i]
            if when > last:
                break
            if size > 0:
                open_.setdefault(size, []).append(i)
            elif open_.get(-size):
                skipped |= {i, open_[-size].pop()}
    return [change for i, change in enumerate(changes) if i not in skipped]
