"""`vlmkit train`: a training that a YAML file describes."""

from pathlib import Path
from typing import Annotated

import typer

from vlmkit.backend.processes import is_first
from vlmkit.errors import FinetuningError

EXAMPLES = """\
Examples:

\b
  vlmkit train train.yaml
  vlmkit train train.yaml --resume                    # after it was killed
  accelerate launch --num_processes 2 -m vlmkit train train.yaml

docs/train.yaml is an example with every key explained; docs/training.md says how to train a real
model. The folder that the file names as output gets the adapters (for vk.finetuning.load),
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
            help="Continue the training in the output folder from its last whole checkpoint. Where "
            "there is none, it begins again, and says so.",
            show_default=False,
        ),
    ] = False,
):
    """Train a model component by component as a YAML file says, and score it before and after."""
    from vlmkit.finetuning.continuing import writable_folder
    from vlmkit.finetuning.settings import read

    config = read(config)
    output = writable_folder(config.output)
    # Only the first process looks: when the others do, it can have begun to write.
    if is_first() and any(output.iterdir()) and not resume:
        raise FinetuningError(
            f"{output} is not empty. Give --resume to continue the training in it, or name another "
            "folder as output."
        )
    if resume:
        _say_where(output / "run")
    _run(config, output)


def _say_where(folder):
    """Say whether there is a checkpoint to continue from."""
    from vlmkit.finetuning.continuing import found_in, step_of

    last, damaged = found_in(folder)
    if last:
        _say(f"resume     after step {step_of(last):,}, from {last}")
    else:
        why = "all its checkpoints are damaged" if damaged else "it has no checkpoint yet"
        _say(f"resume     {folder} cannot be continued: {why}. The training begins at step 1.")


def _run(config, output):
    """Load, score, train, score again, and write the results."""
    import vlmkit as vk
    from vlmkit.finetuning.collating import check_rows

    rows = config.data.dataset("train")
    questions = config.evaluation and config.evaluation.dataset("evaluation")
    # A missing picture is better found now than after the score "before", in the middle of a run.
    unusable = check_rows(rows, unreadable=config.settings.get("unreadable", "raise"))
    if questions is not None:
        check_rows(questions)
    if unusable:
        _say(f"skipping   {unusable:,} of {len(rows):,} rows, which cannot be used")
    model, processor = vk.load(config.model, config.plan, **config.load)
    _say(f"model      {config.model}")
    scores = []
    if questions is not None:
        scores.append(vk.evaluate(model, processor, questions))
        _say(f"before     {scores[0]!r}")
    if config.adapters:
        model = vk.finetuning.load(model, config.adapters, trainable=True)
    else:
        seed = config.settings.get("seed", 0)
        model = vk.finetuning.add_adapters(model, seed=seed, **config.train)
    run = vk.finetuning.train(
        model, processor, rows, output / "run", eval_dataset=questions, **config.settings
    )
    if questions is not None:
        scores.append(vk.evaluate(model, processor, questions))
    vk.finetuning.save(model, output / "adapters", overwrite=True)
    if is_first():
        run.curve.to_csv(output / "loss.csv", index=False)
        run.evaluations.to_csv(output / "evaluations.csv", index=False)
        summary = _summary(config.model, run, scores)
        (output / "summary.md").write_text(summary, encoding="utf-8")
        _say(f"\n{summary}\nwritten to {output}")


def _summary(name, run, scores):
    """What was trained and with what result, as Markdown that also reads as text."""
    from vlmkit.anatomy import component_finder

    component_of, trained = component_finder(run.model), {}
    for parameter_name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            component = component_of(parameter_name)
            trained[component] = trained.get(component, 0) + parameter.numel()
    losses = run.curve["loss"]
    tenth = max(1, len(losses) // 10)
    before = run.continued_from
    continued = f"; {before:,} of the steps were done before" if before else ""
    lines = [f"# {name}, trained", ""]
    lines += [f"- {component}: {n:,} parameters trained" for component, n in trained.items()]
    lines.append(
        f"- {len(losses):,} steps; loss {losses[:tenth].mean():.3f} at first (mean of {tenth}), "
        f"{losses[-tenth:].mean():.3f} at last{continued}"
    )
    losses = run.evaluations["loss"]
    if len(losses):
        last = int(run.evaluations["step"].iloc[-1])
        lines.append(f"- loss on the evaluation's answers: {losses.iloc[-1]:.3f} at step {last:,}")
    if run.skipped:
        lines.append(f"- skipped: {', '.join(f'{n} {why}' for why, n in run.skipped.items())}")
    if run.no_gradient is not None and len(run.no_gradient):
        lines.append(f"- {len(run.no_gradient)} of the trainable tensors got no gradient")
    if scores:
        lines += ["", "| task | before | after |", "|---|---|---|"]
        for task in scores[0].by_task.index:
            shares = (_share(one.by_task.loc[task]) for one in scores)
            lines.append(f"| {task} | {' | '.join(shares)} |")
        lines += ["", "Shares of right answers, with 95% intervals."]
    return "\n".join(lines) + "\n"


def _share(row):
    return f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"


def _say(text):
    if is_first():
        print(text, flush=True)
