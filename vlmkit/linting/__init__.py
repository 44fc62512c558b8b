"""Linting: what transformers will make of somebody's BitsAndBytesConfig, before it is loaded.

    vk.lint("llava-hf/llava-1.5-7b-hf", BitsAndBytesConfig(load_in_4bit=True,
                                                           llm_int8_skip_modules=["vision_tower"]))

A skip list is easily wrong and never says so: an entry is no substring, and any list replaces the
exceptions that transformers makes by itself. A `vk.Plan` has neither trap. This is for the configs
that others wrote.
"""

from vlmkit.checkpoints import find, read_config, weight_files
from vlmkit.errors import CheckpointError, ConfigError
from vlmkit.linting.case import Case
from vlmkit.linting.configs import read
from vlmkit.linting.fates import Fate, fates
from vlmkit.linting.findings import ERROR, NOTE, SEVERITIES, WARNING, Finding, Findings
from vlmkit.linting.rules import RULES

__all__ = ["ERROR", "NOTE", "SEVERITIES", "WARNING", "Fate", "Finding", "Findings", "lint"]


def lint(x, config=None, *, revision=None, trust_remote_code=False):
    """What loading `x` with `config` will do that was perhaps not meant. Returns Findings.

    x: "pebble", a folder, a hub id, a catalog name, a transformers config, or a model (for its
        config). No weight is read.
    config: a BitsAndBytesConfig, its dictionary, or the path of a JSON file or of a checkpoint's
        folder, in whose config.json it is. None is the one that `x` has itself.

    What each parameter will be held in (`findings.fates`) is the verdict of transformers' own
    quantizer, for a load without a device_map. Bytes are those in the dtype that
    the model's config names.

    Raises ConfigError where there is no config of bitsandbytes, CheckpointError and AnatomyError
    as `vk.anatomy` does.
    """
    from vlmkit.anatomy import on_meta
    from vlmkit.backend.quiet import quiet

    with quiet():
        model_config, folder = _config_of(x, revision, trust_remote_code)
        own = getattr(model_config, "quantization_config", None)
        if config is None and own is None:
            raise ConfigError(
                f"{_name(x)} has no quantization_config of its own, and none was given: give a "
                "BitsAndBytesConfig, its dictionary, or the path of a JSON file."
            )
        given = read(own if config is None else config)
        asked, stored = None, bool(own) and folder is not None
        if stored and config is not None:  # transformers prefers what the checkpoint says
            asked, given = given, read(own)
            asked = None if asked.config.to_dict() == given.config.to_dict() else asked
        found = fates(model_config, given, stored=stored, trust_remote_code=trust_remote_code)
        plain = on_meta(model_config, None, trust_remote_code)
        modules = tuple(name for name, _ in plain.named_modules())
        formats = _stored_formats(folder, plain) if stored else {}
    case = Case(given, found, modules, formats, asked)
    items = [finding for rule in RULES for finding in rule(case)]
    items.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Findings(f"{_name(x)} loaded in {given}", tuple(items), found)


def _config_of(x, revision, trust_remote_code):
    """(config, folder or None) of what `lint` is asked about."""
    config = getattr(x, "config", x)
    if hasattr(config, "model_type"):
        return config, None
    folder = find(x, revision=revision, weights=False)
    return read_config(folder, trust_remote_code=trust_remote_code), folder


def _stored_formats(folder, model):
    """{parameter: format} of a folder's weights, or nothing where they are not there."""
    from vlmkit.stored import stored_formats

    try:
        weight_files(folder)
    except CheckpointError:
        return {}
    return stored_formats(folder, model)


def _name(x):
    config = getattr(x, "config", x)
    return type(x).__name__ if hasattr(config, "model_type") else str(x)
