"""A Trainer of transformers that knows components: a rate for each, evaluation by what is answered,
and checkpoints with everything that is trained, each whole or not there."""

import contextlib
import os
import shutil
from pathlib import Path

import transformers
from accelerate.utils import str_to_bool
from tqdm import tqdm
from transformers import TrainerCallback

from vlmkit.anatomy import component_finder
from vlmkit.backend import passes
from vlmkit.errors import FinetuningError, brief
from vlmkit.evaluation import evaluate
from vlmkit.finetuning import saving
from vlmkit.finetuning.gradients import gradient_report

COMPLETE = "trainer_state.json"
"""The file that a Trainer writes last: a checkpoint without it is cut off."""


class Trainer(transformers.Trainer):
    """transformers' Trainer for what `add_adapters` returned.

    settings: a Settings. processor: turns `eval_dataset` into questions for the model. The other
    arguments are those of transformers.
    """

    def __init__(self, model, *, settings, processor, **arguments):
        self.settings, self.asking = settings, processor
        self.attention = passes.attention_of(model)
        with _passes_for_trainable(model):
            super().__init__(model, **arguments)
        if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "no")) and not self.is_fsdp_enabled:
            raise FinetuningError(
                "FSDP was asked for, and accelerate leaves it out on a CPU and on one process "
                f"(found: {self.accelerator.distributed_type.value}): each process would hold the "
                "whole model. Launch on several GPUs, or without FSDP."
            )

    def train(self, *args, **kwargs):
        """As transformers', with the attention that is fast on this device.

        On a CPU in bf16 the backward pass of the fused attention takes up to five times as long as
        the plain one's; in fp32 it does not, and on a GPU the fused one is the faster.
        """
        plain = self.args.bf16 and self.args.device.type == "cpu"
        with passes.attending(self.model, "eager" if plain else self.attention):
            return super().train(*args, **kwargs)

    def create_optimizer(self, model=None):
        """AdamW or a relative, with a group for each component and its rate; norms and biases do
        not decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        component_of = component_finder(self.accelerator.unwrap_model(model))
        decaying = set(self.get_decay_parameter_names(model))
        groups = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                component = component_of(
                    name.replace("module.", "", 1).replace("_fsdp_wrapped_module.", "")
                )
                groups.setdefault((component, name in decaying), []).append(parameter)
        rates = self.settings.rate
        if not isinstance(rates, dict):
            rates = {component: rates for component, _ in groups}
        trained = dict.fromkeys(component for component, _ in groups)
        if set(rates) != set(trained):
            raise FinetuningError(
                f"rate names {', '.join(rates)}, and trained are {', '.join(trained)}: give a rate "
                "for each of these"
            )
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "lr": rates[component],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (component, decays), parameters in groups.items()
            ],
            **arguments,
        )
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """How often the model's own answers are right, as `vk.evaluate` counts it."""
        model = self.accelerator.unwrap_model(self.model)
        passes.answering(model)
        with passes.attending(model, self.attention), passes.without_autocast(model):
            scores = evaluate(model, self.asking, eval_dataset or self.eval_dataset)
        low, high = scores.interval
        found = {"accuracy": scores.accuracy, "low": low, "high": high}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def save_model(self, output_dir=None, _internal_call=False):
        model = self.accelerator.unwrap_model(self.model)
        tensors = saving.gathered(model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            saving.write(model, folder, tensors)

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # OSError, and what torch and safetensors make of one
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            shutil.rmtree(folder, ignore_errors=True)
            last = last_checkpoint(self.args.output_dir)
            raise FinetuningError(
                f"{folder} could not be written: {brief(error)}. "
                + (f"The last good one is {last}: " if last else "There is none before it: ")
                + "make room, and the same call continues from there."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saving.restore(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def last_checkpoint(folder):
    """The last checkpoint in `folder` that is complete, as a pathlib.Path; None without one."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and (path / COMPLETE).is_file()
    ]
    return max(found)[1] if found else None


@contextlib.contextmanager
def _passes_for_trainable(model):
    """A Trainer refuses a quantized model without adapters. Ours may have a projector, in a float
    format, that is trained in full: `add_adapters` has made sure of it."""
    if hasattr(model, "peft_config") or not getattr(model, "is_quantized", False):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = True


class Progress(TrainerCallback):
    """A bar with the loss, and no line for each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {"eval_accuracy": "right", "loss": "loss"}
        self.bar.set_postfix({shown[k]: f"{v:.3f}" for k, v in (logs or {}).items() if k in shown})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class FirstGradients(TrainerCallback):
    """Looks at the gradients of the first step that it sees: `silent` is their report."""

    silent = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.silent is None:
            self.silent = gradient_report(getattr(model, "module", model))
