"""What was trained, on disk: adapters as peft writes them, and what was trained in full beside.

    vk.finetuning.save(model, "my-adapters")
    model = vk.finetuning.load(base, "my-adapters")        # base: loaded under any plan
    model, report = vk.finetuning.merge(model)             # an ordinary model again

peft alone writes adapters only, and a projector that was trained in full would be lost. The folder
also notes on which base it was trained, since adapters fit every model of the same shape and make
sense on one.
"""

import json
import os
from pathlib import Path

from vlmkit.anatomy import component_finder, is_adapter, plain_name, shape_of, unwrapped
from vlmkit.errors import FinetuningError
from vlmkit.folders import whole_folder

NOTES, IN_FULL, ADAPTERS = "vlmkit.json", "trained_in_full.safetensors", "adapter_config.json"


def save(model, path, *, overwrite=False):
    """Write what is trained in `model` to the folder `path`. Returns its pathlib.Path.

    model: what `add_adapters` or `load` returned.
    overwrite: whether a folder that is there and not empty is replaced.

    The whole folder appears at once, or nothing. Of several processes all call it, and the first
    one writes. Raises FinetuningError if nothing is trained, and CheckpointError if the folder is
    taken or cannot be written.
    """
    tensors = gathered(model)
    if os.environ.get("RANK", "0") == "0":
        with whole_folder(path, overwrite=overwrite) as folder:
            write(model, folder, tensors)
    return Path(path).expanduser().resolve()


def gathered(model):
    """{full name: tensor} of what `write` needs. Where FSDP has parted a parameter among processes
    it is put together, and so every process has to call this."""
    return {
        name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or is_adapter(name) or parameter.dim() == 1
    }


def write(model, folder, tensors):
    """The files of `save`, in a folder that is there. tensors: what `gathered` gave."""
    from safetensors.torch import save_file

    in_full = {plain_name(name): tensors[name] for name in in_full_of(model)}
    adapters = hasattr(model, "peft_config")
    if not in_full and not adapters:
        raise FinetuningError(
            "nothing in this model is trained: begin with vk.finetuning.add_adapters"
        )
    if adapters:
        model.save_pretrained(folder, state_dict=tensors)
    if in_full:
        save_file({n: p.detach().contiguous() for n, p in in_full.items()}, folder / IN_FULL)
    notes = {"base": unwrapped(model).name_or_path, "fingerprint": fingerprint(model, tensors)}
    (folder / NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def in_full_of(model):
    """Full names of what is trained and is no adapter."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_adapter(name)
    ]


def load(model, path, *, trainable=False):
    """`model` with what was saved at `path` put into it, in place: adapters, and parameters that
    were trained in full. Returns a PeftModel, or the model itself where there are no adapters.

    model: the base, under any plan in which what was trained in full is not quantized.
    trainable: whether training may go on; otherwise all is frozen and the model in eval mode.

    Raises FinetuningError if there is nothing such at `path`, if it was trained on another base, or
    if its parameters do not fit.
    """
    from safetensors.torch import load_file

    path = Path(path).expanduser()
    if hasattr(model, "peft_config"):
        raise FinetuningError("the model has adapters already: take them off with model.unload()")
    if not (path / NOTES).is_file():
        raise FinetuningError(
            f"{path} holds nothing that vk.finetuning.save wrote: there is no {NOTES}. Adapters of "
            "peft alone load with peft.PeftModel.from_pretrained(model, path)."
        )
    notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
    stored = load_file(path / IN_FULL) if (path / IN_FULL).exists() else {}
    _require_base(model, notes, path)
    _put(model, stored, path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if (path / ADAPTERS).exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path, is_trainable=trainable)
    if trainable:
        for name, parameter in model.named_parameters():
            if plain_name(name) in stored:
                parameter.requires_grad_(True)
    return model.train(trainable)


def restore(model, path):
    """Put what `write` wrote back into the model that it was written from, in place."""
    from safetensors.torch import load_file

    path = Path(path)
    if (path / IN_FULL).exists():
        _put(model, load_file(path / IN_FULL), path)
    if (path / ADAPTERS).exists():
        from peft import load_peft_weights

        adapter = f".{model.active_adapter}.weight"  # which peft leaves out in its files
        stored = load_peft_weights(str(path), device="cpu")
        stored = {f"{name.removesuffix('.weight')}{adapter}": t for name, t in stored.items()}
        _put(model, {plain_name(name): tensor for name, tensor in stored.items()}, path)


def _put(model, stored, path):
    """Copy what was trained in full into `model`."""
    import torch

    held = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in stored.items():
        if name not in held or shape_of(held[name]) != tuple(tensor.shape):
            there = f"has shape {shape_of(held[name])}" if name in held else "is not there"
            raise FinetuningError(
                f"{path} holds {name}, of shape {tuple(tensor.shape)}, and in this model it {there}"
            )
        if not held[name].is_floating_point():
            raise FinetuningError(
                f"{name} was trained in full, and in this model it is quantized: load the base "
                "under a plan that keeps it in a float format."
            )
    with torch.no_grad():
        for name, tensor in stored.items():
            held[name].copy_(_parted_as(held[name], tensor))


def _parted_as(parameter, tensor):
    """`tensor`, parted among the processes where FSDP has parted `parameter`."""
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(parameter.device, parameter.dtype)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


# --- on which base ------------------------------------------------------------------------------


def fingerprint(model, tensors):
    """What a base is known by under any plan: its architecture, and the mean magnitude of each of
    its vectors (norms and biases), which are never quantized. {"architecture", "means"}.

    Vectors that are trained, or of which there are more than the first 64, are left out. tensors:
    what `gathered` gave.
    """
    means = {}
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        if is_adapter(name) or parameter.requires_grad or parameter.dim() != 1:
            continue
        if len(means) == 64:
            break
        means[plain] = _mean_of(tensors[name])
    return {"architecture": type(unwrapped(model)).__name__, "means": means}


def _mean_of(vector):
    """Mean magnitude of a parameter, as a number."""
    return vector.detach().float().abs().mean().item()


def _require_base(model, notes, path):
    held = {plain_name(name): p for name, p in model.named_parameters()}
    told, architecture = notes["fingerprint"], type(unwrapped(model)).__name__
    wrong = None
    if told["architecture"] != architecture:
        wrong = f"that is a {told['architecture']}, and this a {architecture}"
    for name, mean in told["means"].items():
        if wrong:
            break
        if name not in held:
            wrong = f"{name} is not in this model"
        elif abs(_mean_of(held[name]) - mean) > 0.01 * mean + 1e-6:
            wrong = f"{name} differs"
    if wrong:
        raise FinetuningError(
            f"{path} was trained on {notes['base'] or 'another model'}, and this model is another: "
            f"{wrong}. Load that one, and give what vk.load returns."
        )


# --- merging ------------------------------------------------------------------------------------


def merge(model):
    """The adapters worked into the weights: (the model without adapters, a report).

    Each weight W becomes W + (alpha / r) B A, rounded to the format that W is held in. A quantized
    weight is quantized anew, and what an adapter learnt can be finer than the steps of its format.
    The report is a DataFrame with a row per component and format: modules, and lost, the length of
    (merged - wanted) over the length of the adapters' change: 0 where all of it arrived, 1 where
    rounding undid as much as was learnt. Load the base in bf16 or fp32 to lose less.

    Raises FinetuningError if the model has no adapters.
    """
    import pandas

    if not hasattr(model, "peft_config"):
        raise FinetuningError(
            "the model has no adapters to merge: what is trained in full is part of it already"
        )
    from vlmkit.loading.audit import format_of

    component_of = component_finder(model)
    wanted = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and getattr(module, "lora_A", None):
            change = module.get_delta_weight(model.active_adapter).float().cpu()
            base = _weight_of(module.get_base_layer())
            wanted[plain_name(f"{name}.base_layer.weight")] = (base + change, change)
    components = {name: component_of(name) for name in wanted}
    model = model.merge_and_unload(safe_merge=True)
    lost = {}
    for name, (weight, change) in wanted.items():
        module = model.get_submodule(name.rpartition(".")[0])
        squares = lost.setdefault((components[name], format_of(module, "weight")), [0, 0.0, 0.0])
        squares[0] += 1
        squares[1] += (_weight_of(module) - weight).square().sum().item()
        squares[2] += change.square().sum().item()
    rows = [
        (*key, modules, (missed / changed) ** 0.5 if changed else 0.0)
        for key, (modules, missed, changed) in lost.items()
    ]
    return model, pandas.DataFrame(rows, columns=["component", "format", "modules", "lost"])


def _weight_of(layer):
    """The weight of a Linear layer as float32, dequantized where it is quantized."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer).detach().float().cpu()
