"""Boundaries: where activations pass between components of different float formats.

A tower in fp32 hands fp32 features to a projector in bf16, and PyTorch multiplies no fp32 by bf16.
transformers casts at some of these places and not at others. A module whose dtype is not its
surroundings' therefore gets two forward hooks: what comes in is cast to the module's dtype, what
goes out to that of its surroundings. A plan with one float format (the recommended one, say) has
no such place, and its model has no hooks.

Some classes cast to the dtype of the whole model, by which transformers means that of its first
parameter, often the vision encoder's. In a model of several formats the part that the whole works
in, the language model, is therefore put first.
"""

from functools import partial

from vlmkit.anatomy import component_finder
from vlmkit.formats import FORMATS, torch_dtype


def join_dtypes(model, layout):
    """Register the casting hooks on `model`, loaded under `layout`. Returns the names of the
    modules that got them."""
    from torch.nn import ModuleDict, ModuleList

    outside = FORMATS[layout.plan["language_model"]].float_format
    if layout.floats == {outside}:  # one float format: nothing to join
        return []
    below, own, torn = _float_formats(layout)
    joined = []
    component_of = component_finder(model)

    def visit(name, module, around, always=False):
        formats = below.get(name)
        if not formats:
            return
        children = {child: f"{name}.{child}".lstrip(".") for child, _ in module.named_children()}
        if isinstance(module, (ModuleList, ModuleDict)):  # is not called itself, its items are
            for child, path in children.items():
                visit(path, module.get_submodule(child), around, always)
            return
        component = component_of(name)
        inside = around
        if len(formats) == 1:
            (inside,) = formats
        elif component:  # several: what runs through it is in its component's
            inside = FORMATS[layout.plan[component]].float_format
        loose = own.get(name, {inside}) != {inside}  # a gate, say, that multiplies what runs here
        if always or loose or inside != around:
            _cast_at(module, torch_dtype(inside), torch_dtype(around))
            joined.append(name)
        if len(formats) == 1:
            return
        # Within a component of several formats a class may hand on what it has not cast, so that
        # even what has the format around it is made sure of.
        always = loose or bool(component) and name in torn
        for child, path in children.items():
            visit(path, module.get_submodule(child), inside, always)
        if not component:
            _put_first(module, [child for child, path in children.items()
                                if next(iter(below.get(path, ())), None) == inside])  # fmt: skip

    # Whatever contains several components works in the language model's format.
    visit("", model, outside)
    return joined


def _float_formats(layout):
    """Of the arithmetic in `layout`'s modules: {name: the float formats in and below it, in order},
    {name: those of its own parameters}, and the names within which one component has several."""
    below, own, of_component = {}, {}, {}
    for row in layout.rows:
        # What counts is the arithmetic's format, hence `asked`: what a model's own class keeps in
        # fp32 it also casts for by itself.
        name = FORMATS[row.asked].float_format
        own.setdefault(row.module, set()).add(name)
        for module in _above(row.module):
            below.setdefault(module, {})[name] = True
            of_component.setdefault((module, row.component), set()).add(name)
    torn = {module for (module, _), formats in of_component.items() if len(formats) > 1}
    return below, own, torn


def _put_first(module, candidates):
    """Make one of the children of `module`, the first of `candidates`, its first child."""
    children = [child for child, _ in module.named_children()]
    for child in children[: children.index(candidates[0])] if candidates else ():
        submodule = getattr(module, child)
        delattr(module, child)
        setattr(module, child, submodule)  # which puts it last


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
