"""Dataclasses that check the names and the types of what they are given.

The names of settings are those of transformers, peft and TRL. Somebody who writes another library's
name, or an earlier one of ours, is told the right one. Types are checked as transformers checks
those of its configs, by huggingface_hub.
"""

import dataclasses
import math
import re
import reprlib
from typing import Literal, get_args, get_origin

import yaml

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
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "evaluate_every eval_every",
    "per_device_eval_batch_size": "eval_batch_size",
    "early_stopping_patience": "patience",
    "save_steps": "save_every checkpoint_every",
    "max_length": "max_seq_length max_seq_len model_max_length cutoff_len",
    "dataloader_num_workers": "workers num_workers",
    "seed": "random_state",
    "report_to": "logger loggers log_with",
    "r": "rank lora_r lora_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "modules lora_target_modules",
    "use_rslora": "rank_stabilised rank_stabilized rslora",
    "use_dora": "dora",
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


MOST = 10**9
"""The largest whole number where a field has no limit of its own: more steps than any training."""


class Checked:
    """Base of a dataclass whose names, types and limits are checked before anything else.

    what: what a field is, for errors, such as "a setting of a training".
    beside: names that are right elsewhere in the same call.
    limits: {field: (least, most)} of numbers. A field of whole numbers without limits begins at 1
        if its default is not 0, and ends at MOST.
    above: fields whose number has to be above the least, and cannot be equal to it.

    Raises FinetuningError for an unknown name, with the right or the nearest one, for a value of
    another type than its field's, and for a number that is not finite or beyond its limits.
    """

    def __init_subclass__(cls, what, beside=(), limits=None, above=()):
        cls._what, cls._beside, cls._limits, cls._above = what, beside, limits or {}, above

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
                    f"{field.name} is {kind.replace(' | ', ' or ')}, not {shown(value)}."
                ) from None
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._check_limits(field, value)

    def _check_limits(self, field, value):
        whole = field.type in (int, int | None)
        if not whole and field.name not in self._limits:
            return
        least, most = self._limits.get(field.name, (int(field.default != 0), MOST))
        above = field.name in self._above
        finite = isinstance(value, int) or math.isfinite(value)
        if finite and least <= value <= most and not (above and value == least):
            return
        kind = "a whole number from" if whole else "a number above" if above else "a number from"
        raise FinetuningError(f"{field.name} is {kind} {least:,} to {most:,}, not {shown(value)}.")


def shown(value):
    """A value as an error shows it: its repr, cut to a readable length."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write out whole numbers of more than 4,300 digits
        return f"this {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def require_among(name, value, known):
    """Raise FinetuningError, with the nearest right word, if `value` is not one of `known`."""
    if value not in known:
        raise FinetuningError(
            f"{name} is one of {', '.join(known)}, not {shown(value)}. "
            f"{did_you_mean(str(value)[:80], known)}".rstrip()
        )


def _hint(name, known, beside):
    for right, others in RIGHT_NAMES.items():
        if name in others.split() and right in (*known, *beside):
            meaning = f", which {MEANINGS[right]}" if right in MEANINGS else ""
            return f"It is called {right!r} here{meaning}. "
    return did_you_mean(name, known)


class YamlLoader(yaml.SafeLoader):
    """A SafeLoader that reads 2e-4 as a number and 2026-05-01 as text, as YAML 1.2 does. It refuses
    a repeated key."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    "-+0123456789",
)


def unique_keys(pairs):
    """The dictionary of a JSON object's (key, value) pairs, for `json.loads(object_pairs_hook=…)`.
    Raises ValueError for a repeated key, of which JSON keeps the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return found
