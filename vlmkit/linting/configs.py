"""Somebody's quantization config: as an object, a dictionary or a file, made transformers' own."""

import copy
import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from vlmkit.errors import ConfigError, brief

SKIP = "llm_int8_skip_modules"
FORMATS_OF_4_BITS = ("fp4", "nf4")


@dataclass(frozen=True)
class Given:
    """A config as it was given.

    config: transformers' BitsAndBytesConfig. ignored: {key that BitsAndBytesConfig does not have:
        the key that may have been meant, or None}.
    """

    config: object
    ignored: dict

    @property
    def patterns(self):
        """The skip list, or None where there is none."""
        return getattr(self.config, SKIP)

    @property
    def format(self):
        """Name of the format that Linear layers are converted to."""
        if self.config.load_in_8bit:
            return "int8"
        return self.config.bnb_4bit_quant_type + "-dq" * self.config.bnb_4bit_use_double_quant

    def __str__(self):
        skip = self.patterns
        if skip is not None and len(skip) > 4:
            skip = f"[{', '.join(map(repr, skip[:3]))}, … {len(skip) - 3} more]"
        return f"{self.format}, {SKIP}={skip}"


def read(config):
    """What was given, as a Given.

    config: a BitsAndBytesConfig, its dictionary, or the path of a JSON file or of a checkpoint's
        folder. A dictionary or file may be a whole config.json, with the one asked for in its
        `quantization_config`.

    Raises ConfigError for a file that cannot be read, and for what is no config of bitsandbytes.
    """
    if isinstance(config, (str, Path)):
        config = _read_file(Path(config).expanduser())
    if isinstance(config, dict):
        return _from_dict(config)
    if type(config).__name__ != "BitsAndBytesConfig":
        raise ConfigError(
            f"{type(config).__name__} is not a quantization config that can be checked: give a "
            "BitsAndBytesConfig, its dictionary, or the path of a JSON file."
        )
    _require_a_format(config)
    return Given(copy.deepcopy(config), {})


def _read_file(path):
    if path.is_dir():
        path = path / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path}: give the path of a JSON file.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {brief(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object.")
    if "model_type" in raw and not raw.get("quantization_config"):
        raise ConfigError(f"{path} is a model's config, and has no quantization_config.")
    return raw


def _from_dict(raw):
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    raw = raw.get("quantization_config") or raw
    if not isinstance(raw, dict):
        return read(raw)
    method = str(getattr(raw.get("quant_method"), "value", raw.get("quant_method", "bitsandbytes")))
    if method == "vlmkit":
        raise ConfigError(
            "This is a config of several formats, which vlmkit made from a plan and checked. "
            "Compare a loaded model with the plan: vk.audit(model, plan)."
        )
    if method != "bitsandbytes":
        raise ConfigError(f"This config is {method}'s: only bitsandbytes' has such a skip list.")
    known = BitsAndBytesConfig().to_dict()
    ignored = {
        key: next(iter(difflib.get_close_matches(str(key), known, n=1, cutoff=0.8)), None)
        for key in raw
        if key not in known
    }
    try:
        config = AutoQuantizationConfig.from_dict(dict(raw))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"transformers refuses this config: {brief(error)}") from error
    _require_a_format(config)
    return Given(config, ignored)


def _require_a_format(config):
    name = config.bnb_4bit_quant_type
    if not config.load_in_8bit and name not in FORMATS_OF_4_BITS:
        raise ConfigError(
            f"bnb_4bit_quant_type is {name!r}, and bitsandbytes has only "
            f"{' and '.join(FORMATS_OF_4_BITS)}: no weight could be loaded."
        )
