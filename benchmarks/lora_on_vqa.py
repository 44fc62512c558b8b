"""Chapter 08: which component has to learn, if pebble learns easy-VQA by QLoRA? What is forgotten?

    python benchmarks/lora_on_vqa.py                                       # the recorded runs
    python benchmarks/lora_on_vqa.py --steps 4 --n 24 --output trial.csv   # a trial
    python benchmarks/lora_on_vqa.py --only 10 --device cpu                # one of `RUNS`
    python benchmarks/lora_on_vqa.py --only 10 --device cpu --workers 1 --batch 16 --steps 1000 \
        --rate 1.5e-3 --projector-rate 1e-3 --schedule linear              # the best on a CPU

In all runs the language model is in NF4, and the pictures and questions are those of easy-VQA's
training half. Each run trains one component, or several (`RUNS`), for the same number of steps, at
each of two learning rates, which fall as a cosine does. Then it asks all of easy-VQA's test
questions, and questions of pebble's own tasks. In the last run one row in four of the training is
such an old question, about other pictures.

The result is notebooks/data/08_lora_on_vqa.csv: a row per run, with how many answers were right,
and with the bits of the answers in hexadecimal: a 1 for each right one in the order of the
questions, so that two runs can be compared in pairs. It is written after every run. A run that is
in the file already, for the same weights of pebble and on the same kind of device, is not repeated.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from recorded_runs import digest, read, write

OUTPUT = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "08_lora_on_vqa.csv"
SEED = 20_260_800
VISION, PROJECTOR, LANGUAGE, HEAD = "vision_encoder", "projector", "language_model", "head"
OLD, OWN = "old", ["caption", "vqa", "ocr", "chart"]
RUNS = (
    # {component: rank, or "full"}. "head" is the output head alone. A LoRA on the language model
    # includes it. "old" is the share of pebble's own tasks among the rows of the training.
    {HEAD: 16},
    {PROJECTOR: "full", HEAD: 16},
    {VISION: 37, HEAD: 16},
    {VISION: 148, HEAD: 16},
    {VISION: 148, PROJECTOR: "full", HEAD: 16},
    {LANGUAGE: 2},
    {LANGUAGE: 8},
    {LANGUAGE: 32},
    {LANGUAGE: 128},
    {PROJECTOR: "full", LANGUAGE: 32},
    {PROJECTOR: "full", LANGUAGE: 128},
    {PROJECTOR: "full", LANGUAGE: 128, OLD: 0.25},
)
STEPS, BATCH, RATES, SCHEDULE = 600, 32, (1e-3, 2e-3), "cosine"
QUESTIONS, OLD_QUESTIONS = 9_673, 500


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train pebble on easy-VQA, part by part.")
    parser.add_argument("--threads", type=int, help="of the CPU; by default all")
    parser.add_argument("--device", help="as for vk.load; by default a GPU where there is one")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training ({STEPS})")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"rows of a step ({BATCH})")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare rows (0)")
    parser.add_argument("--n", type=int, default=QUESTIONS, help="test questions (all)")
    parser.add_argument("--only", type=int, help="the place of one run in RUNS, from 0")
    parser.add_argument("--rate", type=float, help="one learning rate, in place of both")
    parser.add_argument("--projector-rate", type=float, help="if it is another than --rate")
    parser.add_argument("--schedule", default=SCHEDULE, help=f"how the rates fall ({SCHEDULE})")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    bench = Bench(args)
    for ranks in RUNS if args.only is None else [RUNS[args.only]]:
        for rate in [args.rate] if args.rate else RATES:
            bench.run(ranks, rate)


def training(ranks):
    """What `vk.finetuning.add_adapters` gets, from {component or "head": rank or "full"}."""
    import vlmkit as vk

    found = {
        name: rank if rank == "full" else vk.LoRA(r=rank)
        for name, rank in ranks.items()
        if name in (VISION, PROJECTOR)
    }
    if LANGUAGE in ranks:
        found[LANGUAGE] = vk.LoRA(r=ranks[LANGUAGE], head=True)
    else:
        found[LANGUAGE] = vk.LoRA(r=ranks[HEAD], target_modules=["lm_head"])
    return found


def rows_of(count, old):
    """`count` rows to learn from. A share `old` of them are of pebble's own tasks."""
    import vlmkit as vk

    replayed = round(count * old)
    new = vk.tasks.easy_vqa(count - replayed, seed=SEED, split="train")
    if not replayed:
        return new
    columns = ("images", "question", "answer", "task")
    again = vk.tasks.dataset(OWN, replayed, seed=SEED, split="train")
    return [{column: row[column] for column in columns} for some in (new, again) for row in some]


def label(ranks):
    """For example "vision_encoder 4 + head 16"."""
    return " + ".join(f"{name} {rank}" for name, rank in ranks.items() if name != OLD)


def load(device="cpu"):
    """pebble with its language model in NF4, and its processor."""
    import vlmkit as vk

    formats = {VISION: "fp32", PROJECTOR: "fp32", LANGUAGE: "nf4"}
    return vk.load("pebble", vk.Plan(**formats), device=device)


def key(row):
    """What identifies a run, in a row that was read or is to be written."""
    numbers = ("old", "rate", "projector_rate", "steps", "batch")
    texts = ("device", "trained", "schedule")
    return (*(row[name] for name in texts), *(float(row[name]) for name in numbers))


class Bench:
    def __init__(self, args):
        self.args, self.output, self.weights = args, args.output, digest()
        self.results = read(self.output, self.weights)

    def run(self, ranks, rate):
        """Train what `ranks` says, and record what it answers."""
        import vlmkit as vk
        from vlmkit.loading.placing import resolve_device

        n, steps, batch, old = self.args.n, self.args.steps, self.args.batch, ranks.get(OLD, 0)
        schedule, of_projector = self.args.schedule, self.args.projector_rate or rate
        device = resolve_device(self.args.device)
        what = {"weights": self.weights, "device": device.type, "trained": label(ranks)}
        what |= {"old": old, "rate": rate, "projector_rate": of_projector, "schedule": schedule}
        what |= {"steps": steps, "batch": batch}
        if key(what) in map(key, self.results):
            return
        model, processor = load(device)
        ways = training(ranks)
        model = vk.finetuning.add_adapters(model, seed=SEED, **ways)
        rates = {name: of_projector if name == PROJECTOR else rate for name in ways}
        what["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            vk.finetuning.train(
                model, processor, rows_of(batch * steps, old), folder, max_steps=steps,
                learning_rate=rates, lr_scheduler_type=schedule, save_steps=steps,
                per_device_train_batch_size=batch, dataloader_num_workers=self.args.workers,
            )  # fmt: skip
            what["seconds"] = round(time.perf_counter() - started)
        model = model.eval()
        again = vk.evaluate(model, processor, vk.tasks.dataset(OWN, OLD_QUESTIONS, seed=SEED))
        what |= {"old_n": again.n, "old_right": int(again.answers["correct"].sum())}
        scores = vk.evaluate(model, processor, vk.tasks.easy_vqa(n, seed=SEED))
        correct = scores.answers["correct"].astype(int)
        bits = f"{int(''.join(map(str, correct)), 2):x}"
        self.results.append(what | {"n": n, "right": int(correct.sum()), "bits": bits})
        print(*what.values(), f"{correct.sum()} of {n}", flush=True)
        write(self.output, self.results)


if __name__ == "__main__":
    sys.exit(main())
