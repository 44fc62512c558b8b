"""transformers' Trainer with components: a learning rate for each, evaluation by generated answers,
and checkpoints that hold everything that is trained and are complete or not there."""

import math
import os
import shutil
import warnings
from pathlib import Path

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer, str_to_bool
from tqdm import tqdm
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from vlmkit.anatomy import component_finder, unwrapped, vision_dtype
from vlmkit.backend import passes, sharding
from vlmkit.backend.losses import IGNORED, loss_of_answers
from vlmkit.errors import FinetuningError, brief
from vlmkit.evaluation import evaluate
from vlmkit.evaluation.asking import context_of, in_evaluation_mode
from vlmkit.finetuning import continuing, saved
from vlmkit.finetuning.collating import Collator
from vlmkit.finetuning.gradients import gradient_report, not_finite, require_finite


class Trainer(transformers.Trainer):
    """transformers' Trainer for what `add_adapters` returned.

    rates: the learning rate, or {component: learning rate}. processor: makes prompts of the
    questions in `eval_dataset`. description: of the training, for its checkpoints. The other
    arguments are those of transformers.

    Raises FinetuningError at the first step whose loss or gradients are not finite. That step
    changes no weight, and nothing is saved after it.
    """

    def __init__(self, model, *, rates, processor, description=None, **arguments):
        self.rates, self.processor, self.description = rates, processor, description
        self.attention = passes.attention_of(model)
        self._loss_of_step, self._trained = 0.0, None
        with passes.trainable(model):
            super().__init__(model, compute_loss_func=loss_of_answers, **arguments)
        self._loss_shifts_labels = True  # so that the tokens of a step are counted as in the loss
        if str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "no")) and not self.is_fsdp_enabled:
            raise FinetuningError(
                "FSDP was asked for, and accelerate leaves it out on a CPU and on one process "
                f"(found: {self.accelerator.distributed_type.value}): each process would hold the "
                "whole model. Launch on several GPUs, or without FSDP."
            )
        if self.is_fsdp_enabled and not self.args.optim.startswith("adamw_torch"):
            raise FinetuningError(
                f"optim={self.args.optim.value!r} is an optimizer of bitsandbytes, which cannot "
                "work on the shards of FSDP. Leave optim out: with FSDP, each process has its part "
                "of the states."
            )
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            sharding.require_codes(model)
        if sharding.is_sharded(model):
            sharding.shard(model, self.accelerator)  # now in the precision of the training
        # transformers' own callbacks print a line for each step.
        self.remove_callback(PrinterCallback)
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        self.add_callback(Progress())

    def train(self, *args, **kwargs):
        """As transformers', with the attention that trains fastest on this device, and without
        casts that autocast takes back."""
        kind = passes.training_attention(self.model, self.args.bf16, self.args.device.type)
        with (
            passes.attending(self.model, kind),
            passes.casting(self.model, not self.args.bf16),
        ):
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        # transformers (5.24) says it in the config of the whole model. A language model asks its
        # own, and would keep keys and values of every layer until the end of a step.
        return super().compute_loss(model, inputs | {"use_cache": False}, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._loss_of_step = self._loss_of_step + loss
        return loss

    def _clip_grad_norm(self, model):
        """Clip the gradients, and return the norm that they had.

        As torch.nn.utils.clip_grad_norm_ does, with a look at the norm in between: where it is NaN,
        clipping makes all gradients NaN, and nothing would tell where the first one was.
        """
        trained = [p for p in model.parameters() if p.grad is not None]
        if any(hasattr(parameter.grad, "full_tensor") for parameter in trained):  # sharded by FSDP
            norm = super()._clip_grad_norm(model)
            self._require_finite(model, norm)
            return norm
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        self._require_finite(model, norm)
        if self.args.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(trained, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # max_grad_norm is 0
            grad_norm = super()._get_grad_norm(model)
            self._require_finite(model, grad_norm)
        return grad_norm

    def floating_point_ops(self, inputs):
        """0: nobody reads the sum, and transformers counts all parameters anew for each step."""
        return 0

    def _require_finite(self, model, norm):
        # A loss can be infinite on one process alone: all have to stop. The norm is of all.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss = self.accelerator.gather(self._loss_of_step.reshape(1)).mean()
        self._loss_of_step = 0.0
        if not torch.isfinite(loss + norm):
            model = self.accelerator.unwrap_model(model)
            message = not_finite(model, loss.item(), self.state.global_step + 1)
            model.zero_grad()
            raise FinetuningError(message)

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
        if sharding.is_sharded(model):
            self._trained = [list(group["params"]) for group in self.optimizer.param_groups]
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        # accelerate has just prepared the optimizer: it put in what FSDP2 made of each parameter,
        # which it finds by its address. Shards without rows have none, and it mixes them up.
        if self._trained is not None:
            for group, parameters in zip(self.optimizer.param_groups, self._trained, strict=True):
                group["params"] = parameters
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Accuracy of the model's generated answers, as `vk.evaluate` counts it, of all and, if
        there are several, of each task; and the mean loss of all answer tokens of the dataset.
        Warns if this loss is not finite."""
        model, dataset = (
            self.accelerator.unwrap_model(self.model),
            eval_dataset or self.eval_dataset,
        )
        passes.answering(model)
        with (
            passes.attending(model, self.attention),
            passes.casting(model, True),
            passes.without_autocast(model),
        ):
            scores = evaluate(model, self.processor, dataset)
            loss = self.loss_on(model, dataset)
        if not math.isfinite(loss):
            warnings.warn(
                f"The loss on eval_dataset is {loss} after step {self.state.global_step:,}: the "
                "model, as it answers, computes numbers that are not finite. Look at the rows, or "
                "plan a format with more bits.",
                stacklevel=2,
            )
        low, high = scores.interval
        found = {"loss": loss, "accuracy": scores.accuracy, "low": low, "high": high}
        by_task = scores.by_task["accuracy"]
        if len(by_task) > 1:
            found |= by_task.add_prefix("accuracy_").to_dict()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def loss_on(self, model, dataset):
        """The sum of the losses of all answer tokens of `dataset`, a list or a `datasets.Dataset`,
        over their number: so it does not depend on the rows of a batch.

        There is no DataLoader here, since each one draws a number that the training would miss, and
        the collator is not that of the training, which remembers its last good sample.
        """
        collator, kind = Collator(self.processor, context=context_of(model)), vision_dtype(model)
        size, total, number = self.args.per_device_eval_batch_size, 0.0, 0
        with torch.no_grad(), in_evaluation_mode(model):
            for start in range(0, len(dataset), size):
                rows = range(start, min(start + size, len(dataset)))
                inputs = self._prepare_inputs(collator([dataset[row] for row in rows]))
                labels = inputs.pop("labels")
                for name, tensor in inputs.items():  # pixels, as `vlmkit.evaluation` gives them
                    if torch.is_tensor(tensor) and tensor.is_floating_point():
                        inputs[name] = tensor.to(kind)
                total += loss_of_answers(model(**inputs), labels, 1).item()
                number += (labels[:, 1:] != IGNORED).sum().item()
        return total / number

    def save_model(self, output_dir=None, _internal_call=False):
        model = self.accelerator.unwrap_model(self.model)
        require_finite(model)
        tensors = saved.gathered(model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            saved.write(model, folder, tensors)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its random state
            if self.args.should_save:
                continuing.seal(folder, self.description)
        except FinetuningError:
            raise
        except Exception as error:  # an OSError, or what torch and safetensors make of one
            shutil.rmtree(folder, ignore_errors=True)
            last = continuing.last_checkpoint(self.args.output_dir)
            raise FinetuningError(
                f"{folder} could not be written: {brief(error)}. "
                + (f"The last good one is {last}. " if last else "There is none before it. ")
                + "Make room, and the same call continues from there."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir):
        if not (self.is_fsdp_enabled and sharding.is_sharded(self.model)):
            return super()._save_optimizer_and_scheduler(output_dir)
        # transformers would gather the weights too, the frozen ones if there is no adapter.
        sharding.reshard(self.model)  # an evaluation has gathered some
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved.restore(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


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
        shown = {"eval_accuracy": "accuracy", "eval_loss": "eval loss", "loss": "loss"}
        values = {shown[k]: f"{v:.3f}" for k, v in (logs or {}).items() if k in shown}
        if self.training_bar is not None:  # the last evaluation logs after it is closed
            self.training_bar.set_postfix(values)


class WithoutInputGradients(TrainerCallback):
    """Takes off the hooks by which transformers and peft make the embeddings' output need a
    gradient. Checkpointing with use_reentrant=True needs them. Without it, which is how a training
    here checkpoints, they only keep activations for a backward pass that nobody needs."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        unwrapped(getattr(model, "module", model)).disable_input_require_grads()


class EvaluatesAtTheEnd(TrainerCallback):
    """Evaluates after the last step too, before its checkpoint, which then has the result."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_evaluate or control.should_training_stop
        return control


class FirstGradients(TrainerCallback):
    """Reports the gradients of the first step that it sees, as `no_gradient`."""

    no_gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.no_gradient is None:
            self.no_gradient = gradient_report(getattr(model, "module", model))
