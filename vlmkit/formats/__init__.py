"""Number formats: what a weight costs in bytes, exactly, and how it is rounded.

    FORMATS["nf4"].nbytes((4096, 4096))            # 9,437,248: packed weights, absmax, code
    packed = quantize(weight, "nf4")               # a reference in a few lines of PyTorch
    rounded = dequantize(packed)

    rounding("int3-g32-asym").rounded(weight)      # for experiments: rounded, in its own dtype

exact.py        the formats that a model can be loaded in, with their exact bytes
reference.py    how these formats round a weight, byte for byte as bitsandbytes
experiments.py  formats for experiments, such as int2 to int8, and their spelling
"""

from vlmkit.formats.exact import (
    BLOCK,
    DEFAULT,
    FORMATS,
    NESTED_BLOCK,
    NESTED_CELLS,
    Format,
    format_named,
    format_of_dtype,
    torch_dtype,
)
from vlmkit.formats.experiments import Rounding, rounding
from vlmkit.formats.reference import FP4, NF4, Packed, dequantize, dynamic_code, quantize

__all__ = [
    "BLOCK",
    "DEFAULT",
    "FORMATS",
    "FP4",
    "NESTED_BLOCK",
    "NESTED_CELLS",
    "NF4",
    "Format",
    "Packed",
    "Rounding",
    "dequantize",
    "dynamic_code",
    "format_named",
    "format_of_dtype",
    "quantize",
    "rounding",
    "torch_dtype",
]
