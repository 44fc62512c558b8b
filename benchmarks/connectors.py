"""Chapter 02 with more time: the connectors of the notebook, trained for longer.

    python benchmarks/connectors.py                     # the recorded runs, an hour on two cores
    python benchmarks/connectors.py --device cuda
    python benchmarks/connectors.py --steps 100 50 --repeats 1 --n 40 --output trial.csv   # a trial

The connectors are the classes that notebooks/02_connectors.ipynb defines. First each connector
learns alone, for more steps than in the chapter, and then together with the language model. The
resampler has several numbers of visual tokens. With --repeats, each connector is also trained as in
the chapter, from several seeds; these runs are not recorded yet. Scores are exact match on new
questions, as many for each task.

The result is notebooks/data/02_connectors.csv, which the chapter shows: a row per run, stage and
task. It is written after every run. A run that is in the file already, for the same weights of
pebble, is not repeated, so a benchmark that was stopped continues.
"""

import argparse
import ast
import dataclasses
import math
import sys
from pathlib import Path

from recorded_runs import digest, read, write

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "02_connectors.ipynb"
OUTPUT = NOTEBOOK.parent / "data" / "02_connectors.csv"
SEED = 20_260_200  # of the questions
AS_THERE = {
    "MLP": (49, lambda made: made["MLP"]()),
    "pixel shuffle": (16, lambda made: made["PixelShuffle"]()),
    "patch merger": (16, lambda made: made["PatchMerger"]()),
    "resampler": (16, lambda made: made["Resampler"]()),
}
MORE = {
    ("MLP", 49): lambda made: made["MLP"](),
    ("pixel shuffle", 16): lambda made: made["PixelShuffle"](side=2),
    ("patch merger", 16): lambda made: made["PatchMerger"](side=2),
    ("resampler", 16): lambda made: made["Resampler"](side=4),
    ("resampler", 4): lambda made: made["Resampler"](side=2),
    ("resampler", 49): lambda made: made["Resampler"](side=7),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train chapter 02's connectors for longer.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; by default all")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=(2000, 1000),
        metavar=("FIRST", "SECOND"),
        help="of the longer runs: connector alone, then with the language model (2000 1000)",
    )
    parser.add_argument("--repeats", type=int, default=0, help="short runs, as many seeds (0)")
    parser.add_argument("--n", type=int, default=2000, help="questions, of four tasks (2000)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)

    import torch

    import vlmkit as vk
    from vlmkit.models.pebble import connecting

    if args.threads:
        torch.set_num_threads(args.threads)
    rows = list(vk.tasks.dataset(list(connecting.TASKS), n=args.n, seed=SEED))
    bench = Bench(args, connectors_of(NOTEBOOK), rows)
    first, second = connecting.FIRST_STAGE, connecting.SECOND_STAGE
    longer = [dataclasses.replace(first, max_steps=args.steps[0])]
    longer += [dataclasses.replace(second, max_steps=args.steps[1])]
    for (name, tokens), make in MORE.items():
        bench.run("longer", name, tokens, make, 0, longer)
    for seed in range(args.repeats):
        for name, (tokens, make) in AS_THERE.items():
            bench.run("as in the chapter", name, tokens, make, seed, [first])


def connectors_of(notebook):
    """The classes and functions that the notebook defines, by name. No other cell is run."""
    import nbformat
    import torch

    code = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    defined = [
        node
        for node in ast.parse("\n".join(code)).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    ]
    made = {"math": math, "torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    exec(compile(ast.Module(defined, type_ignores=[]), str(notebook), "exec"), made)
    return made


def key(row):
    """What identifies a run, in a row that was read or is to be written."""
    return row["run"], row["connector"], int(row["visual_tokens"]), int(row["seed"])


class Bench:
    def __init__(self, args, made, rows):
        import vlmkit as vk

        self.output, self.device, self.made, self.rows = args.output, args.device, made, rows
        self.pebble, self.processor = vk.load("pebble", vk.Plan.uniform("fp32"), device="cpu")
        self.weights = digest()
        self.results = read(self.output, self.weights)

    def run(self, run, name, tokens, make, seed, stages):
        """Train one connector through the stages, and record its scores after each stage."""
        import torch

        from vlmkit.models.pebble import connecting

        same = (run, name, tokens, seed)
        done = [(row["stage"], int(row["steps"])) for row in self.results if key(row) == same]
        if done and all((stage.name, stage.max_steps) in done for stage in stages):
            return
        self.results = [row for row in self.results if key(row) != same]
        torch.manual_seed(seed)
        connector = make(self.made)
        connecting.match_size(connector, self.pebble)
        model, processor = connecting.connect(self.pebble, self.processor, connector, tokens)
        model.to(self.device)
        for stage in stages:
            curve = connecting.fit(model, processor.tokenizer, stage, tokens, self.device)
            # The median step is not changed by another process that is busy for a minute.
            seconds = stage.max_steps * curve["seconds"].diff().median()
            scores = connecting.score(model, processor.tokenizer, self.rows, tokens, self.device)
            shares = scores.by_task
            shares.loc["all"] = (scores.n, scores.accuracy, *scores.interval)
            for task, share in shares.iterrows():
                self.results.append(
                    {
                        "weights": self.weights,
                        "run": run,
                        "connector": name,
                        "visual_tokens": tokens,
                        "parameters": sum(p.numel() for p in connector.parameters()),
                        "stage": stage.name,
                        "steps": stage.max_steps,
                        "seed": seed,
                        "device": self.device,
                        "seconds": round(seconds, 1),
                        "task": task,
                        "n": int(share["n"]),
                        **share[["accuracy", "low", "high"]].round(4),
                    }
                )
            said = ", ".join(f"{task} {share:.1%}" for task, share in shares["accuracy"].items())
            print(f"{run}, {name}, {tokens} tokens, seed {seed}, {stage.name}: {said}", flush=True)
        write(self.output, self.results)


if __name__ == "__main__":
    sys.exit(main())
