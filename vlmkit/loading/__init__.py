"""Loading: a model and its processor under a plan, and the audit that proves what was loaded.

    vk.preview("pebble", plan)                        # what a load would give
    model, processor = vk.load("pebble", plan)        # a transformers model, an AutoProcessor
    vk.audit(model, plan)                             # what it gave
    vk.save(model, processor, "my-model")             # the same bits when it is loaded again

`load` returns what the ecosystem expects: a transformers model in eval mode, quantized by
transformers' own BitsAndBytesConfig, and the checkpoint's AutoProcessor.
"""

import os
import warnings

from vlmkit.anatomy import one_at_a_time
from vlmkit.backend import sharding
from vlmkit.backend.boundaries import join_dtypes
from vlmkit.backend.cpu import guard_against_cpu_traps
from vlmkit.backend.llama4 import complete_outputs
from vlmkit.backend.quiet import is_watched, quiet, without_garbage_collection
from vlmkit.checkpoints import find, require_generation_config, weight_files
from vlmkit.errors import PlanError, public
from vlmkit.layout import layout_of
from vlmkit.loading.audit import Audit, Preview, audit, audit_layout, plan_of, preview
from vlmkit.loading.placing import (
    check_attention,
    check_device_map,
    check_formats,
    check_placed,
    check_shards,
    device_of,
    resolve_device,
    resolve_device_map,
    set_attention,
    sharding_device,
)
from vlmkit.loading.processors import check_limits, load_processor, set_limits
from vlmkit.loading.saving import save
from vlmkit.loading.weights import load_weights, require_headers, with_adapters
from vlmkit.plan import Plan
from vlmkit.units import GIGABYTE

__all__ = ["Audit", "Preview", "audit", "default_model", "load", "plan_of", "preview", "save"]


def default_model():
    """The name of the model that the chapters load: the value of the environment variable
    VLMKIT_MODEL, or "pebble"."""
    return os.environ.get("VLMKIT_MODEL") or "pebble"


@public
def load(
    name,
    plan=None,
    *,
    processor=True,
    device=None,
    device_map=None,
    attn_implementation=None,
    revision=None,
    trust_remote_code=False,
    **limits,
):
    """Load the model `name` under `plan`. Returns (model, processor), audited.

    name: a model of the course ("pebble", "cobble"), a folder, or a hub id.
    plan: a Plan or anything that `Plan.parse` takes. None is `Plan.recommended()`. For a checkpoint
        that is quantized already, None is what it holds, and any other plan has to agree with that.
    processor: False leaves the processor out. It is returned as None, and no file of it is needed.
    device: "cpu", "cuda", …; None is cuda if there is one, otherwise the CPU. Under `accelerate
        launch` None is this process's own GPU.
    device_map: transformers' own, in place of `device`: a device, "auto" (or another of
        `vlmkit.loading.placing.STRATEGIES`) to spread the model over all GPUs, or {name of a
        module: device} with "" for all others. A model is either on GPUs or on the CPU. A map that
        would keep a part of it on the CPU or on the disk, to be copied to a GPU in each forward
        pass, is refused.
    attn_implementation: transformers' own: "sdpa" (the default where a model has it), "eager",
        "flash_attention_2" or "flex_attention", or {part of the config: one of them}, such as
        {"vision_config": "eager"}. `vk.save` does not keep it.
    revision: branch, tag or commit of a hub id.
    trust_remote_code: whether Python code that comes with the checkpoint may run.
    limits: how large the processor makes pictures, by transformers' names: min_pixels, max_pixels
        or size (Qwen-VL, GLM-4V), size and do_image_splitting (Idefics, SmolVLM), size (Mistral 3),
        min_patches and max_patches (InternVL). See `vlmkit.families.with_limits`. `vk.save` keeps
        them, and `vk.memory.predict` takes the same.

    The plan is resolved to full module names before any weight is read. If anything is wrong,
    nothing is returned. If the projector was trained with another format of the language model or
    the vision encoder than the plan has, a warning says so.

    If the checkpoint's folder has a folder `adapters`, as cobble-chat has, they are put on the
    model, in whatever formats the plan gives it, and a PeftModel is returned.

    Under `accelerate launch` with FSDP2, each process reads its own shards of the weights alone.
    All processes have to call `load`, and whatever else computes with the model. See
    docs/training.md.

    Several threads may load at once. Each waits until the one before it is done.

    Raises PlanError (the plan, the devices or the attention do not fit the model or this machine),
    CheckpointError (files are missing, damaged or refused), AnatomyError (not a VLM, or it has
    unknown parts), SizeError (limits that the model's processor does not have), AuditError (what
    was loaded is not what the plan asked for).
    """
    plan = None if plan is None else Plan.parse(plan)
    if device is not None and device_map is not None:
        raise PlanError("device and device_map both say where the model goes. Give one of them.")
    shards = sharding.is_asked()
    if shards:
        device = sharding_device(device, device_map)
        device_map = None
    places = {"": resolve_device(device)} if device_map is None else resolve_device_map(device_map)
    check_limits(limits, processor)
    with quiet(bars=is_watched()):  # a download may take long
        folder = find(name, revision=revision, trust_remote_code=trust_remote_code)
    with one_at_a_time(), without_garbage_collection():
        with quiet():
            layout = layout_of(folder, plan, trust_remote_code=trust_remote_code)
            check_formats(layout, device_of(places))
            if shards:
                check_shards(layout)
            places = check_device_map(places, layout)
            if attn_implementation is not None:
                set_attention(layout.config, attn_implementation, trust_remote_code)
                check_attention(layout, device_of(places))
            layout.quantization_config()  # raises before a weight is read
            require_headers(folder, layout, trust_remote_code)
            require_generation_config(folder)
            # The processor comes first: it is quick, and its files are missing most often.
            loaded_processor = load_processor(folder, trust_remote_code) if processor else None
            if limits:
                set_limits(loaded_processor, layout.config, limits)
        with quiet(bars=_is_large(folder) and is_watched()):
            model = load_weights(folder, layout, places, trust_remote_code, shards)
            check_placed(model)
            guard_against_cpu_traps(model)
            complete_outputs(model)
            join_dtypes(model, layout)
            audit_layout(model, layout)
            model = with_adapters(folder, model)
            if shards:
                sharding.shard(model)
    if layout.projector_hint:
        warnings.warn(layout.projector_hint, stacklevel=3)  # where `load` was called
    return model, loaded_processor


def _is_large(folder):
    """Whether a load takes so long that a progress bar helps."""
    return sum(file.stat().st_size for file in weight_files(folder)) > GIGABYTE
