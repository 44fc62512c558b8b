"""The cache of a forward pass, under both of its names: transformers calls it `cache` from 5.24 on,
and `past_key_values` before. Since transformers 5.24, which warns of the older name, until no
version before it is tried."""

from transformers.modeling_outputs import BaseModelOutputWithPast

NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(output):
    """The cache in what a forward pass of a model or `generate` returned; None if there is none."""
    # BLIP-2 returns the output of its language model inside its own.
    return getattr(getattr(output, "language_model_outputs", output), NAME)


def with_cache(cache):
    """The keyword argument of a forward pass that continues after `cache`."""
    return {NAME: cache}
