"""Linting: what transformers will make of somebody's quantization config, before it loads anything.

    vk.lint("llava-hf/llava-1.5-7b-hf", BitsAndBytesConfig(load_in_4bit=True,
                                                           llm_int8_skip_modules=["vision_tower"]))

A skip list is easily wrong, and transformers does not say so: an entry is not matched as a
substring, and any list replaces the exceptions that transformers makes by default. A `vk.Plan` has
neither trap. Linting is for configs that others wrote.

Every method has a list and a rule of its own (`vlmkit.linting.methods`): bitsandbytes, AWQ, GPTQ,
FP8, HQQ, Quanto, EETQ, NVFP4, torchao and compressed-tensors.
"""

from vlmkit.anatomy import on_meta
from vlmkit.backend.quiet import quiet
from vlmkit.checkpoints import find, read_config, stored_formats, weight_files
from vlmkit.errors import CheckpointError, ConfigError, public
from vlmkit.headers import packed_weights
from vlmkit.linting import rules
from vlmkit.linting.context import Context
from vlmkit.linting.findings import ERROR, NOTE, SEVERITIES, WARNING, Finding, Findings
from vlmkit.linting.methods import classes_of
from vlmkit.linting.verdicts import Verdict, read, require_quick, verdicts

__all__ = ["ERROR", "NOTE", "SEVERITIES", "WARNING", "Finding", "Findings", "Verdict", "lint"]


@public
def lint(x, config=None, *, revision=None, trust_remote_code=False):
    """Findings: what loading `x` with `config` will do that its author may not want.

    x: "pebble", a folder, a hub id, a catalog name, a transformers config, or a model (only its
        config is used). No weight is read.
    config: a quantization config of transformers, its dictionary, or the path of a JSON file or of
        a checkpoint's folder with a config.json. None means the config that `x` has itself.

    `findings.verdicts` says which format each parameter will be held in, for a load without a
    device_map. For bitsandbytes it is the verdict of transformers' own quantizer. For other methods
    it follows the method's rule, and `findings.given.method.how` says how vlmkit knows the rule.
    `findings.repaired` is the skip list with all remedies, to paste. Bytes that are not quantized
    are counted in the dtype that the model's config names.

    Raises ConfigError if there is no config of a method in `vlmkit.linting.methods.METHODS`,
    CheckpointError and AnatomyError as `vk.anatomy` does.
    """
    import torch

    source = getattr(x, "config", x)
    name = type(x).__name__ if hasattr(source, "model_type") else str(x)
    with quiet():
        source, folder = _config_of(source, revision, trust_remote_code)
        own = getattr(source, "quantization_config", None)
        if config is None and own is None:
            raise ConfigError(
                f"{name} has no quantization_config of its own, and none was given. Give a "
                "BitsAndBytesConfig or another config of transformers, its dictionary, or the path "
                "of a JSON file."
            )
        given, overruled = read(own if config is None else config), None
        stored = bool(own) and folder is not None
        if stored and config is not None:  # transformers uses the checkpoint's own config
            overruled, given = given, read(own)
            if overruled.as_dict() == given.as_dict():
                overruled = None
        # the dtype that from_pretrained uses unless it is told another
        dtype = source.dtype or source.get_text_config().dtype or torch.bfloat16
        model = on_meta(source, dtype, trust_remote_code)
        modules = {name: classes_of(module) for name, module in model.named_modules()}
        require_quick(given, modules)
        formats = _stored_formats(folder, model, given) if stored else {}
        rows = verdicts(model, given, stored=stored)
    context = Context(given, rows, modules, formats, overruled)
    items = rules.findings(context)
    codes = {finding.code for finding in items if finding.severity != NOTE}
    repaired = None if codes.isdisjoint(rules.OF_THE_LIST) else context.repaired
    return Findings(f"{name} loaded in {given}", items, rows, given, repaired)


def _config_of(x, revision, trust_remote_code):
    """(config, folder or None) of what `lint` is asked about."""
    if hasattr(x, "model_type"):
        return x, None
    folder = find(x, revision=revision, weights=False)
    return read_config(folder, trust_remote_code=trust_remote_code), folder


def _stored_formats(folder, model, given):
    """{parameter: format} of a folder's weights; empty if the folder has no weights. What another
    method than bitsandbytes has packed counts as the format that the config names."""
    try:
        weight_files(folder)
    except CheckpointError:
        return {}
    if given.bitsandbytes:
        return stored_formats(folder, model)
    packed, plain = packed_weights(folder, model)
    return plain | dict.fromkeys(packed, given.format)
