"""Boundaries: casts where activations pass between components of different float formats.

An fp32 vision encoder hands fp32 features to a bf16 projector, and PyTorch does not multiply fp32
by bf16. transformers casts at some of these places and not at others. So a module whose dtype
differs from that of the module around it gets two forward hooks: one casts its inputs to its own
dtype, the other casts its outputs to the dtype around it. Under a plan with one float format, such
as the recommended one, no module gets hooks.

Some classes cast to the dtype of the whole model. transformers takes the first parameter's for it,
often the vision encoder's. In a model of several formats the language model is therefore moved to
the front.

Since transformers 5.21, for as long as it loads a model in one dtype.
"""

from vlmkit.anatomy import component_finder
from vlmkit.formats import FORMATS, torch_dtype


def join_dtypes(model, layout):
    """Register the casting hooks on `model`, which was loaded under `layout`. Returns the names of
    the modules that got them."""
    from torch.nn import ModuleDict, ModuleList

    outside = FORMATS[layout.plan["language_model"]].float_format
    if layout.floats == {outside}:
        return []
    below, own, mixed = _float_formats(layout)
    joined = []
    component_of = component_finder(model)

    def visit(name, module, around, always=False):
        formats = below.get(name)
        if not formats:
            return
        children = {child: f"{name}.{child}".lstrip(".") for child, _ in module.named_children()}
        if isinstance(module, (ModuleList, ModuleDict)):  # only its items are called
            for child, path in children.items():
                visit(path, module.get_submodule(child), around, always)
            return
        component = component_of(name)
        inside = around
        if len(formats) == 1:
            (inside,) = formats
        elif component:  # activations in it are in its component's format
            inside = FORMATS[layout.plan[component]].float_format
        # a gate, for example, which multiplies activations by a parameter of another format
        differs = own.get(name, {inside}) != {inside}
        if always or differs or inside != around:
            _cast_at(module, torch_dtype(inside), torch_dtype(around))
            joined.append(name)
        if len(formats) == 1:
            return
        # Within a component of several formats a class may pass on what it has not cast, so every
        # module in it gets hooks, even those in the format around them.
        always = differs or bool(component) and name in mixed
        for child, path in children.items():
            visit(path, module.get_submodule(child), inside, always)
        if not component:
            _put_first(module, [child for child, path in children.items()
                                if next(iter(below.get(path, ())), None) == inside])  # fmt: skip

    # A module that contains several components works in the language model's format.
    visit("", model, outside)
    return joined


def _float_formats(layout):
    """Three things about the arithmetic in the modules of `layout`: {name of a module: the float
    formats in and below it, in order}, {name: those of its own parameters}, and the names of the
    modules within which one component has several."""
    below, own, of_component = {}, {}, {}
    for row in layout.rows:
        # `asked` and not `format`: where a class keeps a parameter in fp32, it also casts for it.
        name = FORMATS[row.asked].float_format
        own.setdefault(row.module, set()).add(name)
        for module in _above(row.module):
            below.setdefault(module, {})[name] = True
            of_component.setdefault((module, row.component), set()).add(name)
    mixed = {module for (module, _), formats in of_component.items() if len(formats) > 1}
    return below, own, mixed


def _put_first(module, candidates):
    """Make the first of `candidates`, names of children of `module`, its first child."""
    children = [child for child, _ in module.named_children()]
    for child in children[: children.index(candidates[0])] if candidates else ():
        submodule = getattr(module, child)
        delattr(module, child)
        setattr(module, child, submodule)  # which puts it last


def _above(name):
    """`name` and the names of all modules around it, including the model itself ("")."""
    parts = name.split(".") if name else []
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


def _cast_at(module, inside, around):
    module.register_forward_pre_hook(_CastIn(inside), with_kwargs=True)
    module.register_forward_hook(_CastOut(around))


class _Hook:
    """dtype: what it casts to. instead: as `computing_in` says, or None."""

    def __init__(self, dtype):
        self.dtype, self.instead = dtype, None

    def cast(self, x):
        return _cast(x, self.instead or self.dtype)


class _CastIn(_Hook):
    def __call__(self, module, args, kwargs):
        return self.cast(args), self.cast(kwargs)


class _CastOut(_Hook):
    def __call__(self, module, args, output):
        return self.cast(output)


def computing_in(model, dtype):
    """Let all components of `model` compute in one dtype, in which something else gives them their
    weights (FSDP2's mixed precision); or, with None, in the formats of the plan again."""
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, _Hook):
                hook.instead = dtype


def _cast(x, dtype):
    """`x` with every float tensor in it cast to `dtype`. `x` can be a tensor, or nest tensors in
    tuples, lists, dicts and transformers' ModelOutput. Masks, ids and caches pass unchanged."""
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
