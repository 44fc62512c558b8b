"""Adapters: what each component learns, and which modules get adapters.

peft matches module names by suffix: `q_proj` also matches a CLIP tower, and "all-linear" includes
vision encoder and projector. Here every module is named in full, on the meta device, before the
model is changed.
"""

import re
import warnings
from dataclasses import dataclass

from vlmkit import COMPONENTS
from vlmkit.anatomy import anatomy_of, component_finder, is_packed, shape_of, unwrapped
from vlmkit.backend import dora, sharding
from vlmkit.backend.validation import Checked, shown
from vlmkit.errors import CheckpointError, FinetuningError, PlanError, brief, did_you_mean
from vlmkit.plan import matching
from vlmkit.rows import HEAD, LINEAR, kind_of

FULL = "full"


GROUPS = ("attention+mlp", "attention", "mlp", "all-linear")
"""The words for target_modules. The first and the last mean the same; peft has the last one."""


LIMITS = {"r": (1, 65_536), "lora_alpha": (0, 10**6), "lora_dropout": (0, 1)}
"""The least and the most of a LoRA's numbers. Its rank has another limit: see `targets`."""


@dataclass(frozen=True)
class LoRA(Checked, what="a field of a LoRA", limits=LIMITS, above=("lora_alpha",)):
    """Low-rank adapters for the Linear layers of a component (Hu et al., 2021, arXiv 2106.09685).

    A layer's W x becomes W x + (lora_alpha / r) B A x; A has shape (r, in), B has shape (out, r).
    The fields are named as in peft.

    r: rank.
    lora_alpha: scale of the adapter; None is r, so that B A x is multiplied by 1.
    lora_dropout: share of the adapter's input that is dropped in training.
    target_modules: which layers of the component: "attention", "mlp" (every Linear layer outside of
        attention, without the output head), "attention+mlp" or "all-linear" (both of these); or as
        in peft a list of names, each the end of a full name, such as ["q_proj", "v_proj"]; or one
        regular expression that matches whole full names.
    use_rslora: divide by sqrt(r) in place of r (Kalajdzievski, 2023, arXiv 2312.03732).
    use_dora: learn the length of each row of W beside its direction (DoRA; Liu et al., 2024, arXiv
        2402.09353): m (W + s B A) / |W + s B A|, with m of shape (out,) and the norm of each row.
        A step computes the whole W + s B A of every layer, so that it takes longer.
    head: whether the output head gets an adapter too. Tokens that the model never had to produce
        need it: their rows in the head can be all alike, as pebble's are.

    Raises FinetuningError for an unknown name and for a value that no adapter can have.
    """

    r: int = 16
    lora_alpha: int | float | None = None
    lora_dropout: int | float = 0.0
    target_modules: str | list | tuple = "attention+mlp"
    use_rslora: bool = False
    use_dora: bool = False
    head: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.lora_dropout == 1:
            raise FinetuningError("lora_dropout is from 0 to below 1, not 1.")
        wanted = self.target_modules
        if isinstance(wanted, str):
            if wanted not in GROUPS:
                _require_expression(wanted)
            return
        if not wanted or not all(isinstance(name, str) and name for name in wanted):
            raise FinetuningError(f"target_modules is a list of names, not {shown(wanted)}.")
        object.__setattr__(self, "target_modules", tuple(dict.fromkeys(wanted)))

    @property
    def scale(self):
        """lora_alpha for peft: r where it is None."""
        return self.r if self.lora_alpha is None else self.lora_alpha


def _require_expression(text):
    """Raise FinetuningError if `text` is no regular expression, or just a word. A word, as an
    expression, would match no full name: it is a misspelt group, or a name without its list."""
    if re.fullmatch(r"[\w+-]*", text):
        raise FinetuningError(
            f"target_modules is one of {', '.join(GROUPS)}, a list of names, such as "
            f"[{text or 'q_proj'!r}], or a regular expression that matches whole full names, not "
            f"{shown(text)}. {did_you_mean(text, GROUPS)}".rstrip()
        )
    _matching(text, ())


def _matching(pattern, names):
    """Those of `names` that `pattern` matches as wholes."""
    try:
        re.compile(pattern)
        return matching(rf"\A(?:{pattern})\Z", names)
    except (re.error, PlanError) as error:
        raise FinetuningError(
            f"target_modules: {shown(pattern)} cannot be used as a regular expression: {error}"
        ) from error


def parse(training):
    """{component: None, "full" or a LoRA} from what a user gives.

    training: such a dictionary (components that are left out are frozen); "lora", a LoRA of rank 16
        on the language model; or "full", everything.

    Raises FinetuningError, with the nearest right name, for an unknown component or word.
    """
    if training == "lora":
        return {"language_model": LoRA()}
    if training == FULL:
        return dict.fromkeys(COMPONENTS, FULL)
    if not isinstance(training, dict):
        raise FinetuningError(
            f"{training!r} does not say what to train. Give 'lora', 'full', or a dictionary such "
            'as {"projector": "full", "language_model": vk.LoRA(r=16)}. QLoRA is \'lora\' under a '
            "plan with the language model in nf4, such as the recommended plan."
        )
    for component, way in training.items():
        require_component(component)
        if not (way is None or way == FULL or isinstance(way, LoRA)):
            raise FinetuningError(
                f"{component}: {way!r} is not a way to train a component. The ways are None "
                "(frozen), 'full' and a vk.LoRA."
            )
    if not any(training.values()):
        raise FinetuningError("nothing is trained: every component is frozen")
    return dict(training)


def require_component(name):
    """Raise FinetuningError, with the nearest right name, if no component is called `name`."""
    if name not in COMPONENTS:
        raise FinetuningError(
            f"{name!r} is not a component. {did_you_mean(name, COMPONENTS, cutoff=0.4)}"
            f"The components are {', '.join(COMPONENTS)}."
        )


@dataclass(frozen=True)
class Target:
    """What is trained in one component. `lora` is None where the component is trained in full.

    modules: full names of the Linear layers that get an adapter, or of all modules with parameters.
    """

    component: str
    lora: LoRA
    modules: tuple


def targets(model, training):
    """The Targets of `training` (see `parse`) in `model`, which can be on the meta device.

    Raises FinetuningError if the model lacks a component, if a LoRA finds no Linear layer, names a
    module that is not there or is none, or has a rank above all their widths, or if a quantized
    weight is to be trained in full.
    """
    anatomy = anatomy_of(model)
    found = []
    for component, way in parse(training).items():
        empty = not anatomy[component].parameters
        if way is None or empty and training == FULL:
            continue
        if empty:
            has = ", ".join(c for c, part in anatomy.parts.items() if part.parameters)
            raise FinetuningError(
                f"{component} is to be trained, but {anatomy.architecture} has none: it has {has}."
            )
        lora = None if way == FULL else way
        modules = _linears_of(model, component, lora) if lora else _all_of(model, component)
        if lora:
            _require_rank(model, component, lora, modules)
        found.append(Target(component, lora, tuple(modules)))
    return found


def _require_rank(model, component, lora, modules):
    widest = max(max(shape_of(model.get_submodule(name).weight)) for name in modules)
    if lora.r > widest:
        raise FinetuningError(
            f"{component}: r is {lora.r:,}, and its widest layer is {widest:,} wide, so that the "
            "adapters would be larger than the layers. Choose a smaller r; 8 to 64 are usual."
        )


def _all_of(model, component):
    """Full names of all modules with parameters, none of them quantized."""
    component_of = component_finder(model)
    modules = {}
    for name, parameter in model.named_parameters():
        if component_of(name) != component:
            continue
        if is_packed(parameter):
            raise FinetuningError(
                f"{component} is to be trained in full, but {name} is quantized, and a quantized "
                "weight cannot be trained. Plan a float format for it, or give it a vk.LoRA."
            )
        modules[name.rpartition(".")[0]] = True
    return modules


def _linears_of(model, component, lora):
    """Full names of the Linear layers that `lora` gives an adapter."""
    component_of, head = component_finder(model), None
    linears = _all_linears(model, component, component_of)
    if isinstance(lora.target_modules, str) and lora.target_modules in GROUPS:
        wanted = set(lora.target_modules.replace("all-linear", "attention+mlp").split("+"))
        names = [n for n in linears if ("attention" if _in_attention(n) else "mlp") in wanted]
    else:
        names = _named(model, component, component_of, lora.target_modules, linears)
        head = next((name for name in names if name not in linears), None)
    if not names:
        raise FinetuningError(
            f"{component} has no Linear layer for a LoRA on {lora.target_modules}. Choose other "
            "target_modules, or train the component in full."
        )
    if lora.head or head:
        names = [_head_of(model, component, component_of), *(n for n in names if n != head)]
    return names


def _all_linears(model, component, component_of):
    """Full names of the Linear layers of a component that an adapter can change, without the output
    head."""
    from torch.nn import MultiheadAttention

    base, names = unwrapped(model), []
    inside = [n for n, m in model.named_modules() if isinstance(m, MultiheadAttention)]
    for name, module in model.named_modules():
        if component_of(name) != component or not hasattr(module, "weight"):
            continue
        if kind_of(base, module, "weight") != LINEAR or len(shape_of(module.weight)) != 2:
            continue
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue  # never called: the module around it reads its weight
        names.append(name)
    return names


def _in_attention(name):
    return any("attn" in part or "attention" in part for part in name.split("."))


def _named(model, component, component_of, target_modules, linears):
    """Full names of the modules that a list of names, or an expression, means in a component: some
    of `linears`, and the output head. Raises FinetuningError if one means anything else."""
    known = {n: m for n, m in model.named_modules() if n and component_of(n) == component}
    base, found = unwrapped(model), {}
    listed = [target_modules] if isinstance(target_modules, str) else target_modules
    ends = sorted({name.rpartition(".")[2] for name in linears})
    for wanted in listed:
        if wanted is target_modules:
            matched = _matching(wanted, known)
        else:
            matched = [n for n in known if f".{n}".endswith(f".{wanted}")]
        for name in matched:
            head = hasattr(known[name], "weight")
            head = head and kind_of(base, known[name], "weight") == HEAD
            if name not in linears and not head:
                raise FinetuningError(
                    f"target_modules: {shown(wanted)} matches {name}, and a "
                    f"{type(known[name]).__name__} there gets no LoRA. Choose Linear layers alone, "
                    f"by longer names if need be. Those of {component} are called "
                    f"{', '.join(ends) or 'nothing: it has none'}."
                )
        if not matched:
            raise FinetuningError(
                f"target_modules: {shown(wanted)} matches nothing in {component}. "
                f"{did_you_mean(wanted, ends)}Its Linear layers are called "
                f"{', '.join(ends) or 'nothing: it has none'}"
                + (f", and the first in full {linears[0]}." if linears else ".")
            )
        found |= dict.fromkeys(matched)
    return list(found)


def _head_of(model, component, component_of):
    """Full name of the output head. Raises FinetuningError if the head is another component's, or
    is also the embedding: merging its adapter would change the embedding too."""
    head = unwrapped(model).get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or component_of(name) != component:
        raise FinetuningError(f"{component} has no output head for a LoRA: leave head=True out.")
    if head.weight is unwrapped(model).get_input_embeddings().weight:
        raise FinetuningError(
            f"{name} is one matrix with the embedding (tied). An adapter there would, once merged, "
            "also change how words are read: leave the head out (head=True, target_modules)."
        )
    return name


def adapted(model, training, seed=0):
    """`model` with its adapters, and everything frozen that `training` (see `parse`) does not name.

    Changes the model in place. Returns a PeftModel, or the model itself where no component gets a
    LoRA. Adapters are float32 whatever the model's dtype, as peft makes them. seed: of the random
    A of each adapter; B starts at zero.

    Raises FinetuningError as `targets` does, and where the LoRAs of two components differ in what
    peft has one setting for: lora_dropout, use_rslora and use_dora.
    """
    sharding.reshard(model)  # what is frozen below are the shards, and not what was gathered
    found = targets(model, training)
    loras = [target for target in found if target.lora]
    for name in ("lora_dropout", "use_rslora", "use_dora"):
        if len({getattr(target.lora, name) for target in loras}) > 1:
            raise FinetuningError(
                f"peft has one {name} for all adapters of a model, and the LoRAs of "
                f"{' and '.join(t.component for t in loras)} differ in it: make them equal."
            )
    if sharding.is_sharded(model) and any(target.lora.use_dora for target in loras):
        raise FinetuningError(
            "DoRA reads the whole weight of each layer when it begins, and this model is in shards "
            "(accelerate's FSDP config). Use a LoRA without use_dora, or one process."
        )
    in_full = {target.component for target in found if not target.lora}
    component_of = component_finder(model)
    trained = [p for name, p in model.named_parameters() if component_of(name) in in_full]
    model.requires_grad_(False)
    if loras:
        model = _with_adapters(model, loras, seed)
    for parameter in trained:
        parameter.requires_grad_(True)
    return sharding.shard(model) if sharding.is_sharded(model) else model


def _with_adapters(model, loras, seed):
    from peft import LoraConfig

    first = loras[0].lora
    rest = [(f"^{re.escape(name)}", t.lora) for t in loras[1:] for name in t.modules]
    config = LoraConfig(
        r=first.r,
        lora_alpha=first.scale,
        lora_dropout=first.lora_dropout,
        use_rslora=first.use_rslora,
        use_dora=first.use_dora,
        target_modules=[name for target in loras for name in target.modules],
        rank_pattern={name: lora.r for name, lora in rest if lora.r != first.r},
        alpha_pattern={name: lora.scale for name, lora in rest if lora.scale != first.scale},
    )
    return _with_config(model, config, seed)


def resize(model, training):
    """Give the adapters of `model`, which is for a dry run, the ranks of `training`. In all else
    this is the `training` that they were made for. Raises FinetuningError as `targets` does.

    A search for a rank takes a third of the time in this way: peft makes a few hundred adapters one
    by one, in half a second.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    component_of, adapters = component_finder(model), {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            adapters.setdefault(component_of(name), {})[name] = module
    for component, modules in adapters.items():
        r = training[component].r
        _require_rank(model, component, training[component], modules)
        for module in modules.values():
            for (name, a), b in zip(module.lora_A.items(), module.lora_B.values(), strict=True):
                module.r[name] = a.out_features = b.in_features = r
                for part, shape in ((a, (r, a.in_features)), (b, (b.out_features, r))):
                    empty = torch.empty(shape, dtype=part.weight.dtype, device="meta")
                    part.weight = torch.nn.Parameter(empty)


def as_stored(model, folder):
    """`model`, on the meta device, with adapters like those that peft wrote to `folder`. Only their
    config is read. Raises CheckpointError if it is damaged or does not fit."""
    from peft import PeftConfig

    try:
        return _with_config(model, PeftConfig.from_pretrained(folder)).eval()
    except Exception as error:  # peft's
        raise CheckpointError(f"{folder}: the adapters do not fit: {brief(error)}") from error


def _with_config(model, config, seed=0):
    import torch
    from peft import get_peft_model

    on_meta = next(model.parameters()).is_meta
    # peft draws on the CPU, and a caller's own random numbers stay as they are
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # peft 0.21 asks transformers about checkpointing by its older name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    if config.use_dora:
        dora.keep_scales(model)
    return model
