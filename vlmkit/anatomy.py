"""Anatomy: every parameter of a vision-language model belongs to one component.

    vk.anatomy("pebble")                  # also a folder, a hub id, a config, or a model
    vk.anatomy("pebble")["projector"].parameters

`transformers` has no accessor for a projector, and its accessors for encoder and decoder return
something else on nearly half of the architectures. What does tell the components apart is the
*path* of a parameter, `model.vision_tower.encoder.layers.0.….weight`, so that is what this module
reads. The rules are the tables of `vlmkit.architectures`, and nothing but those tables.
"""

import re
import sys
import types
from dataclasses import dataclass, field
from math import prod

from vlmkit import COMPONENTS
from vlmkit.architectures import NOT_VLMS, PROJECTOR, VISION, decide
from vlmkit.errors import AnatomyError, did_you_mean
from vlmkit.tables import Table


def unwrapped(model):
    """The model itself, where PEFT has wrapped it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def plain_name(name):
    """The name that a parameter of a PEFT-adapted model has in the model without adapters."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def is_adapter(name):
    """Whether a name is that of a weight that PEFT added."""
    return any(
        part in ("modules_to_save", "lora_magnitude_vector") or part.startswith("lora_")
        for part in name.split(".")
    )


def type_of(model):
    """The `model_type` of a model's config, or None where it has none."""
    return getattr(getattr(unwrapped(model), "config", None), "model_type", None)


def component_finder(model):
    """A function from a full name in `model` to its component, or None where no rule knows it."""
    model_type = type_of(model)
    return lambda path: decide(path, model_type)[0]


def shape_of(parameter):
    """Shape of the weight that `parameter` stands for, as a tuple. A 4-bit weight packs two in a
    byte, which is what its own `shape` and `numel()` tell; its quantization state knows better."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


@dataclass(frozen=True)
class Part:
    """One component of one model: how many parameters, in how many tensors, below which paths.

    buffers: values that are saved with the weights and are not trained, such as the biases that
    balance the experts of a mixture. They do not count as parameters.
    """

    component: str
    parameters: int = 0
    tensors: int = 0
    places: tuple = ()
    buffers: int = 0


@dataclass(frozen=True)
class Anatomy(Table):
    """The components of one model. `a["projector"].parameters`, `a.total`, `a.component_of(path)`.

    `unknown` holds the full names of the parameters (and saved buffers) that no rule knows; the
    parameters count in `total`, and in no component.
    """

    architecture: str
    parts: dict = field(repr=False)
    unknown: tuple = ()
    unknown_parameters: int = 0
    model_type: str = None

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
        """Parameters of each component that has any, and of what is unknown under None."""
        counts = {c: part.parameters for c, part in self.parts.items() if part.parameters}
        return counts | ({None: self.unknown_parameters} if self.unknown_parameters else {})

    def component_of(self, path):
        """Component of a full module or parameter name, or None where no rule knows it."""
        return decide(path, self.model_type)[0]

    def table(self):
        """A pandas DataFrame with a row per component (and one for what is unknown, if any)."""
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
        return table.set_index("component")

    def _text_table(self):
        table = self.table()
        table["parameters"] = table["parameters"].map("{:,}".format)
        return table

    def _headline(self):
        return f"{self.architecture}: {self.total:,} parameters"

    def require_known(self):
        """Raise AnatomyError if any parameter is unknown; otherwise return self."""
        if self.unknown:
            names = "\n  ".join(self.unknown[:5])
            more = f"\n  and {len(self.unknown) - 5} more" if len(self.unknown) > 5 else ""
            raise AnatomyError(
                f"{self.architecture} has {len(self.unknown)} parameters that no rule of vlmkit "
                f"assigns to a component:\n  {names}{more}\n"
                "vlmkit does not guess: a plan cannot be applied to this architecture."
            )
        return self


def anatomy_of(model):
    """Anatomy of a `torch.nn.Module`: on the meta device or loaded, quantized, wrapped by PEFT
    (whose adapters count in the component that they adapt)."""
    counts, tensors, places, buffers = {}, {}, {}, {}
    unknown = []
    model_type = type_of(model)
    for name, parameter in model.named_parameters():  # lists a tied weight once
        component, place = decide(name, model_type)
        if component is None:
            unknown.append(name)
        counts[component] = counts.get(component, 0) + prod(shape_of(parameter))
        tensors[component] = tensors.get(component, 0) + 1
        places.setdefault(component, {})[place] = True
    for name, buffer in _saved_buffers(model):
        component, _ = decide(name, model_type)
        if component is None:
            unknown.append(name)
        buffers[component] = buffers.get(component, 0) + buffer.numel()
    parts = {
        c: Part(
            c,
            counts.get(c, 0),
            tensors.get(c, 0),
            tuple(places.get(c, ())),
            buffers.get(c, 0),
        )
        for c in COMPONENTS
    }
    found = Anatomy(
        type(unwrapped(model)).__name__, parts, tuple(unknown), counts.get(None, 0), model_type
    )
    if not (parts[VISION].parameters or parts[PROJECTOR].parameters or unknown):
        raise AnatomyError(
            f"{found.architecture} is not a vision-language model as its config describes it: none "
            "of its parameters is a vision encoder's or a projector's. Look at vision_config."
        )
    return found


def _saved_buffers(model):
    """(full name, buffer) of what a checkpoint holds beside the parameters."""
    for path, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                yield (f"{path}.{leaf}" if path else leaf), buffer


def on_meta(config, dtype=None, trust_remote_code=False):
    """The model that `config` describes, on the meta device: every module and shape, no weights.

    dtype: torch dtype of the parameters; None leaves it to the config.
    Raises AnatomyError if the config is not that of a vision-language model.
    """
    import copy

    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    remote = trust_remote_code and "AutoModelForImageTextToText" in getattr(config, "auto_map", {})
    if config.model_type in NOT_VLMS:
        raise AnatomyError(
            f"{type(config).__name__} ({config.model_type}) is not a vision-language model: it "
            f"{NOT_VLMS[config.model_type]}."
        )
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not remote:
        raise AnatomyError(
            f"{type(config).__name__} ({config.model_type}) is not a vision-language model: "
            "transformers has no image-text-to-text model for it. vlmkit works with those that it "
            "has: LLaVA, PaliGemma, SmolVLM, Qwen-VL, Llama 3.2 Vision and some ninety more."
        )
    config = copy.deepcopy(config)  # from_config writes the dtype into the config it is given
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kwargs = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"), _nothing_filled_in():
            return AutoModelForImageTextToText.from_config(
                config, trust_remote_code=trust_remote_code, **kwargs
            )
    except Exception as error:  # each model class fails in its own way on a config it cannot use
        raise AnatomyError(_why_not_built(config, error)) from error


def _nothing_filled_in():
    """Within it, torch.nn.init leaves tensors as they are. On the meta device it has nothing to
    fill, and takes a quarter of the time of a build to find that out."""
    from torch.overrides import TorchFunctionMode

    class NothingFilledIn(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if getattr(function, "__module__", None) == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return function(*args, **kwargs)

    return NothingFilledIn()


def _why_not_built(config, error):
    """A message that names the fields of `config` that a model class stumbled over.

    The exceptions themselves seldom do ("'NoneType' object is not subscriptable"); the line of the
    model class that raised them reads the fields.
    """
    import traceback

    from vlmkit.errors import brief

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


def anatomy(x, *, revision=None, trust_remote_code=False):
    """Anatomy of `x`: "pebble", a folder, a hub id, a transformers config, or a model.

    Names and configs are built on the meta device: no weights are read and little memory is used.

    Raises CheckpointError if a name leads to no config, AnatomyError if it is not a VLM's.
    """
    if hasattr(x, "named_parameters"):
        return anatomy_of(x)
    if not hasattr(x, "model_type"):
        from vlmkit import checkpoints

        folder = checkpoints.find(x, revision=revision, weights=False)
        x = checkpoints.read_config(folder, trust_remote_code=trust_remote_code)
    return anatomy_of(on_meta(x, trust_remote_code=trust_remote_code))


class _CallableModule(types.ModuleType):
    def __call__(self, x, **kwargs):
        return anatomy(x, **kwargs)


# `vlmkit.anatomy` is this module as soon as anything has imported it, and the public face is
# `vk.anatomy("pebble")`. A module whose class has `__call__` serves as both, in any import order.
sys.modules[__name__].__class__ = _CallableModule
