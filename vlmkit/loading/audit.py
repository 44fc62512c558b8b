"""The audit: what every module of a loaded model really holds, against what the plan asked for."""

from dataclasses import replace

from vlmkit.anatomy import is_adapter, on_meta, plain_name, shape_of, unwrapped
from vlmkit.backend.storages import Storages, state_tensors
from vlmkit.errors import AuditError
from vlmkit.formats import BLOCK, FORMATS, format_of_dtype, torch_dtype
from vlmkit.loading.tables import Audit, Preview
from vlmkit.plan import Plan
from vlmkit.stored import plan_of_formats, planned


def preview(name, plan=None, *, revision=None, trust_remote_code=False):
    """What loading `name` under `plan` would give, as a table like the audit's, before a weight is
    read: formats and bytes of each component, and what the plan leaves alone.

    name: "pebble", a folder, a hub id, a transformers config, or a model (for its config).
    plan: a Plan or anything that `Plan.parse` takes; None is what it is for `vk.load`.

    Returns a Preview; its `left_alone()` lists what was asked to be quantized and cannot be.
    Raises CheckpointError, AnatomyError and PlanError as `vk.load` does.
    """
    _, layout = planned(name, plan, revision=revision, trust_remote_code=trust_remote_code)
    return Preview(layout.plan, layout.rows)


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
    modules = dict(model.named_modules())
    parameters = {}
    for full, parameter in model.named_parameters():
        module, _, leaf = full.rpartition(".")
        parameters[plain_name(full)] = modules[module], leaf, parameter
    adapters = {name for name in parameters if is_adapter(name)}
    rows = {row.name: row for row in layout.rows}
    problems = [f"{name}: not in the loaded model" for name in rows.keys() - parameters.keys()]
    problems += [
        f"{name}: loaded, and not in the architecture"
        for name in parameters.keys() - rows.keys() - adapters
    ]
    storages, held = Storages(), []
    for row in layout.rows:
        if row.name not in parameters:
            continue
        module, leaf, parameter = parameters[row.name]
        found, shape = format_of(module, leaf), shape_of(parameter)
        tensors = (parameter, *state_tensors(module, parameter))
        held.append(replace(row, format=found, bytes=sum(map(storages.nbytes, tensors))))
        wrong = _difference(row, found, shape, module)
        if wrong:
            problems.append(f"{row.name}: {wrong}")
    if problems:
        problems.sort()
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AuditError(
            f"what was loaded is not what the plan asked for, in {len(problems)} of {len(rows)} "
            "parameters:\n  " + "\n  ".join(problems[:8]) + more
        )
    return Audit(layout.plan, tuple(held))


def _difference(row, found, shape, module):
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
    return None if shape == row.shape else f"has shape {shape}, not {row.shape}"


def plan_of(model):
    """The plan that `model` satisfies: a format for each component, and an override for each
    module that differs from its component. `vk.audit(model, vk.loading.plan_of(model))` holds.

    model: any transformers VLM, loaded by vlmkit or not.

    Raises AuditError if a weight is in a format that no plan has, such as one that a forward pass
    has repacked (see vlmkit.backend.cpu), and CheckpointError if no plan says what is there.
    """
    model = unwrapped(model)
    formats = {}
    for name, _ in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        formats[plain_name(name)] = format_of(model.get_submodule(module), leaf)
    formats = {name: given for name, given in formats.items() if not is_adapter(name)}
    strange = [f"{name}: {given}" for name, given in formats.items() if given not in FORMATS]
    if strange:
        raise AuditError(
            f"{len(strange)} weights are in a format that no plan has:\n  "
            + "\n  ".join(strange[:5])
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
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return "4-bit, not quantized yet"
    return format_of_dtype(parameter.dtype)
