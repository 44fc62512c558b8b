"""Chapter 10's ablations: pebble's early stages with one of them left out or changed.

    python benchmarks/stages.py                  # what is recorded, half an hour on two cores
    python benchmarks/stages.py --steps 3 3 3 --lesson-steps 3 --n 8 --output trial.csv  # a trial

A recipe is what pebble begins with and which parts then learn, for how many steps; all recipes have
equally many, on tasks of one picture and in smaller batches than in the run that made pebble. A
seed gives the weights of what has learnt nothing yet, and with a stage's first step its pictures:
recipes see the same ones until a stage of one of them ends. Scores are exact match on fresh
questions, equally many a task.

The lessons begin at the end of `instruct` with the batches of the run that made pebble, so that its
log is what they are compared with; they are scored on the pictures they learn from, each seen once.

The result is notebooks/data/10_stages.csv, a row per recipe, seed, stage and task, and a row per 50
or 100 steps of training. It is written after every recipe, and what is in it already for the same
weights is not repeated: what was stopped continues.
"""

import argparse
import csv
import dataclasses
import hashlib
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "10_stages.csv"
QUESTIONS = 20_260_900  # their seed
BRIDGE, EYES = ("multi_modal_projector",), ("vision_tower",)
TONGUE = ("language_model", "lm_head")
ALL = EYES + BRIDGE + TONGUE
LLAVA = (BRIDGE, BRIDGE + TONGUE, BRIDGE + TONGUE)
RECIPES = {
    "LLaVA": ("language", None, LLAVA),
    "Qwen-VL": ("language", None, (EYES + BRIDGE, ALL, BRIDGE + TONGUE)),
    "no projector stage": ("language", None, (BRIDGE + TONGUE,) * 3),
    "vision encoder learns too": ("language", None, (BRIDGE, ALL, ALL)),
    "no text stage": ("language", TONGUE, LLAVA),
    "no vision stage": ("language", EYES, LLAVA),
}
"""Name → the state that it begins with, the parts that are fresh all the same, and what learns in
its first, second and third part. Two equal parts in a row are one stage."""
LESSONS = {"where, asked alone": "wheres", "relation, asked alone": "relations"}
COLUMNS = ("weights", "recipe", "seed", "stage", "steps", "task", "n", "accuracy", "low", "high")
TRAINING = "in training"
HELP = "processes of one thread each, by default one a core; 0: none but this one"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Leave out or change a stage of pebble's.")
    parser.add_argument("--steps", type=int, nargs=3, default=(150, 200, 150), metavar="N")
    parser.add_argument("--lesson-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2, help="of the recipes (2)")
    parser.add_argument("--n", type=int, default=1200, help="questions, of four tasks (1200)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help=HELP)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    weights, rows = digest(), []
    if args.output.exists():
        with args.output.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if row["weights"] == weights]
    order = [(name, seed) for seed in range(args.seeds) for name in RECIPES]
    order += [(name, 0) for name in LESSONS]
    done = {(row["recipe"], int(row["seed"])) for row in rows}
    for (name, seed), made in results([one for one in order if one not in done], args):
        rows += [{"weights": weights, "recipe": name, "seed": seed, **row} for row in made]
        rows.sort(key=lambda row: order.index((row["recipe"], int(row["seed"]))))
        write(args.output, rows)
        last = made[-1]
        print(f"{name}, seed {seed}: {last['task']} {last['accuracy']:.1%}", flush=True)


def results(todo, args):
    """Each recipe and seed with the rows of its run, in the order in which they are done."""
    if not args.workers:
        yield from ((one, run(*one, args)) for one in todo)
        return
    # Fresh processes: a forked one would inherit torch's threads, half alive.
    with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
        runs = {pool.submit(run, *one, args): one for one in todo}
        for finished in as_completed(runs):
            yield runs[finished], finished.result()


def run(name, seed, args):
    if name in LESSONS:
        return lesson(name, args.lesson_steps)
    return recipe(name, seed, args.steps, args.n)


def digest():
    """What pebble's weights and its states in between are recognized by."""
    from vlmkit.models import pebble

    files = [pebble.path() / "model.safetensors"]
    files += sorted((Path(pebble.__file__).parent / "states").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, file)


def begin(state, fresh, seed):
    """The shipped state, with those parts as they were before any training; and a tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from vlmkit.models import pebble
    from vlmkit.models.pebble import states

    torch.set_num_threads(1)
    model = states.after(state, seed)
    if fresh:
        new = states.after("nothing", seed).state_dict()
        new = {n: value for n, value in new.items() if any(part in n.split(".") for part in fresh)}
        model.load_state_dict(model.state_dict() | new)
    return model, AutoTokenizer.from_pretrained(pebble.path())


def stages_of(learns, steps, seed):
    """The stages of a recipe; their names seed the pictures."""
    from vlmkit.models.pebble import connecting

    parts = []
    for part, (parts_learn, count) in enumerate(zip(learns, steps, strict=True)):
        if part and parts_learn == learns[part - 1]:
            parts[-1] = dataclasses.replace(parts[-1], max_steps=parts[-1].max_steps + count)
            continue
        alone = parts_learn == BRIDGE
        base = connecting.FIRST_STAGE if alone else connecting.SECOND_STAGE  # each has its rate
        name = f"seed {seed} from {sum(steps[:part])}"
        parts.append(dataclasses.replace(base, name=name, max_steps=count, trains=parts_learn))
    return parts


def recipe(name, seed, steps, n):
    """Train by one recipe; rows of its training and of its scores after each stage."""
    import vlmkit as vk
    from vlmkit.models.pebble import batches, connecting

    state, fresh, learns = RECIPES[name]
    model, tokenizer = begin(state, fresh, seed)
    questions = list(vk.tasks.dataset(list(connecting.TASKS), n=n, seed=QUESTIONS))
    rows, so_far = [], 0
    for stage in stages_of(learns, steps, seed):
        curve = connecting.fit(model, tokenizer, stage, batches.PATCHES)
        shown = " + ".join(PARTS[part] for part in stage.trains if part in PARTS)
        rows += in_training(curve, shown, so_far, 50)
        so_far += stage.max_steps
        scores = connecting.score(model, tokenizer, questions, batches.PATCHES)
        shares = scores.by_task
        shares.loc["all"] = (scores.n, scores.accuracy, *scores.interval)
        for task, share in shares.iterrows():
            row = {"stage": shown, "steps": so_far, "task": task, "n": int(share["n"])}
            rows.append(row | share[["accuracy", "low", "high"]].round(4).to_dict())
    return rows


PARTS = {
    "vision_tower": "vision_encoder",
    "multi_modal_projector": "projector",
    "language_model": "language_model",
}


def in_training(curve, stage, so_far, every):
    """Right answers during training, a mean over so many steps."""
    means = curve["right"].groupby(curve.index // every).mean()
    ends = [min((number + 1) * every, len(curve)) for number in means.index]
    return [
        {"stage": stage, "steps": so_far + end, "task": TRAINING, "accuracy": round(mean, 4)}
        for end, mean in zip(ends, means, strict=True)
    ]


def lesson(name, steps):
    """One lesson of pebble's, straight from the end of `instruct`."""
    from vlmkit.models.pebble import batches, connecting, train

    (stage,) = (stage for stage in train.STAGES if stage.name == LESSONS[name])
    model, tokenizer = begin("instruct", None, 0)
    stage = dataclasses.replace(stage, max_steps=steps)
    curve = connecting.fit(model, tokenizer, stage, batches.PATCHES)
    return in_training(curve, stage.name, 0, 100)


if __name__ == "__main__":
    sys.exit(main())
