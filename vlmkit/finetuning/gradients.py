"""Gradients: which trainable tensors get none, and why; and what is not finite.

An adapter without a gradient never changes, and nothing else shows it: the loss falls, the file is
saved, and the adapter's weights are what they were.
"""

import re

from vlmkit.anatomy import component_finder, is_packed, plain_name, unwrapped
from vlmkit.errors import FinetuningError

_LAYER = re.compile(r"\.layers?\.(\d+)\.")


def gradient_report(model):
    """A DataFrame with a row for each trainable tensor whose gradient is missing or all zero:
    component, parameter (full name), gradient ("none" or "zero"), and why, as far as it is known.

    Call it after `loss.backward()`, before the gradients are cleared. The A of a LoRA has a zero
    gradient while its B is zero, as before the first step, and is left out: after that step it gets
    one (arXiv 2106.09685, section 4.1).
    """
    import pandas

    component_of = component_finder(model)
    parameters = dict(model.named_parameters())
    last, rows = _last_layer_read(model), []
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if not parameter.requires_grad or gradient is not None and gradient.any():
            continue
        other = parameters.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and gradient is not None and not other.any():
            continue
        component = component_of(name)
        kind = "none" if gradient is None else "zero"
        rows.append((component, name, kind, _why(name, component, last)))
    return pandas.DataFrame(rows, columns=["component", "parameter", "gradient", "why"])


def not_finite(model, loss, step):
    """The message for a step whose loss or gradients are not finite: the step, and the weight or
    the gradient that is to blame, as far as it can be told.

    Call it after the backward pass, before gradients are clipped: clipping spreads a NaN to all.
    """
    told = f"Step {step:,} stops the training: its loss is {loss:g}"
    weight, trained = _weight_not_finite(model)
    if weight:
        why = (
            "The step before made it so: try a smaller learning_rate or max_grad_norm, or a longer "
            "warmup."
            if trained
            else "It is frozen, so it came with the checkpoint, or from a format that cannot hold "
            "it: load another one, or plan bf16 or fp32 for its component."
        )
        return f"{told}, and the weight {weight} is not finite. {why}"
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not _is_finite(parameter.grad)
    ]
    if names:
        more = f", and those of {len(names) - 1:,} more tensors" if names[1:] else ""
        told += f", and the gradient of {plain_name(names[0])} is not finite{more}"
    return (
        f"{told}. All weights are finite: try a smaller learning_rate, bf16=False, or a plan with "
        "more bits, and look at the rows of this step."
    )


def require_finite(model):
    """Raise FinetuningError, in every process, if a trained weight is not finite: nothing of that
    kind is saved."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_finite(parameter):
            raise FinetuningError(
                f"The weight {plain_name(name)} is not finite after the last step, so it is not "
                "saved: try a smaller learning_rate or max_grad_norm, or a longer warmup."
            )


def _weight_not_finite(model):
    """(the first weight with a number that is not finite, whether it is trained); None, False if
    there is none."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        weight = None if is_packed(parameter) else parameter
        for tensor in (weight, getattr(state, "absmax", None)):
            if tensor is not None and tensor.is_floating_point() and not _is_finite(tensor):
                return plain_name(name), parameter.requires_grad
    return None, False


def _is_finite(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP's shards
    return tensor.isfinite().all().item()


def _why(name, component, last):
    """Why a parameter can lack a gradient, in words. last: see `_last_layer_read`."""
    layer = _LAYER.search(plain_name(name))
    if component != "vision_encoder":
        return "nothing in this batch leads from it to the loss"
    if last and layer and int(layer[1]) > last[1]:
        return (
            f"vision_feature_layer is {last[0]}: the features are read after layer {last[1]}, and "
            "what comes later feeds nothing"
        )
    if not layer and any(part in name for part in ("post_layernorm", "pool", "head")):
        return "it makes the encoder's summary of a picture, and the projector reads patches"
    return "no picture in this batch, or the model does not read this part of the encoder"


def _last_layer_read(model):
    """(the config's vision_feature_layer, the last layer of the vision encoder that the projector
    reads, counted from 0); None where the config has no such setting."""
    config = unwrapped(model).config
    wanted = getattr(config, "vision_feature_layer", None)
    layers = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if wanted is None or layers is None:
        return None
    numbers = [wanted] if isinstance(wanted, int) else list(wanted)
    # hidden_states[0] is the embedding, hidden_states[i] is the output of layer i - 1
    return wanted, max((n if n >= 0 else layers + 1 + n) for n in numbers) - 1
