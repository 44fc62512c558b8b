"""Optimizers: what we call them, and what transformers does."""

from vlmkit.errors import FinetuningError, did_you_mean

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""What we call an optimizer, and what transformers does: the AdamW of PyTorch, and of bitsandbytes,
with states in 8 bits, with states that can move to the host's memory ("paged"), and both."""


def check_optimizer(name):
    """`name`, if it is one of OPTIMIZERS. Raises FinetuningError, with the nearest, if not."""
    if name in OPTIMIZERS:
        return name
    raise FinetuningError(
        f"{name!r} is not an optimizer. {did_you_mean(name, OPTIMIZERS)}"
        f"The optimizers are {', '.join(OPTIMIZERS)}."
    )
