"""Gradients: which of what is to be trained gets none, and why.

An adapter without a gradient is trained in name only, and nothing else says so: the loss falls, the
file is saved, and its weights are what they were.
"""

import re

from vlmkit.anatomy import component_finder, plain_name, unwrapped

_LAYER = re.compile(r"\.layers?\.(\d+)\.")


def gradient_report(model):
    """A DataFrame with a row for each trainable tensor whose gradient is missing or all zero:
    component, parameter (full name), gradient ("none" or "zero") and why, as far as that is known.

    To be called after `loss.backward()` and before the gradients are cleared. An A of a LoRA whose
    B is still zero, as every B is before the first step, has a zero gradient by construction and is
    left out: after that step it gets one (arXiv 2106.09685, section 4.1).
    """
    import pandas

    component_of = component_finder(model)
    parameters = dict(model.named_parameters())
    last, rows = _last_layer_read(model), []
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        if parameter.grad is not None and parameter.grad.any():
            continue
        other = parameters.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and parameter.grad is not None and not other.any():
            continue
        component = component_of(name)
        gradient = "none" if parameter.grad is None else "zero"
        rows.append((component, name, gradient, _why(name, component, last)))
    return pandas.DataFrame(rows, columns=["component", "parameter", "gradient", "why"])


def _why(name, component, last):
    """Why the parameter may get no gradient, in words. last: see `_last_layer_read`."""
    layer = _LAYER.search(plain_name(name))
    if component == "vision_encoder":
        if last and layer and int(layer[1]) > last[1]:
            chosen, last = last
            return (
                f"vision_feature_layer is {chosen}: the features are read after layer {last}, and "
                "what comes later feeds nothing"
            )
        if not layer and any(part in name for part in ("post_layernorm", "pool", "head")):
            return "it makes the encoder's summary of a picture, and the projector reads patches"
        return "no picture in this batch, or the model does not read this part of the encoder"
    return "nothing in this batch leads from it to the loss"


def _last_layer_read(model):
    """(what the config chooses, the last layer of the vision encoder that the projector then sees,
    counted from 0); None where it does not choose."""
    config = unwrapped(model).config
    chosen = getattr(config, "vision_feature_layer", None)
    layers = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if chosen is None or layers is None:
        return None
    numbers = [chosen] if isinstance(chosen, int) else list(chosen)
    # hidden_states[0] is the embedding, hidden_states[i] what layer i - 1 gave
    return chosen, max((n if n >= 0 else layers + 1 + n) for n in numbers) - 1
