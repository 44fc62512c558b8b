"""Boundaries: where activations pass between components of different float formats.

A tower in fp32 hands fp32 features to a projector in bf16, and PyTorch multiplies no fp32 by bf16.
transformers casts at some of these places and not at others. A module whose dtype is not its
surroundings' therefore gets two forward hooks: what comes in is cast to the module's dtype, what
goes out to that of its surroundings. A plan with one float format (the recommended one, say) has
no such place, and its model has no hooks.
"""

from functools import partial

from vlmkit.formats import FORMATS, torch_dtype


def join_dtypes(model, layout):
    """Register the casting hooks on `model`, loaded under `layout`. Returns the names of the
    modules that got them."""
    weight_of = {}  # module name -> {float format: parameters below it}
    for row in layout.rows:
        # What counts is the arithmetic's format, hence `asked`: what a model's own class keeps in
        # fp32 it also casts for by itself.
        name = FORMATS[row.asked].companion
        for module in _above(row.module):
            below = weight_of.setdefault(module, {})
            below[name] = below.get(name, 0) + _size(row.shape)
    words = _name_of(model, model.get_input_embeddings())
    outer = FORMATS[layout.plan["language_model"]].companion
    joined = []

    def visit(name, module, around):
        # The stream of hidden states is the language model's; any other module that holds several
        # formats (Qwen's vision module, its merger inside) works in the one most of it has.
        below = weight_of.get(name, {})
        inside = around if name in _above(words) or not below else max(below, key=below.get)
        if inside != around:
            _cast_at(module, torch_dtype(inside), torch_dtype(around))
            joined.append(name)
        if len(below) > 1:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}".lstrip("."), child, inside)

    visit("", model, outer)
    return joined


def _above(name):
    """`name` and the names of all modules around it, the model itself ("") among them."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _size(shape):
    from math import prod

    return prod(shape)


def _name_of(model, wanted):
    return next(name for name, module in model.named_modules() if module is wanted)


def _cast_at(module, inside, around):
    module.register_forward_pre_hook(partial(_cast_in, dtype=inside), with_kwargs=True)
    module.register_forward_hook(partial(_cast_out, dtype=around))


def _cast_in(module, args, kwargs, dtype):
    return _cast(args, dtype), _cast(kwargs, dtype)


def _cast_out(module, args, output, dtype):
    return _cast(output, dtype)


def _cast(x, dtype):
    """`x` with every float tensor in it cast to `dtype`: tensors, tuples, lists, dicts and
    transformers' ModelOutput, nested. Anything else (masks, ids, caches) passes through."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, dict):
        items = {key: _cast(value, dtype) for key, value in x.items()}
        return items if type(x) is dict else type(x)(**items)
    if isinstance(x, (tuple, list)):
        items = [_cast(value, dtype) for value in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x
