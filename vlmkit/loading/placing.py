"""Placing: the devices that a load puts a model's modules on, and the attention that they use."""

import os

from vlmkit.anatomy import on_meta
from vlmkit.backend import sharding
from vlmkit.errors import PlanError, brief, did_you_mean, shown
from vlmkit.formats import FORMATS

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""transformers' words for a device map that is computed from the GPUs' free memory."""


def resolve_device(device=None):
    """`torch.device` for `device`. None is cuda where there is one, otherwise the CPU; of several
    processes that a launcher started, each gets its own GPU.

    Raises PlanError if this machine does not have the device.
    """
    import torch

    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        own = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", own if own < torch.cuda.device_count() else 0)
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise PlanError(
            f"device {str(device)!r} cannot be used here ({brief(error, 100)}). Leave device out "
            f"to get {str(resolve_device())!r}."
        ) from error
    if resolved.type == "meta":
        raise PlanError("device 'meta' holds no weights. Use vk.anatomy or vk.memory.predict.")
    if resolved.type == "cuda" and resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_device_map(device_map):
    """A device map for transformers: {name of a module: torch.device}, or one of STRATEGIES where
    there is a GPU to compute a map for.

    Raises PlanError for a device that this machine does not have, for "disk", and for a map that
    puts some modules on a GPU and others on the CPU.
    """
    import torch

    if isinstance(device_map, str) and device_map in STRATEGIES:
        return device_map if torch.cuda.is_available() else {"": resolve_device()}
    if not isinstance(device_map, dict):
        try:
            return {"": resolve_device(device_map)}
        except PlanError as error:
            raise PlanError(
                f"{error} A device_map is a device, one of {', '.join(STRATEGIES)}, or a "
                "dictionary {name of a module: device}."
            ) from error
    if not device_map:
        raise PlanError("device_map is an empty dictionary. {'': device} is the whole model.")
    if "disk" in device_map.values():
        raise PlanError(
            "device_map puts modules on 'disk', from where they would be read again for each "
            f"token, and vlmkit cannot audit them there. {_SMALLER}"
        )
    if None in device_map.values():
        raise PlanError("device_map gives a module the device None. Name a device.")
    placed = {name: resolve_device(device) for name, device in device_map.items()}
    _require_one_kind(placed.values())
    return placed


_SMALLER = "Use a plan with fewer bits (vk.fit shows which fits), or put all modules on the CPU."


def _require_one_kind(devices):
    kinds = {getattr(device, "type", "cpu" if device in ("cpu", "disk") else "cuda")
             for device in devices}  # fmt: skip
    if len(kinds) > 1 or "disk" in devices:
        raise PlanError(
            f"device_map puts modules on {' and on '.join(sorted(kinds))}. accelerate would keep "
            "those of the CPU without their weights, and copy these to the GPU at each forward "
            f"pass, where vlmkit cannot audit, quantize or train them. {_SMALLER}"
        )


def device_of(device_map):
    """One of the devices of a device map of `resolve_device_map`: all of them are of its kind."""
    return resolve_device() if isinstance(device_map, str) else next(iter(device_map.values()))


def check_device_map(device_map, layout):
    """The device map of `resolve_device_map` for the model of `layout`: {"": device} if it has one
    device only.

    Raises PlanError for names that are no modules of the model, and for parameters without a
    device: transformers would put these on the CPU.
    """
    if isinstance(device_map, str):
        return device_map
    own = [row.name for row in layout.rows]
    names = own + [f"{linear}.weight" for linear in layout.linears]  # a tied head is in no row

    def covers(module, name):
        return not module or name == module or name.startswith(f"{module}.")

    for module in device_map:
        if not any(covers(module, name) for name in names):
            parts = [name.split(".") for name in names]
            outer = {".".join(p[:k]): True for p in parts for k in range(1, len(p) - 1)}
            raise PlanError(
                f"device_map names {shown(module)}, and this model has no module of that name with "
                f"parameters. {did_you_mean(str(module), outer)}vk.anatomy(name) shows the modules."
            )
    without = [name for name in own if not any(covers(module, name) for module in device_map)]
    if without:
        raise PlanError(
            f"device_map gives no device to {len(without)} of {len(own)} parameters: "
            f"{', '.join(without[:3])}, … Add their modules, or '' for all others."
        )
    devices = set(device_map.values())
    return {"": devices.pop()} if len(devices) == 1 else device_map


def check_placed(model):
    """Raise PlanError if a strategy has found no room on the GPUs for all of `model`."""
    _require_one_kind(set(getattr(model, "hf_device_map", {}).values()))


def check_formats(layout, device):
    """Raise PlanError if a format of `layout` does not run on `device`."""
    quantized = ", ".join(sorted(set(layout.quantized.values())))
    if not quantized:
        return
    try:
        import bitsandbytes
    except ImportError as error:
        raise PlanError(
            f"{quantized} needs the package bitsandbytes, which cannot be imported: {error}. "
            "Install it (pip install bitsandbytes), or plan float formats."
        ) from error
    # Its Metal backend has only some of the formats, and no test here runs on it.
    supported = bitsandbytes.supported_torch_devices - {"mps"}
    if device.type not in supported:
        raise PlanError(
            f"{quantized} does not run on the device {device.type!r}: bitsandbytes runs on "
            f"{', '.join(sorted(supported))}. Use bf16, fp16 or fp32 there, or device='cpu'."
        )


def set_attention(config, asked, trust_remote_code=False):
    """Write into `config` which implementation of attention its model uses.

    asked: transformers' `attn_implementation`: a name for the whole model, or {name of a part's
        config: name of an implementation}, such as {"vision_config": "eager"}.

    Raises PlanError if the model does not have it, or if a package for it is not installed. Then
    transformers would raise after it has read the weights, or fall back in silence.
    """
    _require_parts(config, asked)
    try:
        config._attn_implementation = asked
        on_meta(config, None, trust_remote_code)  # transformers' own checks are in it
    except Exception as error:
        raise PlanError(
            f"attn_implementation {shown(asked)} cannot be used with {config.model_type} "
            f"({brief(error.__cause__ or error, 300)}). Every model here has 'eager', and nearly "
            "all have 'sdpa', which is the default."
        ) from error


def _require_parts(config, asked):
    if isinstance(asked, str) and not asked.startswith("paged|"):  # those are for servers
        return
    if not isinstance(asked, dict) or not asked:
        raise PlanError(
            f"attn_implementation is a name such as 'sdpa', or a dictionary such as "
            f"{{'vision_config': 'eager'}}, not {shown(asked)}."
        )
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    for part, one in asked.items():
        if part not in ("", *parts):
            raise PlanError(
                f"attn_implementation names {shown(part)}, and the parts of {config.model_type} "
                f"are {', '.join(parts)}. {did_you_mean(str(part), parts)}".rstrip()
            )
        _require_parts(getattr(config, part) if part else config, one)


def check_attention(layout, device):
    """Raise PlanError if FlashAttention is asked for where it does not run."""
    config = layout.config
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    used = {getattr(part, "_attn_implementation", None) or "" for part in parts}
    if not any("flash" in name for name in used):
        return
    floats = {FORMATS[row.asked].float_format for row in layout.rows}
    if device.type == "cpu" or "fp32" in floats:
        where = "on a CPU" if device.type == "cpu" else "in fp32"
        raise PlanError(
            f"attn_implementation {', '.join(sorted(used - {''}))}: FlashAttention does not run "
            f"{where}. Use 'sdpa' there, or a GPU with bf16 or fp16."
        )


def sharding_device(device=None, device_map=None):
    """The device of this process, where accelerate's FSDP config says that a model is in shards.

    Raises PlanError for a `device_map`, and for a `device` of another process.
    """
    if device_map is not None:
        raise PlanError(
            "device_map says where a whole model goes, and under accelerate's FSDP config each "
            "process holds a shard of it on its own device. Leave device_map out, or launch "
            "without FSDP."
        )
    given = resolve_device(device)
    here = sharding.device_here(cpu=given.type == "cpu")
    if device is not None and given != here:
        raise PlanError(
            f"device {str(device)!r} is not the device of this process, which is {str(here)!r}. "
            "Leave device out under `accelerate launch`."
        )
    return here


def check_shards(layout):
    """Raise PlanError if a format of `layout` cannot be in shards."""
    if "int8" in layout.quantized.values():
        raise PlanError(
            "int8 cannot be in shards: bitsandbytes keeps its scales at the weight, where FSDP "
            "loses them. Plan nf4 or bf16, or launch without FSDP, each process with the whole "
            "model."
        )
    scalar = [row.name for row in layout.rows if not row.shape]
    if scalar:
        raise PlanError(
            f"{scalar[0]} cannot be in shards: it is a single number without a dimension, which "
            "FSDP does not take. Launch without FSDP."
        )
