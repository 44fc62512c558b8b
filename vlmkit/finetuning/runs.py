"""Training: transformers' Trainer, set up for a VLM that is trained component by component.

    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=16))
    run = vk.finetuning.train(model, processor, dataset, "runs/first", max_steps=200)
    run.curve, run.evaluations, run.no_gradient

If a run is killed, the same call continues from its last checkpoint and ends with the same loss.
Under `accelerate launch` it runs on several processes or GPUs.
"""

import json
import secrets
import sys
import warnings
import weakref
from collections import Counter
from dataclasses import asdict, dataclass

from vlmkit.backend import checkpointing, processes, sharding
from vlmkit.errors import FinetuningError, VlmkitError, public
from vlmkit.evaluation import check
from vlmkit.evaluation.asking import context_of
from vlmkit.finetuning import continuing, indistinct, reports, saved
from vlmkit.finetuning.collating import Collator, check_rows
from vlmkit.finetuning.settings import Settings
from vlmkit.images import undecoded

SETTINGS = "settings.json"
_STARTS = weakref.WeakKeyDictionary()  # {model: {folder: its start in the first call}}


@dataclass(frozen=True, eq=False)
class Run:
    """What a training did.

    model: the model that was given, trained.
    curve: DataFrame with a row per step: step, loss, learning_rate, grad_norm.
    evaluations: DataFrame with a row per evaluation: step, loss (the mean over all answer tokens of
        eval_dataset), accuracy of the generated answers, and its 95% interval, low and high; if
        the rows are of several tasks, also accuracy_TASK for each; empty without an
        eval_dataset.
    no_gradient: DataFrame of the trainable tensors that got no gradient in the first step (see
        `gradient_report`); None if nothing was left to train.
    skipped: how many samples were skipped, by reason, on all processes, including those that were
        read ahead of the last step.
    continued_from: the step after which this call went on: 0 for a new training, the last step for
        a training that was finished.
    """

    model: object
    curve: object
    evaluations: object
    no_gradient: object
    skipped: dict
    continued_from: int = 0


@public
def train(model, processor, dataset, output_dir, *, eval_dataset=None, **settings):
    """Train what is trainable in `model`, in place, and return a Run.

    model: what `add_adapters` returned. processor: the model's.
    dataset: rows with images, question and answer, or in another layout that
        `vk.tasks.from_dataset` reads: a `datasets.Dataset`, a list, anything with a length and rows
        by number, or an iterable dataset (which needs `max_steps`).
    output_dir: folder for checkpoints. If it has a checkpoint of the same training, that is
        continued from its last whole one; if it is finished, nothing is trained. More `max_steps`
        or `num_train_epochs` make a training longer. What belongs to a training, beside its
        settings: rows, plan, adapters, base (see `vlmkit.finetuning.continuing.description`).
    eval_dataset: rows to ask the model, and to compute the loss of, every `eval_steps` (or as
        `eval_strategy` says) and at the end. They are looked at before the first step, as those of
        `dataset` are. Evaluating changes nothing in what is learnt.
    settings: those of `vk.finetuning.Settings`.

    Warns of answers that the output head cannot tell apart (see `vlmkit.finetuning.indistinct`),
    and of an evaluation whose loss is not finite.

    Raises FinetuningError if nothing is trainable, if bf16 meets weights in fp16, if the dataset is
    empty or lacks a column, if a sample cannot be used, if the folder holds another training or one
    of more steps, at the first step whose loss or gradients are not finite, if a GPU has too little
    memory, or if a checkpoint cannot be written (the last good one stays).
    """
    settings = Settings(**settings)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FinetuningError(
            "nothing in this model is trainable: begin with vk.finetuning.add_adapters"
        )
    if settings.bf16 and any(str(p.dtype) == "torch.float16" for p in model.parameters()):
        raise FinetuningError(
            "bf16=True computes in bf16, and this model has weights in fp16, with which PyTorch "
            "cannot mix it. Give bf16=False, or load the model with bf16 in place of fp16."
        )
    sharding.reshard(model)
    formats = sharding.formats(model)
    dataset = _checked(dataset, processor, settings)
    _check_to_evaluate(eval_dataset, processor, settings)
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    steps = settings.steps(rows, processes.count())
    eval_steps = settings.steps_between_evaluations(rows, processes.count())
    settings.require_warmup_within(steps)
    import torch
    from accelerate.utils import gather_object
    from transformers import EarlyStoppingCallback, TrainerState

    from vlmkit.finetuning import trainer as trainers

    output_dir = continuing.writable_folder(output_dir)
    description = _description(model, processor, dataset, settings, output_dir)
    last = _last(output_dir, description, steps)
    done = continuing.step_of(last)
    state = continuing.state_in(last) if last else {}
    before = continuing.description_in(last) if last else {}
    # A new name for each new training: a library that knows it goes on with what it has.
    name = before.get("run_name") or f"{output_dir.resolve().name}-{secrets.token_hex(4)}"
    description["run_name"] = name
    if not last:
        _warn_about_answers(model, processor, dataset)
    collator = Collator(
        processor,
        settings.max_length,
        context=context_of(model),
        too_long=settings.too_long,
        unreadable=settings.unreadable,
    )
    gradients = trainers.FirstGradients()
    callbacks = [gradients, trainers.WithoutInputGradients()]
    if eval_dataset is not None:
        callbacks.append(trainers.EvaluatesAtTheEnd())
    worse = 0  # evaluations without a better one, so far
    if settings.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
        kept = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
        worse = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
        callbacks[-1].early_stopping_patience_counter = worse
    trainer = trainers.Trainer(
        model,
        rates=settings.learning_rate,
        processor=processor,
        description=description,
        args=_arguments(settings, model, output_dir, eval_steps, steps, name),
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )
    finished = last and (done >= steps or 0 < (settings.early_stopping_patience or 0) <= worse)
    with reports.going_on(trainer, output_dir, done):
        if finished:
            why = f"it has all {done:,} steps" if done >= steps else f"it stopped early at {done:,}"
            _say(f"{output_dir} is finished: {why}, so nothing is trained.")
            saved.restore(
                model, _best(output_dir, state) if settings.early_stopping_patience else last
            )
            trainer.state = TrainerState.load_from_json(str(last / continuing.STATE))
        else:
            if last:
                _say(f"{output_dir} goes on after step {done:,} of {steps:,}, from {last.name}.")
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except ValueError as error:
                if "does not contain any data" not in str(error):  # accelerate's, of a stream
                    raise
                had = trainer.state.global_step
                raise FinetuningError(
                    f"The dataset ended after {had:,} of {steps:,} steps. Give more rows, or fewer "
                    "max_steps."
                    if had
                    else "The dataset gave no rows, so there is nothing to learn from."
                ) from error
            except torch.OutOfMemoryError as error:
                more = (
                    "Several GPUs can share one model: accelerate launch --config_file fsdp.yaml, "
                    "with a config as in docs/cluster.md."
                )
                if sharding.is_sharded(model):  # FSDP's buffers leave gaps, which this closes
                    more = (
                        "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before you launch, "
                        "or launch more processes, on more GPUs: see docs/cluster.md."
                    )
                raise FinetuningError(
                    f"{model.device} has too little memory for a step of this training. Try, in "
                    "this order, gradient_checkpointing=True, smaller pictures, and a smaller "
                    f"per_device_train_batch_size. {more}"
                ) from error
            finally:
                # accelerate leaves autocast around the model's forward, and the answers would not
                # be those of the plan
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                # It also marks the model as prepared, and would leave autocast out of its next
                # training (accelerate 1.15).
                vars(model).pop("_is_accelerate_prepared", None)
        curve, evaluations = _tables(trainer.state.log_history)
        if eval_dataset is not None and trainer.state.global_step not in set(evaluations["step"]):
            trainer.evaluate()
            curve, evaluations = _tables(trainer.state.log_history)
    if sharding.is_sharded(model):
        sharding.for_answers(model, formats)
    _warn_about(gradients.no_gradient)
    skipped = sum(gather_object([collator.skipped]), start=Counter())  # on all processes
    return Run(model, curve, evaluations, gradients.no_gradient, dict(skipped), done)


def _description(model, processor, dataset, settings, folder):
    """What this training is: see `continuing.description`."""
    found = continuing.description(model, processor, dataset, asdict(settings), processes.count())
    # A model that is given again has what it learnt. It began as it was in the first call.
    starts = _STARTS.setdefault(model, {})
    if not any(folder.glob("checkpoint-*")):
        starts.pop(folder.resolve(), None)
    found |= starts.setdefault(folder.resolve(), {key: found[key] for key in ("base", "start")})
    return json.loads(json.dumps(found))


def _last(folder, description, steps):
    """The checkpoint to go on from; None if there is none.

    Raises FinetuningError if it belongs to another training, or has more steps than are asked.
    """
    last, passed = continuing.found_in(folder)
    for path, wrong in passed.items():
        goes_on = f"from {last.name}" if last else "at the start, since there is none before it"
        _say(f"{path} is passed over: {wrong}. The training goes on {goes_on}.")
    if last:
        continuing.require_same(description, last)
        if continuing.step_of(last) > steps:
            raise FinetuningError(
                f"{folder} holds a training of {continuing.step_of(last):,} steps by now, and this "
                f"one has {steps:,}. Ask for as many or more, or choose another folder."
            )
    elif processes.is_first():
        continuing.write_json(folder / SETTINGS, description)  # for people
    return last


def _best(folder, state):
    """The checkpoint with the best weights of a training that early stopping has ended."""
    best = folder / f"checkpoint-{state['best_global_step']}"
    wrong = continuing.damage(best)
    if wrong:
        raise FinetuningError(
            f"The best weights of {folder} are in {best.name}, and it is damaged: {wrong}. Name "
            "another folder, or delete this one, to train again."
        )
    return best


def _warn_about_answers(model, processor, dataset):
    columns = getattr(dataset, "column_names", None) or []
    if "answer" in columns and hasattr(dataset, "__len__"):
        dataset = dataset.select_columns(["answer"])
    elif not isinstance(dataset, list | tuple):
        return  # to read an answer of another kind can take as long as to draw its picture
    rows = (dataset[place] for place in range(min(len(dataset), continuing.MOST_TEXTS)))
    told = [row["answer"] for row in rows if isinstance(row.get("answer"), str)]
    warning = indistinct.warning_of(model, processor, told)
    if warning and processes.is_first():
        warnings.warn(warning, stacklevel=3)


def _checked(dataset, processor, settings):
    """The dataset, if it can be learnt from, with its pictures left to the collator."""
    if hasattr(dataset, "__len__"):
        if not len(dataset):
            raise FinetuningError("The dataset has no rows, so there is nothing to learn from.")
    elif settings.max_steps is None:
        raise FinetuningError("A dataset without a length has no epochs: give max_steps.")
    check_rows(dataset, processor, unreadable=settings.unreadable)
    return undecoded(dataset)


def _check_to_evaluate(dataset, processor, settings):
    """Raise the errors of an `eval_dataset`, which are better found before a training."""
    if dataset is None and settings.strategy != "no":
        raise FinetuningError(
            f"The settings evaluate by {settings.strategy}, and there is no eval_dataset: give the "
            "rows to evaluate on."
        )
    if dataset is not None:
        try:
            check(processor, dataset, 1)
            check_rows(dataset, processor)
        except VlmkitError as error:
            raise type(error)(f"eval_dataset: {error}") from error


def _say(text):
    if processes.is_first():
        print(text, file=sys.stderr, flush=True)


def _arguments(settings, model, output_dir, eval_steps, steps, name="run"):
    """transformers' TrainingArguments: the settings have its names, and the rest is ours."""
    from transformers import TrainingArguments

    on_cpu = next(model.parameters()).device.type == "cpu"
    save_steps = settings.save_steps or eval_steps or max(50, steps // 20)
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
        "per_device_eval_batch_size": settings.per_device_eval_batch_size
        or settings.per_device_train_batch_size,
        "save_steps": save_steps,
        "save_strategy": "steps",
    }
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        save_total_limit=2,
        load_best_model_at_end=bool(settings.early_stopping_patience),
        metric_for_best_model="eval_accuracy",
        greater_is_better=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it writes the mean of the losses before in place of a NaN
        dataloader_persistent_workers=settings.dataloader_num_workers > 0,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        run_name=name,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes.count() > 1 else None,
        # An adapter of a layer that feeds nothing gets no gradient, and DDP would wait for it.
        ddp_find_unused_parameters=True if processes.count() > 1 else None,
        **given,
    )
    # One process uses one GPU. Where it sees several, a Trainer would copy the model to all of them
    # (DataParallel), which multiplies the batch and, for a quantized model, the loss.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _tables(history):
    """(curve, evaluations) from a Trainer's log, as DataFrames."""
    import pandas

    log = pandas.DataFrame(history)
    curve = log.reindex(columns=["step", "loss", "learning_rate", "grad_norm"])
    columns = ["step", "eval_loss", "eval_accuracy", "eval_low", "eval_high"]
    columns += [name for name in log.columns if name.startswith("eval_accuracy_")]
    asked = log.reindex(columns=columns)
    asked = asked.rename(columns=lambda name: name.removeprefix("eval_"))
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
