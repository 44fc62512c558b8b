"""Attention: which patches of a picture the model attended to when it chose its answer.

    found = vk.attention.over_patches(model, processor, image, "What color is the circle?")
    vk.figures.attention(image, found.mean())
    vk.attention.answer_without(model, processor, image, "What color is the circle?", [12, 13])

The weights say which positions a layer took values from. They do not explain the answer (Jain and
Wallace, 2019, arXiv 1902.10186). To see whether patches matter, hide them: `answer_without`.
"""

import contextlib
from dataclasses import dataclass
from math import isqrt

from vlmkit.anatomy import unwrapped
from vlmkit.errors import AnatomyError
from vlmkit.evaluation.asking import generated, image_places, inputs_of
from vlmkit.images import read_all
from vlmkit.tracing import FIXED_GRID, trace_inputs


@dataclass(frozen=True)
class Attention:
    """How much attention each token of an answer paid to each patch of each image.

    answer: the answer, as `vk.ask` returns it. tokens: its tokens as text, with the end token.
    weights: for each image a numpy float32 array (tokens, layers, heads, rows, columns). These are
    the attention weights at the position where the token was chosen, which is the position of the
    token before it. Over all patches of all images they sum to less than 1; the rest is on words.
    """

    answer: str
    tokens: tuple
    weights: tuple

    def mean(self, image=0, token=0):
        """The average over all heads of all layers, an array (rows, columns)."""
        return self.weights[image][token].mean(axis=(0, 1))


def over_patches(model, processor, images, question, *, max_new_tokens=64):
    """Attention of the answer to a question about an image or a list of images, given as to
    `vk.ask`. Decoding is greedy, as there.

    The model must make a fixed square grid of tokens from an image (LLaVA-1.5, PaliGemma). The grid
    covers the image that the processor gives to the model, without what the processor cropped. The
    attention is computed with the plain implementation ("eager"); the model does not change.

    Raises the errors of `vk.ask`, and AnatomyError if there is no image, if the visual tokens are
    not such a grid, or if the model does not return its attention weights.
    """
    import torch

    images = read_all(images)
    inputs = inputs_of(model, processor, images, question, max_new_tokens)
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
        # Each layer is (batch, heads, queries, keys); the last query chose the token.
        rows = torch.stack([layer[0, :, -1] for layer in layers]).float().cpu()
        steps.append(rows[..., patches])
    tokens = output.sequences[0, length:]
    if len(steps) < len(tokens):
        raise AnatomyError(
            f"{type(unwrapped(model)).__name__} does not return the attention weights of every "
            "layer over the whole prompt."
        )
    weights = torch.stack(steps).numpy()
    return Attention(
        processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        tuple(processor.tokenizer.decode([token]) for token in tokens),
        tuple(weights[..., image, :, :] for image in range(len(images))),
    )


def answer_without(model, processor, image, question, patches, *, max_new_tokens=64):
    """The answer to a question about one image if the language model cannot attend to `patches`.

    patches: their numbers in the grid of `over_patches`, row by row. The other tokens keep their
    positions. The vision encoder has still seen the whole image, so the feature of a visible patch
    may contain something of a hidden one. Raises the errors of `over_patches`, and AnatomyError for
    a patch that is not in the grid.
    """
    import torch

    inputs = inputs_of(model, processor, [image], question, max_new_tokens)
    places = _patches(model, inputs, 1).flatten()
    hidden = torch.as_tensor(list(patches), dtype=torch.long)
    if hidden.numel() and not 0 <= hidden.min() <= hidden.max() < len(places):
        raise AnatomyError(
            f"The patches of this grid have the numbers 0 to {len(places) - 1}; found "
            f"{hidden.tolist()}."
        )
    # Without positions, the model would count them from the mask and take the patches for padding.
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.arange(length, device=inputs["input_ids"].device)[None]
    inputs["attention_mask"][0, places[hidden]] = 0
    tokens = generated(model, processor, inputs, max_new_tokens)
    return processor.tokenizer.decode(tokens[0, length:], skip_special_tokens=True).strip()


def _patches(model, inputs, images):
    """The position in the prompt of each patch of each image: (images, rows, columns)."""
    trace = trace_inputs(model, inputs)  # raises if there is no image
    name = type(unwrapped(model)).__name__
    if trace.strategy != FIXED_GRID:
        raise AnatomyError(
            f"{name} gives an image to its language model by {trace.strategy}. Its visual tokens "
            "are not the patches of one grid, so there is no map of attention."
        )
    (places,) = image_places(model, inputs["input_ids"][0].cpu()).nonzero(as_tuple=True)
    side = isqrt(len(places) // images)
    if not side or len(places) != images * side**2:
        raise AnatomyError(
            f"{name} has {len(places)} visual tokens for {images} image(s), which is not a square "
            "grid of patches."
        )
    return places.unflatten(0, (images, side, side))


@contextlib.contextmanager
def _eager(model):
    """In this context the language model computes attention with the plain implementation, which
    returns the weights. Fused implementations do not."""
    model = unwrapped(model)
    text = model.config.get_text_config()
    key = next((k for k in model.config.sub_configs if getattr(model.config, k) is text), "")
    before = text._attn_implementation
    model.set_attn_implementation({key: "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({key: before})
