"""Verdicts: what transformers will make of every parameter under somebody's quantization config.

For bitsandbytes vlmkit works out none of this itself. It builds the model on the meta device and
hands the model to transformers' own quantizer, as `from_pretrained` does before it reads a weight.
Then it looks. Other methods need a package that vlmkit does not; `vlmkit.linting.methods` has their
rules.
"""

import copy
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path

from vlmkit.anatomy import component_finder
from vlmkit.backend.converting import kept_in_fp32
from vlmkit.errors import ConfigError, brief, did_you_mean
from vlmkit.formats import FORMATS, format_of_dtype
from vlmkit.linting.methods import METHODS, as_dictionary, classes_of, method_name, why_unknown
from vlmkit.rows import Row, is_linear, kind_of


@dataclass(frozen=True)
class Given:
    """A quantization config as somebody wrote it.

    config: transformers' BitsAndBytesConfig; a dictionary for every other method.
    ignored: {key that BitsAndBytesConfig does not have: "Did you mean 'another key'? ", or an empty
        string}. method: a `vlmkit.linting.methods.Method`.
    """

    config: object
    ignored: dict
    method: object = METHODS["bitsandbytes"]

    @property
    def bitsandbytes(self):
        """Whether the method is bitsandbytes."""
        return self.method.name == "bitsandbytes"

    @property
    def entries(self):
        """The skip list, or None if the config has no skip list."""
        return self.method.read_entries(self.as_dict())

    def as_dict(self):
        """The config as a dictionary."""
        return self.config if isinstance(self.config, dict) else self.config.to_dict()

    @property
    def usable(self):
        """The entries that transformers can read, or None if the config has no skip list."""
        if self.entries is None:
            return None
        return [entry for entry in self.entries if why_unusable(entry, self.method) is None]

    @property
    def format(self):
        """Name of the format that Linear layers are converted to."""
        if not self.bitsandbytes:
            return self.method.format_of(self.config)[0]
        if self.config.load_in_8bit:
            return "int8"
        return self.config.bnb_4bit_quant_type + "-dq" * self.config.bnb_4bit_use_double_quant

    def __str__(self):
        skip = self.entries
        if skip is not None and len(skip) > 4:
            skip = f"[{', '.join(map(repr, skip[:3]))}, … {len(skip) - 3} more]"
        return f"{self.format}, {self.method.key}={skip}" if self.method.key else self.format


@dataclass(frozen=True)
class Verdict(Row):
    """A `vlmkit.rows.Row` of a load that has not happened yet.

    asked: the format that the config quantizes to. format: the one that the parameter will be held
        in: of vlmkit.formats, or the dtype's own name if vlmkit.formats does not have it.
    bytes: in that format, with the quantization state. bytes_unquantized: without quantization.
    kept_by: the entries of the skip list that keep the parameter unquantized.
    tied: whether an embedding has the same weight. The weight is counted there, and has 0 bytes
        here.
    """

    bytes_unquantized: int = 0
    kept_by: tuple = ()
    tied: bool = False

    @property
    def quantized(self):
        """Whether the parameter will be quantized."""
        return self.format == self.asked


def verdicts(model, given, *, stored=False):
    """A tuple with a Verdict for each parameter. A tied parameter has one under each of its names.

    model: on the meta device, in the dtype in which it will be loaded. Its Linear layers are
        replaced, as the quantizer does it. given: a Given.
    stored: whether the weights in the checkpoint are quantized already.
    """
    if not given.bitsandbytes:
        return verdicts_by_rule(model, given)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.quantizers.auto import AutoHfQuantizer

    dtype = model.dtype
    config = copy.deepcopy(given.config)
    config.llm_int8_skip_modules = given.usable
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=stored)
    quantizer.preprocess_model(model, dtype=dtype, device_map=None)
    own = config.llm_int8_skip_modules or []
    skip = [*own, *sorted({*quantizer.modules_to_not_convert} - {*own})]
    component_of, floats = component_finder(model), format_of_dtype(dtype)
    found, seen = [], set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        module, shape = model.get_submodule(path), tuple(parameter.shape)
        converted = isinstance(module, (Linear4bit, Linear8bitLt)) and leaf == "weight"
        convertible = leaf == "weight" and (converted or is_linear(module))
        plain = "fp32" if floats in FORMATS and kept_in_fp32(model, name, floats) else floats
        held = given.format if converted and not config.llm_int8_has_fp16_weight else plain
        tied = name in model.all_tied_weights_keys or id(parameter) in seen
        if not tied:
            seen.add(id(parameter))
        found.append(
            Verdict(
                name,
                component_of(name),
                kind_of(model, module, leaf),
                0 if tied else _bytes(held, shape, dtype),
                shape,
                given.format,
                held,
                convertible,
                bytes_unquantized=0 if tied else _bytes(plain, shape, dtype),
                kept_by=entries_that_keep(path, skip) if convertible else (),
                tied=tied,
            )
        )
    return tuple(found)


def verdicts_by_rule(model, given):
    """The same by the method's rule in `vlmkit.linting.methods`; `model` stays as it is.

    Bytes of a quantized weight are those of its packed numbers, without scales. For bitsandbytes
    they are those of the weight before quantization.
    """
    method, config, dtype = given.method, given.config, model.dtype
    label, bits = method.format_of(config)
    test = method.converts(config, model)
    skip = method.entries_as_read(given.usable or [], config, model)
    extra = sorted({*method.added(given.entries, config, model)} - {*skip})
    skip |= {entry: entry for entry in extra}
    component_of, plain = component_finder(model), format_of_dtype(dtype)
    found, seen = [], set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        module, shape = model.get_submodule(path), tuple(parameter.shape)
        kind = kind_of(model, module, leaf)
        experts = method.experts and path.endswith(".experts")
        convertible = experts or (leaf == "weight" and test(path, module))
        classes = classes_of(module)
        keeping = (e for e, read in skip.items() if method.keeps(read, path, classes))
        kept_by = tuple(keeping) if convertible else ()
        quantized = convertible and not kept_by
        tied = name in model.all_tied_weights_keys or id(parameter) in seen
        if not tied:
            seen.add(id(parameter))
        unquantized = 0 if tied else _bytes(plain, shape, dtype)
        packed = unquantized if bits is None else -(-prod(shape) * bits // 8)
        found.append(
            Verdict(
                name,
                component_of(name),
                kind,
                packed if quantized and not tied else unquantized,
                shape,
                label,
                label if quantized else plain,
                convertible,
                bytes_unquantized=unquantized,
                kept_by=kept_by,
                tied=tied,
            )
        )
    return tuple(found)


def _bytes(name, shape, dtype):
    return FORMATS[name].nbytes(shape) if name in FORMATS else prod(shape) * dtype.itemsize


def why_unusable(entry, method=METHODS["bitsandbytes"]):
    """Why `method` cannot read an entry of a skip list, or None if it can."""
    if not isinstance(entry, str):
        return f"of type {type(entry).__name__}, not a string"
    if (expression := _expression(entry, method)) is None:
        return None
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return f"not a valid regular expression ({error})"
    return None


def _expression(entry, method):
    """The regular expression that `method` makes of an entry, or None if it compares names."""
    if method.syntax == "prefix":
        return f"(?:{entry})"  # transformers puts the entry into an expression of its own
    return entry[3:] if method.syntax == "re" and entry.startswith("re:") else None


SECONDS = 5
_TRY = "import json, re, sys; p, names = json.load(sys.stdin); [re.match(p, n) for n in names]"


def require_quick(given, modules):
    """Raise ConfigError if an entry of the skip list takes so long on the names `modules` that a
    load would hang.

    transformers uses Python's own `re`, which cannot be stopped, so another process tries it. An
    entry with one repetition is always quick.
    """
    for entry in given.usable or ():
        expression = _expression(entry, given.method)
        if expression is None or len(re.findall(r"[*+{]", entry)) < 2:
            continue
        words = [sys.executable, "-I", "-S", "-c", _TRY]
        try:
            text = json.dumps([f"{expression}$", list(modules)])
            subprocess.run(words, input=text, text=True, timeout=SECONDS, capture_output=True)
        except subprocess.TimeoutExpired as error:
            raise ConfigError(
                f"{given.method.key}: matching the entry {entry!r} takes longer than {SECONDS} "
                "seconds, and loading with this config would hang. A repeated group in which "
                "something is repeated too, such as (a+)+, does that. Name the modules instead."
            ) from error


def entries_that_keep(module, entries):
    """Those of `entries` that keep the module with this full name out of bitsandbytes, a tuple."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return tuple(entry for entry in entries if not should_convert_module(module, [entry]))


# --- reading a config ----------------------------------------------------------------------------


def read(config):
    """The Given of a config.

    config: a config of transformers, its dictionary, or the path of a JSON file or of a
        checkpoint's folder. A dictionary or a file may also be a whole config.json with a
        `quantization_config`.

    Raises ConfigError for a file that cannot be read, and for a method that METHODS does not have.
    """
    if isinstance(config, (str, Path)):
        config = _read_file(Path(config).expanduser())
    ignored = {}
    if isinstance(config, dict):
        config = config.get("quantization_config") or config
    if isinstance(config, dict) or hasattr(config, "quant_method"):
        other = method_name(config)
        if other not in (None, "bitsandbytes"):
            return _of_another(config, other)
    if isinstance(config, dict):
        config, ignored = _from_dict(config)
    if type(config).__name__ != "BitsAndBytesConfig":
        raise ConfigError(
            f"vlmkit cannot check a {type(config).__name__}. Give a config of transformers, such "
            "as BitsAndBytesConfig, its dictionary, or the path of a JSON file."
        )
    name = config.bnb_4bit_quant_type
    if not config.load_in_8bit and name not in ("fp4", "nf4"):
        raise ConfigError(
            f"bnb_4bit_quant_type is {name!r}, but bitsandbytes has only 'fp4' and 'nf4'. Loading "
            "fails with this config."
        )
    return Given(copy.deepcopy(config), ignored)


def _of_another(config, name):
    """The Given of a config whose quant_method is `name`."""
    if name not in METHODS:
        raise ConfigError(
            f"The config's quant_method is {name!r}, whose skip list vlmkit does not know. It "
            f"knows those of {', '.join(METHODS)}. Configs of vlmkit itself come from a plan: "
            "after a load, call vk.audit(model, plan)."
        )
    given = Given(as_dictionary(config), {}, METHODS[name])
    if why := why_unknown(given.config | {"quant_method": name}):
        raise ConfigError(why)
    key, entries = given.method.key, given.entries
    if entries is not None and not isinstance(entries, (list, tuple)):
        raise ConfigError(f"{key} has to be a list of strings, and is {entries!r}.")
    return given


def _read_file(path):
    try:
        file = path / "config.json" if path.is_dir() else path
        if file.exists() and not file.is_file():  # a pipe, which nobody may ever write to
            raise OSError("it is a pipe or a device, not a file")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {brief(error)}") from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({brief(error)}). Give the path of a JSON file."
        ) from error
    if not isinstance(raw, dict) or ("model_type" in raw and not raw.get("quantization_config")):
        raise ConfigError(f"{file} has no quantization_config, and is no such config itself.")
    return raw


def _from_dict(raw):
    """(transformers' config, the keys that it ignores) of a dictionary."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    known = BitsAndBytesConfig().to_dict()
    ignored = {key: did_you_mean(key, known, 0.8) for key in raw if key not in known}
    try:
        return AutoQuantizationConfig.from_dict(dict(raw)), ignored
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"transformers refuses this config: {brief(error)}") from error
