"""Loading: weights and processor under a plan, and the audit that proves that it took effect.

    model, processor = vk.load("pebble", plan=vk.Plan(language_model="nf4"))

What comes back is what the ecosystem expects: a transformers model in eval mode, quantised by
transformers' own BitsAndBytesConfig, and the checkpoint's AutoProcessor.
"""

import os

from vlmkit.anatomy import on_meta, shape_of
from vlmkit.checkpoints import (
    NO_LONGER_SAVED,
    PEBBLE,
    brief,
    check_weights,
    find,
    read_config,
)
from vlmkit.errors import CheckpointError
from vlmkit.formats import torch_dtype
from vlmkit.loading.audit import audit, audit_layout, plan_of, preview
from vlmkit.loading.boundaries import join_dtypes
from vlmkit.loading.cpu import guard_against_cpu_traps
from vlmkit.loading.devices import check_formats, resolve_device
from vlmkit.loading.processors import load_processor
from vlmkit.loading.quiet import quiet
from vlmkit.loading.saving import save
from vlmkit.loading.tables import Audit, Preview
from vlmkit.plan import Plan
from vlmkit.stored import layout_of

__all__ = ["Audit", "Preview", "audit", "default_model", "load", "plan_of", "preview", "save"]


def default_model():
    """The name that the chapters load: what the environment variable VLMKIT_MODEL says, or
    "pebble"."""
    return os.environ.get("VLMKIT_MODEL") or PEBBLE


def load(name, plan=None, *, processor=True, device=None, revision=None, trust_remote_code=False):
    """Load the model `name` under `plan`. Returns (model, processor), audited.

    name: "pebble", a folder, or a hub id.
    plan: a Plan or anything that `Plan.parse` takes; None is `Plan.recommended()`, or for a
        checkpoint that is quantised already what it holds, with which any plan has to agree.
    processor: False leaves the processor out, returns None for it and needs none of its files.
    device: "cpu", "cuda", …; None is cuda if there is one, otherwise the CPU.
    revision: branch, tag or commit of a hub id.
    trust_remote_code: whether Python code that comes with the checkpoint may run.

    The plan is resolved to full module names on the meta device before any weight is read. All or
    nothing: if anything is wrong, nothing is returned.

    Raises PlanError (the plan does not fit the model or the device), CheckpointError (files
    missing, damaged or refused), AnatomyError (not a VLM, or parts of it unknown), AuditError
    (what was loaded is not what the plan asked for).
    """
    plan = None if plan is None else Plan.parse(plan)
    device = resolve_device(device)
    with quiet():
        folder = find(name, revision=revision, trust_remote_code=trust_remote_code)
        config = read_config(folder, trust_remote_code=trust_remote_code)
        meta = on_meta(config, trust_remote_code=trust_remote_code)
        layout = layout_of(folder, config, meta, plan)
        check_formats(layout, device)
        quantization_config = layout.quantization_config()
        check_weights(folder)
        # The processor before the weights: it is quick, and most of what can be missing is its.
        loaded_processor = load_processor(folder, trust_remote_code) if processor else None
        model = _load_weights(
            folder, config, layout, quantization_config, device, trust_remote_code
        )
        _round_to_layout(model, layout)
        guard_against_cpu_traps(model)
        join_dtypes(model, layout)
    audit_layout(model, layout)
    return model.eval(), loaded_processor


def _load_weights(folder, config, layout, quantization_config, device, trust_remote_code):
    from transformers import AutoModelForImageTextToText

    kwargs = {"quantization_config": quantization_config} if quantization_config else {}
    if getattr(config, "quantization_config", None):  # quantised already: nothing is quantised now
        config.quantization_config = quantization_config and quantization_config.to_dict()
        kwargs = {"config": config}
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=torch_dtype(layout.load_dtype),  # one for all that is float, see load_dtype
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
    _require_complete(folder, model, info, layout)
    return model


def _require_complete(folder, model, info, layout):
    # transformers does not compare the shapes of weights that it quantises.
    wrong = {str(key[0]) for key in info["mismatched_keys"]}
    wrong |= {
        row.name for row in layout.rows if shape_of(model.get_parameter(row.name)) != row.shape
    }
    # What is missing would have been filled with random numbers, which is worse than an error.
    missing = sorted(info["missing_keys"])
    unexpected = sorted(k for k in info["unexpected_keys"] if not NO_LONGER_SAVED.search(k))
    for problem, keys in (
        ("lacks weights that the model has", missing),
        ("holds weights that the model has no place for", unexpected),
        ("holds weights of another shape than the model's", sorted(wrong)),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{folder} {problem}: {', '.join(keys[:3])}{more}. Its config.json and its weights "
                "do not belong together, or a file is incomplete."
            )


def _round_to_layout(model, layout):
    """Give each parameter the dtype of its row, where the checkpoint was read in a wider one."""
    text = model.config.get_text_config()
    for row in layout.rows:
        parameter = model.get_parameter(row.name)
        dtype = torch_dtype(row.format)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype  # what it dequantises to
        elif parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = text.dtype = torch_dtype(layout.plan["language_model"])
    if hasattr(model.config, "vision_config"):
        model.config.vision_config.dtype = torch_dtype(layout.plan["vision_encoder"])
