"""What was trained, on disk: adapters as peft writes them, beside them what was trained in full.

    vk.finetuning.save(model, "my-adapters")
    model = vk.finetuning.load(base, "my-adapters")        # base: loaded under any plan
    model, report = vk.finetuning.merge(model)             # an ordinary model again

peft alone writes adapters only, so that a projector that was trained in full would be lost. The
folder also notes the base, since adapters fit every model of the same shape but belong to one. It
lists its files with their hashes, so that none can be lost or changed without an error.

Plain peft loads the folder too. Modules that were trained in full are in the adapters' file as its
`modules_to_save`, as far as it has this for them; README.md in the folder says what it cannot load.
"""

import hashlib
import json
import os
from pathlib import Path

from vlmkit.anatomy import component_finder, is_adapter, plain_name, shape_of, unwrapped
from vlmkit.errors import FinetuningError, brief, public
from vlmkit.folders import whole_folder

NOTES, IN_FULL, ADAPTERS = "vlmkit.json", "trained_in_full.safetensors", "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PARTS = (IN_FULL, ADAPTERS, WEIGHTS)


@public
def save(model, path, *, overwrite=False):
    """Write what is trained in `model` to the folder `path`. Returns its pathlib.Path.

    model: what `add_adapters` or `load` returned.
    overwrite: whether a folder that exists and is not empty is replaced.

    The whole folder appears at once, or nothing. If there are several processes, all of them call
    `save`, and the first one writes. Raises FinetuningError if nothing is trained, and
    CheckpointError if the folder exists or cannot be written.
    """
    tensors = gathered(model)
    if os.environ.get("RANK", "0") == "0":
        with whole_folder(path, overwrite=overwrite) as folder:
            write(model, folder, tensors)
            _write_for_peft(model, folder)
    return Path(path).expanduser().resolve()


def gathered(model):
    """{full name: tensor} of what `write` needs, gathered where FSDP has sharded it: every process
    has to call this."""
    return {
        name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or is_adapter(name) or parameter.dim() == 1
    }


def write(model, folder, tensors):
    """Write the files of `save` to a folder that exists. tensors: what `gathered` returned."""
    from safetensors.torch import save_file

    in_full = {
        plain_name(name): tensors[name].detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapter(name)
    }
    adapters = hasattr(model, "peft_config")
    if not in_full and not adapters:
        raise FinetuningError(
            "nothing in this model is trained: begin with vk.finetuning.add_adapters"
        )
    if adapters:
        model.save_pretrained(folder, state_dict=tensors)
    if in_full:
        save_file(in_full, folder / IN_FULL)
    notes = {"base": unwrapped(model).name_or_path, "fingerprint": _fingerprint(model, tensors)}
    _write_notes(folder, notes)


def _write_notes(folder, notes):
    """Write the notes of a folder, with a list of its files and their hashes."""
    notes["files"] = {file: _hash_of(folder / file) for file in PARTS if (folder / file).exists()}
    (folder / NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def _hash_of(file):
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_for_peft(model, folder):
    """Add what plain peft needs to load modules that were trained in full, and a README.md that
    says what it loads."""
    from safetensors.torch import load_file, save_file

    notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    in_full = load_file(folder / IN_FULL) if (folder / IN_FULL).exists() else {}
    held = {}
    if (folder / ADAPTERS).exists() and in_full:
        modules = _whole_modules(unwrapped(model), in_full)
        held = {n: t for n, t in in_full.items() if any(n.startswith(f"{m}.") for m in modules)}
        adapters = load_file(folder / WEIGHTS)
        adapters |= {f"base_model.model.{name}": tensor for name, tensor in held.items()}
        save_file(adapters, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
        config["modules_to_save"] = modules or None
        (folder / ADAPTERS).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        _write_notes(folder, notes)
    lost = sorted(in_full.keys() - held.keys())
    (folder / "README.md").write_text(_readme(folder, notes["base"], held, lost), encoding="utf-8")


def _whole_modules(model, in_full):
    """Full names of the outermost modules of which every parameter is in `in_full`. peft can put a
    copy in the place of each of them, but not in the place of a list of modules."""
    from torch.nn import ModuleDict, ModuleList

    found = []
    for path, module in model.named_modules():
        names = {plain_name(f"{path}.{name}") for name, _ in module.named_parameters()}
        inside = any(f"{path}.".startswith(f"{other}.") for other in found)
        whole = path and names and names <= in_full.keys()
        if whole and not inside and not isinstance(module, (ModuleList, ModuleDict)):
            found.append(path)
    return found


def _readme(folder, base, held, lost):
    lines = [
        "# Adapters, written by vlmkit",
        "",
        f"Trained on: {base or 'a model without a name'}",
        "",
        "    model, processor = vk.load(base)",
        "    model = vk.finetuning.load(model, folder)",
        "",
        "`vlmkit merge FOLDER OUT` merges everything into the base and saves an ordinary model.",
        "",
    ]
    if not (folder / ADAPTERS).exists():
        lines.append(
            "Plain peft cannot load this folder: it has no adapters, only parameters that were "
            f"trained in full, in {IN_FULL}."
        )
    else:
        lines.append(
            "Plain peft loads it too: `peft.PeftModel.from_pretrained(model, folder)`. It then has "
            f"the adapters{' and what was trained in full' if held else ''}."
        )
    if lost and (folder / ADAPTERS).exists():
        lines += ["", "**Plain peft leaves out these parameters, which were trained in full:**", ""]
        lines += [f"- {name}" for name in lost]
    return "\n".join(lines) + "\n"


@public
def load(model, path, *, trainable=False):
    """`model` with what was saved at `path` put into it, in place: adapters, and parameters that
    were trained in full. Returns a PeftModel, or the model itself where there are no adapters.

    model: the base, under any plan that does not quantize what was trained in full.
    trainable: whether training goes on; otherwise everything is frozen, in eval mode.

    Raises FinetuningError if `path` holds nothing that `save` wrote, if one of its files is missing
    or was changed, if it was trained on another base, or if its parameters do not fit.
    """
    path = Path(path).expanduser()
    if hasattr(model, "peft_config"):
        raise FinetuningError("the model has adapters already: take them off with model.unload()")
    notes = notes_of(path)
    _require_base(model, path, notes)
    in_full = _put_in_full(model, path)
    model.requires_grad_(False)
    if (path / ADAPTERS).exists():
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(str(path))
        config.modules_to_save = None  # what was trained in full is in its place already
        config.inference_mode = not trainable
        model = PeftModel.from_pretrained(model, path, is_trainable=trainable, config=config)
    if trainable:
        for name, parameter in model.named_parameters():
            if plain_name(name) in in_full:
                parameter.requires_grad_(True)
    return model.train(trainable)


def notes_of(path):
    """The notes of the folder `path`, all of whose files are there and unchanged: a dictionary with
    "base", "fingerprint" and "files". Notes without a list, as an earlier vlmkit wrote them, are
    taken only where every file is there that such a folder can have: then none can be lost.

    Raises FinetuningError otherwise.
    """
    path = Path(path).expanduser()
    if not (path / NOTES).is_file():
        raise FinetuningError(
            f"{path} holds nothing that vk.finetuning.save wrote: there is no {NOTES}. Adapters of "
            "peft alone load with peft.PeftModel.from_pretrained(model, path)."
        )
    try:
        notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
        files = dict(notes.get("files") or dict.fromkeys(PARTS))
        notes["fingerprint"]["means"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FinetuningError(
            f"{path / NOTES} is damaged ({brief(error)}). Copy the folder again, or save the "
            "adapters again."
        ) from error
    for file in PARTS:
        if (file in files) != (path / file).is_file():
            found = "is missing" if file in files else "does not belong to it"
            raise FinetuningError(
                f"{path / file} {found}, according to {NOTES}. Without it, the model would be "
                "another one than was trained. Copy the whole folder again."
            )
        if files.get(file) and _hash_of(path / file) != files[file]:
            raise FinetuningError(
                f"{path / file} was changed or damaged after it was saved: its hash is not the "
                f"one in {NOTES}. Copy the whole folder again."
            )
    return notes


def restore(model, path):
    """Put what `write` wrote back into the model that it was written from, in place."""
    path = Path(path)
    _put_in_full(model, path)
    if (path / ADAPTERS).exists():
        from peft import load_peft_weights

        adapter = f".{model.active_adapter}.weight"  # peft leaves the adapter's name out in files
        stored = load_peft_weights(str(path), device="cpu")
        stored = {f"{name.removesuffix('.weight')}{adapter}": t for name, t in stored.items()}
        _put(model, {plain_name(name): tensor for name, tensor in stored.items()}, path)


def _put_in_full(model, path):
    """Copy what was trained in full into `model`. Returns its names."""
    from safetensors.torch import load_file

    stored = load_file(path / IN_FULL) if (path / IN_FULL).exists() else {}
    _put(model, stored, path)
    return stored.keys()


def _put(model, stored, path):
    """Copy the tensors `stored`, {plain name: tensor}, into `model`: all of them, or none."""
    import torch

    held = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in stored.items():
        if name not in held or shape_of(held[name]) != tuple(tensor.shape):
            found = f"has shape {shape_of(held[name])}" if name in held else "does not exist"
            raise FinetuningError(
                f"{path} holds {name}, of shape {tuple(tensor.shape)}; in this model it {found}."
            )
        if not held[name].is_floating_point():
            raise FinetuningError(
                f"{name} was trained in full, and in this model it is quantized: load the base "
                "under a plan that keeps it in a float format."
            )
    with torch.no_grad():
        for name, tensor in stored.items():
            held[name].copy_(_sharded_like(held[name], tensor))


def _sharded_like(parameter, tensor):
    """`tensor`, sharded as `parameter` is where FSDP has sharded it."""
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(parameter.device, parameter.dtype)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


# --- the base -------------------------------------------------------------------------------------


def _fingerprint(model, tensors):
    """What identifies a base under any plan: {"architecture", "means"}, where means has the mean
    magnitude of the first 64 frozen vectors (norms and biases), which are never quantized."""
    means = {}
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad or is_adapter(name)
        if len(means) < 64 and parameter.dim() == 1 and not trained:
            means[plain_name(name)] = _mean_of(tensors[name])
    return {"architecture": type(unwrapped(model)).__name__, "means": means}


def _mean_of(vector):
    return vector.detach().float().abs().mean().item()


def _require_base(model, path, notes):
    """Raise FinetuningError if `model` is not the base that the notes at `path` describe."""
    wanted, found = notes["fingerprint"]["architecture"], type(unwrapped(model)).__name__
    held = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    wrong = [f"that is a {wanted}, and this a {found}"] if found != wanted else []
    for name, mean in notes["fingerprint"]["means"].items():
        if name not in held:
            wrong.append(f"{name} is not in this model")
        elif abs(_mean_of(held[name]) - mean) > 0.01 * mean + 1e-6:
            wrong.append(f"{name} differs")
    if wrong:
        raise FinetuningError(
            f"{path} was trained on {notes['base'] or 'another model'}, and this model is another: "
            f"{wrong[0]}. Load that one, and give what vk.load returns."
        )


# --- merging --------------------------------------------------------------------------------------


@public
def merge(model):
    """The adapters merged into the weights: (the model without adapters, a report).

    Each weight W becomes W + (lora_alpha / r) B A, rounded to W's format. A quantized weight is
    quantized again, and the adapter's change can be smaller than the steps of its format.
    The report is a DataFrame with a row per component and format: modules, and lost, the length of
    (merged - wanted) over the length of the adapters' change. 0 means that all of the change
    arrived, 1 that rounding undid as much as was learnt. In bf16 or fp32 less is lost.

    Raises FinetuningError if the model has no adapters.
    """
    import pandas

    from vlmkit.loading.audit import format_of

    if not hasattr(model, "peft_config"):
        raise FinetuningError(
            "the model has no adapters to merge: what is trained in full is part of it already"
        )
    component_of = component_finder(model)
    wanted = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and getattr(module, "lora_A", None):
            change = module.get_delta_weight(model.active_adapter).float().cpu()
            plain = plain_name(f"{name}.base_layer.weight")
            base = _weight_of(module.get_base_layer())
            wanted[plain] = (component_of(plain), base + change, change)
    model = model.merge_and_unload(safe_merge=True)
    rows = []
    for name, (component, weight, change) in wanted.items():
        module = model.get_submodule(name.rpartition(".")[0])
        missed = (_weight_of(module) - weight).square().sum().item()
        format = format_of(module, "weight")
        rows.append((component, format, 1, missed, change.square().sum().item()))
    columns = ["component", "format", "modules", "missed", "changed"]
    report = pandas.DataFrame(rows, columns=columns)
    report = report.groupby(["component", "format"], sort=False, as_index=False).sum()
    report["lost"] = (report["missed"] / report["changed"]).fillna(0.0) ** 0.5
    return model, report[["component", "format", "modules", "lost"]]


def _weight_of(layer):
    """The weight of a Linear layer in float32, dequantized where it is quantized."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float().cpu()
