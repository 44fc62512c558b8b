"""The parts of a model that can be given a format of their own, and their bytes in each.

A part is a scope of `vlmkit.sensitivity`: a component's Linear layers, or one numbered layer's; the
output head; and for experiments the token embeddings, which `vk.load` leaves in 16 bits. What no
part has is the same under every plan, and is counted as fixed.
"""

import math
import re
from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.anatomy import unwrapped
from vlmkit.errors import SensitivityError
from vlmkit.formats import FORMATS, format_of_dtype, rounding
from vlmkit.layout import layout_of
from vlmkit.memory import BUFFER, predict
from vlmkit.plan import Plan
from vlmkit.rows import HEAD, LINEAR
from vlmkit.sensitivity import chosen, every
from vlmkit.sensitivity.scopes import weights_of

BY = ("component", "layer")
LOADABLE = ("int8", "nf4", "nf4-dq", "fp4")
EXPERIMENTAL = ("int8", "int6", "int5", "int4", "int3", "int2")
"""The formats of `formats="experimental"`, beside the one that the model is in: see
`vlmkit.formats.rounding`."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part: its scope, as `vlmkit.sensitivity.quantized` reads it, its weights, and the bytes
    that it takes in each format. `main`: whether a uniform plan names it, which leaves the head
    and the embeddings out."""

    scope: str
    weights: tuple = field(repr=False)
    sizes: dict
    main: bool

    @property
    def component(self):
        return self.weights[0].component

    @property
    def parameters(self):
        return sum(weight.parameter.numel() for weight in self.weights)


@dataclass(frozen=True, eq=False)
class Parts:
    """All parts of a model. `base`: the float format that it is in; `formats`: those to choose
    from; `loadable`: whether `vk.load` knows them; `fixed`: {(component, kind): bytes} of what has
    the same bytes under every plan."""

    model: object = field(repr=False)
    parts: tuple
    base: str
    formats: tuple
    loadable: bool
    components: dict = field(repr=False)
    fixed: dict

    def total(self, assignment):
        """Bytes of the whole model under {scope: format}, as the sum of its parts."""
        own = sum(part.sizes[assignment[part.scope]] for part in self.parts)
        return own + sum(self.fixed.values())

    def counted(self, assignment):
        """The same as the ledger counts it, of what a load under the plan will give."""
        if not self.loadable:
            return self.total(assignment)
        return predict(self.model, self.plan(assignment)).total

    def plan(self, assignment):
        """The vk.Plan of an assignment, or None for formats that no model is loaded in."""
        return _plan(self.parts, assignment, self.components) if self.loadable else None

    def uniform(self):
        """{name: assignment} of the plans that give every part one format: with the head and the
        embeddings left as they are, and with them."""
        found = {}
        for name in self.formats:
            everything = {part.scope: name for part in self.parts}
            extra = {part.scope: part.weights[0].kind for part in self.parts if not part.main}
            found[name] = everything | dict.fromkeys(extra, self.base)
            if extra and name != self.base:
                found[f"{name}, {' and '.join(extra.values())} too"] = everything
        return found


def parts_of(model, formats=None, by="component"):
    """The Parts of `model`, which is in a float format.

    formats: names of `vlmkit.formats.FORMATS`; None for those that quantize, beside the one that
        the model is in; "experimental" for EXPERIMENTAL, or a list with at least one spelling that
        only `vlmkit.formats.rounding` knows, for experiments. by: "component" or "layer".
    """
    if by not in BY:
        raise SensitivityError(f"a plan is made by {' or '.join(BY)}, not by {by!r}.")
    base = format_of_dtype(next(w for w in weights_of(model) if w.kind == LINEAR).parameter.dtype)
    names, loadable = _formats(formats, base)
    layout = layout_of(model, base)
    rows = {row.name: row for row in layout.rows}
    found = []
    for scope in every(model, by):
        weights = chosen(model, scope).weights
        if loadable:
            weights = tuple(weight for weight in weights if rows[weight.name].convertible)
        if weights:
            found.append((scope, weights, True))
    for weight in weights_of(model):
        head = weight.kind == HEAD and (not loadable or rows[weight.name].convertible)
        words = unwrapped(model).get_input_embeddings()
        if head or not loadable and weight.module is words:
            found.append((weight.name.rpartition(".")[0], (weight,), False))
    components = {row.component: base for row in layout.rows} if base != "bf16" else {}
    if loadable:
        sizes, fixed = _loaded_sizes(model, found, names, components, layout)
    else:
        sizes, fixed = _rounded_sizes(model, found, names, base, layout)
    buffers = predict(model, Plan.uniform(base)).by_kind.get(BUFFER, 0)
    if buffers:
        fixed["any", BUFFER] = buffers
    parts = tuple(
        Part(scope, weights, own, main)
        for (scope, weights, main), own in zip(found, sizes, strict=True)
    )
    return Parts(model, parts, base, names, loadable, components, fixed)


def _formats(formats, base):
    """(the formats to choose from, whether a model can be loaded in them)"""
    if formats is None:
        return (base, *LOADABLE), True
    if isinstance(formats, str):
        if formats != "experimental":
            raise SensitivityError(
                f'formats is a list of formats, "experimental", or None, not {formats!r}.'
            )
        return (base, *EXPERIMENTAL), False
    if not list(formats):
        raise SensitivityError("formats is empty: name those to choose from.")
    names = tuple(dict.fromkeys((base, *formats)))
    if all(name in FORMATS for name in names):
        return names, True
    for name in names:
        if name == base:
            continue
        if name in FORMATS and not FORMATS[name].quantized:
            raise SensitivityError(
                f"{name!r} among formats for experiments: these round weights in place, and the "
                f"model is in {base}."
            )
        if rounding(name).activations:
            raise SensitivityError(f"{name!r} rounds activations, which saves no bytes.")
    return names, False


def _plan(parts, assignment, components):
    """The plan of an assignment: a format for each component, overrides for its other parts.

    components: {component: the float format of what no part has}, bf16 left out.
    """
    named = dict(components)
    for component in dict.fromkeys(part.component for part in parts if part.main):
        own = [assignment[p.scope] for p in parts if p.main and p.component == component]
        if component not in components or component in assignment:
            # What no part has stays in bf16 whatever is named, so name what is there most.
            named[component] = max(dict.fromkeys(own), key=own.count)
    plan = Plan(**named)
    for part in parts:
        given = plan[part.component]
        given = given if part.main else FORMATS[given].float_format  # the head, if not named
        if assignment[part.scope] != given:
            plan = plan.override(pattern_of(part, parts), assignment[part.scope])
    return plan


def pattern_of(part, parts):
    """A regular expression that finds the modules of a part and of no other: their common path
    where it will do."""
    modules = [weight.name.rpartition(".")[0] for weight in part.weights]
    paths = [module.split(".") for module in modules]
    common = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    prefix = ".".join(common) + "."
    others = [w.name for other in parts if other is not part for w in other.weights]
    if common and not any(name.startswith(prefix) for name in others):
        return f"^{re.escape(prefix)}"
    return "|".join(f"^{re.escape(module)}\\.$" for module in modules)


def _loaded_sizes(model, found, names, components, layout):
    """({format: bytes} of each part, {what: bytes} of the rest), from a layout of all in a format.

    A row is its part's: of the override that finds its module, or of its component. What has the
    same bytes in every format is of the rest.
    """
    parts = [Part(scope, weights, {}, main) for scope, weights, main in found]
    scopes = {part.scope: dict.fromkeys(names, 0) for part in parts}
    patterns = {
        scope: re.compile(pattern_of(part, parts))
        for scope, part in zip(scopes, parts, strict=True)
        if scope not in COMPONENTS
    }
    rows = {name: _resolved(model, parts, scopes, name, components).rows for name in names}
    fixed = {}
    for same in zip(layout.rows, *rows.values(), strict=True):
        row, *others = same
        sizes = {n: _nbytes(r) for n, r in zip(names, others, strict=True)}
        found = (scope for scope, pattern in patterns.items() if pattern.search(row.module + "."))
        scope = next(found, row.component)
        if scope not in scopes or len(set(sizes.values())) == 1:
            _count(fixed, row)
            continue
        for name, size in sizes.items():
            scopes[scope][name] += size
    return list(scopes.values()), fixed


def _resolved(model, parts, scopes, name, components):
    return layout_of(model, _plan(parts, dict.fromkeys(scopes, name), components))


def _nbytes(row):
    return FORMATS[row.format].nbytes(row.shape)


def _count(fixed, row):
    key = (row.component, row.kind)
    fixed[key] = fixed.get(key, 0) + _nbytes(row)


def _rounded_sizes(model, found, names, base, layout):
    """The same for weights packed one by one in formats for experiments, to whole bytes."""
    taken = {weight.name for _, weights, _ in found for weight in weights}
    fixed = {}
    for row in layout.rows:
        if row.name not in taken:
            _count(fixed, row)

    def nbytes(name, shape):
        if name == base:
            return FORMATS[base].nbytes(shape)
        return math.ceil(rounding(name).total_bits(shape) / 8)

    sizes = [
        {name: sum(nbytes(name, tuple(w.parameter.shape)) for w in weights) for name in names}
        for _, weights, _ in found
    ]
    return sizes, fixed
