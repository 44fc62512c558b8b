"""Exercises on what a model is made of: components, attention, connectors, gates."""

import copy

from vlmkit.course.exercises.answers import (
    Hint,
    exercise,
    function,
    known,
    number,
    of_type,
    reject,
    require,
    tensor,
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
def mean_of_a_block(connector):
    """A function of (features, linear), which takes the mean of the four patches of each block of
    2 × 2, with zeros where a patch is missing, and applies the Linear layer to it."""
    import torch
    from torch.nn import functional as F

    for grid, width, wide in ((7, 128, 192), (4, 6, 10)):
        features = torch.randn(2, grid**2, width, generator=torch.manual_seed(grid)) + 1
        linear = torch.nn.Linear(width, wide).requires_grad_(False)
        found = tensor(connector(features.clone(), linear), "the result")
        together = F.unfold(
            F.pad(features.mT.unflatten(2, (grid, grid)), (0, grid % 2, 0, grid % 2)), 2, stride=2
        )
        patches = together.unflatten(1, (width, 4)).permute(0, 3, 2, 1)  # (2, blocks, 4, width)
        there = patches.abs().amax(dim=3, keepdim=True).gt(0).sum(dim=2)
        shape, wanted = tuple(found.shape), (2, patches.shape[1], wide)
        hints = {
            (2, (grid // 2) ** 2, wide): "the last column and row are lost. `blocks` pads them.",
            (2, grid**2, wide): "this is a token for each patch, not for each block.",
            (2, patches.shape[1], width): "apply the Linear layer to the mean.",
        }
        require(
            shape == wanted,
            f"for features of the shape {(*features.shape,)} it returns the shape {shape}; it "
            f"should be {wanted}. {hints.get(shape, '')}".rstrip(),
        )
        channels = patches.flatten(2).unflatten(2, (width, 4))
        total = patches.sum(2)
        mistakes = {
            "this is the mean of neighboring channels of one patch.": channels.mean(3),
            "this is the sum of the four patches, not their mean.": total,
            "this is the first patch of each block.": patches[:, :, 0],
            "at the edge, divide by 4 as well: the zeros are patches.": total / there,
        }

        def gives(tokens, found=found, linear=linear):
            return torch.allclose(found.float(), linear(tokens), atol=1e-4)

        if not gives(total / 4):
            for hint, tokens in mistakes.items():
                require(not gives(tokens), hint)
            raise Hint("the shape is right, but a token is not the mean of its four patches.")
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
