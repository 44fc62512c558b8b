"""A sweep against a forward pass, and against the plain way: reload, quantize, evaluate, each cell.

    make benchmark-sensitivity
    make benchmark-sensitivity BENCHMARK_ARGS="--n=200 --task=vqa"

The sweep and the plain way compute the same cells in turns, scope by scope, on the same questions.
The script compares their results and their times. The plain way loads pebble again for every cell,
rounds its weights, and calls `vk.evaluate`. For the divergence it runs every batch once more with
the unquantized model's answers, whose logits it has kept.

A forward pass is one of the unquantized model over all prompts with their answers, batch by batch.
A cell of the sweep is to cost no more than 1.3 of them.
"""

import argparse
import os
import sys
import time

FORMATS = (
    "int8",
    "int6",
    "int5",
    "int4",
    "int4-row",
    "int4-tensor",
    "int3",
    "int2",
    "int2-asym",
    "nf4",
    "fp4",
)
COMPONENTS = ("vision_encoder", "projector", "language_model")
SCOPES = (*COMPONENTS, list(COMPONENTS))
SHARED = ("accuracy", "difference", "regressions", "fixes", "n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=1000, help="questions")
    parser.add_argument("--task", default="vqa", help='a task, or "all"')
    parser.add_argument("--seed", type=int, default=20260005)
    parser.add_argument(
        "--plain", type=int, default=len(FORMATS), help="formats that the plain way measures (all)"
    )
    options = parser.parse_args()

    import torch

    import vlmkit as vk
    from vlmkit.evaluation import room_for_answers
    from vlmkit.sensitivity import Baseline, Rounded, label_of, measured

    questions = vk.tasks.dataset(options.task, n=options.n, seed=options.seed)
    model, processor = vk.load("pebble", "bf16")
    vk.evaluate(model, processor, questions.select(range(min(64, options.n))))  # warm
    room = room_for_answers(processor, questions)
    start = time.perf_counter()
    baseline = Baseline(model, processor, questions, batch_size=64, max_new_tokens=room)
    first = time.perf_counter() - start
    plain = Plain(vk, questions, baseline)
    some = FORMATS[:: max(1, round(len(FORMATS) / options.plain))]
    rows, found = [], []
    for scope in SCOPES:
        cells, swept, passed = {}, 0.0, 0.0
        for format in FORMATS:
            start = time.perf_counter()
            cells[format] = measured(baseline, Rounded(model, scope, format))
            middle = time.perf_counter()
            forward_pass(baseline)
            swept += middle - start
            passed += time.perf_counter() - middle
        plain.seconds = [0.0, 0.0]
        for format in some:
            found.append(((label_of(scope), format), cells[format], plain.cell(scope, format)))
        seconds = [swept / len(FORMATS), passed / len(FORMATS)]
        rows.append((label_of(scope), *seconds, *(s / len(some) for s in plain.seconds)))
        print(*rows[-1], flush=True)
    print(
        f"\n{options.n} questions ({options.task}), {len(FORMATS)} formats a scope in the sweep, "
        f"{len(some)} of them in the plain way, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads.\n"
    )
    print_times(rows, first)
    return print_agreement(found)


def forward_pass(baseline):
    """One pass over all prompts with their answers, as anybody would write it."""
    from vlmkit.evaluation.asking import in_evaluation_mode
    from vlmkit.sensitivity.teacher_forcing import logits_of_answers

    with in_evaluation_mode(baseline.model):
        for batch in baseline.batches:
            logits_of_answers(baseline.model, batch.inputs, batch.tokens)


class Plain:
    """The plain way. seconds: [load, quantize and evaluate; the divergence on top]."""

    def __init__(self, vk, questions, baseline):
        self.vk, self.questions, self.kept = vk, questions, baseline.batches
        self.room = baseline.max_new_tokens
        self.before = baseline.scores.answers["correct"].to_numpy()
        self.seconds = [0.0, 0.0]

    def cell(self, scope, format):
        from vlmkit.sensitivity.sweeping import changes

        start = time.perf_counter()
        model, processor = self.vk.load("pebble", "bf16")
        self.vk.sensitivity.quantized(model, scope, format).__enter__()  # for good
        after = self.vk.evaluate(model, processor, self.questions).answers["correct"].to_numpy()
        middle = time.perf_counter()
        kl = self.divergence(model, processor)
        self.seconds[0] += middle - start
        self.seconds[1] += time.perf_counter() - middle
        regressions, fixes = changes(self.before, after)
        n = len(after)
        return {
            "accuracy": float(after.mean()),
            "difference": (fixes - regressions) / n,
            "regressions": regressions,
            "fixes": fixes,
            "n": n,
            "kl": kl,
        }

    def divergence(self, model, processor):
        import torch

        from vlmkit.evaluation import batches
        from vlmkit.evaluation.asking import prepared
        from vlmkit.sensitivity.teacher_forcing import logits_of_answers

        total = 0.0
        for (_, images, asked), kept in zip(batches(self.questions, 64), self.kept, strict=True):
            inputs = prepared(model, processor, images, asked, self.room)
            logits = logits_of_answers(model, inputs, kept.tokens)[kept.own].float()
            p, q = kept.logits.float().log_softmax(-1), logits.log_softmax(-1)
            each = torch.zeros(kept.own.shape)
            each[kept.own] = (p.exp() * (p - q)).sum(-1)
            total += float((each.sum(1) / kept.own.sum(1)).sum())
        return total / len(self.questions)


def print_times(rows, first):
    """Seconds a cell. The last row adds a share of the first look at the unquantized model."""
    print("| scope | sweep, s a cell | forward pass, s | passes a cell | plain, s a cell ", end="")
    print("| times faster | plain with the divergence | times faster |")
    print("|---" + "|---:" * 7 + "|")
    share = first / (len(rows) * len(FORMATS))
    mean = [sum(row[i] for row in rows) / len(rows) for i in (1, 2, 3, 4)]
    mean[0] += share
    for name, swept, passed, plain, more in (*rows, ("all, with the first look", *mean)):
        print(
            f"| {name} | {swept:.2f} | {passed:.2f} | {swept / passed:.2f} | {plain:.2f} "
            f"| {plain / swept:.1f} | {plain + more:.2f} | {(plain + more) / swept:.1f} |"
        )
    rates = [60 / s for s in (mean[0], mean[2], mean[2] + mean[3])]
    cells = len(rows) * len(FORMATS)
    print(
        f"\nCells a minute: {rates[0]:.0f} in the sweep, {rates[1]:.1f} in the plain way, "
        f"{rates[2]:.1f} with the divergence. The sweep's {cells} cells took "
        f"{mean[0] * cells:.0f} s, {first:.1f} s of them for the unquantized model."
    )


def print_agreement(found):
    """Print where the two ways differ; 1 if anywhere, else 0."""
    wrong = [
        (*names, name, cell[name], plain[name])
        for names, cell, plain in found
        for name in SHARED
        if cell[name] != plain[name]
    ]
    distance = max(
        abs(cell["kl"] - plain["kl"]) / max(plain["kl"], 1e-4) for _, cell, plain in found
    )
    print(
        f"Accuracy and flips are the same in {len(found) - len({w[:2] for w in wrong})} of "
        f"{len(found)} cells; the divergence differs by at most {distance:.1%}."
    )
    for difference in wrong:
        print("  differs:", *difference)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
