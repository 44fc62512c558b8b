"""What was trained, on disk: adapters as peft writes them, beside them what was trained in full.

    vk.finetuning.save(model, "my-adapters")
    model = vk.finetuning.load(base, "my-adapters")        # base: loaded under any plan
    model, report = vk.finetuning.merge(model)             # an ordinary model again

peft alone writes adapters only, so that a projector that was trained in full would be lost. The
folder also notes the base, since adapters fit every model of the same shape but belong to one.
"""

import json
import os
from pathlib import Path

from vlmkit.anatomy import component_finder, is_adapter, plain_name, shape_of, unwrapped
from vlmkit.errors import FinetuningError, public
from vlmkit.folders import whole_folder

NOTES, IN_FULL, ADAPTERS = "vlmkit.json", "trained_in_full.safetensors", "adapter_config.json"


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
    (folder / NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


@public
def load(model, path, *, trainable=False):
    """`model` with what was saved at `path` put into it, in place: adapters, and parameters that
    were trained in full. Returns a PeftModel, or the model itself where there are no adapters.

    model: the base, under any plan that does not quantize what was trained in full.
    trainable: whether training goes on; otherwise everything is frozen, in eval mode.

    Raises FinetuningError if `path` holds nothing that `save` wrote, if it was trained on another
    base, or if its parameters do not fit.
    """
    path = Path(path).expanduser()
    if hasattr(model, "peft_config"):
        raise FinetuningError("the model has adapters already: take them off with model.unload()")
    if not (path / NOTES).is_file():
        raise FinetuningError(
            f"{path} holds nothing that vk.finetuning.save wrote: there is no {NOTES}. Adapters of "
            "peft alone load with peft.PeftModel.from_pretrained(model, path)."
        )
    _require_base(model, path)
    in_full = _put_in_full(model, path)
    model.requires_grad_(False)
    if (path / ADAPTERS).exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    if trainable:
        for name, parameter in model.named_parameters():
            if plain_name(name) in in_full:
                parameter.requires_grad_(True)
    return model.train(trainable)


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


def _require_base(model, path):
    """Raise FinetuningError if `model` is not the base that the notes at `path` describe."""
    notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
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
