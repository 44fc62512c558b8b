"""The 4-bit quantizer that `load` uses on a CPU: bitsandbytes' bytes, in a tenth of its time.

    packed, absmax = quantize_4bit(weight, "nf4")

    with fast_quantizer():      # bitsandbytes' own operator calls the quantizer below
        AutoModelForImageTextToText.from_pretrained(folder, quantization_config=...)

NF4 and FP4 (QLoRA, arXiv 2305.14314, sec. 3) divide a block of weights by its largest magnitude and
round each weight to the nearest of 16 values. The number of midpoints between neighboring values
that are less than the weight says which value is nearest. bitsandbytes searches for this number,
weight by weight. Here the range from -1 to 1 is cut into cells so narrow that none holds two
midpoints. A table says how many midpoints are in lower cells, and one comparison says whether the
midpoint in the weight's own cell, if there is one, is less than the weight.

Since bitsandbytes 0.50, until it has a CPU kernel of its own for this operator (test_quantizing.py
fails then).
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import ceil

import torch

from vlmkit.backend.cpu import register_cpu_kernel
from vlmkit.errors import CheckpointError
from vlmkit.formats import BLOCK, FP4, NF4

CELLS = 1024  # from 0 to 1; FP4's closest midpoints are 1/384 apart. A power of two: see _cell_of
CHUNK = 2**18  # weights at a time, few enough that intermediate results stay in the CPU's cache
TINY = 1e-38  # bitsandbytes divides by no less, for blocks of zeros


def quantize_4bit(weight, kind, block=BLOCK):
    """Round a float tensor to NF4 or FP4, with exactly the bytes of bitsandbytes on a CPU.

    weight: fp32, fp16 or bf16, of any shape, on the CPU. Blocks run over the flattened tensor.
    kind: "nf4" or "fp4".
    block: how many weights share one scale, an even number.

    Returns (packed, absmax). packed is uint8 of shape (ceil(n / 2), 1), two weights a byte, the
    first in the upper half. absmax is float32 of shape (ceil(n / block),), the largest magnitude of
    each block.

    Raises CheckpointError if the tensor holds an infinity or NaN, whose block would have no scale.
    """
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = flat.new_empty(ceil(n / 2), dtype=torch.uint8)
    absmax = flat.new_empty(ceil(n / block), dtype=torch.float32)
    whole = n // block * block
    step = max(CHUNK // block, 1) * block

    def some_chunks(starts):
        buffers = _Buffers(flat, min(step, whole))
        for start in starts:
            stop = min(start + step, whole)
            values = buffers.values[: stop - start]
            blocks = values.copy_(flat[start:stop]).view(-1, block)
            sizes = torch.abs(values, out=buffers.other[: stop - start]).view_as(blocks)
            largest = torch.amax(sizes, dim=1, out=absmax[start // block : stop // block])
            blocks *= (1 / _finite(largest).clamp(min=TINY))[:, None]
            _pack(values, kind, buffers, out=packed[start // 2 : stop // 2])

    _in_threads(some_chunks, range(0, whole, step))
    if whole < n:  # bitsandbytes multiplies blocks by 1 / scale, but divides a shorter last one
        values = flat[whole:].float()
        absmax[-1] = largest = _finite(values.abs().max()).clamp(min=TINY)
        values = torch.nn.functional.pad(values / largest, (0, n % 2))
        _pack(values, kind, _Buffers(flat, len(values)), out=packed[whole // 2 :])
    return packed[:, None], absmax


class _Buffers:
    """Memory for intermediate results, which every chunk reuses. Freed memory can go back to the
    system, and getting it again, page by page, takes longer than the work."""

    def __init__(self, like, n):
        self.values = like.new_empty(n, dtype=torch.float32)
        self.other = like.new_empty(n, dtype=torch.float32)
        self.cell = like.new_empty(n, dtype=torch.int32)
        self.place = like.new_empty(n, dtype=torch.uint8)
        self.above = like.new_empty(n, dtype=torch.bool)


def _pack(values, kind, buffers, out):
    """Write two codes a byte to `out`, for an even number of values from -1 to 1."""
    below, midpoint, pairs = _tables(kind)
    n = len(values)
    cell = _cell_of(values, buffers.cell[:n], buffers.other[:n])
    # The place of the nearest value, in order of size, is the number of midpoints less than it.
    place = torch.index_select(below, 0, cell, out=buffers.place[:n])
    own = torch.index_select(midpoint, 0, cell, out=buffers.other[:n])
    place += torch.gt(values, own, out=buffers.above[:n])
    torch.add(place[1::2], place[::2], alpha=16, out=out)
    if pairs is not None:
        out.copy_(pairs.index_select(0, out.int()))


def _cell_of(values, cell, other):
    # A larger value, or midpoint, is never in a lower cell. The tables rely on this alone. (The
    # product is exact, because CELLS is a power of two, so only the sum is rounded.)
    return cell.copy_(torch.mul(values, CELLS, out=other).add_(CELLS))


@cache
def _tables(kind):
    """(`below`, `midpoint`, `pairs`) of a format.

    below: for each cell, how many midpoints are in lower cells.
    midpoint: for each cell, the midpoint in it, or infinity where there is none.
    pairs: from two places in a byte to their two codes. None for NF4, where both are the same.
    """
    with torch.device("cpu"):
        code = torch.tensor({"nf4": NF4, "fp4": FP4}[kind], dtype=torch.float32)
        order = torch.argsort(code, stable=True)
        ordered = code[order]
        midpoints = (ordered[:-1] + ordered[1:]) / 2
        buffers = _Buffers(midpoints, len(midpoints))
        cells = _cell_of(midpoints, buffers.cell, buffers.other).long()
        below = torch.bucketize(torch.arange(2 * CELLS + 1), cells).to(torch.uint8)
        midpoint = torch.full(below.shape, torch.inf, dtype=torch.float32)
        midpoint[cells] = midpoints
        byte = torch.arange(256, dtype=torch.uint8)
        pairs = (order[byte.int() >> 4] << 4 | order[byte.int() & 15]).to(torch.uint8)
    return below, midpoint, None if torch.equal(pairs, byte) else pairs


def _finite(largest):
    if not largest.isfinite().all():
        raise CheckpointError(
            "the tensor to be quantized holds an infinity or NaN. Its block has no scale, and all "
            "weights of the block would be lost. Look for the training step that made it."
        )
    return largest


def _in_threads(work, items):
    """Call `work` on shares of `items`, in as many threads as torch is set to use."""
    threads = torch.get_num_threads()
    if threads == 1 or not items:
        return work(items)
    shares = [items[i::threads] for i in range(min(threads, len(items)))]
    # torch itself would share each operation among its threads. They would wait for one another
    # after each, which takes longer than the work where another program uses a core.
    torch.set_num_threads(1)  # here, and in the threads that start from now on
    try:
        if len(shares) == 1:
            return work(items)
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(work, shares))
    finally:
        torch.set_num_threads(threads)


# --- in place of bitsandbytes ---------------------------------------------------------------------

_lock = threading.Lock()
_users, _library = 0, None


@contextlib.contextmanager
def fast_quantizer():
    """Within it, bitsandbytes' operator for 4-bit quantization calls `quantize_4bit` on a CPU.

    bitsandbytes has no CPU kernel for this operator, only a default for every device. So a kernel
    is registered with PyTorch, and removed at the end of the block. Nothing is patched. Other
    threads meanwhile get the same bytes, sooner. Blocks can overlap and be nested.
    """
    global _users, _library
    with _lock:
        _library = _library or register_cpu_kernel("quantize_4bit", _kernel)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _library = None  # this ends the registration


def _kernel(original, keys, weight, block, kind, storage):
    if storage == torch.uint8:
        # For an infinity the call falls through to bitsandbytes. `load` raises afterwards, when it
        # knows the parameter's name.
        with contextlib.suppress(CheckpointError):
            return quantize_4bit(weight, kind, block)
    return original.call_boxed(keys, weight, block, kind, storage)
