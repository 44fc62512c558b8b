"""One of several processes that share models by FSDP: what it holds and needs, as JSON.

    python sharing.py RANK PROCESSES FOLDER    # reads FOLDER/cases.json

Run by tests/test_memory_several.py.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model

import vlmkit as vk
from vlmkit.anatomy import plain_name, unwrapped
from vlmkit.backend.boundaries import computing_in
from vlmkit.backend.checkpointing import enable
from vlmkit.backend.losses import IGNORED, loss_of_answers
from vlmkit.backend.passes import attending
from vlmkit.backend.storages import state_tensors
from vlmkit.families import image_id
from vlmkit.memory import measure_peak
from vlmkit.memory.batch import batch_of


def main(rank, processes, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    for name in ("all_gather_single", "reduce_scatter_single"):  # FSDP2 uses these
        setattr(torch.distributed, name, waiting(getattr(torch.distributed, name)))
    cases = json.loads(Path(folder, "cases.json").read_text())
    found = {name: measured(**case) for name, case in cases.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def measured(folder, plan, training, bf16, checkpointing=False, batch=None):
    model, _ = vk.load(folder, plan, processor=False)
    model = vk.finetuning.add_adapters(model, **eval(training, {"LoRA": vk.LoRA}))
    if checkpointing:
        enable(model)
    layers = [(m, p) for m in model.modules() for p in m.parameters(recurse=False)]
    states = sum(size(tensor) for layer in layers for tensor in state_tensors(*layer))
    keep_codes_in_shards(model)
    model = sharded(model, bf16)
    computing_in(model, torch.bfloat16 if bf16 else None)
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    found = {"weights": {name: size(p) for name, p in parameters.items()}}
    found["states"] = states
    found["buffers"] = sum(map(size, model.buffers()))
    if batch is None:
        return found
    tensors = batch_of(unwrapped(model).config, folder, **batch).inputs(torch.randn)
    labels = tensors["input_ids"].clone()
    labels[labels == image_id(unwrapped(model).config)] = IGNORED
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def passes():
        loss_of_answers(model(**tensors, use_cache=False), labels).backward()

    model.train()
    with attending(model, "eager" if bf16 else "sdpa"):
        passes()
        optimizer.step()
        found["states of the optimizer"] = sum(
            size(t) for state in optimizer.state.values() for t in state.values()
        )
        shards = [storage(p.grad) for p in model.parameters() if p.grad is not None]
        found["gradients"] = sum({s.data_ptr(): s.nbytes() for s in shards}.values())
        optimizer.zero_grad()
        found["peak"] = measure_peak(passes)
    return found


def keep_codes_in_shards(model):
    """Codes of 4 bits in plain parameters: accelerate leaves bitsandbytes' own out of FSDP."""
    for module in model.modules():
        weight = module._parameters.get("weight")  # an adapter has its base's as a property
        if getattr(weight, "quant_state", None) is not None:
            module.quant_state = weight.quant_state
            module.weight = torch.nn.Parameter(weight.data.reshape(-1, 1), requires_grad=False)


def sharded(model, bf16):
    """What accelerate makes of the model with the recipe of docs/training.md."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(
            {type(m).__name__ for m in model.modules()} & set(model._no_split_modules)
        ),
        reshard_after_forward=True,
        mixed_precision_policy="bf16" if bf16 else None,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16" if bf16 else "no",
        is_main_process=False,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def waiting(collective):
    """`collective`, which returns when gloo's threads have let its tensors go. They may do so later
    than the call returns, and what such a thread frees, the profiler does not see: it counted on
    for the whole step."""

    def call(*args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        before = [tensor._use_count() for tensor in tensors]
        work = collective(*args, **kwargs)
        while [tensor._use_count() for tensor in tensors] != before:
            time.sleep(1e-4)
        return work

    return call


def storage(tensor):
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def size(tensor):
    return storage(tensor).nbytes()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
