"""A model in shards: each process of a launch holds its part of every weight, from the file on.

    accelerate launch --config_file fsdp.yaml script.py     # vk.load then gives a model in shards

FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps the shards, gathers the weights of one layer
while the layer computes, and frees them afterwards. accelerate's config says which layers. What is
added here is the way from the file into the shards. accelerate's own way (1.15) needs the whole
model in each process, or in the host memory of the first one (fsdp_cpu_ram_efficient_loading), and
leaves weights in 4 bits whole in each process. transformers' own way (5.24, `distributed_config`)
reads shards, which is used here, and has no way for weights in 4 bits, for adapters in shards, and
for accelerate's config.

- A float weight is a DTensor without data when transformers loads it, so that transformers reads
  the rows of this process and no others.
- A weight in 4 bits is read and quantized whole, one weight at a time, and cut at once. Its codes
  stay bytes (uint8). bitsandbytes' and accelerate's pages recommend to store them as bf16
  (`bnb_4bit_quant_storage`): then FSDP2 changes some of them on a GPU, see `require_codes`. The
  scales stay whole in each process: an eighth of the bytes of the codes (NF4), or a thirtieth (NF4
  with quantized scales).

Since accelerate 1.15, transformers 5.24 and torch 2.13, until accelerate reads shards itself.
"""

import os
import sys

from vlmkit.anatomy import unwrapped
from vlmkit.backend import processes
from vlmkit.backend.quiet import environment
from vlmkit.errors import CheckpointError, FinetuningError, PlanError, brief


def is_asked():
    """Whether this is one of several processes that accelerate launched with FSDP2."""
    return (
        processes.count() > 1
        and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        and os.environ.get("FSDP_VERSION", "1") == "2"
    )


def device_here(cpu=False):
    """The device of this process. The processes are connected afterwards: by NCCL on GPUs and by
    gloo on CPUs."""
    from accelerate import PartialState

    return PartialState(cpu=cpu).device


def reading_shards(kind, device):
    """The class `kind` of a transformers model, as one whose `from_pretrained` reads the shards of
    this process (with `distributed_config=...`, which brings transformers to the two methods)."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (processes.count(),))

    def prepare_distribute_model(cls, distributed_config, device_map=None):
        return distributed_config, device_map, None

    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        made = {}  # tied weights stay one
        for module in model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if not hasattr(parameter, "quant_type"):  # those are cut after they are quantized
                    if parameter not in made:
                        rows, _ = _rows_here(parameter, mesh)
                        shape = (rows, *parameter.shape[1:])
                        empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                        made[parameter] = _shard(parameter, empty, mesh)
                    setattr(module, leaf, made[parameter])
        del model.config.distributed_config
        return model

    def cut(self, weights):
        return {name: _cut(self, name, weight, mesh) for name, weight in weights.items()}

    methods = {
        "prepare_distribute_model": classmethod(prepare_distribute_model),
        "maybe_distribute_model": classmethod(maybe_distribute_model),
        "cut": cut,
        "shards": mesh.size(),
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), methods)


def every_process():
    """Within it, transformers reads weights in every process, also where accelerate's config has
    fsdp_cpu_ram_efficient_loading. transformers would then read them in the first one alone."""
    return environment("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")


def cutting(config):
    """A quantization config whose weights are cut (`vlmkit.backend.mixed` does it)."""
    from vlmkit.backend.mixed import METHOD, MixedConfig

    return config if config.quant_method == METHOD else MixedConfig([config])


def _rows_here(like, mesh):
    """(how many rows of a tensor are this process's, the first of them), as FSDP2 divides them."""
    from torch.distributed.tensor import Shard

    return Shard.local_shard_size_and_offset(like.shape[0], mesh.size(), mesh.get_local_rank())


def _shard(like, local, mesh, placements=None):
    """A parameter whose shard here is `local`, with the shape and the attributes of `like`."""
    import torch
    from torch.distributed.tensor import DTensor, Shard

    shape = like.shape
    stride = torch.empty(shape, device="meta").stride()
    tensor = DTensor.from_local(
        local, mesh, placements or [Shard(0)], run_check=False, shape=shape, stride=stride
    )
    parameter = torch.nn.Parameter(tensor, requires_grad=like.requires_grad)
    # of a Params4bit: quant_state, quant_type and others, which bitsandbytes and peft ask for
    parameter.__dict__.update({k: v for k, v in like.__dict__.items() if k != "data"})
    return parameter


def _cut(model, name, weight, mesh):
    """The shard of a weight that was quantized to 4 bits a moment ago."""
    import torch

    if getattr(weight, "quant_state", None) is None:
        return weight
    module = model.get_submodule(name.rpartition(".")[0])
    module.quant_state, module.quant_storage = weight.quant_state, torch.uint8
    codes = weight.data.reshape(-1).view(torch.uint8)[:, None]
    rows, start = _rows_here(codes, mesh)
    local = codes[start : start + rows].clone()
    like = torch.nn.Parameter(torch.empty_like(codes, device="meta"), requires_grad=False)
    like.__dict__.update(weight.__dict__)
    like.quant_storage = torch.uint8
    return _shard(like, local, mesh)


def is_sharded(model):
    """Whether some parameters of `model` are shards."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor):
    """`tensor`, gathered from all processes if it is a shard. All of them have to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def require_whole(model, what):
    """Raise CheckpointError if `model` is in shards. what: what cannot be done with these."""
    if is_sharded(model):
        raise CheckpointError(
            f"This model is in shards, one in each process, and cannot be {what}. Load it in one "
            "process, without accelerate's FSDP config."
        )


def require_codes(model):
    """Raise FinetuningError if codes of 4 bits in `model` are stored as floats, which FSDP2 changes
    on a GPU: `torch._foreach_copy_`, with which it gathers, gives all NaNs of bf16 the same bits
    (pytorch issue 159333, bitsandbytes issue 1945), and some pairs of bytes look like NaN.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_state") and parameter.is_floating_point():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise FinetuningError(
                f"The 4-bit codes of {name} are stored as {dtype}, and FSDP2 changes some of them "
                "when it gathers them on a GPU. Load the model with vk.load, which also reads it "
                "in shards, or leave bnb_4bit_quant_storage out of its BitsAndBytesConfig."
            )


def set_dtype(model, parameter, dtype):
    """Give a shard, under all its names in `model`, another dtype. `parameter.data = …` changes
    what a DTensor says, and not its shard."""
    local = parameter.to_local().detach().to(dtype)
    new = _shard(parameter, local, parameter.device_mesh, parameter.placements)
    for module in model.modules():
        for leaf, own in list(module.named_parameters(recurse=False)):
            if own is parameter:
                setattr(module, leaf, new)


def shard(model, accelerator=None):
    """Put FSDP2 on `model`, which holds shards, by accelerate's config. It also takes in what was
    added since: adapters are cut, and each process keeps its part. Nothing is copied.

    accelerator: accelerate's, with its precision: with bf16, FSDP2 gathers all floats in bf16, and
    what is trained is held in float32. None is for answers: in the formats of the model.

    FSDP2 cannot take in a parameter later. So it is taken off first, and every shard is put into
    the place that FSDP2 makes for it in a model without data.

    Raises PlanError if accelerate's config names layers that the model does not have, or divides
    weights in another way.
    """
    import torch
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    from vlmkit.backend import boundaries, passes

    accelerator = accelerator or _for_answers()
    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is None:
        raise PlanError(
            "accelerate's config has no fsdp_auto_wrap_policy, so that FSDP would gather all "
            "weights at once, in each process. Write TRANSFORMER_BASED_WRAP there."
        )
    # accelerate would take the class's own list, and fail at names that this model does not have
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or layers_of(model)
    _take_off(model)
    named = model.named_parameters(remove_duplicate=False)
    held = {name: parameter for name, parameter in named if hasattr(parameter, "full_tensor")}
    empty = {}
    for name, parameter in held.items():
        if parameter not in empty:
            like = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            empty[parameter] = torch.nn.Parameter(like, requires_grad=parameter.requires_grad)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, empty[parameter])
    before, plugin.cpu_ram_efficient_loading = plugin.cpu_ram_efficient_loading, False
    try:
        fsdp2_prepare_model(accelerator, model)
    except Exception as error:  # accelerate raises a plain Exception for layers
        raise PlanError(
            f"FSDP cannot shard this model by accelerate's config: {brief(error)} Leave "
            "fsdp_transformer_layer_cls_to_wrap out of it, or name this model's layers: "
            f"{','.join(layers_of(model))}."
        ) from error
    finally:
        plugin.cpu_ram_efficient_loading = before
    places = dict(model.named_parameters(remove_duplicate=False))
    put = {}
    for name, parameter in held.items():
        place = places[name]
        local = parameter.to_local().detach().to(place.dtype)
        if local.shape != place.to_local().shape:
            raise PlanError(
                f"FSDP holds {tuple(place.to_local().shape)} of {name} in this process, and "
                f"{tuple(local.shape)} were read: vlmkit divides each weight among all processes. "
                "Leave parallelism_config out of accelerate's config."
            )
        if parameter not in put:
            put[parameter] = _shard(parameter, local, place.device_mesh, place.placements)
    # It also tells FSDP2 of the new tensors.
    state = {name: put[parameter] for name, parameter in held.items()}
    model.load_state_dict(state, strict=False, assign=True)
    policy = plugin.mixed_precision_policy
    boundaries.computing_in(model, policy.param_dtype if policy else None)
    passes.answering(model)
    return model


def formats(model):
    """{name: dtype} of the parameters of `model` that are trained."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter.dtype for name, parameter in named if parameter.requires_grad}


def for_answers(model, before):
    """Put FSDP2 on a model that was trained so that it computes in its own formats, in which it
    answers as in one process. before: its `formats` before the training."""
    reshard(model)
    for name, dtype in before.items():
        parameter = model.get_parameter(name)
        if parameter.dtype != dtype:
            set_dtype(model, parameter, dtype)
    shard(model)


def layers_of(model):
    """The class names of the repeated layers of `model`, which FSDP2 gathers one at a time."""
    from torch.nn import ModuleList

    lists = [module for module in model.modules() if isinstance(module, ModuleList)]
    found = {_plain_class(item).__name__ for items in lists for item in items}
    return sorted(found & set(unwrapped(model)._no_split_modules or found))


def _plain_class(module):
    """The class of a module without FSDP2."""
    place = getattr(module, "_orig_cls_mro_index", 0)
    return type(module).__mro__[place]


def _for_answers():
    """What accelerate's function for FSDP2 reads of an Accelerator, which does not exist yet: it
    would fix the precision of the training."""
    from types import SimpleNamespace

    from accelerate.utils import FullyShardedDataParallelPlugin

    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin()),
        mixed_precision="no",
        is_main_process=False,
        device=None,
    )


def reshard(model):
    """Free what FSDP2 has gathered: after a forward pass it keeps some weights, whole, until the
    next one. Only the shards can be changed."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes a while
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _take_off(model):
    """Take FSDP2 off all modules of `model`, whose parameters stay shards. torch has no function
    for it (2.13)."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    reshard(model)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in state._fsdp_param_groups:
            handles = [parameter._post_load_hook_handle for parameter in group.fsdp_params]
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
            for handle in handles:
                handle.remove()
        module.__dict__.pop("generate", None)  # see passes.answering
        module.__dict__.get(STATE_KEY, {}).clear()
        module.__dict__.get(REGISTRY_KEY, {}).clear()
        _module_state_mapping.pop(module, None)
        module.__class__ = _plain_class(module)
