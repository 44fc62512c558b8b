"""What a plan can choose: the items of a model, their bytes in each format, the best choice, and
the effect of an assignment.

An item is a scope of `vlmkit.sensitivity`: the Linear layers of a component or of one numbered
layer, the output head, and for experiments the token embeddings, which `vk.load` leaves in 16 bits.
Everything else has the same bytes under every plan.
"""

import contextlib
import math
import re
from dataclasses import dataclass, field, replace

from vlmkit import COMPONENTS
from vlmkit.anatomy import unwrapped
from vlmkit.errors import SensitivityError
from vlmkit.formats import FORMATS, Rounding, format_of_dtype, rounding, torch_dtype
from vlmkit.layout import layout_of
from vlmkit.memory import BUFFER, predict
from vlmkit.plan import Plan
from vlmkit.rows import HEAD, LINEAR
from vlmkit.sensitivity import Rounded, Selection, every, select
from vlmkit.sensitivity.scopes import COMPONENT, LAYER, exactly, weights_of

LOADABLE = ("int8", "nf4", "nf4-dq", "fp4")
EXPERIMENTAL = ("int8", "int6", "int5", "int4", "int3", "int2")
"""The formats of `formats="experimental"`, beside the format of the model: see
`vlmkit.formats.rounding`."""


def least_damage(sizes, damages, room):
    """The choice with the least sum of damages whose sizes sum to at most `room`: {item: option}.

    sizes, damages: {item: {option: whole number of bytes}} and {item: {option: number}}. Of choices
    with equal damage, the smaller one is taken. None if nothing fits.

    This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack
    Problems, 2004, chapter 11). Item by item, every sum of bytes that can be reached is kept with
    the least damage for it. A sum is dropped if another one takes fewer bytes and does no more
    damage. This is exact. It is fast, since the layers of a model have few different sizes.
    """
    rest = sum(min(options.values()) for options in sizes.values())
    states = [(0, 0.0, ())]  # bytes, damage, the options taken, the last one first
    for item, options in sizes.items():
        rest -= min(options.values())
        reached = [
            (size + options[option], damage + damages[item][option], (option, taken))
            for size, damage, taken in states
            for option in options
            if size + options[option] + rest <= room
        ]
        reached.sort(key=lambda state: state[:2])
        states = []
        for state in reached:
            if not states or state[1] < states[-1][1]:
                states.append(state)
    if not states:
        return None
    options, taken = [], states[-1][2]
    while taken:
        option, taken = taken
        options.append(option)
    return dict(zip(sizes, reversed(options), strict=True))


@dataclass(frozen=True, eq=False)
class Item:
    """An item: its scope, as `vlmkit.sensitivity.quantized` reads it, its weights, and its bytes in
    each format. main: whether a uniform plan includes it; head and embeddings are left out."""

    scope: str
    weights: tuple = field(repr=False)
    sizes: dict
    main: bool

    @property
    def component(self):
        return self.weights[0].component

    @property
    def parameters(self):
        return sum(weight.parameters for weight in self.weights)


@dataclass(frozen=True, eq=False)
class Choices:
    """All items of a model. An assignment gives each of them a format: {scope: format}.

    base: the float format of the model. formats: those to choose from. loadable: whether `vk.load`
    knows them. components: {component: base} if the base is not bf16, which a plan need not name.
    fixed: {(component, kind): bytes} of everything that has the same bytes under every plan.
    """

    model: object = field(repr=False)
    items: tuple
    base: str
    formats: tuple
    loadable: bool
    components: dict = field(repr=False)
    fixed: dict = field(default_factory=dict)

    def total(self, assignment):
        """Bytes of the whole model under an assignment, as the sum of its items."""
        own = sum(item.sizes[assignment[item.scope]] for item in self.items)
        return own + sum(self.fixed.values())

    def counted(self, assignment):
        """The same bytes as the memory ledger predicts them for a load under the plan."""
        if not self.loadable:
            return self.total(assignment)
        return predict(self.model, self.plan(assignment)).total

    def all_in(self, name):
        """The assignment of one format to every item."""
        return {item.scope: name for item in self.items}

    def smallest(self):
        """The assignment with the fewest bytes."""
        return {item.scope: min(item.sizes, key=item.sizes.get) for item in self.items}

    def uniform(self):
        """{name: assignment} of the plans with one format for all items: without the head and the
        embeddings, which stay as they are, and with them."""
        found = {}
        for name in self.formats:
            extra = {item.scope: item.weights[0].kind for item in self.items if not item.main}
            found[name] = self.all_in(name) | dict.fromkeys(extra, self.base)
            if extra and name != self.base:
                found[f"{name}, {' and '.join(extra.values())} too"] = self.all_in(name)
        return found

    def plan(self, assignment):
        """The vk.Plan of an assignment, or None for formats that `vk.load` does not know: a format
        for each component, and overrides for items with another format."""
        if not self.loadable:
            return None
        named = dict(self.components)
        for component in dict.fromkeys(item.component for item in self.items if item.main):
            own = [assignment[i.scope] for i in self.items if i.main and i.component == component]
            if component not in self.components or component in assignment:
                # Parameters outside all items stay in bf16 anyway, so name the most frequent format
                named[component] = max(dict.fromkeys(own), key=own.count)
        plan = Plan(**named)
        for item in self.items:
            given = plan[item.component]
            given = given if item.main else FORMATS[given].float_format  # the head, if not named
            if assignment[item.scope] != given:
                plan = plan.override(self.pattern_of(item), assignment[item.scope])
        return plan

    def pattern_of(self, item):
        """A regular expression that finds the modules of an item and of no other: their common path
        if that is enough."""
        modules = [weight.module for weight in item.weights]
        common = []
        for names in zip(*(module.split(".") for module in modules), strict=False):
            if len(set(names)) > 1:
                break
            common.append(names[0])
        prefix = ".".join(common) + "."
        others = [w.name for other in self.items if other is not item for w in other.weights]
        if common and not any(name.startswith(prefix) for name in others):
            return f"^{re.escape(prefix)}"
        return exactly(modules)

    def _count(self):
        """Fill in the sizes of the items, and `fixed`, from the rows of layouts.

        A row with a different size in some format belongs to the item that decides on its format.
        """
        rows = layout_of(self.model, Plan.uniform(self.base)).rows
        owners = self._owners(rows)
        sizes = {name: self._sizes(name, rows, owners) for name in self.formats}
        for number, (row, item) in enumerate(zip(rows, owners, strict=True)):
            own = {name: sizes[name][number] for name in self.formats}
            if item is None or len(set(own.values())) == 1:
                key = (row.component, row.kind)
                self.fixed[key] = self.fixed.get(key, 0) + row.bytes
                continue
            for name, size in own.items():
                item.sizes[name] += size

    def _sizes(self, name, rows, owners):
        """Bytes of each row, if all items are in one format."""
        if self.loadable:
            plan = self.plan(self.all_in(name))
            return [row.bytes for row in layout_of(self.model, plan).rows]
        if name == self.base:
            return [row.bytes for row in rows]
        bits = rounding(name).total_bits  # each weight is packed by itself, to whole bytes
        return [
            math.ceil(bits(row.shape) / 8) if item else row.bytes
            for row, item in zip(rows, owners, strict=True)
        ]

    def _owners(self, rows):
        """For each row the item that decides on its format, or None."""
        if not self.loadable:
            items = {weight.name: item for item in self.items for weight in item.weights}
            return [items.get(row.name) for row in rows]
        items = {item.scope: item for item in self.items}
        overrides = [
            (re.compile(self.pattern_of(item)), item)
            for scope, item in items.items()
            if scope not in COMPONENTS
        ]
        return [
            next(
                (item for pattern, item in overrides if pattern.search(f"{row.module}.")),
                items.get(row.component),
            )
            for row in rows
        ]


def choices_of(model, formats=None, by=COMPONENT):
    """The Choices of `model`, which is in a float format.

    formats: names of `vlmkit.formats.FORMATS`; None for the model's own format and all that
        quantize; "experimental" for EXPERIMENTAL; or a list with at least one spelling that only
        `vlmkit.formats.rounding` knows, for experiments.
    by: "component" or "layer".
    """
    if by not in (COMPONENT, LAYER):
        raise SensitivityError(f"a plan is made by {COMPONENT} or {LAYER}, not by {by!r}.")
    weights = weights_of(model)
    base = format_of_dtype(next(w for w in weights if w.kind == LINEAR).parameter.dtype)
    names, loadable = _formats(formats, base)
    rows = layout_of(model, Plan.uniform(base)).rows
    convertible = {row.name for row in rows if row.convertible or not loadable}
    found = [(scope, select(model, scope).weights, True) for scope in every(model, by)]
    for weight in weights:
        embeds = weight.layer is unwrapped(model).get_input_embeddings()
        if weight.kind == HEAD or embeds and not loadable:
            found.append((weight.module, (weight,), False))
    items = []
    for scope, own, main in found:
        own = tuple(weight for weight in own if weight.name in convertible)
        if own:
            items.append(Item(scope, own, dict.fromkeys(names, 0), main))
    components = {row.component: base for row in rows} if base != "bf16" else {}
    choices = Choices(model, tuple(items), base, names, loadable, components)
    choices._count()
    if buffers := predict(model, Plan.uniform(base)).by_kind.get(BUFFER, 0):
        choices.fixed["any", BUFFER] = buffers
    return choices


def _formats(formats, base):
    """(the formats to choose from, whether `vk.load` knows all of them)"""
    if formats is None:
        return (base, *LOADABLE), True
    if isinstance(formats, str):
        if formats != "experimental":
            raise SensitivityError(
                f'formats is a list of formats, "experimental", or None, not {formats!r}.'
            )
        formats = EXPERIMENTAL
    if not list(formats):
        raise SensitivityError("formats is empty: name those to choose from.")
    names = tuple(dict.fromkeys((base, *formats)))
    if formats is not EXPERIMENTAL and all(name in FORMATS for name in names):
        return names, True
    for name in names[1:]:
        if name in FORMATS and not FORMATS[name].quantized:
            raise SensitivityError(
                f"{name!r} is among formats for experiments, which round weights in place, and the "
                f"model is in {base}."
            )
        if rounding(name).activations:
            raise SensitivityError(f"{name!r} rounds activations, which saves no bytes.")
    return names, False


# --- loading in a format, done in place -----------------------------------------------------------


@dataclass(frozen=True)
class Int8Inputs(Rounding):
    """How LLM.int8 (arXiv 2208.07339) rounds the inputs of a layer: token by token, except features
    in which some value is 6 or more. bitsandbytes rounds products at other places. Its change is as
    large as this one, but it is not the same."""

    kind: str = "int8"
    share: str = "token"
    activations: bool = True
    outlier: float = 6.0  # bitsandbytes' own threshold, and the paper's

    def rounded(self, x):
        large = x.detach().abs().flatten(0, -2) >= self.outlier
        outliers = large.any(0)
        within = super().rounded(x.masked_fill(large.reshape(x.shape), 0))
        return x.where(outliers, within)


@dataclass(frozen=True)
class Cast(Rounding):
    """A float format with fewer bits than the weights have."""

    def rounded(self, x):
        return x.detach().to(torch_dtype(self.kind)).to(x.dtype)


@contextlib.contextmanager
def as_loaded(model, choices, assignment):
    """Within it, weights and inputs are as loading them under an assignment would leave them, for
    NF4 and FP4 to the bit. Gives the changed weights."""
    with contextlib.ExitStack() as stack:
        changed = []
        for item in choices.items:
            # The head is a Linear layer like others if it is named
            weights = tuple(replace(w, kind=LINEAR) if w.kind == HEAD else w for w in item.weights)
            dtype = weights[0].parameter.dtype
            roundings = _roundings(assignment[item.scope], dtype, choices.loadable)
            for one in roundings:
                stack.enter_context(Rounded(model, Selection(item.scope, weights), one))
            if roundings:
                changed += item.weights
        yield changed


def _roundings(format, dtype, loadable):
    """The Roundings that put weights of `dtype` into `format`; none if that changes nothing."""
    own = format_of_dtype(dtype)
    if format == own:
        return []
    if not loadable:
        return [rounding(format)]
    if format == "int8":
        return [rounding("int8-row"), Int8Inputs()]
    if FORMATS[format].quantized:
        return [rounding(format)]
    return [Cast(format)] if own not in FORMATS or FORMATS[format].bits <= FORMATS[own].bits else []
