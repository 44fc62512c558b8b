"""How a model's passes are computed: fast while it is trained, and as it was loaded when it is
asked in between."""

import contextlib

from vlmkit.anatomy import unwrapped


def attention_of(model):
    """Which attention each part of a model uses: {part of its config: kind}, "" for the whole."""
    config = unwrapped(model).config
    parts = {key: getattr(config, key) for key in config.sub_configs}
    kinds = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation} | kinds


@contextlib.contextmanager
def attending(model, kind):
    """Within it, the model's attention is of another kind: a name, or what `attention_of` gave."""
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


@contextlib.contextmanager
def without_autocast(model):
    """Within it, the model's passes run in the formats of its plan: accelerate puts autocast around
    the forward of what it trains, and a model without adapters would answer under it too."""
    forward = model.__dict__.get("forward")
    if "_original_forward" not in model.__dict__:
        yield
        return
    model.forward = model._original_forward
    try:
        yield
    finally:
        model.forward = forward


def answering(model):
    """Let a model that FSDP has parted be asked: `generate` puts its parts together as a forward
    pass does."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "generate")
