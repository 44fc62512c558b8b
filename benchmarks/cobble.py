"""How often is cobble right? Fresh questions, greedy answers in free text, 95% Wilson intervals.

    make benchmark-cobble                     # a few questions, without photographs: minutes
    make benchmark-cobble BENCHMARK_ARGS="--photographs photos --n 1000"

Loads the states by name and asks them. Before that, a process of its own measures on a CPU how long
loading, a first answer and 100 questions take, and the memory that they need. With --folder, it
asks what `python -m vlmkit.models.cobble.train` wrote there instead, with weights rounded in place
of quantized ones (for NF4 these are the same to the bit), which is how the recorded table was made
on a GPU. Held out: CIFAR-10's test photographs, the last 597 of scikit-learn's digits, easy-VQA's
test half, drawings of the evaluation split, and the phrasings of `instructions.UNSEEN`.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from vlmkit.evaluation.statistics import wilson
from vlmkit.models.cobble import instructions as ins

COLUMNS = ("state", "language_model", "task", "n", "right", "low", "high", "seconds")
SMALL = 30
"""Questions a task, unless --n or --folder says otherwise: a few minutes on two cores."""
STATES = {"cobble-bf16": "bf16", "cobble": "nf4", "cobble-chat": "nf4"}


def exactly(true):
    return lambda answer: answer.lower().strip(" .") == true


def naming(labels, rng, phrasings=None):
    asked = ["What is in the picture?"] * len(labels)
    if phrasings:
        kinds = (ins.SENTENCE, ins.WORD, ins.CAPTION)
        asked = [rng.choice([q for k in kinds for q in phrasings[k]]) for _ in labels]
    return asked, [lambda a, t=ins.THINGS[i]: ins.is_right(a, t) for i in labels]


def yes_no(labels, rng, phrasings):
    pairs = [ins.about_photograph(i, rng, ins.YES_NO, phrasings) for i in labels]
    right = [lambda a, t=true: ins.says_yes(a) is ins.says_yes(t) for _, true in pairs]
    return [question for question, _ in pairs], right


def facts(labels, rng):
    pairs = [(q, ins.FACTS[q](ins.THINGS[i])) for i in labels for q in [rng.choice([*ins.FACTS])]]
    return [q for q, _ in pairs], [exactly(true.lower().strip(" .")) for _, true in pairs]


def digits(labels, rng):
    right = [lambda a, t=ins.DIGITS[i]: ins.is_right(a, t, ins.DIGITS) for i in labels]
    return ["Which digit is this?"] * len(labels), right


def questions(given):
    """{task: (pixel values, questions, tests of an answer)}."""
    import numpy as np
    import torch

    from vlmkit import tasks
    from vlmkit.models.cobble import tensors
    from vlmkit.models.cobble.arrays import Arrays
    from vlmkit.tasks import real

    def pixels(pictures):
        return tensors.pixel_values(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))

    rng = random.Random("cobble")
    if given.folder and (given.folder / "pictures").is_dir():
        kept = Arrays(given.folder, "cpu")
        photos, labels = kept["photographs-test"], kept["photographs-test-labels"]
        photos, labels = photos.permute(0, 2, 3, 1).numpy(), labels.numpy()
    elif given.photographs:
        photos, labels = real.read_photographs(given.photographs, "test")
    else:
        print("Without --photographs: only handwriting, easy-VQA and drawings are asked about.")
        photos, labels = [], np.zeros(0, int)
    order = np.random.default_rng(0).permutation(len(photos))
    if len(photos):
        photos, labels = photos[order], labels[order].tolist()
    asked = {}
    about_photographs = (
        ("photographs: name", 10_000, naming),
        ("photographs: name, used phrasings", 2_000, lambda x, r: naming(x, r, ins.USED)),
        ("photographs: name, unseen phrasings", 2_000, lambda x, r: naming(x, r, ins.UNSEEN)),
        ("photographs: yes/no", 2_000, lambda x, r: yes_no(x, r, ins.USED)),
        ("photographs: yes/no, unseen phrasings", 2_000, lambda x, r: yes_no(x, r, ins.UNSEEN)),
        ("photographs: facts", 1_000, facts),
    )
    for task, n, make in about_photographs if len(photos) else ():
        n = min(n, given.n or n, len(photos))
        asked[task] = (pixels(photos[:n]), *make(labels[:n], rng))
    written, values = real.read_digits("test")
    n = min(given.n or len(written), len(written))
    asked["handwritten digits"] = (pixels(written[-n:]), *digits(values[-n:].tolist(), rng))
    pictures, pairs = real.read_easy_vqa("test")
    rows = [(i, q, a) for i, about in enumerate(pairs) for q, a in about]
    rng.shuffle(rows)
    rows = rows[: given.n or None]
    shown = pixels(pictures[[i for i, _, _ in rows]])
    asked["easy-VQA"] = (shown, [q for _, q, _ in rows], [exactly(a) for _, _, a in rows])
    kinds = tasks.KINDS["vqa"]
    for kind in ("color", "shape", "count", "count_color", "exist"):
        indices = range(kinds.index(kind), (given.n or 1_000) * len(kinds), len(kinds))
        rows = [tasks.example("vqa", index, seed=0) for index in indices]
        shown = pixels([np.asarray(row["images"][0]) for row in rows])
        right = [exactly(row["answer"]) for row in rows]
        asked[f"drawings: {kind}"] = (shown, [row["question"] for row in rows], right)
    return asked


def model_of(given, state):
    """(model, tokenizer) of a state."""
    if not given.folder:
        import vlmkit as vk

        plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model=STATES[state])
        model, processor = vk.load(state, plan)
        return model, processor.tokenizer
    from safetensors.torch import load_file

    from vlmkit.models.cobble import recipe
    from vlmkit.models.cobble.conversations import load_parts

    format = STATES[state]
    model, tokenizer = load_parts(given.folder, given.language_model, given.device, language=format)
    weights = load_file(
        given.folder / f"projector-{recipe.STATES[state].language_model}.safetensors"
    )
    model.model.multi_modal_projector.load_state_dict(weights)
    if recipe.STATES[state].adapters:
        from vlmkit import finetuning

        model = finetuning.load(model, given.folder / "adapters")
    return model, tokenizer


TIMES = """
import resource, sys, time
import numpy, torch, transformers
import vlmkit as vk
from vlmkit.models.cobble import tensors
digits = vk.tasks.real.handwriting(100)
clock = [time.perf_counter()]
model, processor = vk.load("cobble")
clock.append(time.perf_counter())
vk.ask(model, processor, digits[0]["images"], digits[0]["question"])
clock.append(time.perf_counter())
vk.evaluate(model, processor, digits)
clock.append(time.perf_counter())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak *= 1 if sys.platform == "darwin" else 1024
print(*(after - before for before, after in zip(clock, clock[1:])), peak / 1e9)
"""
WANTED = {"load, s": 6, "first answer, s": 3, "100 questions, s": 60, "peak memory, GB": 2}


def measure():
    """Print the seconds and the memory of `cobble` on this machine's CPU, in a fresh process."""
    own = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TIMES], env=own, text=True,
                          capture_output=True)  # fmt: skip
    if done.returncode:
        print(f"not measured: {done.stderr.strip().splitlines()[-1]}")
        return
    numbers = done.stdout.split()[-len(WANTED) :]
    for (name, wanted), number in zip(WANTED.items(), map(float, numbers), strict=True):
        print(f"cobble       {name:40} {number:6.2f} (wanted: at most {wanted})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--photographs", help="a folder, or a data set on the hub")
    parser.add_argument("--folder", type=Path, help="what the training wrote")
    parser.add_argument("--language-model", type=Path, help="the GGUF file, with --folder")
    parser.add_argument("--device", default="cuda", help="with --folder")
    parser.add_argument("--n", type=int, help=f"at most so many questions a task ({SMALL})")
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--csv", type=Path, help="write the table there")
    given = parser.parse_args()
    from vlmkit.models.cobble import tensors

    if not given.folder:
        measure()
        given.n = given.n or SMALL
    asked, rows = questions(given), []
    for state in given.states:
        model, tokenizer = model_of(given, state)
        for task, (pixels, texts, right) in asked.items():
            began = time.perf_counter()
            found = tensors.answers(model, tokenizer, texts, pixels, batch_size=1000)
            score = sum(bool(test(a)) for test, a in zip(right, found, strict=True))
            low, high = wilson(score, len(found))
            share, seconds = score / len(found), time.perf_counter() - began
            rows.append((state, STATES[state], task, len(found), score, f"{low:.4f}", f"{high:.4f}",
                         f"{seconds:.1f}"))  # fmt: skip
            print(f"{state:12} {task:40} {len(found):6} {share:7.1%} [{low:.1%}, {high:.1%}] "
                  f"{found[:2]}", flush=True)  # fmt: skip
    if given.csv:
        with given.csv.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
