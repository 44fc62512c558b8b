"""How a training is run: steps, rates, batches, and when it looks at itself."""

import dataclasses
import difflib
from dataclasses import dataclass

from vlmkit import COMPONENTS
from vlmkit.backend.optimizers import check_optimizer
from vlmkit.errors import FinetuningError
from vlmkit.finetuning.collating import RAISE, SKIP

SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True)
class Settings:
    """Settings of `vk.finetuning.train`.

    steps: optimizer steps; None trains for `epochs` passes over the dataset.
    batch_size: samples a step, over all processes and accumulated parts together.
    accumulation: parts in which a batch is worked through, so that only one is in memory.
    rate: the highest learning rate; a dictionary gives one for each component that is trained.
    warmup: the share of the steps in which the rate rises. schedule: how it falls after that.
    clip: the largest norm of the gradients.
    optimizer: "adamw", "adamw_8bit", "paged_adamw" or "paged_adamw_8bit".
    precision: "bf16" computes in bf16 (autocast; what is trained in float32 stays so), "fp32" in
        the formats of the plan.
    checkpointing: compute activations again on the way back and keep fewer.
    evaluate_every: steps between two evaluations by generated answers, where there are questions
        for it; None for the end alone. patience: evaluations without a better one after which
        training stops and the best weights come back.
    save_every: steps between two checkpoints to continue from; None for the end alone.
    max_length, too_long, unreadable: see `vk.finetuning.Collator`.
    workers: processes that read pictures beside the training.
    seed: of the order of the samples and of dropout.
    """

    steps: int = None
    epochs: float = 1
    batch_size: int = 8
    accumulation: int = 1
    rate: float | dict = 2e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    precision: str = "bf16"
    checkpointing: bool = False
    evaluate_every: int = None
    patience: int = None
    save_every: int = None
    max_length: int = None
    too_long: str = RAISE
    unreadable: str = RAISE
    workers: int = 0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "evaluate_every", "patience", "save_every", "max_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise FinetuningError(f"{name} is a whole number from 1 or None, not {value!r}")
        for name in ("batch_size", "accumulation"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise FinetuningError(f"{name} is a whole number from 1, not {value!r}")
        if self.batch_size % self.accumulation:
            raise FinetuningError(
                f"batch_size {self.batch_size} does not part into {self.accumulation} equal parts"
            )
        for name, among in (
            ("schedule", SCHEDULES),
            ("precision", ("bf16", "fp32")),
            ("too_long", (RAISE, SKIP)),
            ("unreadable", (RAISE, SKIP)),
        ):
            _require_among(name, getattr(self, name), among)
        check_optimizer(self.optimizer)
        rates = self.rate if isinstance(self.rate, dict) else {"the model": self.rate}
        for component, rate in rates.items():
            if component != "the model":
                _require_among("rate: a component", component, COMPONENTS)
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 10:
                raise FinetuningError(f"the rate of {component} is a small number, not {rate!r}")
        if self.patience and not self.evaluate_every:
            raise FinetuningError("patience counts evaluations: give evaluate_every too")

    @classmethod
    def of(cls, given):
        """Settings from a dictionary. Raises FinetuningError for an unknown name."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise FinetuningError(
                    f"{name!r} is not a setting of a training: {hint}they are {', '.join(names)}"
                )
        return cls(**given)


def _require_among(name, value, among):
    if value not in among:
        near = difflib.get_close_matches(str(value), among, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FinetuningError(f"{name} is one of {', '.join(among)}, not {value!r}{hint}")
