"""Does a trained projector survive quantization, and does training it afterwards help?

    make benchmark-recipe                         # the recorded results as tables, at once
    make benchmark-recipe BENCHMARK_ARGS="--folder runs/cobble"  # trains and asks; a GPU

Trains projectors of cobble with its language model or its vision encoder in one number format, and
asks them in every other. Needs what `python -m vlmkit.models.cobble.train` wrote to --folder. Each
line of the result is one cell: what the projector was trained with, what it was asked in, how many
of n held-out photographs were named rightly in free text. Lines that exist already are kept, so a
run that was killed continues. On a GPU about fifteen minutes; several GPUs share the work.
"""

import argparse
import contextlib
import csv
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

LANGUAGE = ("bf16", "int8", "nf4", "nf4-dq", "int4", "int3")
VISION = ("bf16", "int4", "int3", "int2")
SMALL, LLAVA, LARGE = 64, 576, 2304
PROJECTOR = ("int8", "nf4", "int3", "int2")
RECORDED = Path(__file__).resolve().parent / "results" / "recipe.csv"
COLUMNS = [
    "trained_vision",
    "trained_language",
    "hidden",
    "seed",
    "asked_vision",
    "asked_language",
    "asked_projector",
    "question",
    "n",
    "right",
]


def trainings(seeds):
    """(vision encoder's format, language model's format, projector's width, seed) of each one."""
    groups = (
        [("bf16", language, LLAVA) for language in LANGUAGE],
        [("bf16", lang, hidden) for lang in ("bf16", "nf4") for hidden in (SMALL, LARGE)],
        [(vision, "bf16", LLAVA) for vision in VISION[1:]],
    )
    return [(*kind, seed) for group in groups for seed in seeds for kind in group]


def cells(vision, language, hidden):
    """(vision encoder, language model, projector, question) that a training is asked in."""
    asked = []
    if vision == "bf16" and hidden == LLAVA:
        asked += [("bf16", other, "bf16", "name") for other in LANGUAGE]
        matched = {language, "bf16", "nf4"}
        questions = ("name unseen", "yes/no", "yes/no unseen", "digit", "animal or vehicle")
        asked += [("bf16", other, "bf16", q) for other in sorted(matched) for q in questions]
        if language in ("bf16", "nf4"):
            asked += [("bf16", language, other, "name") for other in PROJECTOR]
    elif hidden != LLAVA:
        asked += [("bf16", other, "bf16", "name") for other in ("bf16", "nf4")]
    if language == "bf16" and hidden == LLAVA:
        asked += [(other, "bf16", "bf16", "name") for other in VISION]
    return list(dict.fromkeys(asked))


def questions_about(kind, labels, rng):
    """(questions, functions that say whether an answer is right) for pictures with these labels."""
    import cobble  # benchmarks/cobble.py asks the same

    from vlmkit.models.cobble import instructions as ins

    phrasings = ins.UNSEEN if "unseen" in kind else None
    if kind == "digit":
        return cobble.digits(labels, rng)
    if kind.startswith("yes/no"):
        return cobble.yes_no(labels, rng, phrasings or ins.USED)
    if kind != "animal or vehicle":
        return cobble.naming(labels, rng, phrasings)
    words = {"animal", "vehicle"}
    true = ["animal" if ins.THINGS[i] in ins.ANIMALS else "vehicle" for i in labels]
    right = [lambda answer, t=t: ins.is_right(answer, t, words) for t in true]
    return ["Is this an animal or a vehicle?"] * len(labels), right


def file_of(folder, training, end):
    """A file of one training, a tuple as in `trainings`."""
    return folder / "recipe" / ("v-{}_l-{}_h-{}_s-{}".format(*training) + end)


def one_training(given, vision, language, hidden, seed):
    """Train one projector, or open it, and ask it in all of its cells."""
    import torch
    from safetensors.torch import load_file, save_file

    from vlmkit.folders import write_whole
    from vlmkit.models.cobble import conversations, tensors
    from vlmkit.models.cobble.arrays import Arrays
    from vlmkit.models.cobble.train import SETTINGS

    device = torch.device(given.device)
    file = file_of(given.folder, (vision, language, hidden, seed), ".safetensors")
    pictures = Arrays(given.folder, device)
    model, tokenizer = conversations.load_parts(given.folder, given.language_model, device)
    parts = {
        "vision": model.model.vision_tower,
        "language": model.model.language_model,
        "projector": model.model.multi_modal_projector,
    }
    kept = {
        part: {key: tensor.clone() for key, tensor in module.state_dict().items()}
        for part, module in parts.items()
    }

    def put(part, format):
        parts[part].load_state_dict(kept[part])
        conversations.round_linear_layers(parts[part], format)

    put("vision", vision)
    put("language", language)
    if file.exists():
        conversations.prepare_projector(model, pictures, seed, hidden).to(torch.bfloat16)
        kept["projector"] = load_file(file, device=given.device)
    else:
        learned = (SETTINGS["projector"], file.stem, seed, hidden)
        logs = file.parent / "training"  # a log of training has the name of the result
        logs.mkdir(exist_ok=True)
        weights = conversations.train_projector(logs, model, pictures, tokenizer, device, *learned)
        write_whole(file, lambda path: save_file(weights, path))
        kept["projector"] = {key: tensor.to(device) for key, tensor in weights.items()}
    rows = []
    for asked_vision, asked_language, asked_projector, question in cells(vision, language, hidden):
        put("vision", asked_vision)
        put("language", asked_language)
        put("projector", asked_projector)
        source = "digits" if question == "digit" else "photographs"
        n = given.n if question == "name" else given.n // 2
        labels = pictures[f"{source}-test-labels"][:n].tolist()
        questions, right = questions_about(question, labels, random.Random(f"{question} {seed}"))
        pixels = tensors.pixel_values(pictures[f"{source}-test"][:n])
        found = tensors.answers(model, tokenizer, questions, pixels, batch_size=1000)
        score = sum(bool(test(answer)) for test, answer in zip(right, found, strict=True))
        asked = (asked_vision, asked_language, asked_projector, question)
        rows.append((vision, language, hidden, seed, *asked, len(labels), score))
    write(file.with_suffix(".csv"), rows)


def write(file, rows):
    import pandas as pd

    from vlmkit.folders import write_whole

    table = pd.DataFrame(rows, columns=COLUMNS)
    write_whole(file, lambda path: table.to_csv(path, index=False, lineterminator="\n"))


def all_trainings(given):
    """Run `one_training` for each, in processes of their own, so many at a time on each device."""
    import torch

    gpus = max(1, torch.cuda.device_count())
    todo = [
        training
        for training in trainings(given.seeds)
        if not file_of(given.folder, training, ".csv").exists()
    ]
    (given.folder / "recipe").mkdir(exist_ok=True)
    running, devices = {}, itertools.cycle(range(gpus))
    failed = 0
    while todo or running:
        while todo and len(running) < given.jobs * gpus:
            kind = todo.pop(0)
            own = dict(os.environ, CUDA_VISIBLE_DEVICES=str(next(devices)), OMP_NUM_THREADS="2")
            words = [sys.executable, __file__, *sys.argv[1:], "--one", *map(str, kind)]
            with file_of(given.folder, kind, ".log").open("w", encoding="utf-8") as log:
                process = subprocess.Popen(words, env=own, stdout=log, stderr=subprocess.STDOUT)
            running[process] = kind
        process = next(iter(running))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        for process in [p for p in running if p.poll() is not None]:
            kind = running.pop(process)
            failed += process.returncode != 0
            print(*kind, "done" if process.returncode == 0 else "FAILED", flush=True)
    rows = []
    for training in trainings(given.seeds):
        if (file := file_of(given.folder, training, ".csv")).exists():
            with file.open(newline="", encoding="utf-8") as stream:
                rows += list(csv.reader(stream))[1:]
    write(given.folder / "recipe.csv", rows)
    return failed


def show(file):
    """Print what a CSV has: a row for each cell, all seeds of the projector together.

    The Wilson interval knows of the photographs' chance only. The range is that of the seeds.
    """
    import pandas as pd

    from vlmkit.evaluation.statistics import wilson

    table = pd.read_csv(file)
    print("| question | projector trained with | asked in | seeds | n | right, % | seeds, % |")
    print("|---|---|---|---:|---:|---:|---:|")
    names = ["trained_vision", "trained_language", "hidden"]
    names += ["asked_vision", "asked_language", "asked_projector"]
    for (question, *cell), rows in table.groupby(["question", *names], sort=False):
        vision, language, hidden, *asked = cell
        trained = _named(vision, language) + f", {hidden} wide" * (hidden != LLAVA)
        right, n, each = rows["right"].sum(), rows["n"].sum(), 100 * rows["right"] / rows["n"]
        low, high = wilson(right, n)
        share = f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        print(f"| {question} | {trained} | {_named(*asked)} | {len(rows)} | {n:,} | {share} | "
              f"{each.min():.1f} to {each.max():.1f} |")  # fmt: skip


def _named(vision, language, projector="bf16"):
    parts = {"vision encoder": vision, "language model": language, "projector": projector}
    other = [f"{name} {format}" for name, format in parts.items() if format != "bf16"]
    return ", ".join(other) or "bf16"


def main():
    from vlmkit.folders import cache_folder
    from vlmkit.models.cobble.fetching import GGUF

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, help="train and ask; what cobble's training wrote")
    parser.add_argument("--show", type=Path, nargs="?", const=RECORDED, help="only print this CSV")
    parser.add_argument("--language-model", type=Path, default=cache_folder() / GGUF)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=2000, help="photographs in a cell")
    parser.add_argument("--jobs", type=int, default=6, help="trainings at a time on one device")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.show or not given.folder:
        show(given.show or RECORDED)
        return 0
    if given.one:
        vision, language, hidden, seed = given.one
        one_training(given, vision, language, int(hidden), int(seed))
        return 0
    return 1 if all_trainings(given) else 0


if __name__ == "__main__":
    sys.exit(main())
