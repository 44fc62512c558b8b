"""How the formats of `exact.py` round a weight, in a few lines of PyTorch.

This reference is written to be read. The tests compare it with bitsandbytes, byte for byte.
"""

from dataclasses import dataclass
from math import prod

from vlmkit.errors import PlanError
from vlmkit.formats.exact import BLOCK, NESTED_BLOCK, NESTED_CELLS, format_named, torch_dtype

# The 16 values are quantiles of a standard normal distribution, scaled to [-1, 1], with an exact
# zero (QLoRA, appendix E). They are sorted, so the code of a value is its position.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# These are in the order of their bit patterns, which is not the order of the values.
FP4 = tuple(v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3))


@dataclass(frozen=True)
class Packed:
    """A quantized tensor. `state` holds what else is needed to dequantize `data`, as tensors."""

    format: str
    shape: tuple
    data: object
    state: dict

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.data, *self.state.values()))


def quantize(weight, name):
    """`weight`, a float tensor of shape (rows, columns), in the quantized format `name`: a Packed.

    Raises PlanError if `name` is not a quantized format.
    """
    kind = format_named(name)
    if not kind.quantized:
        raise PlanError(f"{name} is a float format: use weight.to({torch_dtype(name)})")
    if name == "int8":
        return _quantize_rows(weight)
    import torch

    code = torch.tensor(NF4 if name.startswith("nf4") else FP4, device=weight.device)
    index, absmax = quantize_blocks(weight.reshape(-1).float(), code, BLOCK)
    if index.numel() % 2:
        # the unused half of the last byte holds the code of the value 0
        index = torch.cat([index, _nearest(index.new_zeros(1).float(), code)])
    packed = (index[::2] << 4 | index[1::2]).to(torch.uint8)
    state = {"absmax": absmax, "code": code}
    if name.endswith("-dq"):
        state = {"code": code} | quantize_scales(absmax)
    return Packed(name, tuple(weight.shape), packed, state)


def dequantize(packed):
    """The float32 tensor of a Packed."""
    import torch

    if packed.format == "int8":
        return packed.data * packed.state["row_absmax"][:, None] / 127
    n = prod(packed.shape)
    state = packed.state
    absmax = dequantize_scales(state) if "offset" in state else state["absmax"]
    index = torch.stack([packed.data >> 4, packed.data & 15], dim=1).reshape(-1)[:n]
    scales = absmax.repeat_interleave(BLOCK)[:n]
    return (state["code"][index.long()] * scales).reshape(packed.shape)


def quantize_scales(absmax):
    """Double quantization (QLoRA, sec. 3): the scales, minus their mean, are rounded to 8 bits in
    blocks of their own. Returns a state for `dequantize_scales`."""
    import torch

    code = torch.tensor(dynamic_code(), device=absmax.device)
    offset = absmax.mean()
    index, nested_absmax = quantize_blocks(absmax - offset, code, NESTED_BLOCK, cells=NESTED_CELLS)
    return {
        "absmax": index.to(torch.uint8),
        "nested_absmax": nested_absmax,
        "nested_code": code,
        "offset": offset,
    }


def dequantize_scales(state):
    """The float32 scales of a state that `quantize_scales` returned."""
    absmax = state["absmax"]
    scales = state["nested_absmax"].repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
    return state["nested_code"][absmax.long()] * scales + state["offset"]


def _quantize_rows(weight):
    """LLM.int8 (arXiv 2208.07339, sec. 2.1): each row divided by its largest magnitude."""
    import torch

    weight = weight.to(torch.float16)  # the format is defined on fp16 weights
    row_absmax = weight.abs().amax(dim=1).float()
    data = torch.round(weight * (127.0 / row_absmax[:, None])).to(torch.int8)
    return Packed("int8", tuple(weight.shape), data, {"row_absmax": row_absmax})


def quantize_blocks(values, code, block, cells=None):
    """For each value, divided by its block's largest magnitude, the index of the nearest entry of
    `code`; and these magnitudes.

    cells: first round to one of so many evenly spaced values from -1 to 1.
    """
    import torch

    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % block)).reshape(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    if cells:
        half = (cells - 1) / 2
        scaled = ((scaled + 1) * half + 0.5).floor() / half - 1
        scaled[absmax == 0] = -1  # as bitsandbytes; times zero, any code is right
    return _nearest(scaled.reshape(-1)[:n], code), absmax


def _nearest(values, code):
    """The index of the entry of `code` that is nearest to each value; on a tie, the smaller one."""
    import torch

    order = torch.argsort(code, stable=True)
    ordered = code[order]
    return order[torch.bucketize(values, (ordered[:-1] + ordered[1:]) / 2)]


def dynamic_code():
    """The 256 values that double quantization rounds scales to. Each power of ten from 1e-6 to 1
    has twice as many steps as the power below (8-bit dynamic tree quantization, arXiv 1511.04561;
    QLoRA, sec. 3, uses it for the scales)."""
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += middles.tolist() + (-middles).tolist()
    return sorted(values)
