"""What was trained, on disk: adapters as peft writes them, beside them what was trained in full.

    vk.finetuning.save(model, "my-adapters")
    model = vk.finetuning.load(base, "my-adapters")        # base: loaded under any plan
    model, report = vk.finetuning.merge(model)             # an ordinary model again

peft alone writes adapters only, so that a projector that was trained in full would be lost. The
folder also notes the base, since adapters fit every model of the same shape but belong to one. It
lists its files with their hashes, so that none can be lost or changed without an error.

Plain peft loads the folder too. Modules that were trained in full are in the adapters' file as its
`modules_to_save`, as far as it has this for them. README.md in the folder says what peft cannot
load, and peft says it in a warning when it loads the folder. docs/from_vlmkit.md has the details.
"""

import hashlib
import json
import re
import warnings
from pathlib import Path

from vlmkit.anatomy import component_finder, is_adapter, is_packed, plain_name, shape_of, unwrapped
from vlmkit.backend import dora, processes, sharding
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.errors import FinetuningError, brief, public
from vlmkit.folders import whole_folder

NOTES, IN_FULL, ADAPTERS = "vlmkit.json", "trained_in_full.safetensors", "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PARTS = (IN_FULL, ADAPTERS, WEIGHTS)
LEFT_OUT = "peft leaves out parameters that were trained in full (see README.md): "
"""The beginning of a key in adapter_config.json. peft ignores a key that it does not know and names
it in a warning. Nothing else in this file makes plain peft say that a parameter is missing."""


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
    if processes.is_first():
        with whole_folder(path, overwrite=overwrite) as folder:
            write(model, folder, tensors)
            _write_for_peft(model, folder)
    return Path(path).expanduser().resolve()


def gathered(model):
    """{full name: tensor} of what `write` needs. Shards are gathered, one after another, in the
    host's memory of the first process, and every process has to call this."""
    sharding.reshard(model)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or is_adapter(name) or parameter.dim() == 1:
            tensor = sharding.whole(parameter)
            if tensor is parameter or processes.is_first():
                tensors[name] = tensor if tensor is parameter else tensor.cpu()
    return tensors


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
        model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)
    if in_full:
        save_file(in_full, folder / IN_FULL)
    _write_notes(folder, {"base": _base_of(model), "fingerprint": _fingerprint(model, tensors)})


def _base_of(model):
    """The name of the base, for people and for other machines: a hub id rather than a folder in the
    hub's cache, the name of a model of the course, or else the full path of a folder."""
    name = unwrapped(model).name_or_path or ""
    path = Path(name).resolve()
    if not (name and path.is_dir()):
        return name
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]\w+$", str(path))
    if cached:
        return "/".join(cached.groups())
    own = (bundled.name for bundled in BUNDLED.values() if bundled.folder.resolve() == path)
    return next(own, str(path))


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
    lost = sorted(in_full)
    if (folder / ADAPTERS).exists():
        config = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
        if notes["base"] not in ("", *BUNDLED):  # transformers does not know the course's models
            config["base_model_name_or_path"] = notes["base"]
        modules, held = _held_by_peft(unwrapped(model), in_full)
        lost = sorted(in_full.keys() - held.keys())
        if modules:
            adapters = load_file(folder / WEIGHTS)
            adapters |= {f"base_model.model.{name}": tensor for name, tensor in held.items()}
            save_file(adapters, folder / WEIGHTS, metadata={"format": "pt"})
            config["modules_to_save"] = modules
        if lost:
            config[LEFT_OUT + ", ".join(lost)] = True
        (folder / ADAPTERS).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        _write_notes(folder, notes)
    text = _readme(folder, notes["base"], in_full, lost)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _held_by_peft(model, in_full):
    """(full names of modules, {name: tensor of them}): what of `in_full` peft can load, by putting
    a copy in the place of a module of which every parameter was trained.

    The modules are the outermost ones. A list of modules is none of them, since peft cannot copy
    it. An output head that is tied to the embedding is a copy of its own, and has its own tensor.
    """
    from torch.nn import ModuleDict, ModuleList

    trained = {id(p): in_full.get(plain_name(name)) for name, p in model.named_parameters()}
    modules, held = [], {}
    for path, module in model.named_modules():
        inside = {
            plain_name(f"{path}.{name}"): trained[id(parameter)]
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        whole = path and inside and all(tensor is not None for tensor in inside.values())
        covered = inside.keys() <= held.keys()
        if whole and not covered and not isinstance(module, (ModuleList, ModuleDict)):
            modules.append(path)
            held |= {name: tensor.clone() for name, tensor in inside.items()}
    return modules, held


def _readme(folder, base, in_full, lost):
    """The text of README.md. lost: the names of `in_full` that plain peft cannot load."""
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
        return "\n".join(lines) + "\n"
    both = " and what was trained in full" if len(lost) < len(in_full) else ""
    lines.append(
        "Plain peft loads it too: `peft.PeftModel.from_pretrained(model, folder)`. It then has "
        f"the adapters{both}."
    )
    fine = sorted({str(t.dtype).removeprefix("torch.") for t in in_full.values()} - {"bfloat16"})
    if both and fine:
        lines.append(
            f"What was trained in full is {' and '.join(fine)} here. peft rounds it to the dtype "
            "in which the base was loaded."
        )
    if lost:
        lines += [
            "",
            "**Plain peft leaves out these parameters, which were trained in full.** It says so in "
            "a warning. Without them, the model is another one than was trained:",
            "",
            *(f"- {name}" for name in lost),
        ]
    return "\n".join(lines) + "\n"


@public
def load(model, path, *, trainable=False):
    """`model` with what was saved at `path` put into it, in place: adapters, and parameters that
    were trained in full. Returns a PeftModel, or the model itself where there are no adapters.

    model: the base, under any plan that does not quantize what was trained in full.
    trainable: whether training goes on; otherwise everything is frozen, in eval mode.

    Warns if what was trained in full is rounded to a coarser format of the base, and how much of
    what was learnt that loses.

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

        said = json.loads((path / ADAPTERS).read_text(encoding="utf-8"))
        config = PeftConfig.from_peft_type(
            **{name: value for name, value in said.items() if not name.startswith(LEFT_OUT)}
        )
        config.modules_to_save = None  # what was trained in full is in its place already
        config.inference_mode = not trainable
        with warnings.catch_warnings():
            # peft 0.21 asks transformers about checkpointing by its older name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            model = PeftModel.from_pretrained(model, path, is_trainable=trainable, config=config)
        if config.use_dora:
            dora.keep_scales(model)
    if trainable:
        for name, parameter in model.named_parameters():
            if plain_name(name) in in_full:
                parameter.requires_grad_(True)
    if sharding.is_sharded(model):
        sharding.shard(model)
    return model.train(trainable)


def notes_of(path):
    """The notes of the folder `path`, all of whose files are there and unchanged: a dictionary with
    "base", "fingerprint" and "files". Notes without a list, as an earlier vlmkit wrote them, are
    taken only where every file is there that such a folder can have: then none can be lost.

    Raises FinetuningError otherwise.
    """
    path = Path(path).expanduser()
    if not (path / NOTES).is_file():
        inside = path / "adapters"  # of an output folder of `vlmkit train`
        raise FinetuningError(
            f"{path} holds nothing that vk.finetuning.save wrote: there is no {NOTES}. "
            + (
                f"Give {inside}."
                if (inside / NOTES).is_file()
                else "Adapters of peft alone load with peft.PeftModel.from_pretrained(model, path)."
            )
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
    _put(model, stored, path, warn=True)
    return stored.keys()


def _put(model, stored, path, warn=False):
    """Copy the tensors `stored`, {plain name: tensor}, into `model`: all of them, or none.

    warn: whether to warn of what is lost where they are rounded.
    """
    import torch

    sharding.reshard(model)
    held = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in stored.items():
        if name not in held or shape_of(held[name]) != tuple(tensor.shape):
            found = f"has shape {shape_of(held[name])}" if name in held else "does not exist"
            raise FinetuningError(
                f"{path} holds {name}, of shape {tuple(tensor.shape)}; in this model it {found}."
            )
        if is_packed(held[name]):
            raise FinetuningError(
                f"{name} was trained in full, and in this model it is quantized: load the base "
                "under a plan that keeps it in a float format."
            )
    missed = changed = 0.0
    with torch.no_grad():
        for name, tensor in stored.items():
            if warn and tensor.dtype != held[name].dtype:
                before = sharding.whole(held[name]).cpu().float()
                rounded = tensor.to(held[name].dtype)
                missed += (rounded.float() - tensor).square().sum().item()
                changed += (tensor - before).square().sum().item()
            held[name].copy_(_sharded_like(held[name], tensor))
    if missed > 0.01**2 * changed:
        warnings.warn(
            f"What was trained in full in {path} is finer than the format that this model has for "
            f"it. Rounding loses {(missed / changed) ** 0.5:.4f} of what was learnt (0: nothing; "
            "1: as much as was learnt). To keep it, load the base under a plan with the format of "
            "the training, such as projector=fp32.",
            stacklevel=5,
        )


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
    return sharding.whole(vector).detach().float().abs().mean().item()


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

    Each weight W becomes W + (lora_alpha / r) B A, rounded once to W's format. A quantized
    weight is quantized again, and the adapter's change can be smaller than its format's steps.
    The report is a DataFrame with a row per component and format: modules, and lost, the length of
    (merged - wanted) over the length of the adapters' change. 0 means that all of the change
    arrived, 1 that rounding undid as much as was learnt. In bf16 or fp32 less is lost.

    Raises FinetuningError if the model has no adapters, or if they are not finite.
    """
    import pandas

    from vlmkit.loading.audit import format_of

    sharding.require_whole(model, "merged")
    if not hasattr(model, "peft_config"):
        raise FinetuningError(
            "the model has no adapters to merge: what is trained in full is part of it already"
        )
    damaged = [n for n, p in model.named_parameters() if is_adapter(n) and not p.isfinite().all()]
    if damaged:
        raise FinetuningError(f"{plain_name(damaged[0])} is not finite: the adapters are damaged.")
    component_of, rows = component_finder(model), []
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_delta_weight") and getattr(module, "lora_A", None):
            layer = module.get_base_layer()
            before = _weight_of(layer)
            wanted = _merged_in_float32(module, model.active_adapter, before)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Merge lora module to")  # rows has it in numbers
                # With safe_merge, peft rounds the adapter's change first, and then the sum too.
                module.merge()
            missed = (_weight_of(layer) - wanted).square().sum().item()
            component = component_of(plain_name(f"{name}.base_layer.weight"))
            changed = (wanted - before).square().sum().item()
            rows.append((component, format_of(layer, "weight"), 1, missed, changed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        model = model.merge_and_unload()
    columns = ["component", "format", "modules", "missed", "changed"]
    report = pandas.DataFrame(rows, columns=columns)
    report = report.groupby(["component", "format"], sort=False, as_index=False).sum()
    report["lost"] = (report["missed"] / report["changed"]).fillna(0.0) ** 0.5
    return model, report[["component", "format", "modules", "lost"]]


def _merged_in_float32(module, adapter, base):
    """What the weight of an adapted layer should become, in float32. base: its weight before."""
    from torch.nn import Linear

    kind = getattr(module, "lora_variant", {}).get(adapter)
    if kind is None:
        return base + module.get_delta_weight(adapter).float().cpu()
    # Such as DoRA, which reads the layer that it adapts: it gets one that nothing is rounded in.
    own, plain = module.base_layer, Linear(*reversed(base.shape), bias=False)
    plain.weight.data = base.to(module.lora_A[adapter].weight.device)
    module.base_layer = plain
    try:
        return kind.merge_safe(module, adapter, plain.weight.data.clone()).detach().float().cpu()
    finally:
        module.base_layer = own


def _weight_of(layer):
    """The weight of a Linear layer in float32, dequantized where it is quantized."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float().cpu()
