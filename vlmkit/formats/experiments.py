"""Formats for experiments: weights or activations rounded, and kept in the model's own dtype.

    rounding("int4")             # round to nearest, symmetric, a scale for each group of 64
    rounding("int3-g32-asym")    # groups of 32 along a row's inputs, with zero points
    rounding("int8-row")         # a scale a row, as LLM.int8 rounds weights
    rounding("int2-tensor")      # one scale for the whole weight
    rounding("nf4-b128-dq")      # NormalFloat in blocks of 128, the scales quantized once more
    rounding("int8-act-token")   # the inputs of the layers: a scale for each token

No model is loaded in these: nothing is packed, and nothing gets smaller or faster. They show what
rounding does to a model's answers, and `effective_bits` what it would save. In `vk.load`, `int8` is
LLM.int8, whose weights are `int8-row` here; `nf4`, `nf4-dq` and `fp4` round as there.
"""

import difflib
import re
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

from vlmkit.errors import PlanError
from vlmkit.formats.exact import BLOCK, NESTED_BLOCK
from vlmkit.formats.reference import FP4, NF4, dequantize_scales, quantize_blocks, quantize_scales

INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
TABLES = {"nf4": NF4, "fp4": FP4}
TENSOR, ROW, GROUP, TOKEN = "tensor", "row", "group", "token"
SCALE_BITS = 32  # a scale is a float32, as bitsandbytes keeps it


@dataclass(frozen=True)
class Rounding:
    """How numbers are rounded. Made by `rounding` from its spelling.

    kind: "int2" to "int8" (evenly spaced values), "nf4" or "fp4" (a table of 16 values).
    share: what shares a scale: "tensor", "row", "group", or for activations "tensor" and "token".
    group: numbers in a group; integers are grouped along a row's inputs, which leaves a row's last
        group shorter where they do not divide; NF4 and FP4 over the flattened weight, as in
        bitsandbytes.
    asymmetric: the values span from the smallest to the largest number (with zero in between), not
        as far to both sides. A symmetric intN has 2^N - 1 values, so that int2 is ternary.
    double: the scales are quantized once more (QLoRA, arXiv 2305.14314, sec. 3).
    activations: rounds the inputs of layers, not their weights.
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
        """The full spelling, which `rounding` reads back: every default named."""
        parts = [self.kind]
        if self.activations:
            parts.append("act")
        letter = "b" if self.kind in TABLES else "g"
        parts.append(f"{letter}{self.group}" if self.share == GROUP else self.share)
        parts += ["asym"] * self.asymmetric + ["dq"] * self.double
        return "-".join(parts)

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
        and zero points (as wide as a number). The fixed tables of values are not counted, of which
        bitsandbytes keeps a copy in every layer (see `FORMATS`, which counts them)."""
        scales = self.scales(shape)
        bits = prod(shape) * self.bits + self.bits * self.asymmetric * scales
        if not self.double:
            return bits + SCALE_BITS * scales
        return bits + 8 * scales + SCALE_BITS * (ceil(scales / NESTED_BLOCK) + 1)

    def effective_bits(self, shape):
        """Bits a weight of `shape`, scales and zero points included, as an exact Fraction."""
        return Fraction(self.total_bits(shape), prod(shape))

    def rounded(self, x):
        """`x`, a float tensor, rounded: a new one of the same shape and dtype.

        Shape (outputs, inputs) for a weight, (..., features) for activations. The arithmetic is
        float32. Infinities and NaN are not looked for.
        """
        values = x.detach().float()
        if self.kind in TABLES:
            return self._by_table(values.reshape(-1)).reshape(x.shape).to(x.dtype)
        rows = values.reshape(-1, x.shape[-1] if self.activations else _columns(x.shape))
        if self.share == TENSOR:
            rows = rows.reshape(1, -1)
        width = min(self.group, rows.shape[1]) if self.share == GROUP else rows.shape[1]
        return self._by_integers(_grouped(rows, width), rows).reshape(x.shape).to(x.dtype)

    def _by_integers(self, groups, rows):
        if self.asymmetric:
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            low, high, steps = low.clamp(max=0), high.clamp(min=0), 2**self.bits - 1
            span = high - low
        else:
            span, steps = groups.abs().amax(1, keepdim=True), 2 ** (self.bits - 1) - 1
        step = (span / steps).clamp(min=1e-30)  # a group of zeros stays zero
        index = (groups / step).round()
        if self.asymmetric:
            zero = (-low / step).round()
            index = (index + zero).clamp(0, steps) - zero
        else:
            index = index.clamp(-steps, steps)
        return _ungrouped(index * self._kept(span, step, steps), rows)

    def _kept(self, span, step, steps):
        """The scales as they are kept: float32, or what double quantization leaves of it."""
        if not self.double:
            return step
        return (dequantize_scales(quantize_scales(span.flatten())) / steps)[:, None]

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
    row, or g64 or b64 for groups of 64, any number), asym (integers alone) and dq; or a kind, act,
    and tensor or token. Groups of 64, symmetric, are the default.

    Raises PlanError, with the nearest right spelling, for anything else.
    """
    if isinstance(x, Rounding):
        return x
    found = _parse(x) if isinstance(x, str) else None
    if found is None:
        near = difflib.get_close_matches(str(x).lower(), _examples(), n=1, cutoff=0.4)
        hint = f": did you mean {near[0]!r}?" if near else "."
        raise PlanError(
            f"{x!r} is not a format for experiments{hint} A format is int2 to int8, nf4 or fp4, "
            "then what shares a scale: -tensor, -row, -g32 (any number), then -asym for zero "
            "points and -dq for quantized scales, such as int4, int3-g32-asym, nf4-b128-dq; for "
            "activations int8-act-token or int8-act-tensor."
        )
    return found


def is_rounding(x):
    """Whether `x` is a right spelling of a format for experiments."""
    return isinstance(x, Rounding) or isinstance(x, str) and _parse(x) is not None


def _parse(text):
    kind, *parts = text.strip().lower().split("-")
    if kind not in (*INTEGERS, *TABLES) or len(set(parts)) < len(parts):
        return None
    fields, shares = {}, []
    for part in parts:
        if group := re.fullmatch(r"[gb]([1-9]\d*)", part):
            shares.append(GROUP)
            fields["group"] = int(group[1])
        elif part in (TENSOR, ROW, TOKEN):
            shares.append(part)
        elif part in ("asym", "dq", "act"):
            fields[{"asym": "asymmetric", "dq": "double", "act": "activations"}[part]] = True
        elif part != "sym":
            return None
    if len(shares) > 1 or {"asym", "sym"} <= set(parts):
        return None
    found = Rounding(kind, *shares, **fields)
    if found.activations:
        return found if shares and found.share in (TENSOR, TOKEN) and not found.double else None
    wrong = found.share == TOKEN or found.double and found.share == TENSOR
    if kind in TABLES:
        wrong = wrong or found.asymmetric or found.share == ROW
    return None if wrong else found


def _examples():
    for kind in (*INTEGERS, *TABLES):
        yield kind
        shares = ("tensor", "row", "g32", "g64", "g128") if kind in INTEGERS else ("b64", "b128")
        for share in shares:
            yield f"{kind}-{share}"
            yield f"{kind}-{share}-{'asym' if kind in INTEGERS else 'dq'}"
        yield f"{kind}-act-token"
        yield f"{kind}-act-tensor"


def _columns(shape):
    """Inputs of one output: a convolution's weight is (outputs, channels, height, width)."""
    return prod(shape[1:]) if len(shape) > 3 else shape[-1]


def _grouped(rows, width):
    """(groups, width): each row cut into groups, its last one filled up with zeros, which change
    neither a largest magnitude nor a range that has zero in it."""
    import torch

    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % width)).reshape(-1, width)


def _ungrouped(groups, rows):
    if groups.numel() == rows.numel():
        return groups.reshape(rows.shape)
    return groups.reshape(rows.shape[0], -1)[:, : rows.shape[1]]
