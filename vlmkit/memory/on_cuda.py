"""What PyTorch's allocator on CUDA adds to a ledger: it is played through a load, block by block.

transformers (5.23, `caching_allocator_warmup` and `convert_and_load_state_dict_in_model`) first
takes memory for all weights at once and gives it back, so that the rest is cut from one segment.
Then it reads one weight after another, in the order of their names, and what is to be quantized is
on the GPU in two formats for a moment. How much a block has to spare depends on this order.
Measured on an H200 (benchmarks/results): what four models under four plans are given after a load
is predicted to the byte in fifteen of sixteen, and to 0.005% in the other.
"""

from math import prod

from vlmkit.architectures import OTHER
from vlmkit.errors import SizeError
from vlmkit.formats import FORMATS, torch_dtype
from vlmkit.memory.allocator import CachingAllocator
from vlmkit.memory.ledger import ACTIVATION, BUFFER, ROUNDING, UNUSED
from vlmkit.memory.weights import state_sizes
from vlmkit.rows import Row

FLOAT = 4  # bytes of a float32


def check_allocator(name):
    """Raises SizeError for an allocator other than "cuda" or None."""
    if name not in ("cuda", None):
        raise SizeError(f"{name!r} is not an allocator that vlmkit knows: 'cuda', or None")


def overhead(layout, weights, more=()):
    """Entries of what the allocator adds: the rounding of blocks, by component, and what is
    reserved and given to nobody.

    layout: of the model that is loaded. weights: entries of what it then holds. more: entries of
        what comes on top when it runs or is trained.
    """
    cuda = CachingAllocator()
    given = loaded(cuda, layout)
    buffers = [entry for entry in weights if entry.kind == BUFFER]
    for entry in (*buffers, *more):
        block = cuda.allocate(entry.bytes) if entry.bytes else None
        # Activations are many tensors, whose blocks come and go: their segments are one block here.
        size = block.size if block and entry.kind != ACTIVATION else entry.bytes
        given[entry.component] = given.get(entry.component, 0) + size
    asked = {}
    for entry in (*weights, *more):
        asked[entry.component] = asked.get(entry.component, 0) + entry.bytes
    name = "PyTorch's caching allocator"
    added = {component: size - asked.get(component, 0) for component, size in given.items()}
    return [
        *(Row(name, component, ROUNDING, size) for component, size in added.items() if size),
        Row(name, OTHER, UNUSED, cuda.reserved - sum(given.values())),
    ]


def loaded(cuda, layout):
    """Play the load of a model under `layout` on the CachingAllocator `cuda`, as of a checkpoint in
    a float format. Returns {component: bytes of its blocks}."""
    width = torch_dtype(layout.load_dtype).itemsize
    cuda.release(cuda.allocate(int(sum(_taken_at_first(row, width) for row in layout.rows))))
    blocks = {}
    for row in sorted(layout.rows, key=lambda row: _in_order(row.name)):
        read = cuda.allocate(prod(row.shape) * width)
        if FORMATS[row.format].quantized:
            blocks[row] = _quantized(cuda, row)
            cuda.release(read)
        else:
            blocks[row] = [read]
    for row, (block, *_) in blocks.items():  # `load` rounds where floats of two formats are asked
        if not FORMATS[row.format].quantized and row.format != layout.load_dtype:
            blocks[row] = [cuda.allocate(FORMATS[row.format].nbytes(row.shape))]
            cuda.release(block)
    given = {}
    for row, own in blocks.items():
        given[row.component] = given.get(row.component, 0) + sum(block.size for block in own)
    return given


def _taken_at_first(row, width):
    """Bytes that transformers counts for a weight before it reads one."""
    format = FORMATS[row.format]
    return prod(row.shape) * (format.bits / 8 if format.quantized else width)


def _in_order(name):
    """Sorts names with their numbers as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _quantized(cuda, row):
    """The Blocks of a weight that is quantized on the GPU by bitsandbytes."""
    weights, state = FORMATS[row.format].parts(row.shape)
    if row.format == "int8":
        half = cuda.allocate(2 * prod(row.shape))  # fp16, whatever was read
        kept = [cuda.allocate(state), cuda.allocate(weights)]
        cuda.release(half)
        return kept
    code, *nested, scales = state_sizes(row.format, state)
    if not nested:
        return [cuda.allocate(size) for size in (scales, weights, code)]
    nested_code, mean, nested_scales = nested
    wide = FLOAT * scales  # before they are quantized to a byte each
    plain = cuda.allocate(wide)
    kept = [cuda.allocate(size) for size in (weights, code, mean)]
    centerd = cuda.allocate(wide)
    kept += [cuda.allocate(size) for size in (nested_code, nested_scales, scales)]
    cuda.release(centerd)
    cuda.release(plain)
    return kept
