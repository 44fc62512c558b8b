"""What a training is told: its settings, and a whole training as a YAML file for `vlmkit train`.

    config = read("train.yaml")
    config.train                # for vk.finetuning.add_adapters: {"projector": "full", ...}
    config.data.dataset("train"), config.settings   # for vk.finetuning.train

The file is checked before anything is loaded: an unknown key would otherwise be a setting that was
never set. docs/train.yaml is an example, docs/training.md explains it.
"""

from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Literal

import yaml

from vlmkit import tasks
from vlmkit.adapters import LoRA, parse, require_component
from vlmkit.backend.optimizers import check_optimizer
from vlmkit.backend.validation import MOST, Checked, YamlLoader, require_among, shown
from vlmkit.errors import FinetuningError, VlmkitError, brief, did_you_mean
from vlmkit.families import LIMITS as PICTURE_LIMITS
from vlmkit.finetuning.collating import RAISE
from vlmkit.plan import Plan

WAYS = {None: None, "frozen": None, "full": "full", "lora": LoRA()}
"""How a file says what a component learns, besides a mapping with the fields of a LoRA."""


SEEDS = (0, 2**32 - 1)
"""The seeds that numpy, which a Trainer seeds too, can have."""

LIMITS = {
    "num_train_epochs": (0, 10**6),
    "per_device_train_batch_size": (1, 10**6),
    "gradient_accumulation_steps": (1, 10**6),
    "per_device_eval_batch_size": (1, 10**6),
    "warmup_steps": (0, MOST),
    "weight_decay": (0, 10),
    "max_grad_norm": (0, MOST),
    "dataloader_num_workers": (0, 1024),
    "seed": SEEDS,
}
"""The least and the most of the settings that are numbers. Beyond these, a training ends in an
error of another library, in numbers that are not finite, or never."""


@dataclass(frozen=True)
class Settings(
    Checked,
    what="a setting of a training",
    beside=("eval_dataset",),
    limits=LIMITS,
    above=("num_train_epochs",),
):
    """Settings of `vk.finetuning.train`. Most have the name and the meaning that they have in
    transformers' TrainingArguments.

    max_steps: optimizer steps; None trains for `num_train_epochs` passes over the dataset.
    per_device_train_batch_size: samples of one process and one accumulated part. A step has
        processes x gradient_accumulation_steps times as many.
    gradient_accumulation_steps: parts of a batch, which are computed one after another.
    learning_rate: the highest one, as a number, or as {component: number} for every component that
        is trained.
    warmup_steps: steps in which the learning rate rises; a number below 1 is a share of all steps.
    lr_scheduler_type: how it falls after that.
    max_grad_norm: the largest norm of the gradients; 0 leaves them as they are.
    optim: "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit" or "paged_adamw_8bit".
    bf16: compute in bf16 (autocast; weights in float32 stay float32); False computes in the formats
        of the plan.
    gradient_checkpointing: recompute activations in the backward pass, and keep fewer in memory.
    eval_strategy: when to evaluate on eval_dataset, beside the end: "steps" (every eval_steps),
        "epoch" (at the end of every epoch) or "no". None is "steps" if eval_steps is given.
    eval_steps: steps between two evaluations on eval_dataset.
    per_device_eval_batch_size: samples at a time for the loss on eval_dataset; None is
        per_device_train_batch_size. The loss does not depend on it.
    early_stopping_patience: evaluations without a better one after which training stops. The best
        weights come back. None never stops early.
    save_steps: steps between two checkpoints; None is eval_steps, or else 50 steps, and more where
        a training has more than 1,000 (a twentieth of it). There is one at the end in any case.
    max_length, too_long, unreadable: see `vk.finetuning.Collator`.
    dataloader_num_workers: processes that read pictures during training.
    seed: of the order of the samples and of dropout; in a file, of the adapters' start too.
    report_to: where losses and evaluations go beside the Run: "tensorboard", "trackio", "wandb" or
        another name that transformers has, a list of these, "all" (of those installed) or "none".

    Raises FinetuningError for an unknown name, for a value that no training can have, and for a
    library in report_to that cannot be used.
    """

    max_steps: int | None = None
    num_train_epochs: int | float = 1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: int | float | dict = 2e-4
    warmup_steps: int | float = 0.05
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: int | float = 0.0
    max_grad_norm: int | float = 1.0
    optim: str = "adamw_torch_fused"
    bf16: bool = True
    gradient_checkpointing: bool = False
    eval_strategy: str | None = None
    eval_steps: int | None = None
    per_device_eval_batch_size: int | None = None
    early_stopping_patience: int | None = None
    save_steps: int | None = None
    max_length: int | None = None
    too_long: Literal["raise", "skip"] = RAISE
    unreadable: Literal["raise", "skip"] = RAISE
    dataloader_num_workers: int = 0
    seed: int = 0
    report_to: str | list = "none"

    def __post_init__(self):
        super().__post_init__()
        check_optimizer(self.optim)
        check_reports(self.report_to)
        self._check_evaluation()
        rates = self.learning_rate
        for component, rate in (rates if isinstance(rates, dict) else {None: rates}).items():
            if component is not None:
                require_component(component)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 10:
                raise FinetuningError(
                    f"a learning_rate is a number between 0 and 10, not {shown(rate)}."
                )
        if self.warmup_steps > 1 and self.warmup_steps % 1:
            raise FinetuningError(
                f"warmup_steps is a share below 1 or a whole number, not {self.warmup_steps}."
            )
        if self.max_steps:
            self.require_warmup_within(self.max_steps)

    def _check_evaluation(self):
        strategy = self.strategy
        require_among("eval_strategy", strategy, ("steps", "epoch", "no"))
        if (strategy == "steps") != bool(self.eval_steps):
            raise FinetuningError(
                f"eval_strategy is {strategy!r}, and eval_steps is {self.eval_steps}: eval_steps "
                'belongs to eval_strategy="steps".'
            )
        if self.early_stopping_patience and strategy == "no":
            raise FinetuningError(
                "early_stopping_patience counts evaluations: give eval_steps, or "
                'eval_strategy="epoch".'
            )
        self._check_save_steps(self.eval_steps)

    def _check_save_steps(self, eval_steps):
        if self.early_stopping_patience and (self.save_steps or 0) % (eval_steps or 1):
            raise FinetuningError(
                f"The best weights come back from a checkpoint, so save_steps ({self.save_steps}) "
                f"has to be a multiple of the steps between two evaluations ({eval_steps})."
            )

    @property
    def strategy(self):
        """eval_strategy, as a word."""
        return self.eval_strategy or ("steps" if self.eval_steps else "no")

    def require_warmup_within(self, steps):
        """Raise FinetuningError if the warmup is longer than a training of so many steps."""
        if self.warmup_steps > steps:
            raise FinetuningError(
                f"warmup_steps is {self.warmup_steps:,}, and the training has {steps:,} steps: the "
                "learning rate would never arrive. Give fewer, or a share of the steps below 1."
            )

    def steps(self, rows, processes=1):
        """Optimizer steps of a training on so many rows; rows: None for a dataset without a
        length, which has max_steps."""
        return self.max_steps or ceil(self.num_train_epochs * self._of_an_epoch(rows, processes))

    def steps_between_evaluations(self, rows, processes=1):
        """eval_steps, or the steps of an epoch; None without evaluations before the end."""
        if self.strategy != "epoch":
            return self.eval_steps
        if rows is None:
            raise FinetuningError("A dataset without a length has no epochs: give eval_steps.")
        self._check_save_steps(self._of_an_epoch(rows, processes))
        return self._of_an_epoch(rows, processes)

    def _of_an_epoch(self, rows, processes):
        batches = ceil(ceil(rows / self.per_device_train_batch_size) / processes)
        return ceil(batches / self.gradient_accumulation_steps)


def check_reports(report_to):
    """Raise FinetuningError if `report_to` has a name that transformers does not know, or one whose
    library cannot be used here: better now than after the weights are loaded."""
    names = [report_to] if isinstance(report_to, str) else report_to
    if names in (["none"], ["all"]):
        return
    from transformers.integrations import integration_utils

    callbacks = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in callbacks:
            raise FinetuningError(
                f"report_to is one of none, all, {', '.join(callbacks)}, or a list of libraries, "
                f"not {shown(name)}. {did_you_mean(str(name)[:80], ['none', 'all', *callbacks])}"
            )
        try:
            # flyte is not among those that transformers looks for. A callback that cannot be made
            # says more when it is collected, so one without its library is not tried.
            if name not in (*integration_utils.get_available_reporting_integrations(), "flyte"):
                raise ImportError(f"pip install {_PACKAGES.get(name, name)}")
            callbacks[name]()
        except Exception as error:  # each library has its own
            raise FinetuningError(
                f"report_to names {name}, which cannot be used here: {brief(error)}. Without it, "
                "losses and evaluations are in the Run in any case."
            ) from error


_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow"}


def require_seed(seed):
    """Raise FinetuningError if `seed` is not one that every library takes."""
    Settings(seed=seed)


@dataclass(frozen=True)
class TaskRows(Checked, what="a key for a task", limits={"n": (1, 10**7), "seed": SEEDS}):
    """Rows of vlmkit's own tasks, as in `vk.tasks.dataset`. split: by default "train" for training
    and "evaluation" for the questions."""

    task: str | list
    n: int = 100
    seed: int = 0
    split: str | None = None

    def dataset(self, split):
        """The rows as a `datasets.Dataset`. split: for rows without one."""
        return tasks.dataset(self.task, self.n, self.seed, self.split or split)


@dataclass(frozen=True)
class SourceRows(Checked, what="a key for a source"):
    """Rows of published data, as in `vk.tasks.from_dataset`. source: a hub id or a path, relative
    to the current directory."""

    source: str
    schema: str | None = None
    split: str | None = None
    name: str | None = None
    prompt: str | None = None
    limit: int | None = None
    on_error: Literal["raise", "skip"] = "raise"

    def dataset(self, split):
        """The rows as a `datasets.Dataset`, with pictures that are not decoded yet."""
        return tasks.from_dataset(**vars(self), decode=False)


LOADED = ("attn_implementation", *PICTURE_LIMITS)
"""Further arguments of `vk.load` that a file can give."""


@dataclass(frozen=True)
class Config(Checked, what="a key"):
    """What a file says. model, plan: as in `vk.load`. load: some of LOADED, for `vk.load`. train:
    {component: one of WAYS, or the fields of a LoRA}. adapters: in place of train, a folder that
    `vk.finetuning.save` wrote, to train on from there. data, evaluation: TaskRows or SourceRows, to
    learn from and to ask before and after training. settings: those of Settings. output: a folder.

    `read` returns it with plan as a Plan, data and evaluation as TaskRows or SourceRows, and train
    as `vk.finetuning.add_adapters` takes it.
    """

    model: str = "pebble"
    plan: str | dict | Plan | None = None
    load: dict = field(default_factory=dict)
    train: dict | None = None
    adapters: str | None = None
    data: dict | TaskRows | SourceRows | None = None
    settings: dict = field(default_factory=dict)
    evaluation: dict | TaskRows | SourceRows | None = None
    output: str | None = None

    def __post_init__(self):
        for key, example in _MAPPINGS.items():
            if isinstance(getattr(self, key), str):
                raise FinetuningError(
                    f"{key} has keys of its own, such as `{key}: {example}`, and here it is the "
                    f"text {shown(getattr(self, key))}."
                )
        super().__post_init__()


_MAPPINGS = {
    "train": "{language_model: lora}", "data": "{source: train.jsonl}",
    "evaluation": "{source: held_out.jsonl}", "settings": "{max_steps: 100}",
}  # fmt: skip
"""Keys of a file whose value is a mapping: an example of each."""


def read(path):
    """The Config in the YAML file `path`, checked.

    Raises FinetuningError for a file that is missing or not YAML, for an unknown or repeated key
    and for a value of a wrong type; and the errors of Plan, LoRA and Settings for other values.
    """
    path = Path(path).expanduser()
    try:
        said = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)  # noqa: S506, a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise FinetuningError(
            f"{path} cannot be read: {error}. The current directory is {Path.cwd()}."
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # such as `!!int abc`, which PyYAML passes on to int()
        raise FinetuningError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _checked(_built(Config, said, "the file"))
    except VlmkitError as error:
        raise type(error)(f"{path}: {error}") from error


def _checked(config):
    """The Config with its parts read."""
    for key in ("data", "output"):
        if not getattr(config, key):
            raise FinetuningError(f"{key} is missing; train, data and output are needed.")
    if config.adapters and config.train:
        raise FinetuningError(
            "train says what new adapters learn, and adapters names a folder of trained ones: give "
            "one of them."
        )
    if not (config.adapters or config.train):
        raise FinetuningError("train is missing; train, data and output are needed.")
    for name in config.load:
        require_among("a key of load", name, LOADED)
    train = {component: _way(component, said) for component, said in (config.train or {}).items()}
    if train:
        parse(train)
    settings = _built(Settings, config.settings, "settings")
    if settings.strategy != "no" and config.evaluation is None:
        raise FinetuningError(
            f"settings: evaluating by {settings.strategy} needs questions: name them in evaluation."
        )
    return replace(
        config,
        plan=None if config.plan is None else Plan.parse(config.plan),
        train=train or None,
        data=_source(config.data, "data"),
        evaluation=config.evaluation and _source(config.evaluation, "evaluation"),
    )


def _built(kind, said, where):
    """kind(**said), with `where` in its errors."""
    if not isinstance(said, dict):
        raise FinetuningError(f"{where} is a mapping of keys to values, not {shown(said)}.")
    try:
        return kind(**{str(key): value for key, value in said.items()})
    except FinetuningError as error:
        raise FinetuningError(f"{where}: {error}") from error


def _way(component, said):
    if isinstance(said, dict):
        return _built(LoRA, said, f"train: {component}")
    if isinstance(said, str | None) and said in WAYS:
        return WAYS[said]
    raise FinetuningError(
        f"train: {component} is frozen, full, lora, or a mapping with the fields of a LoRA, not "
        f"{shown(said)}."
    )


def _source(said, where):
    if "source" not in said:
        _built(TaskRows, {"task": ""} | said, where)  # names a misspelt key
    if ("task" in said) == ("source" in said):
        raise FinetuningError(
            f"{where} names either a task (of vlmkit) or a source (published data), and here it "
            f"names {'both' if 'task' in said else 'neither'}."
        )
    return _built(TaskRows if "task" in said else SourceRows, said, where)
