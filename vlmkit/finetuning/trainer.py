"""transformers' Trainer with components: a learning rate for each, evaluation by generated answers,
and checkpoints that hold everything that is trained and are complete or not there."""

import os
import shutil
from pathlib import Path

import transformers
from accelerate.utils import str_to_bool
from tqdm import tqdm
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from vlmkit.anatomy import component_finder
from vlmkit.backend import passes
from vlmkit.errors import FinetuningError, brief
from vlmkit.evaluation import evaluate
from vlmkit.finetuning import saved
from vlmkit.finetuning.gradients import gradient_report

COMPLETE = "trainer_state.json"
"""The file that a Trainer writes last: a checkpoint without it is incomplete."""


class Trainer(transformers.Trainer):
    """transformers' Trainer for what `add_adapters` returned.

    rates: the learning rate, or {component: learning rate}. processor: makes prompts of the
    questions in `eval_dataset`. The other arguments are those of transformers.
    """

    def __init__(self, model, *, rates, processor, **arguments):
        self.rates, self.processor = rates, processor
        self.attention = passes.attention_of(model)
        with passes.trainable(model):
            super().__init__(model, **arguments)
        if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "no")) and not self.is_fsdp_enabled:
            raise FinetuningError(
                "FSDP was asked for, and accelerate leaves it out on a CPU and on one process "
                f"(found: {self.accelerator.distributed_type.value}): each process would hold the "
                "whole model. Launch on several GPUs, or without FSDP."
            )
        # transformers' own callbacks print a line for each step.
        self.remove_callback(PrinterCallback)
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        self.add_callback(Progress())

    def train(self, *args, **kwargs):
        """As transformers', with the attention that is fast on this device.

        On a CPU in bf16 the backward pass of fused attention takes up to five times as long as that
        of plain attention. In fp32 it does not, and on a GPU fused attention is the faster one.
        """
        plain = self.args.bf16 and self.args.device.type == "cpu"
        with passes.attending(self.model, "eager" if plain else self.attention):
            return super().train(*args, **kwargs)

    def create_optimizer(self, model=None):
        """The optimizer, with a group of parameters for each component and its learning rate. Norms
        and biases have no weight decay."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        component_of = component_finder(self.accelerator.unwrap_model(model))
        decaying = set(self.get_decay_parameter_names(model))
        groups = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = name.replace("module.", "", 1).replace("_fsdp_wrapped_module.", "")
                groups.setdefault((component_of(plain), name in decaying), []).append(parameter)
        trained = dict.fromkeys(component for component, _ in groups)
        rates = self.rates if isinstance(self.rates, dict) else dict.fromkeys(trained, self.rates)
        if set(rates) != set(trained):
            raise FinetuningError(
                f"learning_rate names {', '.join(rates)}, and trained are {', '.join(trained)}: "
                "give a learning rate for each of these."
            )
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        decay = self.args.weight_decay
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "lr": rates[component],
                    "weight_decay": decay if decays else 0.0,
                }
                for (component, decays), parameters in groups.items()
            ],
            **arguments,
        )
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Accuracy of the model's generated answers, as `vk.evaluate` counts it."""
        model = self.accelerator.unwrap_model(self.model)
        passes.answering(model)
        with passes.attending(model, self.attention), passes.without_autocast(model):
            scores = evaluate(model, self.processor, eval_dataset or self.eval_dataset)
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
        tensors = saved.gathered(model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            saved.write(model, folder, tensors)

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # an OSError, or what torch and safetensors make of one
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            shutil.rmtree(folder, ignore_errors=True)
            last = last_checkpoint(self.args.output_dir)
            raise FinetuningError(
                f"{folder} could not be written: {brief(error)}. "
                + (f"The last good one is {last}. " if last else "There is none before it. ")
                + "Make room, and the same call continues from there."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved.restore(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def last_checkpoint(folder):
    """The last complete checkpoint in `folder`, as a pathlib.Path; None if there is none."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(folder).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and (path / COMPLETE).is_file()
    ]
    return max(found)[1] if found else None


class Progress(ProgressCallback):
    """transformers' progress bar as text, in notebooks too, with the loss on it in place of a line
    for each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {"eval_accuracy": "accuracy", "loss": "loss"}
        values = {shown[k]: f"{v:.3f}" for k, v in (logs or {}).items() if k in shown}
        if self.training_bar is not None:  # the last evaluation logs after it is closed
            self.training_bar.set_postfix(values)


class FirstGradients(TrainerCallback):
    """Reports the gradients of the first step that it sees, as `no_gradient`."""

    no_gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.no_gradient is None:
            self.no_gradient = gradient_report(getattr(model, "module", model))
