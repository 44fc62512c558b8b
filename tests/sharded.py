"""What test_sharding.py runs in one process and in two that share a model by FSDP.

    accelerate launch --config_file data/fsdp.yaml sharded.py facts OUT FOLDER PLAN ...

Each function writes what it found to OUT, in the first process. On CPUs accelerate leaves FSDP out,
which PyTorch has there too. So `on_cpus` tells it that these are GPUs, and no more than that.
"""

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path

import families
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

import vlmkit as vk
from vlmkit.anatomy import plain_name, shape_of, vision_dtype
from vlmkit.backend import sharding
from vlmkit.backend.storages import state_tensors
from vlmkit.errors import FinetuningError
from vlmkit.finetuning import Collator, runs, trainer

RANK, PROCESSES = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
WAYS = {"projector": "full", "language_model": vk.LoRA(r=4)}


def on_cpus(made=runs._arguments):
    def arguments(*given):
        found = made(*given)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return found

    runs._arguments = arguments


def as_on_gpus(copy=torch._foreach_copy_):
    """FSDP2 gathers with this function, which gives all NaNs of bf16 the same bits on CUDA (pytorch
    issue 159333). On a CPU it copies bits."""

    def copying(tensors, others, *more):
        copy(tensors, others, *more)
        for tensor in tensors:
            if tensor.dtype == torch.bfloat16:
                tensor.masked_fill_(tensor.isnan(), torch.nan)

    torch._foreach_copy_ = copying


def facts(folder, plan):
    """What a load holds, its logits, and the loss and gradients of a step: a dictionary."""
    model, _ = vk.load(folder, plan, processor=False)
    layout_bytes = vk.audit(model, plan).total
    with torch.no_grad():
        logits = model(**families.inputs(model)).logits.float()
    sharding.reshard(model)
    held = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            states = [t.clone() for t in state_tensors(module, parameter)]
            held[f"{path}.{leaf}"] = [shape_of(parameter), states]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            held[f"{path}.{leaf}"].append(parameter.detach().clone())  # what a layer computes with
    sharding.reshard(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model = vk.finetuning.add_adapters(model, **WAYS)
    batch = families.inputs(model)
    found = model(**batch).logits.float()
    loss = torch.nn.functional.cross_entropy(found[0, :-1], batch["input_ids"][0, 1:])
    loss.backward()
    named = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
    gradients = {plain_name(n): sharding.whole(p.grad).float() for n, p in named}
    return {"bytes": layout_bytes, "held": held, "tied": tied, "logits": logits,
            "loss": loss.item(), "gradients": gradients}  # fmt: skip


def train(out, model, plan, *, die_after=None):
    """Train on drawings, from `out`/run. die_after: the step after which a process is killed."""
    if PROCESSES > 1:
        on_cpus()
    if die_after and RANK == PROCESSES - 1:
        step = trainer.Trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **kwargs)

        trainer.Trainer.training_step = training_step
    rows, name = vk.tasks.dataset("vqa", 24, split="train"), model
    model, processor = vk.load(name, plan)
    before = vk.evaluate(model, processor, rows.select(range(4)))
    model = vk.finetuning.add_adapters(model, **WAYS)
    settings = {"max_steps": 4, "save_steps": 2, "bf16": False}
    settings["per_device_train_batch_size"] = 4 // PROCESSES
    refused = ""
    if PROCESSES > 1:
        try:
            vk.finetuning.train(
                model, processor, rows, Path(out, "other"), optim="adamw_8bit", **settings
            )
        except FinetuningError as error:
            refused = str(error)
    run = vk.finetuning.train(model, processor, rows, Path(out, "run"), **settings)
    unbroken = run
    if run.continued_from:
        other = vk.finetuning.add_adapters(vk.load(name, plan)[0], **WAYS)
        unbroken = vk.finetuning.train(other, processor, rows, Path(out, "unbroken"), **settings)
    vk.finetuning.save(model, Path(out, "adapters"), overwrite=True)
    return {
        "losses": run.curve["loss"].tolist(),
        "unbroken": unbroken.curve["loss"].tolist(),
        "trained": sorted(plain_name(n) for n, p in model.named_parameters() if p.requires_grad),
        "continued_from": run.continued_from,
        "refused": refused,
        "before": before.answers["predicted"].tolist(),
        "after": vk.evaluate(model, processor, rows.select(range(4))).answers["predicted"].tolist(),
    }


def in_bf16(out, *plans):
    """For each plan: what a training in bf16 finds, and what its model answers after it."""
    if PROCESSES > 1:
        on_cpus()
    rows, found = vk.tasks.dataset("vqa", 24, split="train"), {}
    rows = [row | {"answer": "a surprise"} for row in rows]  # which gives a loss far from 0
    settings = {"max_steps": 3, "per_device_train_batch_size": 4 // PROCESSES}
    for number, plan in enumerate(plans):
        model, processor = vk.load("pebble", plan)
        model = vk.finetuning.add_adapters(model, **WAYS)
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        run = vk.finetuning.train(model, processor, rows, Path(out, f"run-{number}"), **settings)
        vk.finetuning.save(model, Path(out, f"adapters-{number}"))
        kept = {name: p.dtype for name, p in model.named_parameters()} == dtypes
        found[plan] = {"losses": run.curve["loss"].tolist(), "kept": kept}
        found[plan]["logits"] = logits(model, processor)
    return found


@torch.no_grad()
def logits(model, processor):
    inputs = Collator(processor)(list(vk.tasks.dataset("vqa", 4)))
    del inputs["labels"]
    inputs["pixel_values"] = inputs["pixel_values"].to(vision_dtype(model))
    return model.eval()(**inputs).logits.float()


def memory(folder, plan):
    """Bytes that no file backs (RssAnon) beyond the start: the most during a load, and after it,
    of every process."""
    vk.load("pebble", plan)  # what a first load imports and builds
    gc.collect()
    before, most, over = _anonymous(), [0], threading.Event()

    def watch():
        while not over.wait(0.002):
            most[0] = max(most[0], _anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    model, _ = vk.load(folder, plan, processor=False)
    over.set()
    thread.join()
    here = [most[0] - before, _anonymous() - before, vk.audit(model, plan).total]
    everywhere = [None] * PROCESSES
    if PROCESSES > 1:
        torch.distributed.all_gather_object(everywhere, here)
    return everywhere


def _anonymous():
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def main(what, out, *words):
    torch.set_num_threads(1)
    as_on_gpus()
    if what == "facts":
        cases = zip(words[::2], words[1::2], strict=True)
        found = {f"{Path(folder).name} {plan}": facts(folder, plan) for folder, plan in cases}
    elif what == "train":
        found = train(out, words[0], words[1], **json.loads(words[2]))
    elif what == "in_bf16":
        found = in_bf16(out, *words)
    else:
        found = memory(*words)
    if RANK == 0:
        torch.save(found, Path(out, f"{what}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
