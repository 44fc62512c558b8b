"""Rows: one parameter of a model with its component, kind, format and bytes.

A layout, an audit, a memory ledger, a lint and a planner are lists of rows, and their tables are
sums over them.
"""

from dataclasses import dataclass
from math import prod

LINEAR, EXPERTS, HEAD, EMBEDDING = "linear", "fused experts", "head", "embedding"
TIED, NORM = "embedding and tied head", "norm"
CONVOLUTION, BIAS, BARE = "convolution", "bias", "bare parameter"
KINDS = (LINEAR, EXPERTS, HEAD, EMBEDDING, TIED, NORM, CONVOLUTION, BIAS, BARE)
"""What a parameter is, as tables show it. `linear` is quantized with its component, and `head` only
where a plan names it. Nothing else is quantized: bitsandbytes converts Linear modules, and the
fused experts of a mixture are one parameter of three dimensions."""

STORED, STATE = "stored weight", "quantization state"
"""Kinds of what a weight file holds: the numbers of a weight, and what a quantizer keeps beside
them (scales, zero points, tables)."""


@dataclass(frozen=True)
class Row:
    """One parameter, or one other tensor that takes memory.

    name: its full name.
    component: one of `vlmkit.COMPONENTS`, or None where no rule knows it.
    kind: one of KINDS, or one of `vlmkit.memory.ledger` for a tensor that is not a parameter.
    bytes: in its format, with its quantization state.
    shape: of the weight, as a tuple. For a 4-bit weight, the shape before packing.
    asked: the format that the plan asks for.
    format: the format that it gets, or that it was found in. This differs from `asked` where
        bitsandbytes and transformers leave a parameter alone.
    convertible: whether it can be quantized at all.
    note: why it is left alone, where `kind` does not say it.
    """

    name: str
    component: str
    kind: str
    bytes: int = 0
    shape: tuple = ()
    asked: str = None
    format: str = None
    convertible: bool = False
    note: str = ""

    @property
    def module(self):
        """Full name of the module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def parameters(self):
        """How many numbers the parameter has."""
        return prod(self.shape)


def sums(rows, key, order=()):
    """{value of the attribute `key`: bytes of the rows that have it}, in `order`, None last."""
    found = {}
    for row in rows:
        value = getattr(row, key)
        found[value] = found.get(value, 0) + row.bytes
    return {value: found[value] for value in (*order, None) if value in found}


def is_linear(module):
    """Whether transformers can convert `module` to a layer of bitsandbytes.

    The test is that of transformers' `replace_with_bnb_linear`: these classes, no subclasses.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def kind_of(model, module, leaf):
    """Which of KINDS a parameter is: the parameter `leaf` of `module`, a module of `model`."""
    from torch import nn

    if leaf == "bias" and isinstance(module, nn.Linear):
        return BIAS
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # PEFT wraps a head that has an adapter
    if module is head:
        return HEAD
    if isinstance(module, nn.Embedding):
        return TIED if head is not None and head.weight is module.weight else EMBEDDING
    if isinstance(module, nn.Linear) or is_linear(module):
        return LINEAR
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return CONVOLUTION
    if "Experts" in type(module).__name__:
        return EXPERTS
    return NORM if type(module).__name__.endswith("Norm") else BARE
