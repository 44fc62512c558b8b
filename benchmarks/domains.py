"""Chapter 08 with all parts: which component must learn for which domain, and what training brings
back after rounding.

    python benchmarks/domains.py                                     # the recorded runs
    python benchmarks/domains.py --steps 4 4 4 --n 24 --output trial.csv   # a trial

Two parts, all with `vlmkit.finetuning`. "domains": pebble learns to read a clock, or to answer in
Dutch, by adapters on one component or on both ends, with about as many trainable parameters in
each case (`EQUAL`), and once with many more (`MORE`; with these also to be asked in Dutch). Asked
are questions of the domain, and of pebble's own tasks, for what it forgets.

"recovery": a component is rounded, and adapters on it learn pebble's own tasks, which the same
training without the rounding is held against.

The result is notebooks/data/08_domains.csv, a row per run and task that was asked about: how many
answers were right before and after, and how many were regressions and fixes. It is written after
every run, and a run that is in it already, for the same weights of pebble, is not repeated.
"""

import argparse
import contextlib
import csv
import hashlib
import os
import sys
import tempfile
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "08_domains.csv"
SEED = 20_260_700  # of the questions; training has a split of its own
VISION, PROJECTOR, LANGUAGE = "vision_encoder", "projector", "language_model"
DOMAINS = ("clock", "dutch")
FULL = "full"
EQUAL = (
    # Ranks for 62 to 68 thousand parameters: as many as the projector has.
    {VISION: 7},
    {PROJECTOR: FULL},
    {LANGUAGE: 3},
    {VISION: 5, LANGUAGE: 1},
)
MORE = {
    "clock": {VISION: 16, PROJECTOR: FULL, LANGUAGE: 16},
    "dutch": {LANGUAGE: 16},
    "dutch_throughout": {LANGUAGE: 16},
}
LONGER = {"dutch": 5, "dutch_throughout": 5}
"""With MORE, so many times the steps: new words for old answers take long to be told apart."""
ROUNDED = ((VISION, "int2-asym", 8), (LANGUAGE, "int2", 8))  # component, format, rank
OWN = ("caption", "vqa", "ocr", "chart")  # of pebble's tasks, those that ask about one picture
BATCH = 16
RATES = {"clock": 3e-3, "dutch": 2e-3, "dutch_throughout": 2e-3, "recovery": 1e-3}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train pebble in two domains, part by part.")
    parser.add_argument("--threads", type=int, help="of the CPU; by default all")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=3,
        default=(400, 400, 100),
        metavar=("CLOCK", "DUTCH", "RECOVERY"),
        help="of training (400 400 100)",
    )
    parser.add_argument("--n", type=int, default=300, help="questions after each run (300)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    bench = Bench(args)
    for component, format, rank in ROUNDED:
        bench.run("recovery", "own", {component: rank}, format)
        bench.run("recovery", "own", {component: rank})
    for domain, ranks in MORE.items():
        bench.run("domains", domain, ranks, times=LONGER.get(domain, 1))
    for domain in DOMAINS:
        for ranks in EQUAL:
            bench.run("domains", domain, ranks)


def training(ranks):
    """What `vk.finetuning.add_adapters` is told, of {component: rank or "full"}."""
    import vlmkit as vk

    return {name: rank if rank == FULL else vk.LoRA(r=rank) for name, rank in ranks.items()}


def label(ranks):
    """Such as "vision_encoder 4 + projector full"."""
    return " + ".join(f"{component} {rank}" for component, rank in ranks.items())


def digest():
    """What pebble's weights are recognized by."""
    from vlmkit.models import pebble

    return hashlib.sha256((pebble.path() / "model.safetensors").read_bytes()).hexdigest()[:12]


def key(row):
    """What tells one run from another."""
    told = [row[name] for name in ("part", "domain", "trained", "format")]
    return *told, int(row["steps"]), float(row["rate"])


class Bench:
    def __init__(self, args):
        self.n, self.output, self.weights = args.n, args.output, digest()
        self.steps = dict(zip(("clock", "dutch", "recovery"), args.steps, strict=True))
        self.steps["dutch_throughout"] = self.steps["dutch"]
        self.results, self._before, self._drawn = [], {}, {}
        if self.output.exists():
            with self.output.open(newline="", encoding="utf-8") as stream:
                found = list(csv.DictReader(stream))
            self.results = [row for row in found if row["weights"] == self.weights]

    def run(self, part, domain, ranks, format="", times=1):
        """Train one thing on one domain, and keep what it answers before and after.

        format: what the trained component is rounded to, all the while; "" is not at all.
        times: so many times the steps of the domain.
        """
        import torch

        import vlmkit as vk

        name = part if part == "recovery" else domain
        what = {"part": part, "domain": domain, "trained": label(ranks), "format": format}
        steps = times * self.steps[name]
        what |= {"steps": steps, "rate": RATES[name]}
        if key(what) in map(key, self.results):
            return
        model, processor = load()
        scope = contextlib.nullcontext()
        if format:
            scope = vk.sensitivity.quantized(model, next(iter(ranks)), format)
        unrounded = self.answers(model, processor, part, domain, "")
        with scope, tempfile.TemporaryDirectory() as folder:
            before = self.answers(model, processor, part, domain, what["trained"] * bool(format))
            torch.manual_seed(SEED)
            model = vk.finetuning.add_adapters(model, **training(ranks))
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            data = self.drawn(name, steps * BATCH)
            vk.finetuning.train(
                model, processor, data, folder, max_steps=steps, learning_rate=RATES[name],
                per_device_train_batch_size=BATCH,
            )  # fmt: skip
            after = self.asked(model.eval(), processor, part, domain)
        what["parameters"] = parameters
        table = before.assign(unrounded=unrounded["correct"], after=after["correct"])
        for task, rows in table.groupby("task", sort=False):
            old, new = rows["correct"], rows["after"]
            counts = {
                "n": len(rows),
                "unrounded": rows["unrounded"].sum(),
                "before": old.sum(),
                "after": new.sum(),
                "regressions": (old & ~new).sum(),
                "fixes": (~old & new).sum(),
            }
            self.results.append({"weights": self.weights} | what | {"task": task} | counts)
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            print(*what.values(), task, said, flush=True)
        self.write()

    def drawn(self, name, rows):
        """What is trained on: drawn once for all runs of a length."""
        import vlmkit as vk

        if (name, rows) not in self._drawn:
            tasks = list(OWN) if name == "recovery" else name
            self._drawn[name, rows] = vk.tasks.dataset(tasks, rows, seed=SEED, split="train")
        return self._drawn[name, rows]

    def answers(self, model, processor, part, domain, state):
        """What `asked` gives for a model that is not trained yet: asked once for each state."""
        where = part, domain, state
        if where not in self._before:
            self._before[where] = self.asked(model, processor, part, domain)
        return self._before[where]

    def asked(self, model, processor, part, domain):
        """The answers to questions of a domain and as many of pebble's tasks, a row each."""
        import pandas as pd

        import vlmkit as vk

        own = "all" if part == "domains" else list(OWN)
        names = [domain, own] if part == "domains" else [own]
        found = [
            vk.evaluate(model, processor, vk.tasks.dataset(name, self.n, seed=SEED)).answers
            for name in names
        ]
        return pd.concat(found, ignore_index=True)

    def write(self):
        self.output.parent.mkdir(parents=True, exist_ok=True)
        part = self.output.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.results[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.results)
        os.replace(part, self.output)


def load():
    """pebble and its processor, ready to train: adapters learn in float32."""
    import vlmkit as vk

    model, processor = vk.load("pebble", "fp32", device="cpu")
    # At this size the backward pass of eager attention is much faster on a CPU than the fused.
    model.set_attn_implementation("eager")
    return model, processor


if __name__ == "__main__":
    sys.exit(main())
