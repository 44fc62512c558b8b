"""Weights: from a checkpoint's files into a model, complete, and in the formats of a layout."""

import contextlib
import os
from math import isfinite

from vlmkit.anatomy import shape_of
from vlmkit.backend.storages import state_tensors
from vlmkit.checkpoints import NO_LONGER_SAVED
from vlmkit.errors import CheckpointError, brief
from vlmkit.formats import torch_dtype


def load_weights(folder, config, layout, device, trust_remote_code=False):
    """The model in `folder`, with each parameter in the format that `layout` gives it.

    config: the checkpoint's. If it says that the weights are quantized already, they are read as
        they are; otherwise they are quantized one after another as they are read, so that there is
        never more than one of them in memory both before and after.

    Raises CheckpointError if weights are missing, left over, of another shape than the model's, or
    not to be quantized because they hold infinities or NaN.
    """
    from transformers import AutoModelForImageTextToText

    quantization_config = layout.quantization_config()
    kwargs = {"quantization_config": quantization_config} if quantization_config else {}
    if getattr(config, "quantization_config", None):  # quantized already: nothing is quantized now
        config.quantization_config = quantization_config and quantization_config.to_dict()
        kwargs = {}
    dtype = torch_dtype(layout.load_dtype)  # one for all that is float, see load_dtype
    mapped = device.type == "cpu" and config.dtype == dtype
    try:
        with _quantizer(layout), _threads(wanted=not mapped):
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they are listed, for _require_complete
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **kwargs,
            )
    except Exception as error:  # of many kinds: what the files can have wrong has no end
        raise CheckpointError(
            f"{folder}: transformers could not load the weights: {brief(error)}"
        ) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones by both names
    _require_complete(folder, parameters, info, layout)
    if layout.quantized:
        _require_scales(folder, model, layout)
    _round_to_layout(model, parameters, layout)
    return model


def _quantizer(layout):
    if not any(name.startswith(("nf4", "fp4")) for name in layout.quantized.values()):
        return contextlib.nullcontext()
    from vlmkit.backend.quantizing import fast_quantizer

    return fast_quantizer()


@contextlib.contextmanager
def _threads(wanted):
    """Within it, transformers hands each weight to a thread only if `wanted`: where a weight is no
    more than mapped from its file, that takes longer than to do it."""
    switch = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers' own
    if wanted or switch in os.environ:
        yield
        return
    os.environ[switch] = "1"
    try:
        yield
    finally:
        os.environ.pop(switch, None)


def _require_complete(folder, parameters, info, layout):
    # transformers does not compare the shapes of weights that it quantizes.
    wrong = {str(key[0]) for key in info["mismatched_keys"]}
    wrong |= {row.name for row in layout.rows if shape_of(parameters[row.name]) != row.shape}
    # What is missing would have been filled with random numbers, which is worse than an error.
    missing = info["missing_keys"]
    unexpected = [k for k in info["unexpected_keys"] if not NO_LONGER_SAVED.search(k)]
    for problem, keys in (
        ("lacks weights that the model has", missing),
        ("holds weights that the model has no place for", unexpected),
        ("holds weights of another shape than the model's", wrong),
    ):
        if keys:
            raise CheckpointError(
                f"{folder} {problem}: {_some(keys)}. Its config.json and its weights do not belong "
                "together, or a file is incomplete."
            )


def _require_scales(folder, model, layout):
    """An infinity or NaN in a weight makes that of its block's scale, and the block is lost."""
    lost = []
    for row in layout.rows:
        if row.module in layout.quantized:
            module = model.get_submodule(row.module)
            tensors = state_tensors(module, getattr(module, row.name.rpartition(".")[2]))
            # NumPy looks for the largest in one thread: there is too little to share.
            if not all(isfinite(t.cpu().numpy().max()) for t in tensors if t.is_floating_point()):
                lost.append(row.name)
    if lost:
        raise CheckpointError(
            f"{folder} holds infinities or NaN in weights that are to be quantized: {_some(lost)}. "
            "A block of weights with one of them has no scale. Keep these in a float format with "
            'plan.override(…, "bf16"), or look for the step that made them.'
        )


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _round_to_layout(model, parameters, layout):
    """Give each parameter the dtype of its row, where the checkpoint was read in a wider one."""
    text = model.config.get_text_config()
    for row in layout.rows:
        parameter = parameters[row.name]
        dtype = torch_dtype(row.format)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype  # what it dequantizes to
        elif parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = text.dtype = torch_dtype(layout.plan["language_model"])
    if hasattr(model.config, "vision_config"):
        model.config.vision_config.dtype = torch_dtype(layout.plan["vision_encoder"])
