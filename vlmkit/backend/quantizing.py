"""The 4-bit quantizer that `load` uses on a CPU: bitsandbytes' bytes, in a tenth of its time.

    packed, absmax = quantize_4bit(weight, "nf4")

    with fast_quantizer():      # bitsandbytes' own operator runs on the quantizer below
        AutoModelForImageTextToText.from_pretrained(folder, quantization_config=...)

NF4 and FP4 (QLoRA, arXiv 2305.14314, sec. 3) divide a block of weights by its largest magnitude and
round each to the nearest of 16 values. The nearest value is told by how many of the 15 midpoints
between neighbors lie below the weight. bitsandbytes searches for it, weight by weight. Here the
range from -1 to 1 is cut into cells so narrow that none holds two midpoints. One look into a table
tells how many midpoints lie below a weight's cell, and one comparison whether the midpoint in the
cell, if there is one, lies below the weight.
"""

import contextlib
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import ceil

import torch

from vlmkit.errors import CheckpointError
from vlmkit.formats import BLOCK, FP4, NF4

OPERATOR = "bitsandbytes::quantize_4bit"
CELLS = 1024  # from 0 to 1; FP4's closest midpoints are 1/384 apart. A power of two: see _cell_of
CHUNK = 2**18  # weights worked on at once, few enough that what is between stays in the cache
TINY = 1e-38  # the least that bitsandbytes divides by: a block of zeros has a scale, too


def quantize_4bit(weight, kind, block=BLOCK):
    """Round a float tensor to NF4 or FP4, as bitsandbytes does on a CPU, to the byte.

    weight: fp32, fp16 or bf16, of any shape, on the CPU. Blocks run over the flattened tensor.
    kind: "nf4" or "fp4".
    block: weights that share one scale, an even number.

    Returns (packed, absmax): uint8 of shape (ceil(n / 2), 1), two weights a byte, the first in the
    upper half; and float32 of shape (ceil(n / block),), the largest magnitude of each block.

    Raises CheckpointError if the tensor holds an infinity or NaN: its block would have no scale.
    """
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    packed = flat.new_empty(ceil(n / 2), dtype=torch.uint8)
    absmax = flat.new_empty(ceil(n / block), dtype=torch.float32)
    whole = n // block * block
    step = max(CHUNK // block, 1) * block

    def some_chunks(starts):
        room = _Room(flat, min(step, whole))
        for start in starts:
            stop = min(start + step, whole)
            values = room.values[: stop - start]
            blocks = values.copy_(flat[start:stop]).view(-1, block)
            sizes = torch.abs(values, out=room.other[: stop - start]).view_as(blocks)
            largest = torch.amax(sizes, dim=1, out=absmax[start // block : stop // block])
            blocks *= (1 / _finite(largest).clamp(min=TINY))[:, None]
            _pack(values, kind, room, out=packed[start // 2 : stop // 2])

    _in_threads(some_chunks, range(0, whole, step))
    if whole < n:  # the last block is short: bitsandbytes divides where it else multiplies
        values = flat[whole:].float()
        absmax[-1] = largest = _finite(values.abs().max()).clamp(min=TINY)
        values = torch.nn.functional.pad(values / largest, (0, n % 2))
        _pack(values, kind, _Room(flat, len(values)), out=packed[whole // 2 :])
    return packed[:, None], absmax


class _Room:
    """Memory for what is between, used for one chunk after another: memory that is freed may go
    back to the system, and getting it again, page by page, then takes longer than the work."""

    def __init__(self, like, n):
        self.values = like.new_empty(n, dtype=torch.float32)
        self.other = like.new_empty(n, dtype=torch.float32)
        self.cell = like.new_empty(n, dtype=torch.int32)
        self.place = like.new_empty(n, dtype=torch.uint8)
        self.above = like.new_empty(n, dtype=torch.bool)


def _pack(values, kind, room, out):
    """Write two codes a byte to `out`, for an even number of values from -1 to 1."""
    below, midpoint, pairs = _tables(kind)
    n = len(values)
    cell = _cell_of(values, room.cell[:n], room.other[:n])
    # A value's place in the order of size is the number of midpoints that are less than it.
    place = torch.index_select(below, 0, cell, out=room.place[:n])
    own = torch.index_select(midpoint, 0, cell, out=room.other[:n])
    place += torch.gt(values, own, out=room.above[:n])
    torch.add(place[1::2], place[::2], alpha=16, out=out)
    if pairs is not None:
        out.copy_(pairs.index_select(0, out.int()))


def _cell_of(values, cell, other):
    # No value ever falls into a lower cell than a smaller value, midpoints included, and that is
    # all that the tables count on. (The product is exact, so that the sum is rounded once.)
    return cell.copy_(torch.mul(values, CELLS, out=other).add_(CELLS))


@cache
def _tables(kind):
    """(`below`, `midpoint`, `pairs`) of a format.

    below: for each cell, how many midpoints are in lower cells.
    midpoint: for each cell, the midpoint in it; where there is none, more than any value.
    pairs: from two places in a byte to their two codes; None for NF4, whose codes are in order.
    """
    with torch.device("cpu"):
        code = torch.tensor({"nf4": NF4, "fp4": FP4}[kind], dtype=torch.float32)
        order = torch.argsort(code, stable=True)
        ordered = code[order]
        midpoints = (ordered[:-1] + ordered[1:]) / 2
        room = _Room(midpoints, len(midpoints))
        cells = _cell_of(midpoints, room.cell, room.other).long()
        below = torch.bucketize(torch.arange(2 * CELLS + 1), cells).to(torch.uint8)
        midpoint = torch.full(below.shape, torch.inf, dtype=torch.float32)
        midpoint[cells] = midpoints
        byte = torch.arange(256, dtype=torch.uint8)
        pairs = (order[byte.int() >> 4] << 4 | order[byte.int() & 15]).to(torch.uint8)
    return below, midpoint, None if torch.equal(pairs, byte) else pairs


def _finite(largest):
    if not largest.isfinite().all():
        raise CheckpointError(
            "the tensor to be quantized holds an infinity or NaN: its block has no scale, and all "
            "weights of the block would be lost. Look for the step that made it."
        )
    return largest


def _in_threads(work, items):
    """`work(some of the items)` until all are done, in as many threads as torch is set to use."""
    threads = torch.get_num_threads()
    if threads == 1 or not items:
        return work(items)
    shares = [items[i::threads] for i in range(min(threads, len(items)))]
    # By itself torch would share each operation among its threads and let them wait for one another
    # after each, which takes longer than the work where another program is using a core.
    torch.set_num_threads(1)  # here, and in the threads that begin from now on
    try:
        if len(shares) == 1:
            return work(items)
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(work, shares))
    finally:
        torch.set_num_threads(threads)


# --- in bitsandbytes' place -------------------------------------------------------------------

_lock = threading.Lock()
_users, _library = 0, None


@contextlib.contextmanager
def fast_quantizer():
    """Within it, bitsandbytes' operator for 4-bit quantization runs on `quantize_4bit` on a CPU.

    bitsandbytes brings no CPU kernel for this operator, only a default for every device. PyTorch's
    registry takes one from anybody, and forgets it at the end of the block: nothing is patched, and
    outside it everything is as it was. Other threads meanwhile get the same bytes, sooner. The
    blocks may overlap and stand in one another.
    """
    global _users, _library
    with _lock:
        _library = _library or _registered()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _library = None  # a registration lives as long as its Library


def _registered():
    import bitsandbytes  # noqa: F401  (defines the operator)

    original = torch.library.get_kernel(OPERATOR, "CPU")

    def kernel(keys, weight, block, kind, storage):
        if storage == torch.uint8:
            # What becomes of an infinity is bitsandbytes' to say; `load` refuses it afterwards,
            # when it knows the parameter's name.
            with contextlib.suppress(CheckpointError):
                return quantize_4bit(weight, kind, block)
        return original.call_boxed(keys, weight, block, kind, storage)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning if a kernel is replaced, which is meant
        library.impl(OPERATOR.partition("::")[2], kernel, "CPU", with_keyset=True)
    return library
