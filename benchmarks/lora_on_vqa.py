"""Chapter 08: which component has to learn, if pebble learns easy-VQA by QLoRA?

    python benchmarks/lora_on_vqa.py                                       # the recorded runs
    python benchmarks/lora_on_vqa.py --steps 4 --n 24 --output trial.csv   # a trial

In all runs the language model is in NF4, and the pictures and questions are those of easy-VQA's
training half. Each run trains one component, or several (`RUNS`), for the same number of steps.
Then it asks a sample of easy-VQA's test questions.

The result is notebooks/data/08_lora_on_vqa.csv: a row per run, with how many answers were right,
and with the bits of the answers in hexadecimal: a 1 for each right one in the order of the
questions, so that two runs can be compared in pairs. It is written after every run. A run that is
in the file already, for the same weights of pebble, is not repeated.
"""

import argparse
import csv
import hashlib
import sys
import tempfile
import time
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "08_lora_on_vqa.csv"
SEED = 20_260_800
VISION, PROJECTOR, LANGUAGE, HEAD = "vision_encoder", "projector", "language_model", "head"
RUNS = (
    # {component: rank, or "full"}. "head" is the output head, a part of the language model.
    {LANGUAGE: 16, HEAD: 16},
    {VISION: 37, HEAD: 16},
    {PROJECTOR: "full", HEAD: 16},
    {HEAD: 16},
)
BATCH, RATE = 4, 2e-3


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train pebble on easy-VQA, part by part.")
    parser.add_argument("--threads", type=int, help="of the CPU; by default all")
    parser.add_argument("--steps", type=int, default=200, help="of training (200)")
    parser.add_argument("--n", type=int, default=400, help="test questions (400)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    bench = Bench(args)
    for ranks in RUNS:
        bench.run(ranks)


def training(ranks):
    """What `vk.finetuning.add_adapters` gets, from {component or "head": rank or "full"}."""
    import vlmkit as vk

    found = {
        name: rank if rank == "full" else vk.LoRA(r=rank)
        for name, rank in ranks.items()
        if name != HEAD
    }
    if HEAD in ranks and LANGUAGE in ranks:
        found[LANGUAGE] = vk.LoRA(r=ranks[LANGUAGE], head=True)
    elif HEAD in ranks:
        found[LANGUAGE] = vk.LoRA(r=ranks[HEAD], target_modules=["lm_head"])
    return found


def label(ranks):
    """For example "vision_encoder 4 + head 16"."""
    return " + ".join(f"{component} {rank}" for component, rank in ranks.items())


def load():
    """pebble with its language model in NF4, and its processor."""
    import vlmkit as vk

    formats = {VISION: "fp32", PROJECTOR: "fp32", LANGUAGE: "nf4"}
    return vk.load("pebble", vk.Plan(**formats), device="cpu")


def digest():
    """A short digest of pebble's weights."""
    from vlmkit.models import pebble

    return hashlib.sha256((pebble.path() / "model.safetensors").read_bytes()).hexdigest()[:12]


def key(row):
    """What identifies a run, in a row that was read or is to be written."""
    return row["trained"], int(row["steps"])


class Bench:
    def __init__(self, args):
        self.args, self.output, self.weights = args, args.output, digest()
        self.results = []
        if self.output.exists():
            with self.output.open(newline="", encoding="utf-8") as stream:
                found = list(csv.DictReader(stream))
            self.results = [row for row in found if row["weights"] == self.weights]

    def run(self, ranks):
        """Train what `ranks` says, and record what it answers."""
        import vlmkit as vk

        n, steps = self.args.n, self.args.steps
        what = {"weights": self.weights, "trained": label(ranks), "steps": steps}
        if key(what) in map(key, self.results):
            return
        model, processor = load()
        model = vk.finetuning.add_adapters(model, seed=SEED, **training(ranks))
        what["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows = vk.tasks.easy_vqa(BATCH * steps, seed=SEED, split="train")
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            vk.finetuning.train(
                model, processor, rows, folder, max_steps=steps, learning_rate=RATE,
                per_device_train_batch_size=BATCH, save_steps=steps,
            )  # fmt: skip
            what["seconds"] = round(time.perf_counter() - started)
        asked = vk.tasks.easy_vqa(n, seed=SEED)
        correct = vk.evaluate(model.eval(), processor, asked).answers["correct"].astype(int)
        bits = f"{int(''.join(map(str, correct)), 2):x}"
        self.results.append(what | {"n": n, "right": int(correct.sum()), "bits": bits})
        print(*what.values(), f"{correct.sum()} of {n}", flush=True)
        self.write()

    def write(self):
        from vlmkit.folders import write_whole

        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.output, self._rows)

    def _rows(self, path):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.results[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.results)


if __name__ == "__main__":
    sys.exit(main())
