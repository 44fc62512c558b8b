"""Gradient checkpointing, under both of its names: transformers calls it activation checkpointing
from 5.23 on, and versions before that know only the older name."""


def enable(model, **kwargs):
    """Make `model` recompute activations in the backward pass. kwargs: for torch's `checkpoint`,
    such as use_reentrant."""
    if _is_newer():
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)


def arguments(wanted):
    """The keyword arguments of `TrainingArguments` that turn it on or off."""
    name = "activation_checkpointing" if _is_newer() else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}


def _is_newer():
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel, "activation_checkpointing_enable")
