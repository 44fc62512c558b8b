"""Weights: from a checkpoint's files to a device, all of them, in the formats of a layout."""

import contextlib
import os
from math import isfinite

from vlmkit.anatomy import on_meta, shape_of
from vlmkit.backend import sharding
from vlmkit.backend.quiet import environment
from vlmkit.backend.storages import state_tensors
from vlmkit.checkpoints import ADAPTERS
from vlmkit.errors import CheckpointError, PlanError, brief
from vlmkit.formats import torch_dtype
from vlmkit.headers import NO_LONGER_SAVED, differences, some
from vlmkit.loading.placing import device_of
from vlmkit.units import GIGABYTE

# transformers' own switch, since 5.21. With "1" it reads the weights in the main thread.
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def require_headers(folder, layout, trust_remote_code=False):
    """Compare the headers of the weight files in `folder` with the model, before any memory is
    taken: from a config that does not belong to them, transformers would first make a whole model
    of random numbers.

    Raises CheckpointError if weights are missing, left over, have another shape, or hold integers
    that are not codes of a quantized format.
    """
    shapes = {row.name: row.shape for row in layout.rows}
    found = differences(folder, shapes, lambda: on_meta(layout.config, None, trust_remote_code))
    _raise_for(folder, *found.items())


def load_weights(folder, layout, device_map, trust_remote_code=False, shards=False):
    """The model in `folder`, with each parameter in the format that `layout` gives it.

    device_map: what `vlmkit.loading.placing.resolve_device_map` returned.
    shards: whether to read this process's shards alone (see `vlmkit.backend.sharding`).

    If the layout's config says that the weights are quantized already, they are read as they are.
    Otherwise each weight is quantized as soon as it is read, so no two weights are in memory in
    both forms.

    Raises CheckpointError if weights are missing, left over, or of another shape than the model's,
    or if they hold infinities or NaN and are to be quantized.
    """
    import torch
    from transformers import AutoModelForImageTextToText as Model

    config, kwargs = layout.config, {}
    quantization_config = layout.quantization_config()
    if shards:
        plain = type(on_meta(config, None, trust_remote_code))
        Model = sharding.reading_shards(plain, device_of(device_map))
        quantization_config = quantization_config and sharding.cutting(quantization_config)
    if getattr(config, "quantization_config", None):  # quantized already
        config.quantization_config = quantization_config and quantization_config.to_dict()
    elif quantization_config:
        kwargs = {"quantization_config": quantization_config}
    if shards:
        from transformers.distributed import DistributedConfig

        kwargs["distributed_config"] = DistributedConfig()
    dtype = torch_dtype(layout.load_dtype)
    try:
        with (
            _quantizer(layout),
            _reader(device_map, config.dtype == dtype),
            sharding.every_process(),
        ):
            model, info = Model.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # _require_complete lists them
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **kwargs,
            )
    except torch.OutOfMemoryError as error:
        raise PlanError(_too_large(layout, device_of(device_map), shards)) from error
    except Exception as error:  # damaged files fail in more ways than can be listed
        raise CheckpointError(
            f"{folder}: transformers could not load the weights: {brief(error)}"
        ) from error
    if shards:
        model.__class__ = plain
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones by both names
    _require_complete(folder, parameters, info, layout)
    _require_scales(folder, model, layout)
    _round_to_layout(model, parameters, layout)
    return model


def _too_large(layout, device, shards):
    """The message where a GPU has too little memory for a model."""
    size = sum(row.bytes for row in layout.rows) / GIGABYTE
    if shards:
        return (
            f"{device} has too little memory for this process's shard of the model, which takes "
            f"{size:,.1f} GB in all. Launch more processes, on more GPUs, or give a plan with "
            "fewer bits."
        )
    return (
        f"The model takes {size:,.1f} GB under this plan, and {device} has too little memory for "
        "it. Several GPUs can share it: accelerate launch --config_file fsdp.yaml, with a config "
        "as in docs/cluster.md. On one GPU, give a plan with fewer bits: vk.fit shows which fits."
    )


def with_adapters(folder, model):
    """`model` with the adapters that the checkpoint in `folder` has: a PeftModel in eval mode, or
    the model itself if there are none.

    Raises CheckpointError if the adapters are damaged or do not fit.
    """
    if not (folder / ADAPTERS / "adapter_config.json").is_file():
        return model
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder / ADAPTERS).eval()
    except Exception as error:  # peft's, safetensors' and torch's
        raise CheckpointError(
            f"{folder / ADAPTERS}: the adapters cannot be loaded: {brief(error)}"
        ) from error


def _quantizer(layout):
    if not any(name.startswith(("nf4", "fp4")) for name in layout.quantized.values()):
        return contextlib.nullcontext()
    from vlmkit.backend.quantizing import fast_quantizer

    return fast_quantizer()


def _reader(device_map, same_dtype):
    """Where weights stay on the CPU in their own dtype, transformers only maps them from the file.
    Handing each of them to a thread takes longer than that."""
    on_cpu = device_of(device_map).type == "cpu"
    if on_cpu and same_dtype and _NO_THREADS not in os.environ:
        return environment(_NO_THREADS, "1")
    return contextlib.nullcontext()


def _require_complete(folder, parameters, info, layout):
    # transformers does not compare the shapes of weights that it quantizes.
    wrong = {str(key[0]) for key in info["mismatched_keys"]}
    wrong |= {row.name for row in layout.rows if shape_of(parameters[row.name]) != row.shape}
    unexpected = [k for k in info["unexpected_keys"] if not NO_LONGER_SAVED.search(k)]
    _raise_for(
        folder,
        # transformers fills them with random numbers
        ("lacks weights that the model has", info["missing_keys"]),
        ("holds weights that the model has no place for", unexpected),
        ("holds weights of another shape than the model's", wrong),
    )


def _raise_for(folder, *problems):
    """Raise CheckpointError for the first of `problems`, (words, names), that has names."""
    for problem, keys in problems:
        if keys:
            raise CheckpointError(
                f"{folder} {problem}: {some(keys)}. Its config.json and its weights do not belong "
                "together, or a file is incomplete. Copy or download the checkpoint again."
            )


def _require_scales(folder, model, layout):
    """Raise CheckpointError if a scale is not finite. A block whose weights hold an infinity or NaN
    has no finite scale, and all its weights are lost."""
    lost = []
    for row in layout.rows:
        if row.module in layout.quantized:
            module = model.get_submodule(row.module)
            tensors = state_tensors(module, getattr(module, row.name.rpartition(".")[2]))
            # NumPy uses one thread, which is faster for tensors as small as these.
            if not all(isfinite(t.cpu().numpy().max()) for t in tensors if t.is_floating_point()):
                lost.append(row.name)
    if lost:
        raise CheckpointError(
            f"{folder} holds infinities or NaN in weights that are to be quantized: {some(lost)}. "
            "A block of weights with one of them has no scale. Keep these in a float format with "
            'plan.override(…, "bf16"), or look for the training step that made them.'
        )


def _round_to_layout(model, parameters, layout):
    """Give each parameter the dtype of its row, where the checkpoint was read in a wider one."""
    for row in layout.rows:
        parameter = parameters[row.name]
        dtype = torch_dtype(row.format)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype  # the dtype that the weight is dequantized to
        elif parameter.is_floating_point() and parameter.dtype != dtype:
            if hasattr(parameter, "full_tensor"):
                sharding.set_dtype(model, parameter, dtype)
                continue
            parameter.data = parameter.data.to(dtype)
    text = model.config.get_text_config()
    model.config.dtype = text.dtype = torch_dtype(layout.plan["language_model"])
    if hasattr(model.config, "vision_config"):
        model.config.vision_config.dtype = torch_dtype(layout.plan["vision_encoder"])
