"""Exercises on what a model is made of: components, attention, connectors, gates."""

import copy

from vlmkit.course.exercises.answers import (
    Hint,
    exercise,
    function,
    kind,
    known,
    number,
    of_type,
    reject,
    require,
    whole,
)


@exercise("left over", number, "a number of parameters")
def left_over(found, model):
    """Parameters of the language model outside the layers with cross-attention, within half a
    million; model: a Llama 3.2 Vision, on the meta device."""
    from vlmkit.anatomy import anatomy_of

    anatomy = anatomy_of(model)
    crossed = model.config.text_config.cross_attention_layers

    def outside(end, components=("language_model",)):
        return sum(
            parameter.numel()
            for path, parameter in model.named_parameters()
            if anatomy.component_of(path) in components
            and not any(f"language_model.layers.{layer}{end}" in path for layer in crossed)
        )

    right, everything = outside("."), anatomy["language_model"].parameters
    cross = anatomy["cross_attention"].parameters
    for unit, name in ((1e6, "millions"), (1e9, "billions")):
        near = abs(found - right / unit) < 0.005 * right / unit
        require(not near, f"this is in {name}; give the number itself.")
    mistakes = {
        everything: "nothing is left out. These layers also have MLPs and norms, which belong to "
        "the language model and were added together with the cross-attention.",
        everything + cross: "nothing is left out, and the cross-attention is counted as well.",
        everything - cross: "cross-attention is not part of the language model here. Leave out the "
        "MLPs and norms of these layers.",
        everything - right: "this is what these layers hold. How much is left without them?",
        right - model.lm_head.weight.numel(): "the output head, lm_head, is missing. It "
        "belongs to the language model.",
        outside(""): f"layers.{crossed[0]} is also the beginning of layers.{crossed[0]}0 and "
        "others: compare with the dot behind the number.",
        outside(".", anatomy.parts): "this has the vision encoder and the projector in it.",
    }

    def close(one, other):
        return abs(one - other) <= 5e5

    if not close(found, right):
        reject(found, mistakes, close)
        raise Hint(f"{found / 1e6:,.0f} million is not what is left.")
    return "a Llama-3.1-8B and eight more rows of embedding: vision was added to a text model."


@exercise("how little is enough", whole, "a number of patches", least=0)
def how_little(count, about, attention):
    """The smallest number of the most attended patches with which the answer is the same; about:
    (model, processor, image, question), attention: of each patch."""
    from vlmkit.attention import answer_without

    order = attention.argsort(axis=None)
    patches = len(order)
    require(count <= patches, f"the picture has {patches} patches.")
    require(count < patches, "that is the whole picture.")

    def seeing(number):
        return answer_without(*about, order[: patches - number])

    full, now = seeing(patches), seeing(count)
    require(now == full, f"with {count} patches it says {now}, with all of them {full}.")
    fewer = any(seeing(number) == full for number in range(count))
    require(not fewer, f"with {count} patches it says {full}, and with fewer of them as well.")
    return f"{count} of {patches}. They are enough; this does not show that each one is needed."


@exercise("mean of a block", function)
def mean_of_a_block(connector, features, blocks, width):
    """A connector that takes the mean of the patches of a block and applies one Linear layer with
    `width` outputs; blocks(features) has the four patches of each block side by side."""
    import torch

    patch, together = features.shape[-1], blocks(features)
    means = together.unflatten(2, (-1, patch)).mean(dim=2)
    with torch.no_grad():
        found = connector(features)
    require(isinstance(found, torch.Tensor), f"it should return a tensor, not {kind(found)}.")
    shape, wanted = tuple(found.shape), (*means.shape[:2], width)
    mistakes = {
        (1, 9, width): "9 tokens: the last column and row are lost. `blocks` pads them with zeros.",
        tuple(means.shape): f"the tokens are {patch} wide; one Linear layer makes them {width}.",
    }
    reject(shape, mistakes)
    require(shape == wanted, f"it returns the shape {shape}; it should be {wanted}.")
    module = connector.__wrapped__
    require(isinstance(module, torch.nn.Module), "a Linear layer has to learn: give an nn.Module.")
    weights = {tuple(p.shape): p for p in module.parameters()}
    count = sum(p.numel() for p in module.parameters())
    shuffled = (width, together.shape[-1]) in weights
    require(not shuffled, f"{count:,} parameters: a pixel shuffle, with weights for each patch.")
    needed = patch * width + width
    require(
        set(weights) == {(width, patch), (width,)},
        f"{count:,} parameters; one Linear layer from {patch} to {width} has {needed:,}.",
    )

    def is_mean(tokens):
        right = torch.nn.functional.linear(tokens, weights[width, patch], weights[width,])
        return torch.allclose(found, right, atol=1e-4)

    mixed = is_mean(together.unflatten(2, (patch, -1)).mean(dim=-1))
    require(not mixed, "this is the mean of neighboring channels of one patch, not of 4 patches.")
    require(is_mean(means), "the shape is right, but a token is not the mean of its four patches.")
    return "a mean forgets which patch was where; it has a quarter of a pixel shuffle's weights."


@exercise("first to learn", of_type, (set, frozenset, list, tuple), "a set of names")
def first_to_learn(names, layer, words, seen):
    """Names of the parameters of a new gated layer that get a gradient in the first step."""
    import torch

    new = copy.deepcopy(layer)
    with torch.enable_grad():
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(True).grad = None
            if "gate" in name and parameter.numel() == 1:
                parameter.data.zero_()  # in a new layer, the gates are closed
        new(words, seen, None, None, None).square().sum().backward()
    parameters = dict(new.named_parameters())
    known(names, parameters, "parameter")
    right = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    for name in sorted(set(names) - right):
        raise Hint(f"{name} is behind a gate, and its gradient is multiplied by tanh(0).")
    missing = right - set(names)
    require(not missing, f"{len(missing)} of {len(right)} are missing: where else is a gate?")
    return "the gates learn first. As they open, the rest can learn."
