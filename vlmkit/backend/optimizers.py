"""The optimizers that can be used, by the names of transformers."""

from vlmkit.errors import FinetuningError, did_you_mean

OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
"""PyTorch's AdamW, and those of bitsandbytes: with states in 8 bits, with states that can move to
the host's memory ("paged"), and with both."""

_OTHER_NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw_torch": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
}


def check_optimizer(name):
    """`name`, if it is one of OPTIMIZERS. Raises FinetuningError, with the right one, if not."""
    if name in OPTIMIZERS:
        return name
    near = f"Did you mean {_OTHER_NAMES[name]!r}? " if name in _OTHER_NAMES else ""
    raise FinetuningError(
        f"{name!r} is not an optimizer. {near or did_you_mean(name, OPTIMIZERS)}"
        f"The optimizers are {', '.join(OPTIMIZERS)}."
    )
