"""peft's DoRA on int8 layers of a CPU, and on a model without data.

Since peft 0.21, until it keeps the scales of int8 layers and knows weights without data. DoRA needs
the weight of a layer itself, in every pass.
"""

import contextlib
from unittest import mock

from vlmkit.backend.quiet import import_bitsandbytes


def keep_scales(model):
    """Let `model` have DoRA on int8 layers of a CPU.

    peft there puts a new weight into the layer each time that it dequantizes one, without the
    scales, which bitsandbytes has moved to the layer's state after the first pass. The layer would
    then take the state's scales from the weight, and fail.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):  # not peft's
            module.register_forward_pre_hook(_with_scales)


def _with_scales(layer, args):
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


@contextlib.contextmanager
def without_data():
    """In this context, DoRA also works on the layers that `vlmkit.memory` makes without data: peft
    recognizes a quantized weight by its class, which they do not have. Layers with data are treated
    as before."""
    import_bitsandbytes()  # without its notes; peft imports it
    from peft.tuners.lora import dora

    copied, dequantized = dora.deepcopy, dora.dequantize_module_weight

    def copy(layer):
        return layer if layer.weight.is_meta else copied(layer)

    def dequantize(layer):
        weight = layer.weight
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            return dequantized(layer)
        from bitsandbytes import functional

        if hasattr(weight, "quant_state"):
            return functional.dequantize_4bit(weight, weight.quant_state)
        if hasattr(weight, "SCB"):
            scales = layer.state.SCB if weight.SCB is None else weight.SCB
            return functional.int8_vectorwise_dequant(weight, scales)
        return dequantized(layer)

    with mock.patch.multiple(dora, deepcopy=copy, dequantize_module_weight=dequantize):
        yield
