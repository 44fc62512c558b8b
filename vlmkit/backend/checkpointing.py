"""Gradient checkpointing, under both of its names: transformers calls it activation checkpointing
from 5.23 on, and versions before that know only the older name."""


def enable(model, **kwargs):
    """Make `model` recompute activations in the backward pass. kwargs: for torch's `checkpoint`;
    use_reentrant is False unless given.

    transformers and peft also give the embeddings a hook that makes their output need a gradient.
    Only use_reentrant=True needs it; otherwise it keeps activations, those of a frozen vision
    encoder too, for a backward pass that nobody needs. So it goes, as it does in a training.
    """
    kwargs = {"use_reentrant": False} | kwargs
    model.disable_input_require_grads()  # transformers forgets the hooks of an earlier call
    if _is_newer():
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if not kwargs["use_reentrant"]:
        model.disable_input_require_grads()


def arguments(wanted):
    """The keyword arguments of `TrainingArguments` that turn it on or off."""
    name = "activation_checkpointing" if _is_newer() else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}


def _is_newer():
    from transformers import PreTrainedModel

    return hasattr(PreTrainedModel, "activation_checkpointing_enable")
