"""The same training on one GPU, on two with a copy each, and on two that share a copy by FSDP.

    make benchmark-several-gpus                     # two GPUs or more, 25 GB of disk, some minutes
    python benchmarks/several_gpus.py --output two.json

Llama-3.2-11B-Vision from the catalog's config, with random weights, is trained with LoRA on its
language model, two samples a step. For each way the result has the losses, which have to be the
same, seconds a step, and the peak of memory on each GPU. accelerate launches the processes, as in
docs/training.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import gpu_setups as setups
import torch

import vlmkit as vk
from vlmkit.backend.quiet import quiet

MODEL = "meta-llama/Llama-3.2-11B-Vision-Instruct"
WAYS = {
    "one GPU, bf16": ("bf16", 1, False),
    "two GPUs, bf16": ("bf16", 2, False),
    "two GPUs, bf16, parted": ("bf16", 2, True),
    "one GPU, nf4": ("nf4", 1, False),
    "two GPUs, nf4": ("nf4", 2, False),
    "two GPUs, nf4, parted": ("nf4", 2, True),
}
"""Way -> the language model's format, processes, and whether FSDP parts the model."""
PARTED = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: {layers}
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
  fsdp_reshard_after_forward: true
num_machines: 1
num_processes: {processes}
"""
LAYERS = "MllamaVisionEncoderLayer,MllamaCrossAttentionDecoderLayer,MllamaSelfAttentionDecoderLayer"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("several_gpus.json"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)  # a process of a launch
    args = parser.parse_args(argv)
    if args.train:
        return train(*args.train, args.steps, args.output)
    if torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed; found {torch.cuda.device_count()}")
    found = {"machine": setups.machine("cuda"), "model": MODEL, "steps": args.steps, "ways": {}}
    with tempfile.TemporaryDirectory() as scratch:
        with quiet():
            setups.make(setups.published(MODEL), Path(scratch, "model"), "cuda")
        torch.cuda.empty_cache()
        for way in WAYS:
            done = launch(way, Path(scratch), args.steps)
            found["ways"][way] = done
            print(way, json.dumps(done), flush=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def launch(way, scratch, steps):
    """What the processes of `way` found, one dictionary for each; or the end of what they said."""
    label, processes, parted = WAYS[way]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if parted:
        config = scratch / "fsdp.yaml"
        config.write_text(PARTED.format(layers=LAYERS, processes=processes), encoding="utf-8")
        command += ["--config_file", str(config)]
    else:
        command += ["--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    output = scratch / f"{label}-{processes}-{'parted' if parted else 'whole'}"
    command += [
        __file__,
        "--train",
        str(scratch / "model"),
        label,
        str(scratch / f"runs-{output.name}"),
    ]
    command += ["--steps", str(steps), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr[-3000:]}
    return [
        json.loads(Path(f"{output}.{rank}").read_text(encoding="utf-8"))
        for rank in range(processes)
    ]


def train(folder, label, runs, steps, output):
    """One process of a training. Writes what it found to `output`, with its rank as the ending."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(rank)
    model, _ = vk.load(
        folder, vk.Plan(language_model=label), processor=False, device=f"cuda:{rank}"
    )
    processor, rows = setups.mllama_processor(model.config), setups.rows(model.config, 2 * steps)
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=16))
    loaded = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with setups.Clock(model) as clock:
        run = vk.finetuning.train(
            model, processor, rows, runs, max_steps=steps, save_steps=steps, learning_rate=1e-4,
            per_device_train_batch_size=2 // int(os.environ.get("WORLD_SIZE", 1)),
        )  # fmt: skip
    found = {
        "losses": [round(loss, 4) for loss in run.curve["loss"]],
        "seconds_a_step": round(median(clock.seconds), 3),
        "loaded": loaded,
        "kept": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
    }
    Path(f"{output}.{rank}").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
