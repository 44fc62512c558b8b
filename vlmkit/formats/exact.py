"""The formats that a model can be loaded in, and what a weight costs in bytes, exactly.

The byte counts are those of `bitsandbytes`, because a loaded model has its layers.
"""

import re
from dataclasses import dataclass
from math import ceil, prod

from vlmkit.errors import PlanError, did_you_mean

BLOCK = 64  # weights that share one absmax in the 4-bit formats (QLoRA, arXiv 2305.14314, sec. 3)
NESTED_BLOCK = 256  # absmax values that share one absmax under double quantization
DEFAULT = "bf16"  # the format of what a plan does not name
NESTED_CELLS = 2**16  # on a CPU, bitsandbytes finds 8-bit codes in a table of this many entries


@dataclass(frozen=True)
class Format:
    """A number format.

    bits: bits of one weight, without its share of scales.
    float_format: the format of everything that is not quantized (biases, norms, embeddings) and of
        the arithmetic. A float format is its own.
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
            return n, 4 * shape[0]  # one float32 scale for each row
        blocks = ceil(n / BLOCK)
        code = 16 * 4  # every layer has its own copy of the 16 values
        if not self.name.endswith("-dq"):
            return (n + 1) // 2, 4 * blocks + code
        # absmax in uint8, their own float32 absmax, both codes, and the subtracted mean (float32)
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
"""Every format by name, the widest first. `experiments.py` has the formats for experiments."""


# Roughly the spelling of the formats of `experiments.py`, for the error about such a name.
_EXPERIMENT = re.compile(r"(int[2-8]|nf4|fp4)(-(tensor|row|token|act|asym|sym|dq|[gb]\d+))*")


_ELSEWHERE = {
    "4bit": "nf4", "load_in_4bit": "nf4", "qlora": "nf4", "8bit": "int8", "load_in_8bit": "int8",
    "fp8": "int8",     "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32",
}  # fmt: skip
"""What other programs call a format, or nearly the same format: the name here."""


def format_named(name):
    """The Format called `name`. Raises PlanError, with the most similar name, if there is none."""
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    if _EXPERIMENT.fullmatch(str(name).lower()):
        raise PlanError(
            f"{name!r} is a format for experiments: it rounds the weights of a loaded model, and "
            "no model can be loaded in it. Load a model in a float format and use "
            f"vk.sensitivity.quantized(model, scope, {name!r}). The formats of a plan are "
            f"{', '.join(FORMATS)}."
        )
    near = did_you_mean(name, [*FORMATS, *_ELSEWHERE], 0.4, _ELSEWHERE)
    raise PlanError(f"{name!r} is not a number format. {near}The formats are {', '.join(FORMATS)}.")


def torch_dtype(name):
    """The torch dtype of a format's `float_format`."""
    import torch

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return dtypes[format_named(name).float_format]


def format_of_dtype(dtype):
    """The name of the float format of a torch dtype; for any other dtype, the dtype's own name."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    short = str(dtype).removeprefix("torch.")
    return names.get(short, short)
