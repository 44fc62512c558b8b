"""Devices: where a model can go, and which formats run there."""

from vlmkit.errors import PlanError, brief


def resolve_device(device=None):
    """`torch.device` for `device`; None is cuda where there is one, otherwise the CPU.

    Raises PlanError if the device is not one that this machine has.
    """
    import torch

    if device is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise PlanError(
            f"device {str(device)!r} cannot be used here ({brief(error, 100)}). Leave device out "
            f"to get {str(resolve_device())!r}."
        ) from error
    if resolved.type == "meta":
        raise PlanError("device 'meta' holds no weights: use vk.anatomy or vk.memory.predict")
    if resolved.type == "cuda" and resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved


def check_formats(layout, device):
    """Raise PlanError if a format of `layout` does not run on `device`."""
    quantized = sorted(set(layout.quantized.values()))
    if not quantized:
        return
    try:
        import bitsandbytes
    except ImportError as error:
        raise PlanError(
            f"{', '.join(quantized)} needs the package bitsandbytes, which cannot be imported: "
            f"{error}"
        ) from error
    # Its Metal backend covers a part of the formats, and nothing here tests it.
    supported = bitsandbytes.supported_torch_devices - {"mps"}
    if device.type not in supported:
        raise PlanError(
            f"{', '.join(quantized)} does not run on the device {device.type!r}: bitsandbytes runs "
            f"on {', '.join(sorted(supported))}. Use bf16, fp16 or fp32 there, or device='cpu'."
        )
