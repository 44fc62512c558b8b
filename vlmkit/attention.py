"""Attention: which patches of a picture the model attended to when it chose its answer.

    found = vk.attention.over_patches(model, processor, image, "What color is the circle?")
    vk.figures.attention(image, found.mean())
    vk.attention.answer_without(model, processor, image, "What color is the circle?", [12, 13])

The weights say from where a layer fetched what it added. They are not an explanation of the answer
(Jain and Wallace, 2019, arXiv 1902.10186): whether patches mattered is seen when they are hidden.
"""

import contextlib
from dataclasses import dataclass
from math import isqrt

from vlmkit.anatomy import unwrapped
from vlmkit.errors import AnatomyError
from vlmkit.evaluation.asking import (
    check_processor,
    check_question,
    generated,
    image_places,
    prepared,
)
from vlmkit.images import read_all
from vlmkit.tracing import FIXED_GRID, trace_inputs


@dataclass(frozen=True)
class Attention:
    """How much attention each token of an answer paid to each patch of each image.

    answer: the answer, as `vk.ask` gives it. tokens: its tokens as text, with the mark that ends
    it. weights: a numpy float32 array (tokens, layers, heads, rows, columns) for each image, the
    attention weights of the position where that token was chosen, which is the position of the
    token before it. Over all patches of all images they sum to less than 1: the rest went to words.
    """

    answer: str
    tokens: tuple
    weights: tuple

    def mean(self, image=0, token=0):
        """Array (rows, columns): the average over all heads of all layers."""
        return self.weights[image][token].mean(axis=(0, 1))


def over_patches(model, processor, images, question, *, max_new_tokens=64):
    """Attention of the answer to a question about an image, or a list of them, given as to
    `vk.ask`, and as greedy as there.

    For models that make a fixed square grid of tokens of an image (LLaVA-1.5, PaliGemma). The grid
    is that of the image as its processor gives it to the model: what a processor crops is not in
    it. The attention is computed in the plain way ("eager") and the model left as it was.

    Raises what `vk.ask` raises, and AnatomyError where no image was given, where the model's visual
    tokens are no such grid, and where it does not give its attention weights.
    """
    import torch

    images = read_all(images)
    inputs = _inputs(model, processor, images, question, max_new_tokens)
    patches = _patches(model, inputs, len(images))
    with _eager(model):
        output = generated(
            model,
            processor,
            inputs,
            max_new_tokens,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    length = inputs["input_ids"].shape[1]
    steps = []
    for step, layers in enumerate(output.attentions or ()):
        if not layers or any(a is None or a.shape[-1] != length + step for a in layers):
            break
        # Of each layer (batch, heads, queries, keys) what the last position gave to the patches.
        rows = torch.stack([layer[0, :, -1] for layer in layers]).float().cpu()
        steps.append(rows[..., patches])
    chosen = output.sequences[0, length:]
    if len(steps) < len(chosen):
        raise AnatomyError(
            f"{type(unwrapped(model)).__name__} does not give the attention weights of every layer "
            "over the whole prompt."
        )
    weights = torch.stack(steps).numpy()
    return Attention(
        processor.tokenizer.decode(chosen, skip_special_tokens=True).strip(),
        tuple(processor.tokenizer.decode([token]) for token in chosen),
        tuple(weights[..., image, :, :] for image in range(len(images))),
    )


def answer_without(model, processor, image, question, patches, *, max_new_tokens=64):
    """The answer to a question about one image of which the language model cannot see `patches`.

    patches: their numbers in the grid of `over_patches`, row by row. No token attends to them; the
    others keep their places. The vision encoder has seen the whole picture, so that a patch's
    feature can hold something of what its neighbors showed. Raises what `over_patches` raises, and
    AnatomyError for a patch that the grid does not have.
    """
    import torch

    inputs = _inputs(model, processor, read_all([image]), question, max_new_tokens)
    places = _patches(model, inputs, 1).flatten()
    hidden = torch.as_tensor(list(patches), dtype=torch.long)
    if hidden.numel() and not 0 <= hidden.min() <= hidden.max() < len(places):
        raise AnatomyError(
            f"the patches of this grid have the numbers 0 to {len(places) - 1}, and "
            f"{hidden.tolist()} are not all among them."
        )
    # Positions are counted from the mask, as those of padding, unless they are given.
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.arange(length, device=inputs["input_ids"].device)[None]
    inputs["attention_mask"][0, places[hidden]] = 0
    tokens = generated(model, processor, inputs, max_new_tokens)
    return processor.tokenizer.decode(tokens[0, length:], skip_special_tokens=True).strip()


def _inputs(model, processor, images, question, max_new_tokens):
    check_processor(processor)
    check_question(question)
    return prepared(model, processor, [images], [question], max_new_tokens)


def _patches(model, inputs, images):
    """Where in the prompt each patch of each image is: (images, rows, columns)."""
    trace = trace_inputs(model, inputs)  # raises where there is no image
    name = type(unwrapped(model)).__name__
    if trace.strategy != FIXED_GRID:
        raise AnatomyError(
            f"{name} gives an image to its language model by {trace.strategy}: its visual tokens "
            "are not the patches of one grid, and there is no map to draw."
        )
    (places,) = image_places(model, inputs["input_ids"][0].cpu()).nonzero(as_tuple=True)
    side = isqrt(len(places) // images)
    if not side or len(places) != images * side**2:
        raise AnatomyError(
            f"{name} has {len(places)} visual tokens for {images} image(s), which is no square "
            "grid of patches."
        )
    return places.unflatten(0, (images, side, side))


@contextlib.contextmanager
def _eager(model):
    """Attention of the language model that keeps its weights, which the fused kinds do not."""
    model = unwrapped(model)
    text = model.config.get_text_config()
    key = next((k for k in model.config.sub_configs if getattr(model.config, k) is text), "")
    before = text._attn_implementation
    model.set_attn_implementation({key: "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({key: before})
