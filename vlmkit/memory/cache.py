"""Cache: the keys and values that a decoder keeps of every token it has seen.

A layer keeps, for each token of each sample, `heads x width` keys and as many values. Which layers
do so, with how many heads and how wide, is read from the cache that a dry run leaves, so that no
name in a config has to be known. The length of the tensors follows from the kind of layer:

- full attention: every token so far;
- a sliding window of w: the whole prompt, because transformers keeps a view of the last w - 1
  tokens of one long tensor; from the next token on, at most w;
- cross-attention (Llama 3.2 Vision): the states of the pictures, whatever the text.
"""

import torch

from vlmkit.anatomy import component_finder
from vlmkit.architectures import CROSS, LANGUAGE
from vlmkit.memory.ledger import CACHE
from vlmkit.memory.tracker import storage_of
from vlmkit.rows import Row


def predicted_cache(cache, places, new_tokens):
    """Entries of `cache`, left by a dry run of the prompt, after `new_tokens` more tokens.

    places: see `places_of`.
    """
    for layer_idx, component, layer in _layers(cache, places):
        grows = component != CROSS
        for key, tensor in _tensors(layer):
            size = _grown(layer, key, tensor, grows, new_tokens)
            yield Row(_name(key, layer_idx), component, CACHE, size)


def _grown(layer, key, tensor, grows, new_tokens):
    """Bytes of one of a layer's tensors after `new_tokens` more."""
    if key not in ("keys", "values") or not grows:
        return storage_of(tensor).nbytes()
    length = layer.get_seq_length() + new_tokens
    if layer.is_sliding and new_tokens:
        length = min(length, layer.sliding_window)
    batch, heads, _, width = tensor.shape
    return batch * heads * length * width * tensor.element_size()


def stretch(cache, places, length, tracker):
    """Fill `cache`, left by a dry run, as it is when `length` tokens have gone through."""
    for place, component, shown in list(_layers(cache, places)):
        layer = cache.layers[place]
        if getattr(shown, "keys", None) is None:
            continue
        most = length if component != CROSS else shown.get_seq_length()
        if shown.is_sliding:
            layer.cumulative_length, most = length, min(length, shown.sliding_window - 1)
        shapes = [(*t.shape[:2], most, t.shape[3]) for t in (shown.keys, shown.values)]
        dtype = shown.keys.dtype
        tracker.component = component
        with tracker:
            layer.keys, layer.values = (torch.empty(shape, dtype=dtype) for shape in shapes)
        tracker.component = None
        layer.dtype, layer.device, layer.is_initialized = dtype, torch.device("cpu"), True


def measured_cache(cache, model, storages):
    """Entries of what `cache` really holds: distinct storages at their full size."""
    for layer_idx, component, layer in _layers(cache, places_of(model)):
        for key, tensor in _tensors(layer):
            entry = Row(_name(key, layer_idx), component, CACHE, storages.nbytes(tensor))
            if entry.bytes:
                yield entry


def places_of(model, stand_ins=None):
    """{place in the cache: (component, place of the layer to read there)} of the layers of `model`.

    stand_ins: {name of a layer that a dry run skipped: name of a layer like it}.
    """
    component_of = component_finder(model)
    where = {n: m.layer_idx for n, m in model.named_modules() if hasattr(m, "layer_idx")}
    places = {}
    for name, place in where.items():
        read = place
        for skipped, like_it in (stand_ins or {}).items():
            if name.startswith(f"{skipped}."):
                read = where[like_it + name[len(skipped) :]]
        component = component_of(name)
        if component in (LANGUAGE, CROSS):  # encoders number their layers too, but cache nothing
            places[place] = component, read  # the attention, which is named after its layer
    return places


def _layers(cache, places):
    """(place, component, cache layer) of a transformers cache."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise TypeError(f"{type(cache).__name__} is not a cache of transformers with layers")
    for place in range(max(len(layers), len(places))):
        component, read = places.get(place, (LANGUAGE, place))
        if read < len(layers):
            yield place, component, layers[read]


def _tensors(layer):
    """(attribute, tensor) of all that a cache layer holds."""
    for key, value in vars(layer).items():
        values = value.values() if isinstance(value, dict) else value
        for item in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(item, torch.Tensor) and item.numel():
                yield key, item


def _name(key, place):
    return f"{key.strip('_').replace('_', ' ')} of layer {place}"
