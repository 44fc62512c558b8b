"""Fine-tuning, component by component: what is trained, by which adapters, in which modules.

    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=16))

    run = vk.finetuning.train(model, processor, dataset, "runs/first", steps=200)
    vk.finetuning.save(model, "adapters")

A component is frozen (None, or left out), trained in full ("full"), or given low-rank adapters (a
LoRA).

adapters.py    which modules get adapters, by full name
collating.py   rows to batches, with the loss on the answers
settings.py, training.py, trainer.py   the training, on transformers' Trainer
gradients.py   what is to be trained and gets no gradient, and why
checkpointing.py   activations computed twice rather than kept, in any transformers
passes.py      how its passes are computed, and those of the questions in between
configs.py     the same as a file, for `vlmkit train`
saving.py      what was trained, to disk and back, and merged into the weights
"""

from vlmkit.adapters import LoRA, Target, adapted, parse, targets
from vlmkit.errors import FinetuningError
from vlmkit.finetuning.collating import Collator, token_table
from vlmkit.finetuning.gradients import gradient_report
from vlmkit.finetuning.saving import load, merge, save
from vlmkit.finetuning.settings import Settings
from vlmkit.finetuning.training import Run, train

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


def add_adapters(model, **training):
    """`model` ready to train: what `training` names gets gradients, and nothing else does.

    model: one that `vk.load` returned, or any transformers VLM. It is changed in place.
    training: for each component None (frozen, as is one that is left out), "full" or a `vk.LoRA`.

    Returns a PeftModel, or the model itself where no component gets a LoRA, in training mode.
    Adapters are float32 and begin as zero, so that the model answers as before. What is trained in
    full keeps the format of its plan, and stays part of the model: `PeftModel.save_pretrained`
    writes the adapters alone.

    Raises FinetuningError if there is no such component, if a LoRA finds no Linear layer, if a
    quantized weight is to be trained in full, or if the model has adapters already.
    """
    if hasattr(model, "peft_config"):
        raise FinetuningError(
            "the model has adapters already. To start anew, take them off (model.unload()) or "
            "merge them in (model.merge_and_unload()), and give what that returns."
        )
    return adapted(model, training).train()
