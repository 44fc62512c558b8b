"""Weights: a model as loading makes it, on the meta device, and what its tensors take.

transformers' `get_memory_footprint()` leaves out the scales of quantized weights, 5.6% of an nf4
model. A sum over modules counts tied weights twice. Neither is used here.
"""

from math import ceil

from vlmkit.anatomy import component_finder
from vlmkit.backend.boundaries import join_dtypes
from vlmkit.backend.cpu import guard_against_cpu_traps
from vlmkit.backend.llama4 import complete_outputs
from vlmkit.formats import BLOCK, FORMATS, NESTED_BLOCK, torch_dtype
from vlmkit.memory.ledger import BUFFER, STATE
from vlmkit.rows import Row


def predicted_weights(model, layout):
    """Entries of the weights of `model`, on the meta device, under `layout`."""
    component_of = component_finder(model)
    for row in layout.rows:
        weights, state = FORMATS[row.format].parts(row.shape)
        yield Row(row.name, row.component, row.kind, weights)
        for size in state_sizes(row.format, state):
            yield Row(row.name, row.component, STATE, size)
    for name, buffer in model.named_buffers():
        size = buffer.numel() * buffer.element_size()
        yield Row(name, component_of(name), BUFFER, size)


def state_sizes(name, state):
    """Bytes of each tensor of a quantization state of `state` bytes in all, the scales last."""
    if not state or name == "int8":
        return [state] if state else []
    code = 16 * 4
    if not name.endswith("-dq"):
        return [code, state - code]
    nested_code, offset = 256 * 4, 4
    scales = state - code - nested_code - offset
    # A byte for each block, and a float32 for each 256 blocks: n + 4 ceil(n / 256) bytes.
    nested = 4 * -(-scales // (NESTED_BLOCK + 4))
    return [code, nested_code, offset, nested, scales - nested]


def as_loaded(model, layout):
    """`model`, on the meta device, with the layers and dtypes that loading gives it under `layout`:
    bitsandbytes' layers, and the casts between components of different float formats. In place."""
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
    complete_outputs(model)
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
    quantized becomes float32. Returns {parameter name: bytes that it had before}."""
    import torch

    before = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            before[name] = parameter.numel() * parameter.element_size()
            parameter.data = parameter.data.float()
    return before
