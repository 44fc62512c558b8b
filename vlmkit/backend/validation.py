"""Dataclasses that check the names and the types of what they are given.

The names of settings are those of transformers, peft and TRL. Somebody who writes another library's
name, or an earlier one of ours, is told the right one. Types are checked as transformers checks
those of its configs, by huggingface_hub.
"""

import dataclasses
from typing import Literal, get_args, get_origin

from vlmkit.errors import FinetuningError, did_you_mean

RIGHT_NAMES = {
    "max_steps": "steps num_steps total_steps max_train_steps",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs",
    "per_device_train_batch_size": "batch batch_size per_device_batch_size micro_batch_size",
    "gradient_accumulation_steps": "accumulation gradient_accumulation accumulate_grad_batches",
    "learning_rate": "rate lr",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps",
    "lr_scheduler_type": "schedule scheduler lr_scheduler lr_schedule",
    "max_grad_norm": "clip grad_clip clip_grad_norm gradient_clip_val",
    "optim": "optimizer",
    "bf16": "precision mixed_precision fp16 fp32 dtype",
    "gradient_checkpointing": "checkpointing activation_checkpointing use_gradient_checkpointing",
    "eval_steps": "evaluate_every eval_every",
    "early_stopping_patience": "patience",
    "save_steps": "save_every checkpoint_every",
    "max_length": "max_seq_length max_seq_len model_max_length cutoff_len",
    "dataloader_num_workers": "workers num_workers",
    "seed": "random_state",
    "r": "rank lora_r lora_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "modules lora_target_modules",
    "use_rslora": "rank_stabilised rank_stabilized rslora",
    "eval_dataset": "evaluation val_dataset validation",
    "evaluation": "eval_dataset val_dataset validation",
    "output": "output_dir folder",
    "model": "model_name model_name_or_path base_model",
}
"""Our name: what it is called elsewhere, or was called here."""

MEANINGS = {
    "per_device_train_batch_size": "counts the samples of one process and one accumulated part",
    "warmup_steps": "below 1 is a share of the steps",
    "bf16": "is true or false",
}
"""What to know of a name that says something else than the name that it stands for."""


class Checked:
    """Base of a dataclass whose names and types are checked before its values.

    what: what a field is, for errors, such as "a setting of a training".
    beside: names that are right elsewhere in the same call.

    Raises FinetuningError for an unknown name, with the right or the nearest one, for a value of
    another type than its field's, and for a whole number below 1 if the default is not 0.
    """

    def __init_subclass__(cls, what, beside=()):
        cls._what, cls._beside = what, beside

    def __new__(cls, *_, **given):
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise FinetuningError(
                    f"{name!r} is not {cls._what}. {_hint(name, known, cls._beside)}"
                    f"The names are {', '.join(known)}."
                )
        return super().__new__(cls)

    def __post_init__(self):
        from huggingface_hub.dataclasses import type_validator

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal:
                require_among(field.name, value, get_args(field.type))
                continue
            try:
                type_validator(field.name, value, field.type)
            except TypeError:
                kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
                raise FinetuningError(
                    f"{field.name} is {kind.replace(' | ', ' or ')}, not {value!r}."
                ) from None
            counts = field.type in (int, int | None) and field.default != 0
            if counts and value is not None and value < 1:
                raise FinetuningError(f"{field.name} is a whole number from 1, not {value}.")


def require_among(name, value, known):
    """Raise FinetuningError, with the nearest right word, if `value` is not one of `known`."""
    if value not in known:
        raise FinetuningError(
            f"{name} is one of {', '.join(known)}, not {value!r}. "
            f"{did_you_mean(value, known)}".rstrip()
        )


def _hint(name, known, beside):
    for right, others in RIGHT_NAMES.items():
        if name in others.split() and right in (*known, *beside):
            meaning = f", which {MEANINGS[right]}" if right in MEANINGS else ""
            return f"It is called {right!r} here{meaning}. "
    return did_you_mean(name, known)
