"""Training: transformers' Trainer, set up for a VLM that is trained component by component.

    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=16))
    run = vk.finetuning.train(model, processor, dataset, "runs/first", steps=200)
    run.curve, run.evaluations, run.silent

Killed at any moment, the same call continues from the last checkpoint, and comes to the same loss.
Under `accelerate launch` it runs on several processes or GPUs: a batch is shared out among them.
"""

import json
import os
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from vlmkit.backend import checkpointing
from vlmkit.backend.optimizers import OPTIMIZERS
from vlmkit.errors import FinetuningError
from vlmkit.evaluation import COLUMNS, lacking_columns
from vlmkit.finetuning.collating import Collator, undecoded
from vlmkit.finetuning.settings import Settings

SETTINGS = "settings.json"


@dataclass(frozen=True, eq=False)
class Run:
    """What a training did.

    model: the one that was given, trained.
    curve: DataFrame with a row per step: step, loss, rate, gradient (its norm).
    evaluations: DataFrame with a row per evaluation: step, accuracy and its 95% interval, low and
        high; empty without questions.
    silent: DataFrame of what is to be trained and got no gradient in the first step (see
        `gradient_report`); None where a finished run was only looked at.
    skipped: how many samples were skipped, by reason, on all processes; what was read ahead of the
        last step counts too.
    """

    model: object
    curve: object
    evaluations: object
    silent: object
    skipped: dict


def train(model, processor, dataset, folder, *, evaluation=None, **settings):
    """Train what is trainable in `model`, in place, and return a Run.

    model: what `add_adapters` returned. processor: the model's.
    dataset: rows with images, question and answer; a `datasets.Dataset`, a list, anything with a
        length and rows by number, or an iterable dataset (which needs `steps`).
    folder: for checkpoints. If there are any of the same training, it continues.
    evaluation: rows to ask the model during training (see Settings.evaluate_every) and at its end.
    settings: those of `vk.finetuning.Settings`.

    Raises FinetuningError if nothing is trainable, if the dataset is empty or lacks a column, if a
    sample cannot be used, if the folder holds another training, or if a checkpoint cannot be
    written (the last good one stays).
    """
    settings = Settings.of(settings)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FinetuningError(
            "nothing in this model is trainable: begin with vk.finetuning.add_adapters"
        )
    dataset = _checked(dataset, settings)
    from vlmkit.finetuning import trainer as trainers

    folder = Path(folder).expanduser()
    last = _continued(folder, settings, trainers.last_checkpoint(folder))
    collator = Collator(
        processor,
        settings.max_length,
        too_long=settings.too_long,
        unreadable=settings.unreadable,
    )
    gradients = trainers.FirstGradients()
    trainer = trainers.Trainer(
        model,
        settings=settings,
        processor=processor,
        args=_arguments(model, folder, settings, evaluation is not None),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=evaluation,
        callbacks=_callbacks(settings, gradients),
    )
    _remove_printing(trainer, trainers.Progress)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        # accelerate leaves autocast around the model's forward: answers would not be the plan's.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if evaluation is not None and not _evaluated_at_end(trainer.state):
        trainer.evaluate()
    _warn_of(gradients.silent)
    curve, evaluations = _tables(trainer.state.log_history)
    return Run(model, curve, evaluations, gradients.silent, _on_all_processes(collator.skipped))


def _checked(dataset, settings):
    """The dataset, with pictures left to the collator."""
    if hasattr(dataset, "__len__"):
        if not len(dataset):
            raise FinetuningError("The dataset has no rows, so there is nothing to learn from.")
        columns = getattr(dataset, "column_names", None) or list(dataset[0])
    else:
        if settings.steps is None:
            raise FinetuningError("A dataset without a length has no epochs: say how many steps.")
        columns = getattr(dataset, "column_names", None) or COLUMNS
    lacking = lacking_columns(columns)
    if lacking:
        raise FinetuningError(lacking)
    return undecoded(dataset)


def _continued(folder, settings, last):
    """The checkpoint to continue from, if there is one. Notes the settings in the folder."""
    notes = folder / SETTINGS
    asked = json.loads(json.dumps(asdict(settings)))
    if notes.exists() and last:
        before = json.loads(notes.read_text(encoding="utf-8"))
        differ = [name for name in asked if before.get(name) != asked[name]]
        if differ:
            told = "; ".join(f"{n} was {before.get(n)!r}, is {asked[n]!r}" for n in differ)
            raise FinetuningError(
                f"{folder} holds a training with other settings ({told}). Continue it with its "
                "own, or choose another folder."
            )
        return last  # nothing is written: of several processes another may just be reading
    folder.mkdir(parents=True, exist_ok=True)
    notes.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    return last


def _arguments(model, folder, settings, evaluates):
    from transformers import TrainingArguments

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % (processes * settings.accumulation):
        raise FinetuningError(
            f"batch_size {settings.batch_size} does not part into {settings.accumulation} parts "
            f"on {processes} processes"
        )
    on_cpu = next(model.parameters()).device.type == "cpu"
    every = settings.evaluate_every if evaluates else None
    save_every = settings.save_every or every
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size // processes // settings.accumulation,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=_highest(settings.rate),
        warmup_steps=settings.warmup,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim=OPTIMIZERS[settings.optimizer],
        bf16=settings.precision == "bf16",
        **checkpointing.arguments(settings.checkpointing),
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(settings.patience),
        metric_for_best_model="eval_accuracy",
        greater_is_better=True,
        logging_steps=1,
        dataloader_num_workers=settings.workers,
        dataloader_persistent_workers=settings.workers > 0,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        seed=settings.seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        # An adapter of a layer that feeds nothing gets no gradient, and DDP would wait for it.
        ddp_find_unused_parameters=True if processes > 1 else None,
    )
    # A process has one GPU. Where it sees several, a Trainer would hand the model to all of them
    # (DataParallel), with so many times the batch and, for a quantized model, the loss.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _highest(rate):
    return max(rate.values()) if isinstance(rate, dict) else rate


def _callbacks(settings, gradients):
    from transformers import EarlyStoppingCallback

    return [gradients] + ([EarlyStoppingCallback(settings.patience)] if settings.patience else [])


def _remove_printing(trainer, progress):
    """Our bar in place of transformers' callbacks, which print a line for each step."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in (
            "PrinterCallback",
            "ProgressCallback",
            "NotebookProgressCallback",
        ):
            trainer.remove_callback(type(callback))
    trainer.add_callback(progress())


def _on_all_processes(counts):
    """The sum of the Counters of all processes, as a dictionary."""
    from accelerate.utils import gather_object

    return dict(sum(gather_object([counts]), start=Counter()))


def _evaluated_at_end(state):
    return any(
        "eval_accuracy" in entry and entry["step"] == state.global_step
        for entry in state.log_history
    )


def _tables(history):
    import pandas

    names = {"loss": "loss", "learning_rate": "rate", "grad_norm": "gradient"}
    steps = [
        {"step": entry["step"]} | {new: entry.get(old) for old, new in names.items()}
        for entry in history
        if "loss" in entry
    ]
    asked = [
        {"step": entry["step"]} | {n: entry[f"eval_{n}"] for n in ("accuracy", "low", "high")}
        for entry in history
        if "eval_accuracy" in entry
    ]
    return (
        pandas.DataFrame(steps, columns=["step", *names.values()]),
        pandas.DataFrame(asked, columns=["step", "accuracy", "low", "high"]),
    )


def _warn_of(silent):
    if silent is None or silent.empty:
        return
    reasons = "; ".join(dict.fromkeys(silent["why"]))
    warnings.warn(
        f"{len(silent)} of the tensors that are to be trained got no gradient in the first step "
        f"({reasons}). run.silent names them.",
        stacklevel=3,
    )
