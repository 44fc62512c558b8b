"""Number formats: what a weight costs in bytes, exactly, and how it is rounded.

    FORMATS["nf4"].nbytes((4096, 4096))            # 9,437,248: packed weights, absmax, code
    packed = quantize(weight, "nf4")               # the reference, in a few lines of PyTorch
    weight_again = dequantize(packed)

The byte counts are those of `bitsandbytes`, whose layers are what a loaded model holds. The
reference is written to be read; the tests hold it against bitsandbytes byte for byte.
"""

import difflib
from dataclasses import dataclass
from math import ceil, prod

from vlmkit.errors import PlanError

BLOCK = 64  # weights that share one absmax in the 4-bit formats (QLoRA, arXiv 2305.14314, sec. 3)
NESTED_BLOCK = 256  # absmax values that share one absmax under double quantisation
NESTED_CELLS = 2**16  # bitsandbytes looks 8-bit codes up in a table of so many entries on a CPU


@dataclass(frozen=True)
class Format:
    """A number format.

    bits: of one weight, without its share of scales.
    companion: the float format of everything beside the quantised weights (biases, norms,
        embeddings) and of the arithmetic; for a float format, itself.
    """

    name: str
    bits: int
    companion: str
    about: str

    @property
    def quantized(self):
        return self.name != self.companion

    def parts(self, shape):
        """Bytes of one weight tensor of `shape`: (weights, quantisation state)."""
        n = prod(shape)
        if not self.quantized:
            return n * self.bits // 8, 0
        if self.name == "int8":
            return n, 4 * shape[0]  # one float32 scale a row
        blocks = ceil(n / BLOCK)
        code = 16 * 4  # every layer keeps its own copy of the 16 values
        if not self.name.endswith("-dq"):
            return (n + 1) // 2, 4 * blocks + code
        # absmax in uint8, its own float32 absmax, both codes, and the mean taken off (float32)
        return (n + 1) // 2, blocks + 4 * ceil(blocks / NESTED_BLOCK) + code + 256 * 4 + 4

    def nbytes(self, shape):
        """Bytes of one weight tensor of `shape`, with its quantisation state."""
        return sum(self.parts(shape))


FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32, "fp32", "IEEE single precision"),
        Format("fp16", 16, "fp16", "IEEE half precision"),
        Format("bf16", 16, "bf16", "brain float: the exponent of fp32, 8 bits of precision"),
        Format("int8", 8, "bf16", "LLM.int8: rows scaled to int8 (arXiv 2208.07339)"),
        Format("nf4", 4, "bf16", "4-bit NormalFloat in blocks of 64 (arXiv 2305.14314)"),
        Format("nf4-dq", 4, "bf16", "nf4 with the scales quantised once more"),
        Format("fp4", 4, "bf16", "4-bit float (sign, 2 exponent, 1 mantissa) in blocks of 64"),
    )
}
"""Every format by name, the widest first. Grouped integers (int2 to int8) will stand here too."""


def format_named(name):
    """The Format called `name`. Raises PlanError, with the nearest right name, if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(str(name).lower(), FORMATS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise PlanError(f"{name!r} is not a number format: {hint}the formats are {', '.join(FORMATS)}")


def torch_dtype(name):
    """torch dtype of a format's floats: of the format itself, or of its companion."""
    import torch

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return dtypes[format_named(name).companion]


def format_of_dtype(dtype):
    """Name of the float format of a torch dtype, or the dtype's own name where it is none."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    short = str(dtype).removeprefix("torch.")
    return names.get(short, short)


# --- the reference ---------------------------------------------------------------------------

# The 16 values are quantiles of a standard normal distribution, scaled to [-1, 1], with an exact
# zero (QLoRA, appendix E). They are in order, so a value's code is its place.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# In order of the bit pattern, which is not the order of the values.
FP4 = tuple(v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3))


@dataclass(frozen=True)
class Packed:
    """A quantised tensor. `state` holds the tensors that dequantising needs besides `data`."""

    format: str
    shape: tuple
    data: object
    state: dict

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.data, *self.state.values()))


def quantize(weight, name):
    """Round `weight` (a float tensor of shape (rows, columns)) to the quantised format `name`.

    Returns a Packed. Raises PlanError if `name` is not a quantised format.
    """
    kind = format_named(name)
    if not kind.quantized:
        raise PlanError(f"{name} is a float format: use weight.to({torch_dtype(name)})")
    if name == "int8":
        return _quantize_rows(weight)
    import torch

    code = torch.tensor(NF4 if name.startswith("nf4") else FP4, device=weight.device)
    index, absmax = _quantize_blocks(weight.reshape(-1).float(), code, BLOCK)
    if index.numel() % 2:
        # the last byte's spare half holds what the value 0 rounds to
        index = torch.cat([index, _nearest(index.new_zeros(1).float(), code)])
    packed = (index[::2] << 4 | index[1::2]).to(torch.uint8)
    state = {"absmax": absmax, "code": code}
    if name.endswith("-dq"):
        nested_code = torch.tensor(dynamic_code(), device=weight.device)
        offset = absmax.mean()
        index, nested_absmax = _quantize_blocks(
            absmax - offset, nested_code, NESTED_BLOCK, cells=NESTED_CELLS
        )
        state = {
            "absmax": index.to(torch.uint8),
            "code": code,
            "nested_absmax": nested_absmax,
            "nested_code": nested_code,
            "offset": offset,
        }
    return Packed(name, tuple(weight.shape), packed, state)


def dequantize(packed):
    """The float32 tensor that a Packed stands for."""
    import torch

    if packed.format == "int8":
        return packed.data * packed.state["row_absmax"][:, None] / 127
    n = prod(packed.shape)
    state = packed.state
    absmax = state["absmax"]
    if "offset" in state:
        scales = state["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = state["nested_code"][absmax.long()] * scales + state["offset"]
    index = torch.stack([packed.data >> 4, packed.data & 15], dim=1).reshape(-1)[:n]
    scales = absmax.repeat_interleave(BLOCK)[:n]
    return (state["code"][index.long()] * scales).reshape(packed.shape)


def _quantize_rows(weight):
    """LLM.int8 (arXiv 2208.07339, sec. 2.1): each row divided by its largest magnitude."""
    import torch

    weight = weight.to(torch.float16)  # the format is defined on fp16 weights
    row_absmax = weight.abs().amax(dim=1).float()
    data = torch.round(weight * (127.0 / row_absmax[:, None])).to(torch.int8)
    return Packed("int8", tuple(weight.shape), data, {"row_absmax": row_absmax})


def _quantize_blocks(values, code, block, cells=None):
    """Index into `code` of each value over its block's largest magnitude, and those magnitudes.

    cells: round to one of so many evenly spaced values from -1 to 1 before looking for the code.
    """
    import torch

    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % block)).reshape(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    if cells:
        half = (cells - 1) / 2
        scaled = ((scaled + 1) * half + 0.5).floor() / half - 1
        scaled[absmax == 0] = -1  # bitsandbytes gives them the first code; times zero, any will do
    return _nearest(scaled.reshape(-1)[:n], code), absmax


def _nearest(values, code):
    """Index of the entry of `code` nearest to each value; on a tie, the smaller entry."""
    import torch

    order = torch.argsort(code, stable=True)
    ordered = code[order]
    return order[torch.bucketize(values, (ordered[:-1] + ordered[1:]) / 2)]


def dynamic_code():
    """The 256 values that double quantisation rounds scales to: for each power of ten from 1e-6
    to 1, twice as many steps as for the one below (8-bit dynamic tree quantisation, arXiv
    1511.04561; used for the scales by QLoRA, sec. 3)."""
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += middles.tolist() + (-middles).tolist()
    return sorted(values)
