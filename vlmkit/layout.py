"""Layouts: a plan on one model, with a row for each parameter.

    layout = layout_of("pebble", "language_model=nf4")
    layout.rows                        # what each parameter is, was asked for, and gets
    layout.quantization_config()       # transformers' own BitsAndBytesConfig

Loading, the audit, the memory ledger, lint and the planner all use the same Layout, so they cannot
disagree.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

from vlmkit import COMPONENTS
from vlmkit.anatomy import anatomy_of, on_meta, unwrapped
from vlmkit.backend import converting
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.checkpoints import find, quantization_method, read_config, stored_formats, what_loads
from vlmkit.errors import CheckpointError, PlanError, did_you_mean
from vlmkit.formats import DEFAULT, FORMATS
from vlmkit.plan import Plan, matching
from vlmkit.rows import BIAS, LINEAR, Row, is_linear, kind_of


@dataclass(frozen=True)
class Layout:
    """A plan on a model.

    plan: the Plan. config: the model's transformers config.
    rows: a `vlmkit.rows.Row` for each parameter.
    linears: full names of all modules that transformers would quantize without a skip list.
    """

    plan: Plan
    rows: tuple
    linears: tuple
    config: object = field(default=None, repr=False, compare=False)

    @cached_property
    def quantized(self):
        """{full name of a module: its quantized format}."""
        return {row.module: row.format for row in self.rows if FORMATS[row.format].quantized}

    @cached_property
    def floats(self):
        """Names of the float formats that the plan asks for, also beside quantized weights."""
        return {FORMATS[row.asked].float_format for row in self.rows}

    @property
    def load_dtype(self):
        """Name of the float format to read the checkpoint in: the plan's own if it has only one.
        Otherwise fp32, so that each parameter is rounded only once."""
        return next(iter(self.floats)) if len(self.floats) == 1 else "fp32"

    @property
    def skipped(self):
        """Full names of the outermost modules in which nothing is quantized."""
        return converting.skip_list(self.linears, self.quantized)

    @property
    def projector_hint(self):
        """A sentence if the plan has the language model in a format that the projector did not see
        in its training, according to the config, and this matters. Empty otherwise."""
        said = getattr(self.config, "projector_trained_with", None) or {}
        trained, given = said.get("language_model"), self.plan["language_model"]
        if trained is None or _like(trained) == _like(given):
            return ""
        named = MISMATCHED.get((_like(trained), _like(given)))
        measured = (
            f" (cobble then named {named[1]}% of photographs, not {named[0]}%)" if named else ""
        )
        fitting = [
            bundled.name
            for bundled in BUNDLED.values()
            if bundled.fetched and _like(bundled.trained_with) == _like(given)
        ]
        fits = f" {fitting[0]} has a projector that fits this plan." if fitting else ""
        return (
            f"The projector was trained with the language_model in {trained}, and the plan has "
            f"{given}: the answers can be fluent and wrong{measured}.{fits}"
        )

    def quantization_config(self):
        """transformers' config for this layout, or None where nothing is quantized. See
        `vlmkit.backend.converting.quantization_config`."""
        return converting.quantization_config(self.linears, self.quantized)


MATCHING = {"int8": DEFAULT, "nf4-dq": "nf4"}
"""Formats of the language model that a projector of cobble could not tell apart: three seeds with
2,000 photographs each showed no difference (benchmarks/results/recipe.csv). The float formats are
alike too. The vision encoder's formats are left out: in 4 bits it cost less than one point.
In 2 bits, which no plan has, it cost more than half of the names."""

MISMATCHED = {(DEFAULT, "nf4"): (88, 73), ("nf4", DEFAULT): (88, 83)}
"""{(format in training, other format): % of photographs that cobble named in the one, and in the
other}: means of three seeds, of the same record. The loss depends on the seed: from bf16 to NF4 it
is 4 to 32 points."""


def _like(name):
    """The format that stands for all that a projector cannot tell from `name`. int3 is none of
    FORMATS, since no plan has it."""
    name = DEFAULT if name in FORMATS and not FORMATS[name].quantized else name
    return MATCHING.get(name, name)


def layout_of(x, plan=None, *, loadable=True, revision=None, trust_remote_code=False):
    """The Layout of `x` under `plan`. No weight is read, and no network is needed for a checkpoint
    that is on this machine or in the catalog.

    x: "pebble", a folder, a hub id, a transformers config, or a model (for its config).
    plan: a Plan or anything that `Plan.parse` takes. None is the recommended plan, or the formats
        that `x` holds if `x` is a checkpoint that is quantized already.
    loadable: whether `x` has to be loadable under `plan`. A quantized checkpoint can be loaded only
        in the quantized formats that it holds.

    Raises CheckpointError if there is no such checkpoint, or if it is quantized by something other
    than bitsandbytes. Raises AnatomyError if the model has parameters of unknown component. Raises
    PlanError if a part of the plan matches nothing, changes nothing, contradicts another part, or
    asks for other quantized formats than a quantized checkpoint holds.
    """
    config = getattr(unwrapped(x), "config", x)
    if hasattr(config, "model_type"):
        known = trust_remote_code or hasattr(x, "named_parameters")  # its code has run already
        return _layout_of_config(config, Plan.parse(plan), known)
    folder = find(x, revision=revision, weights=False)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    method = quantization_method(config)
    if method is None or plan is not None and not loadable:
        return _layout_of_config(config, Plan.parse(plan), trust_remote_code)
    if cannot := what_loads(method):
        raise CheckpointError(
            f"{folder} cannot be loaded. {cannot} To use vlmkit, load the checkpoint that they "
            "were made from, under a plan. vk.memory.predict predicts what this takes, if it is "
            "given a plan."
        )
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{x} is quantized already. Its formats are read from its weight files, and they are "
            f"not here ({folder}). vk.memory.predict(name, plan) predicts what it costs under a "
            "plan without them."
        )
    model = on_meta(config, trust_remote_code=trust_remote_code)
    stored = stored_formats(folder, model)
    if plan is None:
        plan = plan_of_formats(stored, model)
    layout = _resolve(Plan.parse(plan), model)
    _require_stored(folder, layout, stored)
    return replace(layout, config=config)


_KEPT = {}  # the last layouts that _layout_of_config has made
_MOST = 32
_KEEPS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # transformers' own names


def _layout_of_config(config, plan, trust_remote_code):
    """The Layout of `plan` on the model that `config` describes.

    Building a model on the meta device takes a fifth of the time that mapping a checkpoint takes,
    and the layout depends only on the config and the plan. So the last layouts are kept.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(config)
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    # A notebook can change what a class keeps in fp32.
    keeps = [tuple(getattr(model_class, name, None) or ()) for name in _KEEPS]
    key = (kind, model_class, *keeps, config.to_json_string(use_diff=False), plan)
    remote = trust_remote_code and hasattr(config, "auto_map")  # such code can change, too
    if remote or key not in _KEPT:
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[key] = _resolve(plan, on_meta(config, trust_remote_code=trust_remote_code))
    return replace(_KEPT[key], config=config)


# --- a plan on a model that is on the meta device -----------------------------------------------


def _resolve(plan, model):
    """The Layout of `plan` on `model`, which is on the meta device."""
    found = anatomy_of(model).require_known()
    why_not = converting.never_converted(model)
    modules = dict(model.named_modules())
    linears = tuple(name for name, module in modules.items() if is_linear(module))
    convertible = set(linears) - why_not.keys()
    parameters = dict(model.named_parameters())
    overrides = _overrides(plan, {name.rpartition(".")[0]: True for name in parameters})
    named = _formats_of_modules(overrides)
    rows = []
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        component = found.component_of(name)
        kind = kind_of(model, modules[module], leaf)
        asked = named.get(module, plan[component])
        can = module in convertible and kind != BIAS
        given = FORMATS[asked].float_format
        if FORMATS[asked].quantized and can and (kind == LINEAR or module in named):
            given = asked
        elif converting.kept_in_fp32(model, name, given):
            given = "fp32"
        note = ""
        if kind == LINEAR and not can:
            note = why_not.get(module, f"{type(modules[module]).__name__}, not a plain Linear")
        shape = tuple(parameter.shape)
        size = FORMATS[given].nbytes(shape)
        rows.append(Row(name, component, kind, size, shape, asked, given, can, note))
    layout = Layout(plan, tuple(rows), linears)
    _require_overrides(overrides, layout)
    _require_components(found, layout)
    return layout


def _overrides(plan, modules):
    """{(pattern, format): those of `modules` that this override of `plan` finds}."""
    found = {}
    for pattern, name in plan.overrides:
        hits = {
            m.removesuffix(".") for m in matching(pattern, [*modules, *(f"{m}." for m in modules)])
        }
        found[pattern, name] = [m for m in modules if m in hits]
    return found


def _formats_of_modules(overrides):
    """{full name of a module: the format that an override names for it}."""
    named = {}
    for (pattern, name), modules in overrides.items():
        for module in modules:
            other, has = named.setdefault(module, (pattern, name))
            if has != name:
                raise PlanError(
                    f"the plan contradicts itself about {module}: {other!r} asks for {has} and "
                    f"{pattern!r} asks for {name}. Make the patterns narrower."
                )
    return {module: name for module, (_, name) in named.items()}


def _require_overrides(overrides, layout):
    """Every override has to find a module, and one that can be quantized if it names such a
    format."""
    for (pattern, name), modules in overrides.items():
        if not modules:
            tied = matching(pattern, layout.linears)
            if tied:
                raise PlanError(
                    f"the plan's override {pattern!r} matches only {tied[0]}, whose weight is tied "
                    "to the embeddings. It cannot have a format of its own."
                )
            names = list(dict.fromkeys(row.module for row in layout.rows))
            segments = {segment for module in names for segment in module.split(".")}
            raise PlanError(
                f"the plan's override {pattern!r} matches no module of this model. "
                f"{did_you_mean(pattern, segments, 0.6)}Its modules have full names such as\n  "
                + "\n  ".join(names[:: 1 + len(names) // 5])
            )
        if FORMATS[name].quantized and not layout.quantized.keys() & set(modules):
            kinds = sorted({row.kind for row in layout.rows if row.module in modules})
            raise PlanError(
                f"the plan's override {pattern!r} asks for {name}, and none of the {len(modules)} "
                f"modules that it matches can be quantized (they are: {', '.join(kinds)}). Only "
                "Linear layers whose weight is not tied to an embedding can."
            )


def _require_components(anatomy, layout):
    """The model has to have every component that the plan names, with something to quantize if the
    plan names a quantized format."""
    for component, name in layout.plan.named.items():
        own = [row for row in layout.rows if row.component == component]
        if name != DEFAULT and not own:
            has = ", ".join(c for c, part in anatomy.parts.items() if part.parameters)
            raise PlanError(
                f"the plan asks for {component} in {name}, but {anatomy.architecture} has no "
                f"{component}: the plan matches no module. It has {has}."
            )
        if FORMATS[name].quantized and not any(row.asked == row.format for row in own):
            raise PlanError(
                f"the plan asks for {component} in {name}, but nothing in it can be quantized: it "
                f"has {', '.join(sorted({row.kind for row in own}))}."
            )


# --- checkpoints and models that are quantized already ------------------------------------------


def _require_stored(folder, layout, stored):
    """Raise PlanError if `layout` has other quantized weights than the checkpoint in `folder`,
    which holds the formats `stored`."""
    wrong = [
        f"{row.name}: holds {stored[row.name]}, asked for {row.format}"
        for row in layout.rows
        if stored.get(row.name, row.format) != row.format
        and (FORMATS[row.format].quantized or FORMATS[stored[row.name]].quantized)
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PlanError(
            f"{folder} is quantized already, and not as the plan asks, in {len(wrong)} weights:\n  "
            + "\n  ".join(wrong[:5])
            + f"{more}\nA plan cannot give back the bits that are gone, and quantizing again would "
            "lose more. Leave the plan out to load what is stored, or load the checkpoint that "
            "this one was made from under your plan."
        )


def plan_of_formats(formats, model):
    """The Plan under which `model` holds each parameter in the format that `formats` gives: a
    format for each component, and overrides for the modules that differ from their component.

    formats: {full name of a parameter: name of a format}. model: on the meta device.

    Beside quantized weights fp16 counts as bf16, which is what a plan has there.
    Raises CheckpointError if no plan describes the formats.
    """
    layouts = {n: _resolve(Plan.uniform(n), model).rows for n in {DEFAULT, *formats.values()}}
    # What each parameter gets if its component is asked for in the format `name`.
    given = {(name, row.name): row.format for name, rows in layouts.items() for row in rows}
    rows = layouts[DEFAULT]
    quantized = {row.component for row in rows if FORMATS[formats.get(row.name, DEFAULT)].quantized}
    wanted = {}  # None: the other name of a tied weight, or a weight that is not stored
    for row in rows:
        name = formats.get(row.name)
        wanted[row.name] = DEFAULT if name == "fp16" and row.component in quantized else name

    def agrees(name, row, override=False):
        forced = override and FORMATS[name].quantized and row.convertible
        return wanted[row.name] in (None, name if forced else given[name, row.name])

    plan = {}
    for component in COMPONENTS:
        own = [row for row in rows if row.component == component]
        names = sorted({wanted[row.name] or DEFAULT for row in own})
        fits = {n: sum(row.parameters for row in own if agrees(n, row)) for n in names}
        if own:
            plan[component] = max(names, key=lambda n: (fits[n], FORMATS[n].quantized))
    differing = [row for row in rows if not agrees(plan[row.component], row)]
    overrides = {}
    for row in differing:
        if any(f"{row.module}.".startswith(prefix) for prefix in overrides):
            continue
        prefix, name = _outermost_override(row, rows, differing, wanted, agrees)
        overrides[prefix] = name
    plan = Plan(**plan)
    for prefix, name in overrides.items():
        plan = plan.override(f"^{re.escape(prefix)}", name)
    return plan


def _outermost_override(row, rows, differing, wanted, agrees):
    """(prefix, format) of the outermost module around `row` in which one format suits all rows."""
    parts = row.module.split(".")
    for i in range(1, len(parts) + 1):
        prefix = ".".join(parts[:i]) + "."
        inside = [other for other in rows if other.name.startswith(prefix)]
        for name in Counter(wanted[r.name] for r in differing if r.name.startswith(prefix)):
            if all(agrees(name, other, override=True) for other in inside):
                return prefix, name
    raise CheckpointError(
        f"{row.name} is held in {wanted[row.name]}, and its neighbors are not. No plan describes "
        "that."
    )
