"""How often pebble is right, on questions that no training saw.

    python benchmarks/pebble.py                             # 1,000 questions a family, two plans
    python benchmarks/pebble.py --n 100 --plan nf4          # fewer, or under another plan
    python benchmarks/pebble.py --markdown accuracy.md      # the tables for the model card

The questions are from the evaluation split of `vlmkit.tasks`, which has no picture of the training
split. `vk.evaluate` compares the answers: exact match after greedy generation, with 95% Wilson
intervals. Nothing is written without --markdown.
"""

import argparse
import sys
from pathlib import Path

PLANS = ("bf16", "recommended")
SEED = 20_260_000  # far from the small seeds that people try by hand


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure pebble's accuracy on fresh questions.")
    parser.add_argument("--model", default="pebble", help="another model: a folder or a hub id")
    parser.add_argument("--n", type=int, default=1000, help="questions a family (1000)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the questions ({SEED})")
    parser.add_argument("--plan", action="append", help="a plan; repeatable (bf16, recommended)")
    parser.add_argument("--batch-size", type=int, default=64, help="questions at once (64)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args(argv)

    from vlmkit.errors import VlmkitError

    try:
        scores = {plan: _score(args, plan) for plan in args.plan or PLANS}
    except VlmkitError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    text = _report(args, scores)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def _score(args, plan):
    """Scores over all families under one plan, `args.n` questions each."""
    import pandas as pd

    import vlmkit as vk
    from vlmkit.evaluation import Scores

    model, processor = vk.load(args.model, plan)
    answers = []
    for task in vk.tasks.TASKS:
        dataset = vk.tasks.dataset(task, args.n, seed=args.seed, split="evaluation")
        print(f"{args.model}, {plan}: {task}", file=sys.stderr)
        options = {"batch_size": args.batch_size, "progress": sys.stderr.isatty()}
        answers.append(vk.evaluate(model, processor, dataset, **options).answers)
    return Scores(pd.concat(answers, ignore_index=True))


def _report(args, scores):
    lines = [
        f"Exact match of {args.model} on {args.n:,} fresh questions a family "
        f"(evaluation split, seed {args.seed}), greedy, in %, with 95% Wilson intervals.",
        "",
        *_markdown(["family"], {plan: score.by_task for plan, score in scores.items()}),
        _mean_row(scores),
        "",
        *_markdown(["family", "kind"], {plan: score.by_kind for plan, score in scores.items()}),
        "",
    ]
    for plan, score in scores.items():
        families, kinds = score.by_task["accuracy"], score.by_kind["accuracy"]
        lines.append(
            f"{plan}: lowest family {families.idxmin()} {families.min():.1%}, lowest kind "
            f"{' '.join(kinds.idxmin())} {kinds.min():.1%}, mean of families {families.mean():.1%}."
        )
    return "\n".join(lines)


def _markdown(names, tables):
    """The rows of a Markdown table: a line per index entry, a column per plan."""
    first = next(iter(tables.values()))
    yield f"| {' | '.join([*names, 'n', *tables])} |"
    yield f"|{'---|' * len(names)}{'---:|' * (1 + len(tables))}"
    for key in first.index:
        cells = [key] if len(names) == 1 else list(key)
        cells.append(f"{first.loc[key, 'n']:,}")
        columns = ["accuracy", "low", "high"]
        cells += [_percent(*table.loc[key, columns]) for table in tables.values()]
        yield f"| {' | '.join(cells)} |"


def _percent(accuracy, low, high):
    return f"{100 * accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean_row(scores):
    """All questions together. The families are equally large, so this is also their mean."""
    cells = [_percent(score.accuracy, *score.interval) for score in scores.values()]
    return f"| all | {next(iter(scores.values())).n:,} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
