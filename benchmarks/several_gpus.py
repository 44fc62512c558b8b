"""One training on one GPU and on two: with a copy each, and sharing a model that one cannot hold.

    make benchmark-several-gpus                     # two GPUs or more, 25 GB of disk, some minutes
    python benchmarks/several_gpus.py --output two.json
    python benchmarks/several_gpus.py --one-gpu     # the processes of a way take turns on one GPU

Llama-3.2-11B-Vision from the catalog's config, with random weights, is trained with LoRA on its
language model, two samples a step. In the ways of 16 GB, no process may take more of its GPU: bf16
(21.3 GB) then fails on one, with an error that is recorded, and two share it by FSDP. For each way
and process the result has the losses, which have to be the same, seconds a step, the peaks of the
GPU in the load and in the training, and the peak of the host's memory in the load (RssAnon). One
process of a way is killed after half of the steps, and the way is launched again. The adapters that
it saved are loaded on one GPU. accelerate launches the processes with the configs of docs/launch.

What shares a model has PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: without it, bf16 does not
fit into 16 GB (docs/cluster.md).

With --one-gpu, the processes of a way are on the same GPU, each with its own memory, and NCCL moves
what they gather over the loopback network. Bytes and losses are those of two GPUs; seconds are not.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

import gpu_setups as setups
import torch
from loading import _Memory

import vlmkit as vk
from vlmkit.backend.losses import loss_of_answers
from vlmkit.backend.quiet import quiet
from vlmkit.errors import PlanError
from vlmkit.finetuning import Collator, trainer

MODEL = "meta-llama/Llama-3.2-11B-Vision-Instruct"
LAUNCH = Path(__file__).parent.parent / "docs" / "launch"
LIMIT = 16 * 10**9


class Way(NamedTuple):
    """The language model's format, a config of docs/launch, the bytes of its GPU that a process may
    take (0: all), whether its training has checkpointing, and whether a process is killed."""

    label: str
    config: str
    limit: int = 0
    checkpointing: bool = False
    killed: bool = False


WAYS = {
    "one GPU, bf16": Way("bf16", "one_gpu"),
    "one GPU of 16 GB, bf16": Way("bf16", "one_gpu", LIMIT),
    "two GPUs, bf16": Way("bf16", "two_gpus"),
    "two GPUs of 16 GB share, bf16": Way("bf16", "two_gpus_fsdp", LIMIT, True, killed=True),
    "one GPU, nf4": Way("nf4", "one_gpu"),
    "two GPUs of 16 GB share, nf4": Way("nf4", "two_gpus_fsdp", LIMIT),
}
PROCESSES = {"one_gpu": 1, "two_gpus": 2, "two_gpus_fsdp": 2}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("several_gpus.json"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY")
    parser.add_argument("--one-gpu", action="store_true", help="all processes on the first GPU")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)  # a process of a launch
    parser.add_argument("--kill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.train:
        folder, way = args.train
        if args.check:
            return check(folder, WAYS[way], args.output, args.steps)
        return train(folder, WAYS[way], args.output, args.steps, args.kill)
    if torch.cuda.device_count() < (1 if args.one_gpu else 2):
        parser.error(
            f"two GPUs are needed; found {torch.cuda.device_count()}. With --one-gpu, one is enough"
        )
    if args.one_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    found = {"machine": setups.machine("cuda"), "gpus": 1 if args.one_gpu else 2}
    found |= {"model": MODEL, "steps": args.steps, "ways": {}}
    with tempfile.TemporaryDirectory() as scratch:
        with quiet():
            setups.make(setups.published(MODEL), Path(scratch, "model"), "cuda")
        torch.cuda.empty_cache()
        for name in args.ways:
            done = launch(name, Path(scratch), args.steps)
            found["ways"][name] = done
            print(name, json.dumps(done), flush=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def launch(name, scratch, steps):
    """What the processes of a way found, one dictionary for each; where they shared a model, also
    what one GPU makes of the adapters; or the end of what they said."""
    way, output = WAYS[name], scratch / name.replace(" ", "-")
    shares, environment = way.config.endswith("fsdp"), dict(os.environ)
    if shares:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    said = {"capture_output": True, "text": True, "env": environment}
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(LAUNCH / f"{way.config}.yaml"), "--main_process_port", "0"]
    command += [__file__, "--train", str(scratch / "model"), name]
    command += ["--steps", str(steps), "--output", str(output)]
    if way.killed:
        done = subprocess.run([*command, "--kill"], **said)
        if f"-{signal.SIGKILL}" not in done.stderr:
            return {"failed": _end_of(done.stderr)}
    done = subprocess.run(command, **said)
    if done.returncode:
        return {"failed": _end_of(done.stderr)}
    found = [_read(output, rank) for rank in range(PROCESSES[way.config])]
    if shares and not any("refused" in one for one in found):
        check = [sys.executable, *command[command.index(__file__) :], "--check"]
        done = subprocess.run(check, **said)
        if done.returncode:
            return {"failed": _end_of(done.stderr)}
        found.append(_read(output, "check"))
    return found


def _read(output, which):
    return json.loads(Path(f"{output}.{which}").read_text(encoding="utf-8"))


def _end_of(stderr):
    """The last of what the processes said, without what their launcher said of them."""
    return stderr.partition("torch/distributed/elastic/multiprocessing/")[0][-3000:]


def check(folder, way, output, steps):
    """The loss of what was trained in shards, loaded in one process on one GPU without a limit."""
    model, _ = vk.load(folder, vk.Plan(language_model=way.label), processor=False)
    processor, rows = setups.processor_of(model.config), setups.rows(model.config, 2 * steps)
    model = vk.finetuning.load(model, f"{output}-adapters")
    found = {"loss_of_saved": _loss(model, processor, rows)}
    Path(f"{output}.check").write_text(json.dumps(found), encoding="utf-8")
    return 0


def train(folder, way, output, steps, kill=False):
    """One process of a training. Writes what it found to `output`, with its rank as the ending."""
    rank, processes = (int(os.environ.get(n, d)) for n, d in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        _take_a_gpu(rank, processes, way.limit)
    if kill and rank == processes - 1:
        _kill_after(steps // 2)
    plan, found = vk.Plan(language_model=way.label), {}
    try:
        with _Memory() as host:
            model, _ = vk.load(folder, plan, processor=False)
    except PlanError as error:
        found["refused"] = str(error)
    else:
        found |= {"host": host.peak, "loaded": _of_gpu("memory_allocated")}
        found["load"] = _of_gpu("max_memory_allocated")
        found |= _trained(model, output, steps, processes, way.checkpointing)
    Path(f"{output}.{rank}").write_text(json.dumps(found), encoding="utf-8")
    return 0


def _take_a_gpu(rank, processes, limit):
    gpus = torch.cuda.device_count()
    torch.cuda.set_device(rank % gpus)
    if limit:
        share = limit / torch.cuda.get_device_properties(rank % gpus).total_memory
        torch.cuda.set_per_process_memory_fraction(share, rank % gpus)
    if processes > gpus:
        # NCCL refuses a GPU to two processes of one host: each says that it is another host
        os.environ |= {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo", "LOCAL_RANK": "0"}
        os.environ |= {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_NTHREADS": "4"}
        os.environ |= {"NCCL_NSOCKS_PERTHREAD": "4"}


def _trained(model, output, steps, processes, checkpointing):
    processor, rows = setups.processor_of(model.config), setups.rows(model.config, 2 * steps)
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=16))
    _of_gpu("reset_peak_memory_stats")
    with setups.Clock(model) as clock:
        run = vk.finetuning.train(
            model, processor, rows, f"{output}-runs", max_steps=steps, save_steps=steps // 2,
            learning_rate=1e-4, per_device_train_batch_size=2 // processes,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
    peak, reserved = (_of_gpu(f"max_memory_{kind}") for kind in ("allocated", "reserved"))
    vk.finetuning.save(model, f"{output}-adapters", overwrite=True)
    return {
        "losses": [round(loss, 4) for loss in run.curve["loss"]],
        "continued_from": run.continued_from,
        "seconds_a_step": round(median(clock.seconds), 3) if clock.seconds else None,
        "kept": _of_gpu("memory_allocated"),
        "peak": peak,
        "reserved": reserved,
        "loss_after": _loss(model, processor, rows),
    }


def _of_gpu(name, *words):
    """What a function of torch.cuda returns; 0 on a CPU, where a test runs this script."""
    return getattr(torch.cuda, name)(*words) if torch.cuda.is_available() else 0


def _kill_after(steps):
    """Kill this process after so many steps, without a word."""
    step = trainer.Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step > steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    trainer.Trainer.training_step = training_step


@torch.no_grad()
def _loss(model, processor, rows):
    """The loss of the first two rows, in the formats of the plan."""
    batch = Collator(processor)([rows[0], rows[1]])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    return round(loss_of_answers(model.eval()(**batch), labels).item(), 4)


if __name__ == "__main__":
    sys.exit(main())
