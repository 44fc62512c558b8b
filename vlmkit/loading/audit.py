"""The audit: what every module of a loaded model really holds, against what the plan asked for."""

from dataclasses import dataclass, field
from math import prod

from vlmkit import COMPONENTS
from vlmkit.anatomy import on_meta, shape_of, unwrapped
from vlmkit.errors import AuditError
from vlmkit.formats import BLOCK, FORMATS, format_of_dtype, torch_dtype
from vlmkit.memory import storages_of
from vlmkit.plan import Plan

MEGABYTE = 10**6


@dataclass(frozen=True)
class AuditRow:
    """One component: the format asked for, those found, modules with weights, parameters, bytes.

    kept: what has another format than the component's, and which: what bitsandbytes leaves alone,
        and what an override of the plan names.
    """

    component: str
    asked: str
    found: str
    modules: int
    parameters: int
    bytes: int
    kept: str = ""


@dataclass(frozen=True)
class Audit:
    """The result of an audit that found no difference."""

    rows: tuple = field(repr=False)

    @property
    def total(self):
        """Bytes of all parameters, with their quantisation states."""
        return sum(row.bytes for row in self.rows)

    def table(self):
        """A pandas DataFrame with a row for each component that the model has."""
        import pandas as pd

        columns = ["component", "asked", "found", "modules", "parameters", "bytes", "kept"]
        rows = [[getattr(row, c) for c in columns] for row in self.rows]
        return pd.DataFrame(rows, columns=columns).set_index("component")

    def _text_table(self):
        table = self.table()
        table["parameters"] = table["parameters"].map("{:,}".format)
        table.insert(4, "MB", (table.pop("bytes") / MEGABYTE).map("{:.2f}".format))
        return table.rename(columns={"kept": "besides"})

    def __str__(self):
        text = self._text_table().to_string()
        return f"{text}\ntotal {self.total / MEGABYTE:.2f} MB (1 MB = 10^6 bytes)"

    def _repr_html_(self):
        text = self._text_table().to_html()
        return f"{text}<p>total {self.total / MEGABYTE:.2f} MB (1 MB = 10<sup>6</sup> bytes)</p>"


def audit(model, plan):
    """Compare every module of `model` with `plan`. Returns an Audit, a row per component.

    model: one that `vk.load` returned, or any transformers VLM that was loaded in another way;
        PEFT's wrapper is looked through, and its adapters are left out of the count.
    plan: a Plan or anything that `Plan.parse` takes.

    Raises AuditError, naming the modules, where model and plan differ.
    """
    base = unwrapped(model)
    return audit_layout(
        base, Plan.parse(plan).resolve(on_meta(base.config, trust_remote_code=True))
    )


def audit_layout(model, layout):
    """Compare every parameter of `model` with its row in `layout`. See `audit`."""
    parameters = {plain_name(name): (name, p) for name, p in model.named_parameters()}
    adapters = {name for name in parameters if is_adapter(name)}
    rows = {row.name: row for row in layout.rows}
    problems = [f"{name}: not in the loaded model" for name in rows.keys() - parameters.keys()]
    problems += [
        f"{name}: loaded, and not in the architecture"
        for name in parameters.keys() - rows.keys() - adapters
    ]
    sizes = storages_of(model)
    found = {}
    for name in rows.keys() & parameters.keys():
        full, parameter = parameters[name]
        module = model.get_submodule(full.rpartition(".")[0])
        found[name] = (format_of(module, full.rpartition(".")[2]), prod(shape_of(parameter)), full)
        wrong = _difference(rows[name], found[name][0], module)
        if wrong:
            problems.append(f"{name}: {wrong}")
    if problems:
        problems.sort()
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AuditError(
            f"what was loaded is not what the plan asked for, in {len(problems)} of {len(rows)} "
            "parameters:\n  " + "\n  ".join(problems[:8]) + more
        )
    table = []
    for component in COMPONENTS:
        own = [row for row in layout.rows if row.component == component]
        if own:
            table.append(_row(component, layout.plan[component], own, found, sizes))
    return Audit(tuple(table))


def _difference(row, found, module):
    """What is wrong with the parameter of `row`, in words; None if nothing is."""
    if found != row.format:
        means = "" if row.asked == row.format else f", which for {row.kind} weights is {row.format}"
        return f"asked for {row.asked}{means}; found {found}"
    if FORMATS[row.format].bits == 4:
        state = module.weight.quant_state
        if state.blocksize != BLOCK:
            return f"{found} in blocks of {state.blocksize}, not {BLOCK}"
        if module.compute_dtype != torch_dtype(row.format):
            return f"computes in {module.compute_dtype}, not {torch_dtype(row.format)}"
    shape = shape_of(module.get_parameter(row.name.rpartition(".")[2]))
    return None if shape == row.shape else f"has shape {shape}, not {row.shape}"


def format_of(module, leaf):
    """Name of the format that a module's parameter `leaf` is really held in."""
    parameter = getattr(module, leaf)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            return f"{state.quant_type} repacked by a forward pass on the CPU"
        return state.quant_type + ("-dq" if state.nested else "")
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return "4-bit, not quantised yet"
    return format_of_dtype(parameter.dtype)


def _row(component, asked, own, found, sizes):
    quantized = FORMATS[asked].quantized
    formats = {}
    for row in own:
        formats.setdefault(found[row.name][0], []).append(row)
    others = {f: rows for f, rows in formats.items() if f != asked}
    kept = ", ".join(
        f"{f}: {', '.join(dict.fromkeys(row.kind for row in rows))}" for f, rows in others.items()
    )
    return AuditRow(
        component,
        asked,
        " + ".join(sorted(formats, key=lambda f: f != asked)) if quantized else " + ".join(formats),
        len({row.module for row in own}),
        sum(found[row.name][1] for row in own),
        sum(sizes[found[row.name][2]].bytes for row in own),
        kept,
    )


# --- looking through PEFT ---------------------------------------------------------------------


def plain_name(name):
    """The name that a parameter of a PEFT-adapted model has in the model without adapters."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def is_adapter(name):
    """Whether a (plain) name is that of a weight that PEFT added."""
    return any(
        part in ("modules_to_save", "lora_magnitude_vector") or part.startswith("lora_")
        for part in name.split(".")
    )
