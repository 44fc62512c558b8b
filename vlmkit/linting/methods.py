"""Methods: what each quantization method keeps out of quantization, by its own matching rules.

The same list means different things to different methods: `["visual"]` keeps Qwen2-VL's vision
encoder under AutoAWQ, which looks for substrings, and keeps nothing when transformers loads the
result. `METHODS` has a line for each method, with the place where its rule stands and how vlmkit
has checked it: by a load with the library, by transformers' own conversion on the meta device, or
only by reading the source. tests/test_linting_methods.py repeats those loads and conversions where
the libraries are installed.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

LOAD, CONVERSION, SOURCE = "a load", "a conversion", "the source"
START_OR_END = (
    "An entry is a regular expression that has to match from the start of a module's full name to "
    "the end of one of its parts, or it is the end of the name"
)
REPLACED = "By default transformers keeps the head, but any list, even an empty one, replaces that"


# --- whether an entry keeps a module: (entry, full name, names of the module's classes) -----------


def _start_or_end(entry, name, classes):
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, [entry])


def _of_weight(entry, name, classes):
    return _start_or_end(entry, f"{name}.weight", classes)


def _exact(entry, name, classes):
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry == name or entry in classes


def _same_tag(entry, name, classes):
    return entry == tag(name)


def tag(name):
    """HQQ's name of a layer: its full name without "model", "layers" and numbers."""
    parts = name.split(".")
    return ".".join(p for p in parts if p not in ("model", "layers") and not p.isnumeric())


# --- the config: (entries, or None without a list), the format, and bits per weight ---------------


def _list_named(key):
    return lambda config: config.get(key)


def _named_bits(title, key, usual=None):
    def format_of(config):
        found = str(config.get(key) or usual)
        digits = re.search(r"\d+", found)
        number = int(digits[0]) if digits else None
        return f"{title}-{found}" if not found.isdigit() else f"{title}-int{found}", number

    return format_of


def _hqq_bits(config):
    settings = config.get("quant_config") or config
    bits = settings.get("weight_quant_params", settings).get("nbits", 4)
    return f"hqq-int{bits}", bits


def _torchao_type(config):
    found = config.get("quant_type")
    if isinstance(found, dict):
        return (found.get("default") or {}).get("_type", "torchao")
    return type(found).__name__


def _torchao_bits(config):
    name = _torchao_type(config)
    digits = re.search(r"(?:Int|Float|UInt|MX|NVFP)(\d)", name)
    return f"torchao-{name}", int(digits[1]) if digits else 8


def _groups_bits(config):
    weights = [g.get("weights") or {} for g in _groups(config)]
    if not weights:
        return "compressed-tensors", None
    return f"{weights[0].get('type', 'int')}{weights[0]['num_bits']}", weights[0]["num_bits"]


def _groups(config):
    groups = config.get("config_groups") or {}
    return [g for g in groups.values() if isinstance(g, dict) and (g.get("weights") or {})]


# --- which modules are converted at all: (config, model) -> a test of (name, module) --------------


def _linear(config, model):
    from torch import nn

    return lambda name, module: isinstance(module, nn.Linear)


def _plain_linear(config, model):
    from torch import nn

    return lambda name, module: type(module) is nn.Linear


def _nvfp4(config, model):
    from transformers.integrations.nvfp4 import _is_nvfp4_compatible

    return lambda name, module: _is_nvfp4_compatible(module)


def _with_embeddings(config):
    return config.get("include_input_output_embeddings", False)


def _targeted(config, model):
    from torch import nn

    targets = [target for group in _groups(config) for target in group.get("targets", ())]

    def test(name, module):
        fits = isinstance(module, (nn.Linear, nn.Embedding))
        return fits and any(_exact(target, name, classes_of(module)) for target in targets)

    return test


BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers",
          "model.language_model.layers", "h", "decoder.layers", "layers")  # fmt: skip
"""optimum's BLOCK_PATTERNS. The first that begins a module's name is where GPTQ quantizes."""


def _in_blocks(config, model):
    from torch import nn

    names = [name for name, _ in model.named_modules()]
    block = config.get("block_name_to_quantize")
    block = block or next((b for b in BLOCKS if any(n.startswith(b) for n in names)), None)
    inside = config.get("modules_in_block_to_quantize")
    ends = None if inside is None else tuple(e for part in inside for e in _listed(part))

    def test(name, module):
        fits = type(module) is nn.Linear and block is not None and name.startswith(block)
        return fits and (ends is None or name.endswith(ends))

    return test


def _listed(part):
    return [part] if isinstance(part, str) else part


def classes_of(module):
    """The names of a module's class and of the classes that it is derived from."""
    return tuple(cls.__name__ for cls in type(module).__mro__)


# --- what transformers adds to a list: (entries, config, model) -> names --------------------------


def _defaults(model):
    from transformers.quantizers.base import get_keys_to_not_convert

    return get_keys_to_not_convert(model)


def _replaced(entries, config, model):
    own = list(model._keep_in_fp32_modules or ())
    return own + (_defaults(model) if entries is None else [])


def _added(entries, config, model):
    return list(model._keep_in_fp32_modules or ()) + _defaults(model)


def _nothing(entries, config, model):
    return []


def _hqq_head(entries, config, model):
    return ["lm_head"] if entries is None else []


def _without_embeddings(entries, config, model):
    names = _replaced(entries, config, model)
    return [n for n in names if n not in _embeddings(model)] if _with_embeddings(config) else names


def _embeddings(model):
    ends = [id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    return {name for name, module in model.named_modules() if id(module) in ends}


# --- entries as the method reads them: (entries, config, model) -> {entry: what is matched} -------


def _as_written(entries, config, model):
    return {entry: entry for entry in entries}


def _renamed(entries, config, model):
    """FP8 brings the names of older releases up to date first, as transformers does for weights."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    given = SimpleNamespace(modules_to_not_convert=list(entries))
    FineGrainedFP8HfQuantizer._normalize_modules_to_not_convert(
        SimpleNamespace(quantization_config=given), model
    )
    return dict(zip(entries, given.modules_to_not_convert, strict=True))


def _dropped(entries, config, model):
    """`include_input_output_embeddings` strikes the embeddings and the head from torchao's list. An
    embedding stays as it is all the same, because torchao's `quantize_` converts Linear layers."""
    gone = _embeddings(model) if _with_embeddings(config) else ()
    return {entry: entry for entry in entries if entry not in gone}


@dataclass(frozen=True)
class Method:
    """How one method reads its skip list.

    name: `quant_method` in a config. key: the list's name there, or None without a list.
    matching: the rule in words. source: where the rule stands. checked: LOAD, CONVERSION or SOURCE.
    keeps: whether an entry keeps a module. converts: which modules are converted at all. added:
        what transformers adds to the list. entries_as_read: what is matched for each entry. All of
        these are functions; their arguments stand above them in this file.
    format_of: a function of a config that returns the format's name and its bits per weight.
    always: what is kept besides the list, in words.
    syntax: "prefix" for expressions, "re" for names and expressions after `re:`, "tag" for HQQ's.
    experts: whether fused experts are converted too.
    """

    name: str
    key: str
    matching: str
    source: str
    checked: str
    keeps: Callable = _start_or_end
    converts: Callable = _linear
    added: Callable = _replaced
    entries_as_read: Callable = _as_written
    format_of: Callable = None
    always: str = REPLACED
    syntax: str = "prefix"
    experts: bool = False

    @property
    def how(self):
        """How vlmkit knows the rule, in words."""
        read = "only read" if self.checked == SOURCE else f"checked by {self.checked}, and read"
        return f"{read} in {self.source}"

    def read_entries(self, config):
        """The skip list of a config, a dictionary; None without one."""
        return config.get(self.key) if self.key else None


_T = "transformers 5.24"
METHODS = {
    method.name: method
    for method in (
        Method("bitsandbytes", "llm_int8_skip_modules", START_OR_END,
               f"{_T}, integrations/bitsandbytes.py", LOAD, converts=_plain_linear,
               format_of=lambda config: ("bitsandbytes", None)),
        Method("awq", "modules_to_not_convert", START_OR_END, f"{_T}, integrations/awq.py", SOURCE,
               added=_added, format_of=_named_bits("awq", "bits", 4),
               always="transformers always keeps the head, whatever the list"),
        Method("fp8", "modules_to_not_convert",
               f"Entries get the names that the release has for old ones first. {START_OR_END}",
               f"{_T}, quantizers/quantizer_finegrained_fp8.py", CONVERSION,
               converts=_plain_linear, entries_as_read=_renamed, experts=True,
               format_of=lambda config: ("fp8", 8)),
        Method("fbgemm_fp8", "modules_to_not_convert", START_OR_END,
               f"{_T}, integrations/fbgemm_fp8.py", SOURCE,
               format_of=lambda config: ("fbgemm-fp8", 8)),
        Method("quanto", "modules_to_not_convert", START_OR_END, f"{_T}, integrations/quanto.py",
               LOAD, format_of=_named_bits("quanto", "weights", "int8")),
        Method("eetq", "modules_to_not_convert", START_OR_END, f"{_T}, integrations/eetq.py",
               SOURCE, format_of=lambda config: ("eetq-int8", 8)),
        Method("nvfp4", "modules_to_not_convert", START_OR_END, f"{_T}, integrations/nvfp4.py",
               CONVERSION, converts=_nvfp4, format_of=lambda config: ("nvfp4", 4)),
        Method("torchao", "modules_to_not_convert",
               "An entry is a regular expression that has to match from the start of a weight's "
               "full name to the end of one of its parts. The end of a module's name matches "
               "nothing, because the name that is compared ends with .weight",
               f"{_T}, quantizers/quantizer_torchao.py", LOAD, keeps=_of_weight,
               added=_without_embeddings, entries_as_read=_dropped, format_of=_torchao_bits),
        Method("hqq", "skip_modules",
               'An entry has to equal a layer\'s full name without "model", "layers" and numbers',
               f"{_T}, integrations/hqq.py, and hqq 0.2.8, models/base.py", CONVERSION,
               keeps=_same_tag, added=_hqq_head, format_of=_hqq_bits, syntax="tag",
               always='The list is ["lm_head"] by default, and another list replaces that'),
        Method("compressed-tensors", "ignore",
               "An entry is a module's full name or the name of its class; with re: in front it is "
               "a regular expression that has to match from the start of the full name",
               "compressed-tensors 0.20.1, utils/match.py", LOAD, keeps=_exact, converts=_targeted,
               added=_nothing, format_of=_groups_bits, syntax="re",
               always="compressed-tensors keeps nothing that the list leaves out"),
        Method("gptq", None,
               "There is no list of exceptions: Linear layers are converted in the language "
               "model's blocks, and of these only what modules_in_block_to_quantize names",
               "optimum 2.3.0, gptq/quantizer.py", SOURCE, converts=_in_blocks, added=_nothing,
               format_of=_named_bits("gptq", "bits", 4), always="Only blocks are converted"),
    )
}  # fmt: skip
"""`quant_method` -> Method."""


def as_dictionary(config):
    """A copy of a config of another method than bitsandbytes, as a dictionary."""
    if not isinstance(config, dict):
        attributes = {k: v for k, v in vars(config).items() if not k.startswith("_")}
        config = attributes | {"quant_method": method_name(config)}
    return copy.deepcopy(config)


def why_unknown(config):
    """Why vlmkit cannot follow a config, a dictionary of a known method, or None if it can."""
    if config["quant_method"] == "torchao" and _torchao_type(config).endswith("FqnToConfig"):
        return "FqnToConfig gives modules formats of their own, which vlmkit does not follow."
    return None


def method_name(config):
    """The `quant_method` of a config or a dictionary, as a string, or None."""
    found = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return getattr(found, "value", found)
