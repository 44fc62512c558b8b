"""Checkpointing, by both of its names: transformers calls it activation checkpointing from 5.23 on.
Before it was gradient checkpointing, and the newer name is not known there."""


def enable(model, **kwargs):
    """Let `model` compute its activations twice rather than keep them. kwargs: for torch's
    `checkpoint`, such as use_reentrant."""
    if _newer():
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)


def arguments(wanted):
    """The same for `TrainingArguments`, as keyword arguments."""
    name = "activation_checkpointing" if _newer() else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}


def _newer():
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel, "activation_checkpointing_enable")
