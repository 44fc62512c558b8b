"""Preview and audit: what a load under a plan will give, and what a loaded model really holds."""

import textwrap
from collections import Counter
from dataclasses import dataclass, field, replace

from vlmkit import COMPONENTS
from vlmkit.anatomy import is_adapter, on_meta, plain_name, shape_of, unwrapped
from vlmkit.backend.storages import Storages, state_tensors
from vlmkit.errors import AuditError, public
from vlmkit.formats import BLOCK, FORMATS, format_of_dtype, torch_dtype
from vlmkit.layout import layout_of, plan_of_formats
from vlmkit.tables import Table
from vlmkit.units import MEGABYTE


@dataclass(frozen=True)
class Formats(Table):
    """The formats of a model's parameters under a plan. `rows`: a `vlmkit.rows.Row` for each."""

    plan: object = field(repr=False)
    rows: tuple = field(repr=False)
    found = "found"

    @property
    def total(self):
        """Bytes of all parameters, with their quantization states."""
        return sum(row.bytes for row in self.rows)

    def table(self):
        """A pandas DataFrame with a row for each component that the model has: the format asked
        for, the formats found, modules with weights, parameters, bytes, and in `kept` the rows that
        have another format than their component's, in MB, most first."""
        import pandas as pd

        rows = {}
        for component in COMPONENTS:
            own = [row for row in self.rows if row.component == component]
            if own:
                rows[component] = _summary(self.plan[component], own)
        columns = ["asked", self.found, "modules", "parameters", "bytes", "kept"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        return table.rename_axis("component")

    def left_alone(self):
        """A pandas DataFrame of what the plan asks to quantize and what is not quantized: by
        component and kind of parameter, with the bytes, most first. `why` is the reason where the
        kind does not say it."""
        import pandas as pd

        columns = ["component", "kind", "why", "format", "parameters", "bytes"]
        rows = [
            (row.component, row.kind, row.note, row.format, row.parameters, row.bytes)
            for row in self.rows
            if FORMATS[row.asked].quantized and row.format != row.asked
        ]
        table = pd.DataFrame(rows, columns=columns).groupby(columns[:4], sort=False).sum()
        table = table.sort_values("bytes", ascending=False, kind="stable")
        return table.reset_index(columns[1:4])

    def _text_table(self):
        table = self.table().drop(columns="kept")
        table["parameters"] = table["parameters"].map("{:,}".format)
        table.insert(4, "MB", (table.pop("bytes") / MEGABYTE).map("{:.2f}".format))
        return table

    def _remarks(self):
        yield f"total {self.total / MEGABYTE:.2f} MB (1 MB = 10^6 bytes)"
        kept = self.table()["kept"]
        others = [f"{component} {text}" for component, text in kept.items() if text]
        if others:
            yield "in other formats, in MB:"
        for text in others:
            yield textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="    ")


@dataclass(frozen=True)
class Preview(Formats):
    """What a load under a plan will give, predicted to the byte. hint: what `vk.load` would warn
    of, or an empty string."""

    hint: str = field(default="", repr=False)
    found = "gets"

    def _remarks(self):
        yield from super()._remarks()
        if self.hint:
            yield textwrap.fill(self.hint, 98)


class Audit(Formats):
    """The result of an audit that found no difference: the format that holds every parameter."""


def _summary(asked, rows):
    """A component's line of `Formats.table`."""
    formats = sorted(dict.fromkeys(row.format for row in rows), key=lambda f: f != asked)
    others = {name: Counter() for name in formats if name != asked}
    for row in rows:
        if row.format != asked:
            what = f"{row.kind} ({row.note})" if row.note else row.kind
            others[row.format][what] += row.bytes
    return (
        asked,
        " + ".join(formats),
        len({row.module for row in rows}),
        sum(row.parameters for row in rows),
        sum(row.bytes for row in rows),
        "; ".join(f"{name}: {_in_megabytes(sizes)}" for name, sizes in others.items()),
    )


def _in_megabytes(sizes):
    """A Counter of bytes as "what MB, what MB", most first."""

    def megabytes(size):
        if size < MEGABYTE / 2000:
            return "<0.001"
        digits = 3 if size < MEGABYTE / 10 else 2
        return f"{size / MEGABYTE:.{digits}f}"

    return ", ".join(f"{what} {megabytes(size)}" for what, size in sizes.most_common())


@public
def preview(name, plan=None, *, revision=None, trust_remote_code=False):
    """What loading `name` under `plan` would give, before a weight is read: a table like the
    audit's, with the formats and bytes of each component, and what the plan leaves alone.

    name: "pebble", a folder, a hub id, a transformers config, or a model (for its config).
    plan: a Plan or anything that `Plan.parse` takes. None is what it is for `vk.load`.

    Returns a Preview. Its `left_alone()` lists what was asked to be quantized and cannot be.
    Raises CheckpointError, AnatomyError and PlanError as `vk.load` does.
    """
    layout = layout_of(name, plan, revision=revision, trust_remote_code=trust_remote_code)
    return Preview(layout.plan, layout.rows, layout.projector_hint)


@public
def audit(model, plan):
    """Compare every module of `model` with `plan`. Returns an Audit, a row per component.

    model: any transformers VLM, loaded by `vk.load` or not. Inside PEFT's wrapper the model itself
        is audited, without the adapters.
    plan: a Plan or anything that `Plan.parse` takes.

    Raises AuditError, naming the modules, where model and plan differ.
    """
    model = unwrapped(model)
    return audit_layout(model, layout_of(model, plan))


def audit_layout(model, layout):
    """Compare every parameter of `model` with its row in `layout`. See `audit`."""
    places = _places(model)
    extra = places.keys() - {row.name for row in layout.rows}
    problems = [f"{name}: loaded, and not in the architecture" for name in extra]
    storages, held = Storages(), []
    for row in layout.rows:
        if row.name not in places:
            problems.append(f"{row.name}: not in the loaded model")
            continue
        module, leaf = places[row.name]
        parameter, found = getattr(module, leaf), format_of(module, leaf)
        tensors = (parameter, *state_tensors(module, parameter))
        held.append(replace(row, format=found, bytes=sum(map(storages.nbytes, tensors))))
        wrong = _difference(row, found, shape_of(parameter), module)
        if wrong:
            problems.append(f"{row.name}: {wrong}")
    if problems:
        problems.sort()
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AuditError(
            f"what was loaded is not what the plan asked for, in {len(problems)} of "
            f"{len(layout.rows)} parameters:\n  " + "\n  ".join(problems[:8]) + more + "\n"
            "vk.loading.plan_of(model) is the plan that it satisfies."
        )
    return Audit(layout.plan, tuple(held))


def _places(model):
    """{full name of a parameter: (its module, its name there)}, without PEFT's adapters."""
    modules = dict(model.named_modules())
    names = [name for name, _ in model.named_parameters() if not is_adapter(name)]
    split = {plain_name(name): name.rpartition(".") for name in names}
    return {name: (modules[module], leaf) for name, (module, _, leaf) in split.items()}


def _difference(row, found, shape, module):
    """What is wrong with the parameter of `row`, in words. None if nothing is."""
    if found != row.format:
        means = "" if row.asked == row.format else f", which for {row.kind} weights is {row.format}"
        return f"asked for {row.asked}{means}; found {found}"
    if FORMATS[row.format].bits == 4:
        state = module.weight.quant_state
        if state.blocksize != BLOCK:
            return f"{found} in blocks of {state.blocksize}, not {BLOCK}"
        if module.compute_dtype != torch_dtype(row.format):
            return f"computes in {module.compute_dtype}, not {torch_dtype(row.format)}"
    return None if shape == row.shape else f"has shape {shape}, not {row.shape}"


@public
def plan_of(model):
    """The plan that `model` satisfies: a format for each component, and an override for each
    module that differs from its component. `vk.audit(model, vk.loading.plan_of(model))` holds.

    model: any transformers VLM, loaded by vlmkit or not.

    Raises AuditError if a weight is in a format that no plan has, such as a weight that a forward
    pass has repacked (see vlmkit.backend.cpu). Raises CheckpointError if no plan describes the
    model.
    """
    model = unwrapped(model)
    formats = {name: format_of(*place) for name, place in _places(model).items()}
    strange = [f"{name}: {given}" for name, given in formats.items() if given not in FORMATS]
    if strange:
        raise AuditError(
            f"{len(strange)} weights are in a format that no plan has:\n  "
            + "\n  ".join(strange[:5])
            + "\nLoad the model again with vk.load."
        )
    return plan_of_formats(formats, on_meta(model.config, trust_remote_code=True))


def format_of(module, leaf):
    """Name of the format that a module's parameter `leaf` is really held in."""
    parameter = getattr(module, leaf)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            return f"{state.quant_type} repacked by a forward pass on the CPU"
        return state.quant_type + ("-dq" if state.nested else "")
    if type(parameter).__name__ == "Params4bit":
        return "4-bit, not quantized yet"
    return format_of_dtype(parameter.dtype)
