"""Anatomy: every parameter of a vision-language model belongs to one component.

    vk.anatomy("pebble")                  # also a folder, a hub id, a config, or a model
    vk.anatomy("pebble")["projector"].parameters

`transformers` has no accessor for a projector, and its accessors for encoder and decoder return
something else for nearly half of the architectures. The *path* of a parameter, such as
`model.vision_tower.encoder.layers.0.….weight`, does say its component. All rules for paths are in
the tables of `vlmkit.architectures`.
"""

import contextlib
import re
import sys
import threading
import types
from dataclasses import dataclass, field, replace
from math import prod

from vlmkit import COMPONENTS, checkpoints
from vlmkit.architectures import GGUF, NOT_VLMS, PROJECTOR, VISION, decide
from vlmkit.errors import AnatomyError, CheckpointError, brief, did_you_mean, public
from vlmkit.headers import gguf_files, gguf_rows, mismatch, stored_rows, unquantized
from vlmkit.rows import sums
from vlmkit.tables import Table
from vlmkit.units import MEGABYTE

_LOCK = threading.RLock()


@contextlib.contextmanager
def one_at_a_time():
    """Within it, no other thread of vlmkit builds or loads a model, and at its end torch's default
    dtype is what it was.

    While transformers builds a model, it sets torch's default dtype for the whole process, and
    sets it back to what it found. If two threads do so at once, one finds the other's.
    """
    import torch

    with _LOCK:
        before = torch.get_default_dtype()
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def unwrapped(model):
    """The model itself, without the wrapper that PEFT may have put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_name(name):
    """The name of a parameter without what PEFT has added to it."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def is_adapter(name):
    """Whether PEFT added the weight of this name."""
    return any(
        part in ("modules_to_save", "lora_magnitude_vector") or part.startswith("lora_")
        for part in name.split(".")
    )


def type_of(model):
    """The `model_type` of a model's config, or None."""
    return getattr(getattr(unwrapped(model), "config", None), "model_type", None)


def component_finder(model):
    """A function of a full name in `model` that returns its component, or None if no rule fits."""
    model_type = type_of(model)
    return lambda path: decide(path, model_type)[0]


def vision_dtype(model):
    """The floating-point dtype of the pixels that the vision encoder takes.

    Under a plan the components have different dtypes, and `model.dtype` is that of the first one.
    For a quantized encoder it is the dtype of the unquantized rest, such as the patch embedding.
    """
    component_of = component_finder(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and component_of(name) == VISION:
            return parameter.dtype
    return model.dtype


def shape_of(parameter):
    """The shape of the weight before it was packed, as a tuple. `shape` and `numel()` of a 4-bit
    weight count bytes, which hold two numbers each; its quantization state has the shape."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def is_packed(parameter):
    """Whether `parameter` holds codes of a quantized format, which can be stored in a float dtype
    (see vlmkit.backend.sharding)."""
    return getattr(parameter, "quant_state", None) is not None or not parameter.is_floating_point()


@dataclass(frozen=True)
class Part:
    """One component of one model: the number of parameters and of tensors, and their paths.

    buffers: the number of values that are saved with the weights and not trained, such as the
    biases that balance the experts of a mixture. They are not parameters.
    """

    component: str
    parameters: int = 0
    tensors: int = 0
    places: tuple = ()
    buffers: int = 0


@dataclass(frozen=True)
class Anatomy(Table):
    """The components of one model. `a["projector"].parameters`, `a.total`, `a.component_of(path)`.

    unknown: the full names of parameters (and saved buffers) that no rule assigns to a component.
    These parameters count in `total`, and in no component.
    stored: for a quantized checkpoint, a `vlmkit.rows.Row` for each tensor in its weight files,
        with its stored format and its bytes. The table then has a column for it.
    notes: sentences on what is stored.
    """

    architecture: str
    parts: dict = field(repr=False)
    unknown: tuple = ()
    unknown_parameters: int = 0
    model_type: str = None
    stored: tuple = field(default=(), repr=False)
    notes: tuple = field(default=(), repr=False)

    def __getitem__(self, component):
        if component not in self.parts:
            raise AnatomyError(
                f"{component!r} is not a component. {did_you_mean(component, COMPONENTS)}"
                f"The components are {', '.join(COMPONENTS)}."
            )
        return self.parts[component]

    @property
    def total(self):
        """Parameters of the whole model, tied weights counted once."""
        return sum(part.parameters for part in self.parts.values()) + self.unknown_parameters

    @property
    def by_component(self):
        """{component: parameters} for components that have any; None stands for unknown ones."""
        counts = {c: part.parameters for c, part in self.parts.items() if part.parameters}
        return counts | ({None: self.unknown_parameters} if self.unknown_parameters else {})

    def component_of(self, path):
        """The component of a full module or parameter name, or None if no rule fits."""
        return decide(path, self.model_type)[0]

    def table(self):
        """A pandas DataFrame with a row per component, and one for unknown parameters if any."""
        import pandas as pd

        rows = [
            (p.component, p.parameters, p.tensors, ", ".join(p.places)) for p in self.parts.values()
        ]
        if self.unknown:
            rows.append(
                ("unknown", self.unknown_parameters, len(self.unknown), ", ".join(self.unknown[:3]))
            )
        table = pd.DataFrame(rows, columns=["component", "parameters", "tensors", "where"])
        share = table["parameters"] / max(self.total, 1)
        table.insert(2, "share", [f"{s:.1%}" for s in share])
        table = table.set_index("component")
        if self.stored:
            table.insert(3, "stored", [self._formats(c) for c in table.index])
        return table

    def _formats(self, component):
        """The formats in which `component` is stored, the one with most bytes first."""
        own = [row for row in self.stored if (row.component or "unknown") == component]
        sizes = sums(own, "format", {row.format: True for row in own})
        return ", ".join(sorted(sizes, key=sizes.get, reverse=True))

    def _text_table(self):
        table = self.table()
        table["parameters"] = table["parameters"].map("{:,}".format)
        return table

    def _headline(self):
        size = sum(row.bytes for row in self.stored) / MEGABYTE
        stored = f", stored in {size:,.2f} MB (1 MB = 10^6 bytes)" if self.stored else ""
        return f"{self.architecture}: {self.total:,} parameters{stored}"

    def _remarks(self):
        return self.notes

    def require_known(self):
        """Raise AnatomyError if any parameter is unknown; otherwise return self."""
        if self.unknown:
            names = "\n  ".join(self.unknown[:5])
            more = f"\n  and {len(self.unknown) - 5} more" if len(self.unknown) > 5 else ""
            raise AnatomyError(
                f"{self.architecture} has {len(self.unknown)} parameters that no rule of vlmkit "
                f"assigns to a component:\n  {names}{more}\n"
                "vlmkit does not guess, so it cannot apply a plan to this architecture."
            )
        return self


def anatomy_of(model):
    """Anatomy of a `torch.nn.Module`: loaded or on the meta device, quantized or not, also with
    PEFT's adapters, which count in the component that they adapt."""
    model_type = type_of(model)
    tensors, buffers, unknown = {}, {}, []
    for name, parameter in model.named_parameters():  # lists a tied weight once
        component, place = decide(name, model_type)
        tensors.setdefault(component, []).append((place, prod(shape_of(parameter))))
        if component is None:
            unknown.append(name)
    for name, buffer in _saved_buffers(model):
        component, _ = decide(name, model_type)
        buffers[component] = buffers.get(component, 0) + buffer.numel()
        if component is None:
            unknown.append(name)

    def part(component):
        own = tensors.get(component, [])
        places = tuple(dict.fromkeys(place for place, _ in own))
        size = sum(size for _, size in own)
        return Part(component, size, len(own), places, buffers.get(component, 0))

    parts = {component: part(component) for component in COMPONENTS}
    architecture = type(unwrapped(model)).__name__
    if not (parts[VISION].parameters or parts[PROJECTOR].parameters or unknown):
        raise AnatomyError(
            f"{architecture}, as its config describes it, is not a vision-language model: it has "
            "no parameters of a vision encoder or a projector. Look at vision_config."
        )
    return Anatomy(architecture, parts, tuple(unknown), part(None).parameters, model_type)


def _saved_buffers(model):
    """(full name, buffer) of the buffers that a checkpoint holds."""
    for path, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                yield (f"{path}.{leaf}" if path else leaf), buffer


def on_meta(config, dtype=None, trust_remote_code=False):
    """The model that `config` describes, on the meta device: every module and shape, no weights.

    dtype: the torch dtype of the parameters; None means the dtype of the config.
    Raises AnatomyError if the config is not that of a vision-language model.
    """
    import copy

    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    remote = trust_remote_code and "AutoModelForImageTextToText" in getattr(config, "auto_map", {})
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or remote
    if not known or config.model_type in NOT_VLMS:
        why = NOT_VLMS.get(
            config.model_type, "is not in transformers' list of vision-language models"
        )
        raise AnatomyError(
            f"{type(config).__name__} ({config.model_type}) is not a vision-language model: it "
            f"{why}. vlmkit works with LLaVA, PaliGemma, SmolVLM, Qwen-VL, Llama 3.2 Vision and "
            "about ninety more that transformers has."
        )
    config = copy.deepcopy(config)  # from_config writes the dtype into its config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kwargs = {} if dtype is None else {"dtype": dtype}
    try:
        with (
            one_at_a_time(),
            torch.device("meta"),
            _nothing_filled_in(),
            _not_endless(),
        ):
            return AutoModelForImageTextToText.from_config(
                config, trust_remote_code=trust_remote_code, **kwargs
            )
    except AnatomyError:
        raise
    except Exception as error:  # each model class fails in its own way
        raise AnatomyError(_why_not_built(config, error)) from error


MOST_TENSORS = 20_000  # the largest models have some thousands, since experts are in one tensor


@contextlib.contextmanager
def _not_endless():
    """Within it, a model with more than MOST_TENSORS parameters raises AnatomyError. With a wrong
    number of experts in its config, for example, it would grow until memory is full."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count = 0

    def hook(module, name, parameter):
        nonlocal count
        count += 1
        if count > MOST_TENSORS:
            raise AnatomyError(
                f"the config describes a model with more than {MOST_TENSORS:,} weight tensors. "
                "No vision-language model has so many. Look at the numbers of layers and experts "
                "in config.json."
            )

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _nothing_filled_in():
    """In this context torch.nn.init does nothing. On the meta device there is nothing to fill, and
    finding that out takes a quarter of the time of a build."""
    from torch.overrides import TorchFunctionMode

    class NothingFilledIn(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if getattr(function, "__module__", None) == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs)

    return NothingFilledIn()


def _why_not_built(config, error):
    """A message that names the fields of `config` that a model class could not use.

    The exception seldom names them ("'NoneType' object is not subscriptable"), but the line of code
    that raised it reads them.
    """
    import traceback

    text = f"{type(config).__name__} ({config.model_type}) cannot be built: {brief(error)}."
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/models/" in f.filename]
    fields = re.findall(r"config\.(\w+)", frames[-1].line) if frames else []
    if isinstance(error, AttributeError) and hasattr(error.obj, "model_type"):  # a config itself
        fields = [error.name]
    if fields:
        text += f" Look at the field {' and '.join(dict.fromkeys(fields))} of the config."
    elif frames:
        text += f" It stopped at: {frames[-1].line}"
    return text


@public
def anatomy(x, *, revision=None, trust_remote_code=False):
    """Anatomy of `x`: "pebble", a folder, a hub id, a transformers config, or a model. Also of a
    GGUF file, or of a list of them (the model's and its mmproj).

    If a checkpoint is quantized, by whatever method, the table says in which formats the tensors of
    each component are stored, as the headers of its weight files have it. If the weight files are
    here and hold other weights than config.json says, a note says so.

    From a name or a config, the model is built on the meta device: no weights are read, and little
    memory is used. A config does not name adapters, so those of a checkpoint count only once they
    are loaded. Raises CheckpointError if there is no config of that name, and AnatomyError if the
    config is not that of a vision-language model.
    """
    if hasattr(x, "named_parameters"):
        return anatomy_of(x)
    if hasattr(x, "model_type"):
        return anatomy_of(on_meta(x, trust_remote_code=trust_remote_code))
    files = gguf_files(x)
    if not files:
        folder = checkpoints.find(x, revision=revision, weights=False)
        files = gguf_files(folder)
    if files:
        return _anatomy_of_gguf(files)
    config = checkpoints.read_config(folder, trust_remote_code=trust_remote_code)
    model = on_meta(config, trust_remote_code=trust_remote_code)
    found = anatomy_of(model)
    method, wrong = checkpoints.quantization_method(config), mismatch(folder, model)
    if method is None:
        return replace(found, notes=wrong)
    notes = (*filter(None, [checkpoints.what_loads(method)]), *wrong)
    try:
        rows = tuple(stored_rows(folder, model))
    except CheckpointError as error:
        note = f"It is quantized by {method}, and the table cannot say what is: {brief(error)}"
        return replace(found, notes=(note, *notes))
    return replace(found, stored=rows, notes=(*unquantized(rows, method), *notes))


def _anatomy_of_gguf(files):
    """Anatomy of GGUF `files`, which have the shape of every weight, so no config is needed."""
    rows, names = gguf_rows(files)
    parts = {}
    for component in (*COMPONENTS, None):
        own = [row for row in rows if row.component == component]
        places = tuple(dict.fromkeys(decide(row.name, GGUF)[1] for row in own))
        parts[component] = Part(component, sum(r.parameters for r in own), len(own), places)
    unknown = tuple(row.name for row in rows if row.component is None)
    size = parts.pop(None).parameters
    notes = (checkpoints.what_loads("gguf"),)
    return Anatomy(f"GGUF ({', '.join(names)})", parts, unknown, size, GGUF, tuple(rows), notes)


class _CallableModule(types.ModuleType):
    def __call__(self, x, **kwargs):
        return anatomy(x, **kwargs)


# `vlmkit.anatomy` is this module once anything has imported it, and it is also a function of the
# public face: `vk.anatomy("pebble")`. A module whose class has `__call__` is both.
sys.modules[__name__].__class__ = _CallableModule
