"""PyTorch's caching allocator on CUDA: what a tensor takes beyond its own bytes.

The rules, from `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.h` of PyTorch 2.13
with its default settings:

- a block is a multiple of 512 bytes;
- blocks of up to 1 MiB are cut from segments of 2 MiB, larger ones from segments of 20 MiB, and
  one of 10 MiB or more gets a segment of its own, a multiple of 2 MiB;
- of the free blocks that are large enough the smallest is taken; what is left of it stays a block
  if it is at least 512 bytes, or among the large ones more than 1 MiB;
- a block that is given back joins free neighbors in its segment.

Segments are what `nvidia-smi` shows (`torch.cuda.memory_reserved`), blocks what PyTorch counts
(`torch.cuda.memory_allocated`). The context of CUDA itself, some hundred MB, is in neither.
"""

from bisect import bisect_left, insort
from itertools import count

BLOCK = 512
SMALL = 2**20
SMALL_SEGMENT, LARGE_SEGMENT = 2 * 2**20, 20 * 2**20
OWN_SEGMENT, SEGMENT_STEP = 10 * 2**20, 2 * 2**20


class Block:
    """A piece of a segment. size: bytes. small: of which pool. before, after: its neighbors."""

    __slots__ = ("after", "before", "free", "place", "size", "small")

    def __init__(self, size, small, place, before=None, after=None):
        self.size, self.small, self.place = size, small, place
        self.before, self.after, self.free = before, after, False


class CachingAllocator:
    """The allocator, without memory behind it.

    reserved, allocated: bytes of all segments, and of the blocks given out. peak: of the latter.
    """

    def __init__(self):
        self.reserved = self.allocated = self.peak = 0
        self._free = {True: [], False: []}  # (size, place, block), of the small and the large pool
        self._places = count(step=2**50)  # where segments begin: further apart than any is long

    def allocate(self, size):
        """Give out a Block for a tensor of `size` bytes."""
        size = max(1, -(-size // BLOCK)) * BLOCK
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size,))
        block = free.pop(place)[2] if place < len(free) else self._segment(size, small)
        block.free = False
        rest = block.size - size
        if rest and (small or rest > SMALL):
            self._split(block, size)
        self.allocated += block.size
        self.peak = max(self.peak, self.allocated)
        return block

    def release(self, block):
        """Take back a Block."""
        self.allocated -= block.size
        before, after = block.before, block.after
        if before and before.free:
            self._withdraw(before)
            block.place, block.before = before.place, before.before
            block.size += before.size
            if block.before:
                block.before.after = block
        if after and after.free:
            self._withdraw(after)
            block.after = after.after
            block.size += after.size
            if block.after:
                block.after.before = block
        self._offer(block)

    def _segment(self, size, small):
        if small:
            segment = SMALL_SEGMENT
        elif size < OWN_SEGMENT:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // SEGMENT_STEP) * SEGMENT_STEP
        self.reserved += segment
        return Block(segment, small, next(self._places))

    def _split(self, block, size):
        rest = Block(block.size - size, block.small, block.place + size, block, block.after)
        if rest.after:
            rest.after.before = rest
        block.size, block.after = size, rest
        self._offer(rest)

    def _offer(self, block):
        block.free = True
        insort(self._free[block.small], (block.size, block.place, block))

    def _withdraw(self, block):
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.place))]
