"""Training: transformers' Trainer, set up for a VLM that is trained component by component.

    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=16))
    run = vk.finetuning.train(model, processor, dataset, "runs/first", max_steps=200)
    run.curve, run.evaluations, run.no_gradient

If a run is killed, the same call continues from its last checkpoint and ends with the same loss.
Under `accelerate launch` it runs on several processes or GPUs.
"""

import json
import os
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmkit.backend import checkpointing
from vlmkit.errors import FinetuningError
from vlmkit.evaluation.asking import context_of
from vlmkit.finetuning.collating import Collator, check_rows
from vlmkit.finetuning.settings import Settings
from vlmkit.images import undecoded

SETTINGS = "settings.json"


@dataclass(frozen=True, eq=False)
class Run:
    """What a training did.

    model: the model that was given, trained.
    curve: DataFrame with a row per step: step, loss, learning_rate, grad_norm.
    evaluations: DataFrame with a row per evaluation: step, accuracy, and its 95% interval, low and
        high; empty without an eval_dataset.
    no_gradient: DataFrame of the trainable tensors that got no gradient in the first step (see
        `gradient_report`); None if nothing was left to train.
    skipped: how many samples were skipped, by reason, on all processes, including those that were
        read ahead of the last step.
    """

    model: object
    curve: object
    evaluations: object
    no_gradient: object
    skipped: dict


def train(model, processor, dataset, output_dir, *, eval_dataset=None, **settings):
    """Train what is trainable in `model`, in place, and return a Run.

    model: what `add_adapters` returned. processor: the model's.
    dataset: rows with images, question and answer, or in another layout that
        `vk.tasks.from_dataset` reads: a `datasets.Dataset`, a list, anything with a length and rows
        by number, or an iterable dataset (which needs `max_steps`).
    output_dir: folder for checkpoints. If it has checkpoints of the same training, it continues.
    eval_dataset: rows to ask the model every `eval_steps` and at the end.
    settings: those of `vk.finetuning.Settings`.

    Raises FinetuningError if nothing is trainable, if the dataset is empty or lacks a column, if a
    sample cannot be used, if the folder holds another training, or if a checkpoint cannot be
    written (the last good one stays).
    """
    settings = Settings(**settings)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FinetuningError(
            "nothing in this model is trainable: begin with vk.finetuning.add_adapters"
        )
    dataset = _checked(dataset, settings)
    from accelerate.utils import gather_object
    from transformers import EarlyStoppingCallback

    from vlmkit.finetuning import trainer as trainers

    output_dir = Path(output_dir).expanduser()
    last = trainers.last_checkpoint(output_dir)
    _require_same(settings, output_dir, last)
    collator = Collator(
        processor,
        settings.max_length,
        context=context_of(model),
        too_long=settings.too_long,
        unreadable=settings.unreadable,
    )
    gradients = trainers.FirstGradients()
    callbacks = [gradients]
    if settings.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer = trainers.Trainer(
        model,
        rates=settings.learning_rate,
        processor=processor,
        args=_arguments(settings, model, output_dir, eval_dataset is not None),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        # accelerate leaves autocast around the model's forward: answers would not be the plan's.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    curve, evaluations = _tables(trainer.state.log_history)
    if eval_dataset is not None and trainer.state.global_step not in set(evaluations["step"]):
        trainer.evaluate()
        curve, evaluations = _tables(trainer.state.log_history)
    _warn_about(gradients.no_gradient)
    skipped = sum(gather_object([collator.skipped]), start=Counter())  # on all processes
    return Run(model, curve, evaluations, gradients.no_gradient, dict(skipped))


def _checked(dataset, settings):
    """The dataset, if it can be learnt from, with its pictures left to the collator."""
    if hasattr(dataset, "__len__"):
        if not len(dataset):
            raise FinetuningError("The dataset has no rows, so there is nothing to learn from.")
    elif settings.max_steps is None:
        raise FinetuningError("A dataset without a length has no epochs: give max_steps.")
    check_rows(dataset, unreadable=settings.unreadable)
    return undecoded(dataset)


def _require_same(settings, folder, last):
    """Raise FinetuningError if `last`, the checkpoint in `folder`, has other settings. If there is
    none, note the settings in the folder."""
    notes = folder / SETTINGS
    asked = json.loads(json.dumps(asdict(settings) | {"processes": _processes()}))
    if notes.exists() and last:
        before = json.loads(notes.read_text(encoding="utf-8"))
        differ = [name for name in asked if before.get(name) != asked[name]]
        if differ:
            told = "; ".join(f"{n} was {before.get(n)!r}, is {asked[n]!r}" for n in differ)
            raise FinetuningError(
                f"{folder} holds a training with other settings ({told}). Continue it with its "
                "own settings, or choose another folder."
            )
        return  # write nothing: another process can be reading the file
    folder.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def _processes():
    return int(os.environ.get("WORLD_SIZE", 1))


def _arguments(settings, model, output_dir, evaluates):
    """transformers' TrainingArguments: the settings have its names, and the rest is ours."""
    from transformers import TrainingArguments

    on_cpu = next(model.parameters()).device.type == "cpu"
    eval_steps = settings.eval_steps if evaluates else None
    save_steps = settings.save_steps or eval_steps
    rates = settings.learning_rate
    given = {
        name: value
        for name, value in asdict(settings).items()
        if name in TrainingArguments.__dataclass_fields__ and value is not None
    }
    given.pop("gradient_checkpointing", None)  # under either of its names
    given |= checkpointing.arguments(settings.gradient_checkpointing)
    given |= {
        "learning_rate": max(rates.values()) if isinstance(rates, dict) else rates,
        "eval_steps": eval_steps,
        "eval_strategy": "steps" if eval_steps else "no",
        "save_steps": save_steps or 500,
        "save_strategy": "steps" if save_steps else "no",
    }
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        save_total_limit=2,
        load_best_model_at_end=bool(settings.early_stopping_patience),
        metric_for_best_model="eval_accuracy",
        greater_is_better=True,
        logging_steps=1,
        dataloader_persistent_workers=settings.dataloader_num_workers > 0,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and _processes() > 1 else None,
        # An adapter of a layer that feeds nothing gets no gradient, and DDP would wait for it.
        ddp_find_unused_parameters=True if _processes() > 1 else None,
        **given,
    )
    # One process uses one GPU. Where it sees several, a Trainer would copy the model to all of them
    # (DataParallel), which multiplies the batch and, for a quantized model, the loss.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _tables(history):
    """(curve, evaluations) from a Trainer's log, as DataFrames."""
    import pandas

    log = pandas.DataFrame(history).rename(columns=lambda name: name.removeprefix("eval_"))
    curve = log.reindex(columns=["step", "loss", "learning_rate", "grad_norm"])
    asked = log.reindex(columns=["step", "accuracy", "low", "high"])
    curve, asked = curve.dropna(subset="loss"), asked.dropna(subset="accuracy")
    return curve.reset_index(drop=True), asked.reset_index(drop=True)


def _warn_about(no_gradient):
    if no_gradient is None or no_gradient.empty:
        return
    reasons = "; ".join(dict.fromkeys(no_gradient["why"]))
    warnings.warn(
        f"{len(no_gradient)} of the trainable tensors got no gradient in the first step "
        f"({reasons}). run.no_gradient names them.",
        stacklevel=3,
    )
