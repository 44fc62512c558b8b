"""What transformers quantizes with bitsandbytes, and how it is told to quantize something else.

transformers converts every Linear layer that its `llm_int8_skip_modules` does not name. This list
is the only way to say what to quantize, and it has three traps:

1. An entry is a regular expression that has to match a name from its start, or a suffix of a name.
   A bare "vision_tower" does not match "model.vision_tower", and transformers ignores it silently.
   Every entry here is therefore the full name of a module.
2. No list at all brings transformers' own exceptions back (the output head, for example). Every
   config here therefore has a list, even an empty one.
3. A model class can add names of its own to any list (`_keep_in_fp32_modules`).

Since transformers 5.21, the oldest version tried, until its configs name what to quantize.
"""

import re
import warnings

from vlmkit.errors import PlanError
from vlmkit.formats import DEFAULT, format_named, torch_dtype


def skip_list(linears, quantized):
    """The full names of the outermost modules that hold some of `linears` and none of `quantized`.

    linears, quantized: full names of modules.
    """
    busy = {name.rsplit(".", i)[0] for name in quantized for i in range(name.count(".") + 1)}
    found = {}
    for name in linears:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
        idle = next((prefix for prefix in prefixes if prefix not in busy), None)
        if idle is not None:
            found[idle] = True
    return list(found)


def quantization_config(linears, quantized):
    """transformers' config for a model in which `quantized` and nothing else is quantized.

    linears: full names of all modules that transformers would quantize without a skip list.
    quantized: {full name of a module: format}.

    Returns a BitsAndBytesConfig for one format, a `vlmkit.backend.mixed.MixedConfig` for several,
    and None for none. Raises PlanError for what a skip list cannot express.
    """
    configs = []
    for name in sorted(set(quantized.values())):
        modules = {module for module, given in quantized.items() if given == name}
        configs.append(_config_of(name, linears, modules))
    if len(configs) < 2:
        return configs[0] if configs else None
    from vlmkit.backend.mixed import MixedConfig

    return MixedConfig(configs)


def _config_of(name, linears, modules):
    """The BitsAndBytesConfig that gives `modules` the format `name`, and quantizes nothing else."""
    from transformers import BitsAndBytesConfig

    skip = skip_list(linears, modules)
    _require_exact(skip, linears, modules)
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name.removesuffix("-dq"),
        bnb_4bit_use_double_quant=name.endswith("-dq"),
        bnb_4bit_compute_dtype=torch_dtype(name),
        llm_int8_skip_modules=skip,
    )


def formats_of_config(config):
    """(format of all Linear layers, [(pattern, format), ...]) of a BitsAndBytesConfig: what it
    quantizes to, and the exceptions that its skip list makes, as overrides of a plan.

    An entry of the list spares what transformers' own `should_convert_module` spares. An entry that
    spares no module, which transformers passes over silently, becomes a pattern that finds none,
    and that is an error where the plan meets a model.

    Warns if the list leaves the output head out, which transformers then quantizes and a plan does
    not. Warns if the config computes in another dtype than the plan, which computes in bf16. Raises
    PlanError for what a plan cannot express.
    """
    import torch
    from transformers.quantizers.quantizers_utils import should_convert_module

    if not (config.load_in_4bit or config.load_in_8bit):
        raise PlanError(
            "The BitsAndBytesConfig quantizes nothing: set load_in_4bit or load_in_8bit."
        )
    unusual = {
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    if config.load_in_4bit:
        unusual = {"bnb_4bit_quant_storage": torch.uint8}
    for key, usual in unusual.items():
        if (found := getattr(config, key)) != usual:
            raise PlanError(f"A plan cannot express {key}={found}: it always has {usual}.")
    name = "int8"
    if config.load_in_4bit:
        name = config.bnb_4bit_quant_type + "-dq" * config.bnb_4bit_use_double_quant
        dtype = config.bnb_4bit_compute_dtype
        if dtype != torch_dtype(DEFAULT):
            warnings.warn(
                f"The BitsAndBytesConfig computes in {str(dtype).removeprefix('torch.')}, and as a "
                f"plan it computes in bf16. Bytes and weights are the same.",
                stacklevel=4,
            )
    format_named(name)
    if config.llm_int8_skip_modules is None:
        return name, ()
    overrides = []
    for entry in config.llm_int8_skip_modules:
        try:
            re.compile(entry)
        except (re.error, TypeError) as error:
            raise PlanError(
                f"{entry!r} in llm_int8_skip_modules is not a regular expression: {error}"
            ) from error
        # A plan searches in a name with a dot at its end, and a match has to end at a boundary.
        start = rf"^(?:{entry})(?:(?<=\.)(?!$)|(?=\.))"
        overrides.append((rf"{start}|{re.escape(entry)}\.$", DEFAULT))
    if should_convert_module("lm_head", config.llm_int8_skip_modules):
        warnings.warn(
            "The BitsAndBytesConfig has a skip list without lm_head, so transformers would "
            "quantize the output head too. A plan keeps it.",
            stacklevel=4,
        )
    return name, tuple(overrides)


def _require_exact(skip, linears, modules):
    """Ask transformers' own function what it does with this skip list."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    wrong = [n for n in linears if should_convert_module(n, skip) != (n in modules)]
    if wrong:
        raise PlanError(
            f"transformers' skip list cannot express this plan: it would treat {wrong[0]} "
            f"(and {len(wrong) - 1} more modules) differently. Give them the format of their "
            "neighbors."
        )


def never_converted(model):
    """{full name of a module: why} of the modules that no plan can quantize.

    A tied weight is shared with an embedding, which cannot read packed bytes. transformers does not
    quantize what the model's class lists as to be kept in fp32, whatever dtype it is kept in.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    skips = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    listed = (name for name, _ in model.named_modules() if not should_convert_module(name, skips))
    tied = {**model.all_tied_weights_keys}
    names = (key.removesuffix(".weight") for key in (*tied, *tied.values()))
    return dict.fromkeys(listed, "left out by its class") | dict.fromkeys(names, "tied")


def kept_in_fp32(model, name, given):
    """Whether the class of `model` keeps the parameter `name` in fp32 when the model is loaded in
    the float format `given`. Some classes do this for a few modules, because their forward pass
    relies on it."""
    from transformers.core_model_loading import build_glob_alternation

    # from_pretrained finds and matches the names in the same way.
    kept = model._get_dtype_plan(torch_dtype(given))
    return bool(kept) and build_glob_alternation(list(kept))[0].search(name) is not None
