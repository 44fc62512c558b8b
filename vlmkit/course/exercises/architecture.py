"""Exercises on what a model is made of: components, attention, connectors, gates."""

import copy

from vlmkit.course.exercises.answers import Hint, called, exercise, kind, require, whole

# --- parameters, and what the picture gives -------------------------------------------------------


@exercise("left over")
def left_over(answer, model):
    """Parameters of the language model outside the layers with cross-attention; model: a Llama 3.2
    Vision, on the meta device. Within half a million."""
    from vlmkit.anatomy import anatomy_of

    anatomy = anatomy_of(model)
    crossed = model.config.text_config.cross_attention_layers
    counts = {path: p.numel() for path, p in model.named_parameters()}

    def outside(end, component="language_model"):
        return sum(
            count
            for path, count in counts.items()
            if (component is None or anatomy.component_of(path) == component)
            and not any(f"language_model.layers.{layer}{end}" in path for layer in crossed)
        )

    found, right = whole(answer, "a number of parameters"), outside(".")
    parts = anatomy.by_component
    all_of_it, cross = parts["language_model"], parts["cross_attention"]
    require(found != right // 10**6, "this is in millions; give the number itself.")
    mistakes = {
        all_of_it: "nothing is left out. The MLPs and norms of these layers count with the "
        "language model, and were added with the cross-attention.",
        all_of_it + cross: "nothing is left out, and the cross-attention is counted as well.",
        all_of_it - cross: "the cross-attention is no part of the language model here. What is to "
        "go are the MLPs and norms of these layers.",
        all_of_it - right: "this is what these layers hold. What is left without them?",
        outside(
            ""
        ): f"layers.{crossed[0]} is also the beginning of layers.{crossed[0]}0 and others: "
        "compare with the dot behind the number.",
        outside(".", None): "this has the vision encoder and the projector in it.",
    }
    if abs(found - right) > 5e5:
        for wrong, hint in mistakes.items():
            require(abs(found - wrong) > 5e5, hint)
        raise Hint(f"{found / 1e6:,.0f} million are not what is left.")
    return "a Llama-3.1-8B and eight more rows of embedding: sight was added to a text model."


@exercise("how little is enough")
def how_little(answer, about, attention):
    """The smallest number of the most attended patches with which the answer is the same; about:
    (model, processor, image, question), attention: of each patch."""
    from vlmkit.attention import answer_without

    count, order = whole(answer, "a number of patches", least=0), attention.argsort(axis=None)
    patches = len(order)
    require(count <= patches, f"the picture has {patches} patches.")
    require(count < patches, "that is the whole picture.")

    def seeing(number):
        return answer_without(*about, order[: patches - number])

    full, now = seeing(patches), seeing(count)
    require(now == full, f"with {count} patches it says {now}, with all of them {full}.")
    fewer = [number for number in range(count) if seeing(number) == full]
    require(not fewer, f"with {count} patches it says {full}, and with fewer of them as well.")
    return f"{count} of {patches}. That these are enough does not say that each of them is needed."


# --- connectors -----------------------------------------------------------------------------------


@exercise("mean of a block")
def mean_of_a_block(answer, features, blocks, width):
    """A connector that takes the mean of a block's patches and lets one Linear layer of `width`
    outputs follow; blocks(features) has the four patches of each block side by side."""
    import torch

    patch = features.shape[-1]
    together = blocks(features)
    means = together.unflatten(2, (-1, patch)).mean(dim=2)
    with torch.no_grad():
        found = called(answer, features)
    require(
        isinstance(found, torch.Tensor), f"it should return a tensor, and returns {kind(found)}."
    )
    shape, wanted = tuple(found.shape), (*means.shape[:2], width)
    if shape == (1, 9, width):
        raise Hint("9 tokens: the last column and row are lost. `blocks` pads them with zeros.")
    if shape == (*means.shape[:2], patch):
        raise Hint(f"the tokens are {patch} wide; a Linear layer should make them {width}.")
    require(shape == wanted, f"it returns the shape {shape}; {wanted} is asked for.")
    require(isinstance(answer, torch.nn.Module), "a Linear layer has to learn: give an nn.Module.")
    weights = {tuple(p.shape): p for p in answer.parameters()}
    count = sum(p.numel() for p in answer.parameters())
    require(
        (width, together.shape[-1]) not in weights,
        f"{count:,} parameters: a pixel shuffle, which gives each patch weights of its own.",
    )
    require(
        set(weights) == {(width, patch), (width,)},
        f"{count:,} parameters; one Linear layer from {patch} to {width} has "
        f"{patch * width + width:,}.",
    )
    weight, bias = weights[width, patch], weights[width,]
    with torch.no_grad():
        right = torch.allclose(found, means @ weight.T + bias, atol=1e-4)
        other = together.unflatten(2, (patch, -1)).mean(dim=-1) @ weight.T + bias
        mixed = torch.allclose(found, other, atol=1e-4)
    require(
        not mixed, "this is the mean of neighboring channels of one patch, not of four patches."
    )
    require(right, "the shape is right, but a token is not the mean of its four patches.")
    return "a mean forgets which patch was where, with a quarter of a pixel shuffle's weights."


@exercise("first to learn")
def first_to_learn(answer, layer, words, seen):
    """Names of the parameters of a fresh gated layer that get a gradient in the first step."""
    import torch

    require(
        isinstance(answer, set | frozenset | list | tuple),
        f"what is asked for is a set of names; this is {kind(answer)}.",
    )
    fresh = copy.deepcopy(layer)
    with torch.enable_grad():
        for name, parameter in fresh.named_parameters():
            parameter.requires_grad_(True).grad = None
            if "gate" in name and parameter.numel() == 1:
                parameter.data.zero_()  # fresh: the gates are closed
        fresh(words, seen, None, None, None).square().sum().backward()
    right = {name for name, p in fresh.named_parameters() if p.grad is not None and p.grad.any()}
    names = dict(fresh.named_parameters())
    strange = [str(name) for name in answer if name not in names]
    require(
        not strange,
        f"no parameter is called {', '.join(strange)}; give names as named_parameters() does.",
    )
    behind = sorted(set(answer) - right)
    require(
        not behind,
        f"{behind[0] if behind else ''} stands behind a gate, and its gradient is multiplied by "
        "tanh(0).",
    )
    missing = sorted(right - set(answer))
    require(not missing, f"{len(missing)} of {len(right)} are missing: where else is a gate?")
    return "the gates learn first, and let the rest learn as they open."
