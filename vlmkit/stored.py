"""Checkpoints that are quantized already: which formats they hold, and which plan that is.

    plan = plan_of_formats(stored_formats(folder, model_on_meta), model_on_meta)

The formats are read from the headers of the weight files, a quantized weight being known by the
scales stored beside it. What config.json says of them is a wish, as a plan is, and is not asked.
"""

import re
from collections import Counter
from math import prod

from vlmkit import COMPONENTS
from vlmkit.anatomy import on_meta
from vlmkit.checkpoints import check_weights, find, read_config, weight_files
from vlmkit.errors import CheckpointError, PlanError
from vlmkit.formats import DEFAULT, FORMATS
from vlmkit.layout import layout_for
from vlmkit.plan import Plan

_FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
_METHODS = ("bitsandbytes", "vlmkit")


def planned(x, plan=None, *, loadable=True, revision=None, trust_remote_code=False):
    """(config, Layout) of `x` under `plan`, without reading a weight.

    x: "pebble", a folder, a hub id, a transformers config, or a model (for its config).
    plan: a Plan or anything that `Plan.parse` takes; for None see `layout_of`.
    loadable: whether `plan` has to be one under which `x` can be loaded, if it is quantized.
    """
    config = getattr(x, "config", x)
    if hasattr(config, "model_type"):
        return config, Plan.parse(plan).resolve(on_meta(config, None, trust_remote_code))
    folder = find(x, revision=revision, weights=False)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if plan is not None and not loadable:
        return config, layout_for(config, Plan.parse(plan), trust_remote_code)
    if getattr(config, "quantization_config", None) and not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{x} is quantized already. What it holds is read from its weight files, and they are "
            "not here. What it would cost under a plan, vk.memory.predict(name, plan) tells."
        )
    return config, layout_of(folder, config, plan, trust_remote_code)


def layout_of(folder, config, plan=None, trust_remote_code=False):
    """The Layout under which the checkpoint in `folder` is to be loaded.

    config: the checkpoint's.
    plan: a Plan, or None for the recommended one, or for the formats that the checkpoint holds if
        it is quantized already.

    Raises CheckpointError if it is quantized by something other than bitsandbytes, and PlanError
    if `plan` asks for other quantized formats than it holds.
    """
    if not getattr(config, "quantization_config", None):
        return layout_for(config, Plan.parse(plan), trust_remote_code)
    method = _method(config.quantization_config)
    if method not in _METHODS:
        raise CheckpointError(
            f"{folder} holds weights quantized by {method}, which vlmkit does not read. Load the "
            "checkpoint that they were made from, under a plan."
        )
    model = on_meta(config, trust_remote_code=trust_remote_code)
    stored = stored_formats(folder, model)
    if plan is None:
        return plan_of_formats(stored, model).resolve(model)
    layout = Plan.parse(plan).resolve(model)
    _require_same(folder, layout, stored)
    return layout


def _method(quantization_config):
    if not isinstance(quantization_config, dict):
        quantization_config = quantization_config.to_dict()
    method = quantization_config.get("quant_method", "bitsandbytes")  # not said in old files
    return str(getattr(method, "value", method))


def _require_same(folder, layout, stored):
    wrong = [
        (row.name, stored[row.name], row.format)
        for row in layout.rows
        if row.name in stored
        and stored[row.name] != row.format
        and (FORMATS[row.format].quantized or FORMATS[stored[row.name]].quantized)
    ]
    if wrong:
        lines = "\n  ".join(f"{name}: holds {has}, asked for {ask}" for name, has, ask in wrong[:5])
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise PlanError(
            f"{folder} is quantized already, and not as the plan asks, in {len(wrong)} weights:\n"
            f"  {lines}{more}\nA plan cannot give back the bits that are gone, and quantizing "
            "again would lose more. Leave the plan out to load what is stored, or load the "
            "checkpoint that this one was made from under your plan."
        )


def stored_formats(folder, model):
    """{full parameter name in `model`: name of the format that it is stored in}.

    model: on the meta device. Raises CheckpointError if a file is missing or damaged.
    """
    from safetensors import safe_open

    check_weights(folder)
    dtypes = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            keys = weights.keys()
            dtypes.update({key: weights.get_slice(key).get_dtype() for key in keys})
    rename = _renamer(model)
    formats = {}
    for key, dtype in dtypes.items():
        four_bits = _STATE.search(key)
        if four_bits:
            key = key[: four_bits.start()]
            name = four_bits[1] + "-dq" * (f"{key}.nested_absmax" in dtypes)
        elif key.endswith(".SCB"):
            key, name = f"{key.removesuffix('.SCB')}.weight", "int8"
        elif dtype in _FLOATS:
            name = _FLOATS[dtype]
        else:  # packed weights, whose state tells, or what is no weight
            continue
        key = rename(key)
        if name in FORMATS and FORMATS[name].quantized or key not in formats:
            formats[key] = name
    return {n: formats[n] for n, _ in model.named_parameters() if n in formats}


def _renamer(model):
    """transformers' own way from a checkpoint's names to a model's, which are not always the same.

    A mistake here would be found: what is loaded is audited against what is read from the names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    names = model.state_dict()

    def rename(key):
        new, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        return key if new not in names and key in names else new

    return rename


def plan_of_formats(formats, model):
    """The Plan under which `model` (on the meta device) holds each parameter in the format that
    `formats` ({full name: format name}) gives: a format for each component, and overrides for what
    differs from its component.

    Beside quantized weights fp16 counts as bf16, which is what a plan has there.
    Raises CheckpointError if no plan says so.
    """
    layouts = {
        name: Plan.uniform(name).resolve(model).rows for name in {DEFAULT, *formats.values()}
    }
    rows = layouts[DEFAULT]
    quantized = {row.component for row in rows if FORMATS[formats.get(row.name, DEFAULT)].quantized}
    wanted = {}
    for row in rows:
        name = formats.get(row.name)  # None: the other name of a tied weight, or not stored
        halved = name == "fp16" and row.component in quantized
        wanted[row.name] = DEFAULT if halved else name
    given = {
        (name, row.name): row.format for name, layout in layouts.items() for row in layout
    }  # what a parameter gets if its component is asked for in the format `name`

    def agrees(name, row, override=False):
        gets = given[name, row.name]
        if override and FORMATS[name].quantized and row.convertible:
            gets = name
        return wanted[row.name] in (None, gets)

    base = {}
    for component in COMPONENTS:
        own = [row for row in rows if row.component == component]
        candidates = sorted({wanted[row.name] or DEFAULT for row in own})
        if own:
            base[component] = max(
                candidates,
                key=lambda c: (
                    sum(prod(r.shape) for r in own if agrees(c, r)),
                    FORMATS[c].quantized,
                ),
            )
    plan = Plan(**base)
    for prefix, name in _overrides("", rows, base, wanted, agrees):
        plan = plan.override(rf"^{re.escape(prefix)}\.", name)
    return plan


def _overrides(prefix, rows, base, wanted, agrees):
    """(module, format) of the outermost modules that hold something else than their component."""
    wrong = [row for row in rows if not agrees(base[row.component], row)]
    if not wrong:
        return
    for name in Counter(wanted[row.name] for row in wrong) if prefix else ():
        if all(agrees(name, row, override=True) for row in rows):
            yield prefix, name
            return
    start = len(prefix) + 1 if prefix else 0
    inside = {}
    for row in rows:
        if row.module == prefix:
            if row in wrong:
                raise CheckpointError(
                    f"{row.name} is held in {wanted[row.name]}, and its neighbors are not: no "
                    "plan says that."
                )
            continue
        inside.setdefault(row.module[start:].partition(".")[0], []).append(row)
    for child, own in inside.items():
        yield from _overrides(f"{prefix}.{child}".lstrip("."), own, base, wanted, agrees)
