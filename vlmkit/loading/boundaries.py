"""Boundaries: where activations pass between components of different float formats.

A tower in fp32 hands fp32 features to a projector in bf16, and PyTorch multiplies no fp32 by bf16.
transformers casts at some of these places and not at others. A module whose dtype is not its
surroundings' therefore gets two forward hooks: what comes in is cast to the module's dtype, what
goes out to that of its surroundings. A plan with one float format (the recommended one, say) has
no such place, and its model has no hooks.
"""

from functools import partial

from vlmkit.anatomy import component_finder
from vlmkit.formats import FORMATS, torch_dtype


def join_dtypes(model, layout):
    """Register the casting hooks on `model`, loaded under `layout`. Returns the names of the
    modules that got them."""
    below = {}  # module name -> the float formats of the parameters in and below it
    for row in layout.rows:
        # What counts is the arithmetic's format, hence `asked`: what a model's own class keeps in
        # fp32 it also casts for by itself.
        for name in _above(row.module):
            below.setdefault(name, set()).add(FORMATS[row.asked].companion)
    joined = []
    component_of = component_finder(model)

    def visit(name, module, around):
        formats = below.get(name, set())
        inside = around
        if len(formats) == 1:
            (inside,) = formats
        elif formats and component_of(name):  # several: what runs through it is in its component's
            inside = FORMATS[layout.plan[component_of(name)]].companion
        if inside != around:
            _cast_at(module, torch_dtype(inside), torch_dtype(around))
            joined.append(name)
        if len(formats) > 1:
            for child, submodule in module.named_children():
                visit(f"{name}.{child}".lstrip("."), submodule, inside)

    # Whatever contains several components works in the language model's format.
    visit("", model, FORMATS[layout.plan["language_model"]].companion)
    return joined


def _above(name):
    """`name` and the names of all modules around it, the model itself ("") among them."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


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
