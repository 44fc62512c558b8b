"""Fates: what transformers will make of every parameter under a quantization config.

Nothing of this is worked out here. transformers builds the model on the meta device and hands it to
its own quantizer, as `from_pretrained` does before it reads a weight; then one looks at the result.
"""

import copy
import re
from dataclasses import dataclass
from math import prod

from vlmkit.anatomy import component_finder, on_meta
from vlmkit.formats import FORMATS, format_of_dtype
from vlmkit.layout import kept_in_fp32
from vlmkit.rows import is_linear, kind_of


@dataclass(frozen=True)
class Fate:
    """One parameter: what it is, and what it will be held in.

    format: of vlmkit.formats, or the dtype's own name where it has none there.
    bytes: with its quantization state. plain_bytes: if nothing were quantized.
    convertible: whether it is the weight of a layer that bitsandbytes converts if it is let.
    kept_by: the entries of the skip list that keep it as it is.
    tied: whether another parameter, an embedding, has the same weight. It costs nothing then.
    """

    name: str
    module: str
    component: str
    kind: str
    shape: tuple
    format: str
    bytes: int
    plain_bytes: int
    convertible: bool
    quantized: bool
    kept_by: tuple
    tied: bool

    @property
    def parameters(self):
        """Number of weights."""
        return prod(self.shape)


def fates(config, given, *, stored=False, trust_remote_code=False):
    """A tuple with a Fate for each parameter, tied ones under each of their names.

    config: a transformers config. given: a `vlmkit.linting.configs.Given`.
    stored: whether the weights are quantized already, as their own config says.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    model = on_meta(config, dtype_of(config), trust_remote_code)
    dtype = model.dtype
    ours = copy.deepcopy(given.config)
    ours.llm_int8_skip_modules = usable(given.patterns)
    quantizer = AutoHfQuantizer.from_config(ours, pre_quantized=stored)
    quantizer.preprocess_model(model, dtype=dtype, device_map=None)
    own = ours.llm_int8_skip_modules or []
    skip = [*own, *sorted({*quantizer.modules_to_not_convert} - {*own})]
    component_of = component_finder(model)
    floats = format_of_dtype(dtype)
    found, seen = [], set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        converted = _is_converted(module) and leaf == "weight"
        plain = "fp32" if floats in FORMATS and kept_in_fp32(model, name, floats) else floats
        shape = tuple(parameter.shape)
        form = given.format if converted and not ours.llm_int8_has_fp16_weight else plain
        tied = name in model.all_tied_weights_keys or id(parameter) in seen
        if not tied:
            seen.add(id(parameter))
        convertible = leaf == "weight" and (converted or is_linear(module))
        found.append(
            Fate(
                name,
                path,
                component_of(name),
                kind_of(model, module, leaf),
                shape,
                form,
                0 if tied else _bytes(form, shape, dtype),
                0 if tied else _bytes(plain, shape, dtype),
                convertible,
                form == given.format,
                tuple(keepers(path, skip)) if convertible else (),
                tied,
            )
        )
    return tuple(found)


def dtype_of(config):
    """The torch dtype in which `from_pretrained` reads a checkpoint of that config unless it is
    told another; bfloat16 where the config does not say."""
    import torch

    return config.dtype or config.get_text_config().dtype or torch.bfloat16


def _is_converted(module):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return isinstance(module, (Linear4bit, Linear8bitLt))


def _bytes(name, shape, dtype):
    return FORMATS[name].nbytes(shape) if name in FORMATS else prod(shape) * dtype.itemsize


def usable(patterns):
    """The entries of a skip list that transformers can read, or None for no list."""
    if patterns is None:
        return None
    return [pattern for pattern in patterns if why_unusable(pattern) is None]


def why_unusable(pattern):
    """Why transformers cannot read an entry of a skip list, or None if it can."""
    if not isinstance(pattern, str):
        return f"of type {type(pattern).__name__}, not a string"
    try:
        re.compile(f"(?:{pattern})")  # as transformers embeds it in its own
    except re.error as error:
        return f"no regular expression ({error})"
    return None


def keepers(module, patterns):
    """The entries of `patterns` that keep the module of that full name from being converted."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return [pattern for pattern in patterns if not should_convert_module(module, [pattern])]
