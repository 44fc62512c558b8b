"""`vlmkit train`: a training that a file describes."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vlmkit.errors import FinetuningError

EXAMPLES = """\
Examples:

\b
  vlmkit train train.yaml
  vlmkit train train.yaml --resume                    # after it was killed
  accelerate launch --num_processes 2 -m vlmkit train train.yaml

docs/train.yaml is an example with every key explained; docs/training.md says how to train a real
model. Into the folder that the file names as output come adapters (for vk.finetuning.load),
loss.csv, evaluations.csv, summary.md, and checkpoints to continue from.
"""


def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml", help="What to train, on what, and how.", show_default=False
        ),
    ],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the training that the output folder holds, from its last checkpoint.",
            show_default=False,
        ),
    ] = False,
):
    """Train a model component by component as a YAML file says, and score it before and after."""
    from vlmkit.finetuning import configs

    said = configs.read(config)
    output = Path(said.output).expanduser()
    # The other processes look when the first may have begun to write.
    if _first() and output.exists() and any(output.iterdir()) and not resume:
        raise FinetuningError(
            f"{output} is not empty. Give --resume to continue the training in it, or name another "
            "folder as output."
        )
    _run(said, output)


def _run(said, output):
    """Everything that takes time: load, score, train, score, write."""
    import vlmkit as vk
    from vlmkit.finetuning import configs

    rows = configs.rows(said.data, "train")
    questions = said.evaluation and configs.rows(said.evaluation, "evaluation")
    model, processor = vk.load(said.model, said.plan, device=_device())
    _say(f"model      {said.model}")
    scores = {}
    if questions is not None:
        scores["before"] = vk.evaluate(model, processor, questions)
        _say(f"before     {scores['before']!r}")
    model = vk.finetuning.add_adapters(model, **said.training)
    run = vk.finetuning.train(
        model, processor, rows, output / "run", evaluation=questions, **said.settings
    )
    if questions is not None:
        scores["after"] = vk.evaluate(model, processor, questions)
    vk.finetuning.save(model, output / "adapters", overwrite=True)
    if _first():
        run.curve.to_csv(output / "loss.csv", index=False)
        run.evaluations.to_csv(output / "evaluations.csv", index=False)
        summary = _summary(said, model, run, scores)
        (output / "summary.md").write_text(summary, encoding="utf-8")
        _say(f"\n{summary}\nwritten to {output}")


def _summary(said, model, run, scores):
    """What was trained and what came of it, as text that is Markdown too."""
    from vlmkit.anatomy import component_finder

    component_of, trained = component_finder(model), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            component = component_of(name)
            trained[component] = trained.get(component, 0) + parameter.numel()
    losses = run.curve["loss"]
    tenth = max(1, len(losses) // 10)
    lines = [f"# {said.model}, trained", ""]
    lines += [f"- {component}: {n:,} parameters trained" for component, n in trained.items()]
    lines.append(
        f"- {len(losses):,} steps; loss {losses[:tenth].mean():.3f} at first (mean of {tenth}), "
        f"{losses[-tenth:].mean():.3f} at last"
    )
    if run.skipped:
        lines.append(f"- skipped: {', '.join(f'{n} {why}' for why, n in run.skipped.items())}")
    if run.silent is not None and len(run.silent):
        lines.append(f"- {len(run.silent)} tensors that were to be trained got no gradient")
    if scores:
        lines += ["", "| task | before | after |", "|---|---|---|"]
        tables = [scores[when].by_task for when in ("before", "after")]
        for task in tables[0].index:
            lines.append(f"| {task} | " + " | ".join(_share(t.loc[task]) for t in tables) + " |")
        lines += ["", "Shares of right answers, with 95% intervals."]
    return "\n".join(lines) + "\n"


def _share(row):
    return f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def _first():
    """Whether this is the first of several processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _device():
    """The device of this process, of several on one machine; None lets `vk.load` choose."""
    import torch

    own = os.environ.get("LOCAL_RANK")
    return f"cuda:{own}" if own is not None and torch.cuda.is_available() else None


def _say(text):
    if _first():
        print(text, flush=True)
