"""Fine-tuning, component by component: what is trained, by which adapters, in which modules.

    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=16))

A component is frozen (None, or left out), trained in full ("full"), or given low-rank adapters (a
LoRA).
"""

from vlmkit.errors import FinetuningError
from vlmkit.finetuning.adapters import LoRA, Target, adapted, parse, targets

__all__ = ["LoRA", "Target", "adapted", "add_adapters", "parse", "targets"]


def add_adapters(model, **training):
    """`model` ready to train: what `training` names gets gradients, and nothing else does.

    model: one that `vk.load` returned, or any transformers VLM. It is changed in place.
    training: for each component None (frozen, as is one that is left out), "full" or a `vk.LoRA`.

    Returns a PeftModel, or the model itself where no component gets a LoRA, in training mode.
    Adapters are float32 and begin as zero, so that the model answers as before. What is trained in
    full keeps the format of its plan, and stays part of the model: `PeftModel.save_pretrained`
    writes the adapters alone.

    Raises FinetuningError if there is no such component, if a LoRA finds no Linear layer, if a
    quantised weight is to be trained in full, or if the model has adapters already.
    """
    if hasattr(model, "peft_config"):
        raise FinetuningError(
            "the model has adapters already. To start anew, take them off (model.unload()) or "
            "merge them in (model.merge_and_unload()), and give what that returns."
        )
    return adapted(model, training).train()
