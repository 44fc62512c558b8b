"""Layouts: a plan resolved against one model, with a row for each of its parameters.

Loading, auditing and the memory ledger all read the same Layout, so they cannot disagree.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from vlmkit.anatomy import anatomy_of, on_meta
from vlmkit.errors import PlanError, did_you_mean
from vlmkit.formats import DEFAULT, FORMATS, torch_dtype
from vlmkit.rows import BIAS, LINEAR, Row, is_linear, kind_of


@dataclass(frozen=True)
class Layout:
    """A plan on a model. `rows`, `quantized` (module name to format), `quantization_config()`."""

    plan: object
    rows: tuple
    linears: tuple  # full names of all modules that transformers would convert if it were let
    always_skipped: tuple = ()  # names that transformers adds to any skip list by itself

    @cached_property
    def quantized(self):
        return {row.module: row.format for row in self.rows if FORMATS[row.format].quantized}

    @cached_property
    def floats(self):
        """Names of the float formats that the plan asks for, also beside quantized weights."""
        return {FORMATS[row.asked].float_format for row in self.rows}

    @property
    def load_dtype(self):
        """Name of the float format to read the checkpoint in: the plan's own if it has only one.
        Otherwise fp32, from which each parameter is rounded once, to the format that it gets."""
        return next(iter(self.floats)) if len(self.floats) == 1 else "fp32"

    @property
    def skipped(self):
        """Full names of the modules to leave out of quantization: the outermost modules in which
        nothing is quantized."""
        return self._outside(self.quantized)

    def _outside(self, inside):
        """The outermost modules that hold Linear layers and none of those in `inside`."""
        return outermost(self.linears, inside)

    def quantization_config(self):
        """transformers' config for this layout, or None where nothing is quantized: its own
        BitsAndBytesConfig for one quantized format, `vlmkit.backend.mixed.MixedConfig` for several.

        Raises PlanError for what a skip list cannot express.
        """
        formats = sorted(set(self.quantized.values()))
        configs = [self._config_of(name) for name in formats]
        if len(configs) < 2:
            return configs[0] if configs else None
        from vlmkit.backend.mixed import MixedConfig

        return MixedConfig(configs)

    def _config_of(self, name):
        """The BitsAndBytesConfig that quantizes what has the format `name`, and nothing else."""
        from transformers import BitsAndBytesConfig

        # A list always, even an empty one: None would bring transformers' automatic exceptions
        # back, and any list replaces them. That is why the head is named here like the rest.
        inside = {module for module, given in self.quantized.items() if given == name}
        skip = self._outside(inside)
        self._check(skip, inside)
        if name == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name.removesuffix("-dq"),
            bnb_4bit_use_double_quant=name.endswith("-dq"),
            bnb_4bit_compute_dtype=torch_dtype(name),
            llm_int8_skip_modules=skip,
        )

    def _check(self, skip, inside):
        # transformers reads an entry as a regular expression from the start of a name, and also
        # as a suffix of it. Ask its own function what it will make of this list.
        from transformers.quantizers.quantizers_utils import should_convert_module

        wrong = [
            name
            for name in self.linears
            if should_convert_module(name, [*skip, *self.always_skipped]) != (name in inside)
        ]
        if wrong:
            raise PlanError(
                f"transformers' skip list cannot express this plan: it would treat {wrong[0]} "
                f"(and {len(wrong) - 1} more modules) differently. Plan them like their neighbors."
            )


def outermost(names, besides):
    """The outermost modules that hold some of `names` and none of `besides` (full names both)."""
    busy = {name.rsplit(".", i)[0] for name in besides for i in range(name.count(".") + 1)}
    found = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        idle = next((prefix for prefix in prefixes if prefix not in busy), None)
        if idle is not None:
            found[idle] = True
    return list(found)


_KEPT = {}  # the last layouts that layout_for has made
_MOST = 32
_KEEPS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")  # transformers' own names


def layout_for(config, plan, trust_remote_code=False):
    """The Layout of `plan` on the model that `config` describes.

    To build the model on the meta device takes a fifth of the time that mapping a checkpoint takes,
    and the layout depends on nothing but the two. So it is kept for the next load.
    Raises AnatomyError as `on_meta` does, and what `Plan.resolve` raises.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(config)
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    # In a notebook the class can be another tomorrow, or be told to keep other modules in fp32.
    keeps = [getattr(model_class, name, None) or () for name in _KEEPS]
    key = (kind, model_class, *map(tuple, keeps), config.to_json_string(use_diff=False), plan)
    if trust_remote_code or key not in _KEPT:
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[key] = resolve(plan, on_meta(config, trust_remote_code=trust_remote_code))
    return _KEPT[key]


def resolve(plan, model):
    """The Layout of `plan` on `model`, which is on the meta device. See `Plan.resolve`."""
    found = anatomy_of(model).require_known()
    kept = _never_converted(model)
    modules = dict(model.named_modules())
    linears = {name: True for name, module in modules.items() if is_linear(module)}
    linear = linears.keys() - kept.keys()
    overrides = _Overrides(plan)
    rows = []
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        component = found.component_of(name)
        owner = modules[module]
        kind = kind_of(model, owner, leaf)
        asked, named = overrides.format_for(module), True
        if asked is None:
            asked, named = plan[component], False
        wanted = FORMATS[asked]
        can = module in linear and kind != BIAS
        given = wanted.float_format
        if wanted.quantized and can and (kind == LINEAR or named):
            given = asked
        elif kept_in_fp32(model, name, given):
            given = "fp32"
        note = ""
        if kind == LINEAR and not can:
            note = kept.get(module, f"{type(owner).__name__}, not a plain Linear")
        shape = tuple(parameter.shape)
        size = FORMATS[given].nbytes(shape)
        rows.append(Row(name, component, kind, size, shape, asked, given, can, note))
    layout = Layout(plan, tuple(rows), tuple(linears), tuple(_fp32_names(model)))
    overrides.require_used(layout)
    _require_effect(plan, found, layout)
    return layout


def _never_converted(model):
    """{module name: why} of modules that must not be quantized even by name: a tied weight is
    shared with an embedding, which cannot read packed bytes; and what the model's own class lists
    as to be kept in fp32 stays out of quantization whatever it is kept in."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    fp32 = _fp32_names(model)
    listed = (name for name, _ in model.named_modules() if not should_convert_module(name, fp32))
    tied = {**model.all_tied_weights_keys}
    names = (key.removesuffix(".weight") for key in (*tied, *tied.values()))
    return dict.fromkeys(listed, "left out by its class") | dict.fromkeys(names, "tied")


def _fp32_names(model):
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())


def kept_in_fp32(model, name, given):
    """Whether the model's class keeps the parameter `name` in fp32 although it is to be loaded in
    the float format `given`: some do so with a few modules, since their forward counts on it."""
    from transformers.core_model_loading import build_glob_alternation

    # The names, and how they match, are transformers' own, as from_pretrained uses them.
    kept = model._get_dtype_plan(torch_dtype(given))
    return bool(kept) and build_glob_alternation(list(kept))[0].search(name) is not None


class _Overrides:
    """The plan's overrides, and which modules each of them has found."""

    def __init__(self, plan):
        self.patterns = [(pattern, re.compile(pattern), name) for pattern, name in plan.overrides]
        self.found = {(pattern, name): set() for pattern, name in plan.overrides}

    def format_for(self, module):
        hits = [
            (pattern, name)
            for pattern, compiled, name in self.patterns
            if compiled.search(module) or compiled.search(module + ".")
        ]
        for hit in hits:
            self.found[hit].add(module)
        if len({name for _, name in hits}) > 1:
            claims = " and ".join(f"{pattern!r} asks for {name}" for pattern, name in hits)
            raise PlanError(
                f"the plan contradicts itself about {module}: {claims}. Make the patterns narrower."
            )
        return hits[0][1] if hits else None

    def require_used(self, layout):
        for (pattern, name), modules in self.found.items():
            tied = [n for n in layout.linears if re.search(pattern, n) and n not in modules]
            if tied and not modules:
                raise PlanError(
                    f"the plan's override {pattern!r} matches only {tied[0]}, whose weight is tied "
                    "to the embeddings: it is theirs, and cannot have a format of its own."
                )
            if not modules:
                modules = list(dict.fromkeys(row.module for row in layout.rows))
                segments = {segment for module in modules for segment in module.split(".")}
                raise PlanError(
                    f"the plan's override {pattern!r} matches no module of this model. "
                    f"{did_you_mean(pattern, segments, 0.6)}Its modules have full names "
                    "such as\n  " + "\n  ".join(modules[:: 1 + len(modules) // 5])
                )
            if FORMATS[name].quantized and not modules & set(layout.quantized):
                kinds = sorted({row.kind for row in layout.rows if row.module in modules})
                raise PlanError(
                    f"the plan's override {pattern!r} asks for {name}, and none of the "
                    f"{len(modules)} modules that it matches can be quantized (they are: "
                    f"{', '.join(kinds)}). Only Linear layers whose weight is not tied to an "
                    "embedding can."
                )


def _require_effect(plan, anatomy, layout):
    """A component that the plan gives a format of its own must be there, and must have something to
    quantize if the format is a quantized one."""
    for component, name in plan.named.items():
        if name != DEFAULT and not anatomy[component].parameters:
            has = ", ".join(c for c, part in anatomy.parts.items() if part.parameters)
            raise PlanError(
                f"the plan asks for {component} in {name}, but {anatomy.architecture} has no "
                f"{component}: the plan matches no module. It has {has}."
            )
        if not FORMATS[name].quantized or any(
            row.component == component and row.asked == row.format for row in layout.rows
        ):
            continue
        raise PlanError(
            f"the plan asks for {component} in {name}, but nothing in it can be quantized: it has "
            f"{', '.join(sorted({r.kind for r in layout.rows if r.component == component}))}."
        )
