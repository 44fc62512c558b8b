"""Formats for experiments: weights or activations rounded, and kept in the model's own dtype.

    rounding("int4")             # round to nearest, symmetric, a scale for each group of 64
    rounding("int3-g32-asym")    # groups of 32 along a row's inputs, with zero points
    rounding("int8-row")         # a scale for each row, as LLM.int8 rounds weights
    rounding("int2-tensor")      # one scale for the whole weight
    rounding("nf4-b128-dq")      # NormalFloat in blocks of 128, with quantized scales
    rounding("int8-act-token")   # the inputs of the layers: a scale for each token

No model is loaded in these formats: nothing is packed, and nothing gets smaller or faster. They
show what rounding does to a model's answers, and `effective_bits` shows what it would save. In
`vk.load`, `int8` is LLM.int8, whose weights are `int8-row` here. `nf4`, `nf4-dq` and `fp4` are the
same here and there.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

from vlmkit.errors import PlanError, did_you_mean
from vlmkit.formats.exact import BLOCK, NESTED_BLOCK
from vlmkit.formats.reference import FP4, NF4, dequantize_scales, quantize_blocks, quantize_scales

INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
TABLES = {"nf4": NF4, "fp4": FP4}
TENSOR, ROW, GROUP, TOKEN = "tensor", "row", "group", "token"
SCALE_BITS = 32  # a scale is a float32, as in bitsandbytes


@dataclass(frozen=True)
class Rounding:
    """How numbers are rounded. `rounding` makes one from its spelling.

    kind: "int2" to "int8" (evenly spaced values), "nf4" or "fp4" (a table of 16 values).
    share: the numbers that share a scale: "tensor", "row" or "group"; for activations "tensor" or
        "token".
    group: numbers in a group. Integers are grouped along the inputs of a row, whose last group may
        be shorter. NF4 and FP4 are grouped over the flattened weight, as in bitsandbytes.
    asymmetric: the values span the range from the smallest to the largest number, zero included.
        Else they reach equally far on both sides of zero: a symmetric intN has 2^N - 1 values, so
        int2 is ternary.
    double: the scales are quantized too (QLoRA, arXiv 2305.14314, sec. 3).
    activations: the inputs of layers are rounded, not their weights.
    """

    kind: str
    share: str = GROUP
    group: int = BLOCK
    asymmetric: bool = False
    double: bool = False
    activations: bool = False

    @property
    def bits(self):
        """Bits of one number, without its share of scales."""
        return int(self.kind[-1])

    @property
    def name(self):
        """The full spelling, with the defaults. `rounding` reads it back."""
        letter = "b" if self.kind in TABLES else "g"
        share = f"{letter}{self.group}" if self.share == GROUP else self.share
        act, asym, dq = ["act"] * self.activations, ["asym"] * self.asymmetric, ["dq"] * self.double
        return "-".join([self.kind, *act, share, *asym, *dq])

    def __str__(self):
        return self.name

    def scales(self, shape):
        """How many scales a weight of `shape` has."""
        n, columns = prod(shape), _columns(shape)
        if self.share == TENSOR:
            return 1
        if self.share == ROW:
            return n // columns
        if self.kind in TABLES:
            return ceil(n / self.group)
        return n // columns * ceil(columns / self.group)

    def total_bits(self, shape):
        """Bits of a weight of `shape` packed in this format: its numbers, scales (32 bits each)
        and zero points (as wide as a number). The table of 16 values does not count here; in
        bitsandbytes every layer has a copy, so `FORMATS` counts it."""
        scales = self.scales(shape)
        bits = prod(shape) * self.bits + self.bits * self.asymmetric * scales
        if not self.double:
            return bits + SCALE_BITS * scales
        return bits + 8 * scales + SCALE_BITS * (ceil(scales / NESTED_BLOCK) + 1)

    def effective_bits(self, shape):
        """Bits for each number of a weight of `shape`, with scales and zero points: a Fraction."""
        return Fraction(self.total_bits(shape), prod(shape))

    def rounded(self, x):
        """The float tensor `x` rounded: a new tensor of the same shape and dtype.

        Shape (outputs, inputs) for a weight, (..., features) for activations. The arithmetic is in
        float32. Infinity and NaN are not checked for.
        """
        values = x.detach().float()
        if self.kind in TABLES:
            return self._by_table(values.reshape(-1)).reshape(x.shape).to(x.dtype)
        rows = values.reshape(-1, x.shape[-1] if self.activations else _columns(x.shape))
        if self.share == TENSOR:
            rows = rows.reshape(1, -1)
        width = min(self.group, rows.shape[1]) if self.share == GROUP else rows.shape[1]
        return self._by_integers(rows, width).reshape(x.shape).to(x.dtype)

    def _by_integers(self, rows, width):
        from torch.nn.functional import pad

        # Each row is cut into groups. Zeros fill up its last group: they change neither the largest
        # magnitude nor a range that includes zero.
        count, columns = rows.shape
        groups = pad(rows, (0, -columns % width)).reshape(-1, width)
        if self.asymmetric:
            low = groups.amin(1, keepdim=True).clamp(max=0)
            high = groups.amax(1, keepdim=True).clamp(min=0)
            span, steps = high - low, 2**self.bits - 1
        else:
            span, steps = groups.abs().amax(1, keepdim=True), 2 ** (self.bits - 1) - 1
        step = (span / steps).clamp(min=1e-30)  # a group of zeros stays zero
        index = (groups / step).round()
        if self.asymmetric:
            zero = (-low / step).round()
            index = (index + zero).clamp(0, steps) - zero
        else:
            index = index.clamp(-steps, steps)
        if self.double:
            step = (dequantize_scales(quantize_scales(span.flatten())) / steps)[:, None]
        return (index * step).reshape(count, -1)[:, :columns]

    def _by_table(self, values):
        import torch

        code = torch.tensor(TABLES[self.kind], device=values.device)
        block = values.numel() if self.share == TENSOR else self.group
        index, absmax = quantize_blocks(values, code, block)
        if self.double:
            absmax = dequantize_scales(quantize_scales(absmax))
        return code[index] * absmax.repeat_interleave(block)[: values.numel()]


def rounding(x):
    """The Rounding that `x` spells, or `x` itself if it is one.

    A spelling is a kind (int2 to int8, nf4, fp4), then in any order what shares a scale (tensor,
    row, or g64 or b64 for groups of 64, or any other number), asym (only for integers) and dq. For
    activations it is a kind, act, and tensor or token. The default is symmetric groups of 64.

    Raises PlanError, with the most similar right spelling, for anything else.
    """
    if isinstance(x, Rounding):
        return x
    found = _parsed(x) if isinstance(x, str) else None
    if found is None:
        raise PlanError(
            f"{x!r} is not a format for experiments. {did_you_mean(x, _examples(), 0.4)}A format "
            "is int2 to int8, nf4 or fp4, then what shares a scale: -tensor, -row, -g32 (or any "
            "other number), then -asym for zero points and -dq for quantized scales, such as int4, "
            "int3-g32-asym, nf4-b128-dq; for activations int8-act-token or int8-act-tensor."
        )
    return found


def _parsed(text):
    """The Rounding that a text spells, or None."""
    kind, *parts = text.strip().lower().split("-")
    groups = [int(part[1:]) for part in parts if re.fullmatch(r"[gb][1-9]\d*", part)]
    shares = [part for part in parts if part in (TENSOR, ROW, TOKEN)]
    flags = [part for part in parts if part in ("asym", "sym", "dq", "act")]
    if (
        kind not in (*INTEGERS, *TABLES)
        or len(groups) + len(shares) + len(flags) < len(parts)
        or len(groups) + len(shares) > 1
        or len(set(flags)) < len(flags)
        or {"asym", "sym"} <= set(flags)
    ):
        return None
    share, group = (shares or [GROUP])[0], (groups or [BLOCK])[0]
    found = Rounding(kind, share, group, "asym" in flags, "dq" in flags, "act" in flags)
    if found.activations:
        possible = (TENSOR, TOKEN)
    elif kind in TABLES:
        possible = () if found.asymmetric else (TENSOR, GROUP)
    else:
        possible = (TENSOR, ROW, GROUP)
    few_scales = share in (TENSOR, TOKEN)  # too few to quantize them
    return None if share not in possible or found.double and few_scales else found


def _examples():
    for kind in (*INTEGERS, *TABLES):
        table = kind in TABLES
        shares = ("b64", "b128") if table else ("tensor", "row", "g32", "g64", "g128")
        flag = "dq" if table else "asym"
        yield kind
        yield from (f"{kind}-{share}{end}" for share in shares for end in ("", f"-{flag}"))
        yield from (f"{kind}-act-token", f"{kind}-act-tensor")


def _columns(shape):
    """Inputs of one output. A convolution's weight is (outputs, channels, height, width)."""
    return prod(shape[1:]) if len(shape) > 3 else shape[-1]
