"""Shadows: a model as loading and adapting will make it, with no data in it.

Built on the meta device by the same steps as the real one: transformers' modules, bitsandbytes'
layers in the places that the layout names, the casts between components of different float formats,
peft's adapters, checkpointing. Run in a `vlmkit.memory.shapes.Rehearsal`, it does what the real one
does.
"""

from math import ceil

from vlmkit.backend.boundaries import join_dtypes
from vlmkit.backend.cpu import guard_against_cpu_traps
from vlmkit.formats import BLOCK, FORMATS, NESTED_BLOCK, torch_dtype


def shadow(model, layout):
    """`model`, on the meta device, with the layers and dtypes that `layout` gives it. In place."""
    for row in layout.rows:
        if FORMATS[row.format].quantized:
            module = _quantized(model.get_submodule(row.module), row.format)
            model.set_submodule(row.module, module)
        else:
            parameter = model.get_parameter(row.name)
            parameter.data = parameter.data.to(torch_dtype(row.format))
    formats = set(layout.quantized.values())
    model.is_loaded_in_8bit = "int8" in formats  # what peft looks at
    model.is_loaded_in_4bit = bool(formats - {"int8"})
    guard_against_cpu_traps(model)
    join_dtypes(model, layout)
    return model


def _quantized(linear, name):
    """bitsandbytes' layer for `linear` in the format `name`, with its state, on the meta device."""
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    bias = linear.bias is not None
    size = linear.in_features, linear.out_features
    n = linear.weight.numel()
    if name == "int8":
        layer = Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=6.0, device="meta")
        weight = torch.nn.Parameter(empty(*linear.weight.shape, dtype=torch.int8), False)
        weight.CB, weight.SCB = weight.data, empty(linear.out_features)
    else:
        dtype = torch_dtype(name)
        layer = Linear4bit(*size, bias, compute_dtype=dtype, device="meta")
        blocks = ceil(n / BLOCK)
        state = QuantState(
            empty(blocks), linear.weight.shape, empty(16), BLOCK, name.removesuffix("-dq"), dtype
        )
        if name.endswith("-dq"):
            inner = empty(ceil(blocks / NESTED_BLOCK))
            state.absmax, state.offset = empty(blocks, dtype=torch.uint8), empty(())
            state.state2 = QuantState(inner, code=empty(256), blocksize=NESTED_BLOCK)
            state.state2.dtype, state.nested = torch.float32, True
        weight = torch.nn.Parameter(empty(ceil(n / 2), 1, dtype=torch.uint8), False)
        weight.quant_state, weight.bnb_quantized, weight.blocksize = state, True, BLOCK
        weight.compress_statistics, weight.quant_type = state.nested, state.quant_type
    layer.weight = weight
    if bias:
        layer.bias = linear.bias
    layer.train(linear.training)
    return layer


def prepare_kbit(model):
    """What `peft.prepare_model_for_kbit_training` does to dtypes: every parameter that is not
    quantized in float32. Returns {parameter name: bytes that it had before}."""
    import torch

    before = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            before[name] = parameter.numel() * parameter.element_size()
            parameter.data = parameter.data.float()
    return before
