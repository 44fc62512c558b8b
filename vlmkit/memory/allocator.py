"""PyTorch's caching allocator on CUDA: what a tensor takes beyond its own bytes.

The rules, from `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.h` of PyTorch 2.13
with its default settings:

- a block is a multiple of 512 bytes;
- blocks of up to 1 MiB are cut from segments of 2 MiB, larger ones from segments of 20 MiB, and
  one of 10 MiB or more gets a segment of its own, a multiple of 2 MiB;
- of the free blocks that are large enough the smallest is taken; what is left of it stays a block
  if it is at least 512 bytes, or among the large ones more than 1 MiB.

Segments are what `nvidia-smi` shows (`torch.cuda.memory_reserved`), blocks what PyTorch counts
(`torch.cuda.memory_allocated`). The context of CUDA itself, some hundred MB, is in neither.
"""

from bisect import bisect_left, insort

from vlmkit.architectures import OTHER
from vlmkit.errors import SizeError
from vlmkit.memory.ledger import ACTIVATION, ROUNDING, UNUSED, Entry

BLOCK = 512
SMALL = 2**20
SMALL_SEGMENT, LARGE_SEGMENT = 2 * 2**20, 20 * 2**20
OWN_SEGMENT, SEGMENT_STEP = 10 * 2**20, 2 * 2**20


def rounded(size):
    """Bytes of the block that a tensor of `size` bytes gets."""
    return max(1, -(-size // BLOCK)) * BLOCK


class Segments:
    """Segments of an allocator whose blocks are given out and not taken back, as those of weights.

    reserved, allocated: bytes of all segments, and of the blocks given out.
    """

    def __init__(self):
        self.reserved = self.allocated = 0
        self._free = {True: [], False: []}  # sizes of free blocks, of the small and the large pool

    def allocate(self, size):
        """Give out a block for a tensor of `size` bytes. Returns the bytes of the block."""
        size = rounded(size)
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, size)
        found = free.pop(place) if place < len(free) else self._segment(size)
        rest = found - size
        if rest and (small or rest > SMALL):
            insort(free, rest)
        else:
            size = found
        self.allocated += size
        return size

    def _segment(self, size):
        if size <= SMALL:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // SEGMENT_STEP) * SEGMENT_STEP
        self.reserved += segment
        return segment


def overhead(allocator, entries):
    """Entries of what the `allocator`, "cuda", adds to `entries`: the rounding of blocks, by
    component, and what is reserved and given to nobody.

    Raises SizeError for any other allocator.
    """
    if allocator != "cuda":
        raise SizeError(f"{allocator!r} is not an allocator that vlmkit knows: 'cuda', or None")
    segments, rounding = Segments(), {}
    for entry in entries:
        # Activations are many tensors, whose blocks come and go: their segments are one block here.
        block = segments.allocate(entry.bytes) if entry.bytes else 0
        if entry.kind != ACTIVATION:
            more = rounding.get(entry.component, 0) + block - entry.bytes
            rounding[entry.component] = more
    added = sum(rounding.values())
    unused = segments.reserved - sum(entry.bytes for entry in entries) - added
    name = "PyTorch's caching allocator"
    return [
        *(Entry(name, component, ROUNDING, size) for component, size in rounding.items() if size),
        Entry(name, OTHER, UNUSED, unused),
    ]
