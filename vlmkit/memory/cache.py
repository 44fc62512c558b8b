"""Cache: what a decoder keeps of the tokens that it has seen.

A layer of attention keeps, for each token of each sample, `heads x width` keys and as many values.
Which layers do so, with how many heads and how wide, is read from the cache that a dry run leaves,
so that no name in a config has to be known. How much a layer keeps follows from its kind:

- full attention: every token so far, also in the keys of an indexer (GLM-5, MiniMax-M3);
- a sliding window or chunks of w: the whole prompt, because transformers keeps a view of the last
  w - 1 tokens of one long tensor; from the next token on, at most w;
- linear attention and convolution (Qwen3.5, LFM2): states of one size, whatever the text;
- cross-attention: the states of the pictures (Llama 3.2 Vision) or of the encoder (Florence-2),
  whatever the decoder writes;
- a layer that uses the keys of another (Gemma 4): nothing.
"""

import torch

from vlmkit.anatomy import component_finder, unwrapped
from vlmkit.architectures import CROSS, LANGUAGE
from vlmkit.families import writes_apart
from vlmkit.memory.ledger import CACHE
from vlmkit.memory.tracker import storage_of
from vlmkit.rows import Row

GROWING = {
    "keys": -2, "values": -2, "idx_keys": -2, "indexer_keys": -2, "indexer_position_ids": -1
}  # fmt: skip
"""Attributes of a cache layer that have a place for each token: the axis of these places."""


def predicted_cache(cache, places):
    """Entries of `cache`, left by a dry run. places: see `places_of`."""
    for name, component, _, _, shown in _layers(cache, places):
        for key, tensor in _tensors(shown):
            yield Row(_name(key, name), component, CACHE, storage_of(tensor).nbytes())


def stretch(cache, places, more, tracker):
    """Fill `cache`, left by a dry run, as it is when `more` tokens have gone through."""
    seen = [(*layer[1:4], dict(vars(layer[4]))) for layer in _layers(cache, places)]
    for component, grows, layer, state in seen:
        tracker.component = component
        with tracker:
            for key, value in state.items():
                state[key] = _stretched(key, value, state, more if grows else 0)
        tracker.component = None
        if grows and isinstance(state.get("cumulative_length"), int):
            state["cumulative_length"] += more
        vars(layer).update(state)
    for place in getattr(cache, "is_updated", ()):
        cache.is_updated[place] = True  # no layer reads the encoder's states again


def _stretched(key, value, state, more):
    """A new tensor for a cache layer's attribute `key`, with `more` places where it has some."""
    if isinstance(value, dict):
        return {place: _stretched(None, item, state, more) for place, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.dim() < 2 and f"prefill_{key}" not in state:
        return value
    shape = list(value.shape)
    if key in GROWING and not more and value.dim() > 1:  # also what the view of a window leaves out
        axis, seen = GROWING[key], shape[GROWING[key]]
        if seen:
            shape[axis] = storage_of(value).nbytes() * seen // (value.numel() * value.itemsize)
        return torch.zeros(shape, dtype=value.dtype).narrow(axis, shape[axis] - seen, seen)
    if key in GROWING:
        if value.dim() < 2:  # Unlimited-OCR keeps the prompt apart, and no other token yet
            shape = list(state[f"prefill_{key}"].shape)
            shape[GROWING[key]] = 0
        shape[GROWING[key]] += more
        if state.get("sliding_window"):
            shape[GROWING[key]] = min(shape[GROWING[key]], state["sliding_window"] - 1)
    return torch.zeros(shape, dtype=value.dtype)


def measured_cache(cache, model, storages):
    """Entries of what `cache` really holds: distinct storages at their full size."""
    for name, component, _, _, layer in _layers(cache, places_of(model)):
        for key, tensor in _tensors(layer):
            entry = Row(_name(key, name), component, CACHE, storages.nbytes(tensor))
            if entry.bytes:
                yield entry


def places_of(model, stand_ins=None, label_of=None):
    """{place in the cache: (component, place of the layer to read there)} of the layers of `model`.

    stand_ins: {name of a layer that a dry run skipped: name of a layer like it}.
    label_of: what to say of a full name in place of its component, such as (component, card).
    """
    component_of = component_finder(model)
    label_of = label_of or component_of
    base = unwrapped(model)
    encoder = set(base.get_encoder().modules()) if writes_apart(base.config) else ()
    where = {
        name: module.layer_idx
        for name, module in model.named_modules()
        if getattr(module, "layer_idx", None) is not None and module not in encoder
    }
    places = {}
    for name, place in where.items():
        read = place
        for skipped, like_it in (stand_ins or {}).items():
            if name.startswith(f"{skipped}."):
                read = where[like_it + name[len(skipped) :]]
        # Encoders number their layers too, but cache nothing.
        if component_of(name) in (LANGUAGE, CROSS):
            places[place] = label_of(name), read  # the attention, which is named after its layer
    return places


def _layers(cache, places):
    """(name, component, whether it grows, cache layer, the cache layer that shows what it holds) of
    a transformers cache."""
    parts = [("layer", cache, True)]
    if hasattr(cache, "cross_attention_cache"):
        parts = [
            ("layer", cache.self_attention_cache, True),
            ("cross-attention of layer", cache.cross_attention_cache, False),
        ]
    for word, part, grows in parts:
        layers = getattr(part, "layers", None)
        if layers is None:
            raise TypeError(f"{type(part).__name__} is not a cache of transformers with layers")
        for place, layer in enumerate(layers):
            component, read = places.get(place, (LANGUAGE, place))
            grow = grows and CROSS not in (component, component[0])  # with its card, if it has one
            yield f"{word} {place}", component, grow, layer, layers[read]


def _tensors(layer):
    """(attribute, tensor) of all that a cache layer holds."""
    for key, value in vars(layer).items():
        values = list(value.values()) if isinstance(value, dict) else value
        for item in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(item, torch.Tensor) and item.numel():
                yield key, item


def _name(key, layer):
    return f"{key.strip('_').replace('_', ' ')} of {layer}"
