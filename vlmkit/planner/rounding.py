"""Loading in a format, done in place: the same change of a float model's weights and inputs.

For NF4 and FP4 that is the rounding of the weights, to the bit. LLM.int8 (arXiv 2208.07339) also
rounds what goes into a layer, token by token, but for the features in which some value is 6 or
more; bitsandbytes then rounds products in other places than here, which is as large a change and
not the same one. A narrower float format rounds the weights.
"""

import contextlib
from dataclasses import dataclass, replace

from vlmkit.formats import FORMATS, Rounding, format_of_dtype, rounding, torch_dtype
from vlmkit.rows import LINEAR
from vlmkit.sensitivity import Swap
from vlmkit.sensitivity.scopes import Chosen

OUTLIER = 6.0  # bitsandbytes' own threshold, and the paper's


@dataclass(frozen=True)
class Int8Inputs(Rounding):
    """The inputs of an LLM.int8 layer."""

    kind: str = "int8"
    share: str = "token"
    activations: bool = True

    def rounded(self, x):
        large = x.detach().abs().flatten(0, -2) >= OUTLIER
        outliers = large.any(0)
        within = super().rounded(x.masked_fill(large.reshape(x.shape), 0))
        return x.where(outliers, within)


@dataclass(frozen=True)
class Cast(Rounding):
    """A float format with fewer bits than the weights have."""

    def rounded(self, x):
        return x.detach().to(torch_dtype(self.kind)).to(x.dtype)


def changes(format, dtype, loadable):
    """The Roundings that put weights of `dtype` into `format`; none where that changes nothing.

    loadable: whether `format` is one of `vlmkit.formats.FORMATS`, and not one for experiments.
    """
    own = format_of_dtype(dtype)
    if format == own:
        return []
    if not loadable:
        return [rounding(format)]
    if format == "int8":
        return [rounding("int8-row"), Int8Inputs()]
    if FORMATS[format].quantized:
        return [rounding(format)]
    return [Cast(format)] if own not in FORMATS or FORMATS[format].bits <= FORMATS[own].bits else []


@contextlib.contextmanager
def applied(model, parts, assignment, loadable=True):
    """Within it, the weights of `parts` are as loading them under `assignment` would leave them,
    {scope: format}. Gives the parameters that are changed."""
    with contextlib.ExitStack() as stack:
        changed = []
        for part in parts:
            # The head is a Linear layer like others once it is named.
            weights = tuple(replace(w, kind=LINEAR) if _linear(w) else w for w in part.weights)
            roundings = changes(assignment[part.scope], weights[0].parameter.dtype, loadable)
            for one in roundings:
                stack.enter_context(Swap(model, Chosen(part.scope, weights), one))
            if roundings:
                changed += [weight.parameter for weight in weights]
        yield changed


def _linear(weight):
    from torch import nn

    return isinstance(weight.module, nn.Linear)
