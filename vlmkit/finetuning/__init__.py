"""Fine-tuning, component by component.

    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=16))
    run = vk.finetuning.train(model, processor, dataset, "runs/first", max_steps=200)
    vk.finetuning.save(model, "adapters")

Each component is frozen (None, or left out), trained in full ("full"), or given low-rank adapters
(a `vk.LoRA`; see vlmkit.adapters).

collating.py   rows to batches, with labels on the answers
settings.py    settings, and a training as a YAML file for `vlmkit train`
runs.py, trainer.py   the training, on transformers' Trainer
continuing.py  which checkpoint is whole, and whether it belongs to this training
reports.py     losses and evaluations to TensorBoard, trackio, W&B
gradients.py   which trainable tensors get no gradient, and what is not finite
indistinct.py  which answers the output head cannot tell apart
saved.py       what was trained, to disk and back, and merged into the weights
"""

from vlmkit.adapters import LoRA, Target, adapted, parse, targets
from vlmkit.errors import FinetuningError, public
from vlmkit.finetuning.collating import Collator, token_table
from vlmkit.finetuning.gradients import gradient_report
from vlmkit.finetuning.runs import Run, train
from vlmkit.finetuning.saved import load, merge, save
from vlmkit.finetuning.settings import Settings, require_seed

__all__ = [
    "Collator",
    "LoRA",
    "Run",
    "Settings",
    "Target",
    "adapted",
    "add_adapters",
    "gradient_report",
    "load",
    "merge",
    "parse",
    "save",
    "targets",
    "token_table",
    "train",
]


@public
def add_adapters(model, *, seed=0, **training):
    """`model` ready to train: what `training` names gets gradients, everything else is frozen.

    model: what `vk.load` returned, or any transformers VLM. It is changed in place.
    seed: of the adapters' random start. The same seed gives the same start, in a new process too.
    training: for each component None (frozen, as if left out), "full" or a `vk.LoRA`.

    Returns a PeftModel, or the model itself where no component gets a LoRA, in training mode.
    Adapters are float32 and start at zero, so that the model first answers as before (with DoRA,
    within the rounding of its dtype). What is
    trained in full keeps the format of its plan, and stays part of the model:
    `PeftModel.save_pretrained` writes the adapters alone, `vk.finetuning.save` both.

    Raises FinetuningError if there is no such component, if a LoRA finds no Linear layer, if a
    quantized weight is to be trained in full, if the model has adapters already, or if the seed is
    no whole number from 0 to 4,294,967,295.
    """
    require_seed(seed)
    if hasattr(model, "peft_config"):
        raise FinetuningError(
            "the model has adapters already. Take them off (model.unload()) or merge them in "
            "(model.merge_and_unload()), and give what that returns."
        )
    return adapted(model, training, seed).train()
