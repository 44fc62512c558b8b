"""Adapters: which modules of a component they go to, by full name, and how peft puts them there.

peft matches a list of names by suffix, so that `q_proj` reaches into a CLIP tower too, and its
"all-linear" includes vision encoder and projector. Here every module is named in full, on the meta
device, before anything is changed.
"""

import difflib
import re
import warnings
from dataclasses import dataclass

from vlmkit import COMPONENTS
from vlmkit.anatomy import anatomy_of, component_finder, shape_of, unwrapped
from vlmkit.errors import FinetuningError
from vlmkit.rows import LINEAR, kind_of

FULL = "full"
MODULES = ("attention+mlp", "attention", "mlp")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters for the Linear layers of a component (Hu et al., 2021, arXiv 2106.09685).

    A layer's W x becomes W x + (alpha / r) B A x, with A of shape (r, in) and B of shape (out, r).

    r: rank.
    alpha: scale of the adapter; None is r, that is 1 in front of B A x.
    dropout: share of the adapter's input that is dropped in training.
    modules: "attention", "mlp" (every Linear layer that is not in an attention, and not the output
        head), or "attention+mlp".
    rank_stabilised: alpha / sqrt(r) in place of alpha / r (Kalajdzievski, 2023, arXiv 2312.03732).
    head: whether the output head gets an adapter, too: for tokens that the model never had to say,
        whose rows there may be all alike. pebble's are.

    Raises FinetuningError for values that make no adapter.
    """

    r: int = 16
    alpha: float = None
    dropout: float = 0.0
    modules: str = "attention+mlp"
    rank_stabilised: bool = False
    head: bool = False

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise FinetuningError(f"the rank of a LoRA is a whole number from 1 on, not {self.r!r}")
        if not 0 <= self.dropout < 1:
            raise FinetuningError(f"dropout is a share from 0 to below 1, not {self.dropout!r}")
        if self.modules not in MODULES:
            near = difflib.get_close_matches(str(self.modules), MODULES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise FinetuningError(
                f"{self.modules!r} are not modules of a LoRA: {hint}they are {', '.join(MODULES)}"
            )

    @property
    def scale(self):
        """alpha as peft is told it: None resolved to r."""
        return self.r if self.alpha is None else self.alpha


def parse(training):
    """{component: None, "full" or a LoRA} from what a user gives.

    training: such a dictionary, in which components may be left out (frozen); "lora", which is
        rank 16 on the language model's Linear layers; or "full", which is everything.

    Raises FinetuningError, with the nearest right name, for an unknown component or word.
    """
    if training == "lora":
        return {"language_model": LoRA()}
    if training == FULL:
        return dict.fromkeys(COMPONENTS, FULL)
    if not isinstance(training, dict):
        raise FinetuningError(
            f"{training!r} does not say what to train: give 'lora', 'full', or a dictionary such "
            'as {"projector": "full", "language_model": vk.LoRA(r=16)}'
        )
    for component, way in training.items():
        if component not in COMPONENTS:
            near = difflib.get_close_matches(str(component), COMPONENTS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise FinetuningError(
                f"{component!r} is not a component: {hint}they are {', '.join(COMPONENTS)}"
            )
        if not (way is None or way == FULL or isinstance(way, LoRA)):
            raise FinetuningError(
                f"{component}: {way!r} is no way to train it: None (frozen), 'full' or a vk.LoRA"
            )
    if not any(training.values()):
        raise FinetuningError("nothing is trained: every component is frozen")
    return dict(training)


@dataclass(frozen=True)
class Target:
    """What one component's training touches. `lora` is None where it is trained in full.

    modules: full names of the Linear layers that get an adapter, or of all modules with parameters.
    """

    component: str
    lora: LoRA
    modules: tuple


def targets(model, training):
    """The Targets of `training` (see `parse`) in `model`, on the meta device or loaded.

    Raises FinetuningError if the model lacks a component, if an adapter finds no Linear layer, or
    if a quantized weight is to be trained in full.
    """
    anatomy = anatomy_of(model)
    whole = training == FULL
    found = []
    for component, way in parse(training).items():
        if way is None or whole and not anatomy[component].parameters:
            continue
        if not anatomy[component].parameters:
            has = ", ".join(c for c, part in anatomy.parts.items() if part.parameters)
            raise FinetuningError(
                f"{component} is to be trained, but {anatomy.architecture} has none: it has {has}."
            )
        pick = _all_of if way == FULL else _linears_of
        modules = pick(model, component, way)
        found.append(Target(component, None if way == FULL else way, tuple(modules)))
    return found


def _all_of(model, component, way):
    component_of = component_finder(model)
    modules = {}
    for name, parameter in model.named_parameters():
        if component_of(name) != component:
            continue
        if not parameter.is_floating_point():
            raise FinetuningError(
                f"{component} is to be trained in full, but {name} is quantized, and a quantized "
                "weight cannot be trained. Plan a float format for it, or give it a vk.LoRA."
            )
        modules[name.rpartition(".")[0]] = True
    return modules


def _linears_of(model, component, lora):
    from torch.nn import MultiheadAttention

    component_of = component_finder(model)
    base = unwrapped(model)
    inside = [n for n, m in model.named_modules() if isinstance(m, MultiheadAttention)]
    names = [_head_of(model, component, component_of)] if lora.head else []
    for name, module in model.named_modules():
        if component_of(name) != component or not hasattr(module, "weight"):
            continue
        if kind_of(base, module, "weight") != LINEAR or len(shape_of(module.weight)) != 2:
            continue
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue  # is never called: its weight is read by the module around it
        attention = any("attn" in part or "attention" in part for part in name.split("."))
        if lora.modules == "attention+mlp" or attention == (lora.modules == "attention"):
            names.append(name)
    if len(names) == lora.head:
        raise FinetuningError(
            f"{component} has no Linear layer for a LoRA on {lora.modules}: choose other modules, "
            "or train it in full."
        )
    return names


def _head_of(model, component, component_of):
    """Full name of the output head. Raises FinetuningError where it is another component's, or the
    embedding as well, which an adapter that is merged would change with it."""
    head = unwrapped(model).get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or component_of(name) != component:
        raise FinetuningError(f"{component} has no output head for a LoRA: leave head=True out.")
    if head.weight is unwrapped(model).get_input_embeddings().weight:
        raise FinetuningError(
            f"{name} is one matrix with the embedding (tied), and an adapter there, once merged, "
            "would change how words are read, too: leave head=True out."
        )
    return name


def adapted(model, training):
    """`model` with everything frozen but what `training` (see `parse`) names, adapters put in by
    peft. Returns a PeftModel, or the model itself where no component gets adapters. In place.

    Adapters are float32 whatever the model's dtype, as peft makes them.

    Raises FinetuningError as `targets` does, and where the LoRAs of several components differ in
    what peft has one setting for: dropout and rank stabilization.
    """
    chosen = targets(model, training)
    loras = [target for target in chosen if target.lora]
    _require_one_setting(loras)
    in_full = {target.component for target in chosen if not target.lora}
    component_of = component_finder(model)
    trained = [p for name, p in model.named_parameters() if component_of(name) in in_full]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if loras:
        model = _with_adapters(model, loras)
    for parameter in trained:
        parameter.requires_grad_(True)
    return model


def _require_one_setting(loras):
    settings = {(t.lora.dropout, t.lora.rank_stabilised) for t in loras}
    if len(settings) > 1:
        raise FinetuningError(
            "peft has one dropout and one rank stabilization for all adapters of a model, and the "
            f"LoRAs of {' and '.join(t.component for t in loras)} differ in them: make them equal."
        )


def _with_adapters(model, loras):
    from peft import LoraConfig, get_peft_model

    first = loras[0].lora
    rest = [(f"^{re.escape(name)}", t.lora) for t in loras[1:] for name in t.modules]
    config = LoraConfig(
        r=first.r,
        lora_alpha=first.scale,
        lora_dropout=first.dropout,
        use_rslora=first.rank_stabilised,
        target_modules=[name for target in loras for name in target.modules],
        rank_pattern={name: lora.r for name, lora in rest if lora.r != first.r},
        alpha_pattern={name: lora.scale for name, lora in rest if lora.scale != first.scale},
    )
    on_meta = next(model.parameters()).is_meta
    with warnings.catch_warnings():
        # peft 0.21 asks transformers about checkpointing by its older name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config, low_cpu_mem_usage=on_meta)
