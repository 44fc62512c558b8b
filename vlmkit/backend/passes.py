"""How a model computes its passes: fast while it is trained, and as it was loaded while it answers
questions in between."""

import contextlib

import torch

from vlmkit.anatomy import unwrapped


def attention_of(model):
    """The attention of each part of a model: {part of its config: name}, "" for the whole."""
    config = unwrapped(model).config
    parts = {key: getattr(config, key) for key in config.sub_configs}
    kinds = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation} | kinds


@contextlib.contextmanager
def attending(model, kind):
    """Give the model another attention for a while. kind: a name, or what `attention_of` gave."""
    model = unwrapped(model)
    before = attention_of(model)
    if kind == before or not model._can_set_attn_implementation():
        yield
        return
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def training_attention(model, bf16, device):
    """The attention that trains fastest on this kind of device ("cpu", "cuda"), for `attending`.
    bf16: whether it trains under autocast.

    On a CPU in bf16 the backward pass of fused attention takes up to twelve times as long as that
    of plain attention (torch 2.13, batches of 16 short prompts). In fp32 it does not, and on a GPU
    fused attention is the faster one.
    """
    in_bf16 = bf16 or any(p.dtype == torch.bfloat16 for p in model.parameters())
    return "eager" if device == "cpu" and in_bf16 else attention_of(model)


@contextlib.contextmanager
def without_autocast(model):
    """Let the model compute in the formats of its plan for a while: accelerate wraps the forward
    pass of a model that it trains in autocast, and answers would be computed under it too."""
    forward = model.__dict__.get("forward")
    if "_original_forward" not in model.__dict__:
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = forward


@contextlib.contextmanager
def casting(model, cast):
    """Let the adapters of peft give their input the dtype of their weights (fp32) for a while, or
    not.

    Under autocast it is for nothing: each adapter casts the input to bf16 again, and keeps a copy
    of its own for the backward pass, where several could share the input. Results are the same. On
    a GPU peft leaves it out by itself for weights in 4 bits (0.21). DoRA reads the dtype of the
    input, and is left as it is.
    """
    layers = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    layers = [layer for layer in layers if not getattr(layer, "lora_variant", {})]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = cast
    try:
        yield
    finally:
        for layer, casts in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = casts


@contextlib.contextmanager
def trainable(model):
    """Let transformers' Trainer accept a quantized model without adapters for a while. The Trainer
    refuses every such model; ours can have a projector in a float format that is trained in full,
    which `add_adapters` has checked."""
    if hasattr(model, "peft_config") or not getattr(model, "is_quantized", False):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


def answering(model):
    """Let a model that FSDP has sharded answer: `generate` then gathers its shards as a forward
    pass does."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule) and "generate" not in model.__dict__:
        register_fsdp_forward_method(model, "generate")
