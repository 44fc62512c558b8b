"""The formats that a model can be loaded in: what a weight costs in bytes, exactly.

The byte counts are those of `bitsandbytes`, whose layers are what a loaded model holds.
"""

import re
from dataclasses import dataclass
from math import ceil, prod

from vlmkit.errors import PlanError, did_you_mean

BLOCK = 64  # weights that share one absmax in the 4-bit formats (QLoRA, arXiv 2305.14314, sec. 3)
NESTED_BLOCK = 256  # absmax values that share one absmax under double quantization
DEFAULT = "bf16"  # the format of what a plan does not name
NESTED_CELLS = 2**16  # bitsandbytes looks 8-bit codes up in a table of so many entries on a CPU


@dataclass(frozen=True)
class Format:
    """A number format.

    bits: of one weight, without its share of scales.
    float_format: the float format of everything beside the quantized weights (biases, norms,
        embeddings) and of the arithmetic; for a float format, itself.
    """

    name: str
    bits: int
    float_format: str
    about: str

    @property
    def quantized(self):
        return self.name != self.float_format

    def parts(self, shape):
        """Bytes of one weight tensor of `shape`: (weights, quantization state)."""
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
        """Bytes of one weight tensor of `shape`, with its quantization state."""
        return sum(self.parts(shape))


FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32, "fp32", "IEEE single precision"),
        Format("fp16", 16, "fp16", "IEEE half precision"),
        Format("bf16", 16, "bf16", "brain float: the exponent of fp32, 8 bits of precision"),
        Format("int8", 8, "bf16", "LLM.int8: rows scaled to int8 (arXiv 2208.07339)"),
        Format("nf4", 4, "bf16", "4-bit NormalFloat in blocks of 64 (arXiv 2305.14314)"),
        Format("nf4-dq", 4, "bf16", "nf4 with the scales quantized once more"),
        Format("fp4", 4, "bf16", "4-bit float (sign, 2 exponent, 1 mantissa) in blocks of 64"),
    )
}
"""Every format by name, the widest first. Those for experiments are in `experiments.py`."""


# Roughly how the formats of `experiments.py` are spelled, to say that a name is one of them.
_EXPERIMENT = re.compile(r"(int[2-8]|nf4|fp4)(-(tensor|row|token|act|asym|sym|dq|[gb]\d+))*")


def format_named(name):
    """The Format called `name`. Raises PlanError, with the nearest right name, if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    if _EXPERIMENT.fullmatch(str(name).lower()):
        raise PlanError(
            f"{name!r} is a format for experiments: it rounds the weights of a model that is "
            "loaded already, and no model is loaded in it. Load one in a float format and use "
            f"vk.sensitivity.quantized(model, scope, {name!r}). The formats of a plan are "
            f"{', '.join(FORMATS)}."
        )
    raise PlanError(
        f"{name!r} is not a number format. {did_you_mean(name, FORMATS, 0.4)}The formats are "
        f"{', '.join(FORMATS)}."
    )


def torch_dtype(name):
    """torch dtype of a format's floats: of the format itself, or of its float format."""
    import torch

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return dtypes[format_named(name).float_format]


def format_of_dtype(dtype):
    """Name of the float format of a torch dtype, or the dtype's own name where it is none."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    short = str(dtype).removeprefix("torch.")
    return names.get(short, short)
