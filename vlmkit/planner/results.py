"""The results of planning: plans with their predicted and measured damage, and which is better."""

import contextlib
from dataclasses import dataclass, field

from vlmkit.errors import SensitivityError
from vlmkit.evaluation.statistics import CHANCE, bootstrap, mcnemar, paired_interval, wilson
from vlmkit.sensitivity import quantized
from vlmkit.sensitivity.sweeping import changes
from vlmkit.tables import Table
from vlmkit.units import MEGABYTE


@dataclass(frozen=True)
class Measured:
    """A plan on the held-out questions. Intervals are 95%, (low, high).

    kl: mean divergence from the unquantized model, in nats a token of its answers, and its
    bootstrap interval. accuracy: share of right answers, and its Wilson interval. difference: from
    the unquantized model's accuracy on the same questions, and its paired-bootstrap interval. n:
    the number of questions.
    """

    kl: float
    kl_interval: tuple
    accuracy: float
    interval: tuple
    difference: float
    difference_interval: tuple
    n: int
    outcome: object = field(repr=False, compare=False, default=None)

    @classmethod
    def of(cls, baseline, outcome):
        """The Measured of an Outcome of `baseline`'s questions."""
        right, n = outcome.correct, len(outcome.correct)
        return cls(
            *_divergence(outcome.kl),
            right.mean().item(),
            wilson(int(right.sum()), n),
            *_difference(baseline.scores.answers["correct"].to_numpy(), right),
            n,
            outcome,
        )


def _divergence(kl):
    """(the mean, its interval)"""
    return kl.mean().item(), bootstrap(kl, 2_000, one_by_one=True)


def _difference(before, after):
    """(the difference in accuracy, its interval)"""
    regressions, fixes = changes(before, after)
    n = len(before)
    return (fixes - regressions) / n, paired_interval(regressions, fixes, n)


@dataclass(frozen=True)
class Trial:
    """One plan. name: as tables show it. assignment: {scope: format}. plan: a vk.Plan, or None for
    formats that `vk.load` does not know. bytes: of the loaded model, by the ledger. predicted: the
    sum of the items' damages, each alone. joint: the damage of all items together. Both are mean
    divergences on the calibration questions, in nats a token. measured: see Measured."""

    name: str
    assignment: dict
    plan: object
    bytes: int
    predicted: float
    joint: float
    measured: Measured

    def row(self):
        """A dict of numbers, for tables and figures."""
        found = self.measured
        return {
            "plan": self.name,
            "bytes": self.bytes,
            "predicted": self.predicted,
            "joint": self.joint,
            "kl": found.kl,
            "kl_low": found.kl_interval[0],
            "kl_high": found.kl_interval[1],
            "accuracy": found.accuracy,
            "low": found.interval[0],
            "high": found.interval[1],
            "difference": found.difference,
            "difference_low": found.difference_interval[0],
            "difference_high": found.difference_interval[1],
            "n": found.n,
        }


@dataclass(frozen=True)
class Result(Table):
    """The best plan within a budget. Made by `best_plan` and `Planner.best`.

    best: the Trial to use. The result has its `plan`, `assignment`, `bytes`, `predicted` and
    `measured`, too. uniform: the Trial of the best plan with one format for all within the same
    budget, or None if no such plan fits. rejected: the Trial that the planner selected, if held-out
    questions showed that it is worse than the uniform one, else None. unquantized: the Trial of the
    model as it is. reason: why the plan is the best, in words. parts: a DataFrame, a row for each
    item with its format, bytes and damage alone. fixed: {(component, kind): bytes} of everything
    that no plan changes.
    """

    budget: object
    best: Trial
    uniform: Trial
    rejected: Trial
    unquantized: Trial
    reason: str
    parts: object = field(repr=False)
    fixed: dict = field(repr=False)

    @property
    def plan(self):
        return self.best.plan

    @property
    def assignment(self):
        return self.best.assignment

    @property
    def bytes(self):
        return self.best.bytes

    @property
    def predicted(self):
        return self.best.predicted

    @property
    def measured(self):
        return self.best.measured

    def applied(self, model):
        """A context in which the float `model` has the assignment's formats for experiments: one
        `vlmkit.sensitivity.quantized` for each item. Raises SensitivityError if there is a plan:
        load it."""
        if self.plan is not None:
            raise SensitivityError("these formats can be loaded: vk.load(name, plan=result.plan).")
        stack = contextlib.ExitStack()
        for part in self.parts.itertuples():
            if not part.unchanged:
                stack.enter_context(quantized(model, part.scope, part.format))
        return stack

    def table(self):
        """A pandas DataFrame: a row for the plan, one for the uniform plan, one for the model as it
        is. Bytes; predicted, joint and measured divergence; accuracy and its difference."""
        import pandas as pd

        return pd.DataFrame([trial.row() for trial in self._trials()]).set_index("plan")

    def _trials(self):
        trials = []
        for trial in (self.best, self.rejected, self.uniform, self.unquantized):
            if trial is not None and all(trial.assignment != other.assignment for other in trials):
                trials.append(trial)
        return trials

    def _text_table(self):
        import pandas as pd

        def text(value, interval, form):
            low, high = interval
            return f"{value:{form}} [{low:{form}}, {high:{form}}]"

        rows = {}
        for trial in self._trials():
            found = trial.measured
            rows[trial.name] = {
                "MB": f"{trial.bytes / MEGABYTE:.3f}",
                "predicted KL": f"{trial.predicted:.4f}",
                "joint KL": f"{trial.joint:.4f}",
                "measured KL": text(found.kl, found.kl_interval, ".4f"),
                "accuracy": text(found.accuracy, found.interval, ".1%"),
                "difference": text(found.difference, found.difference_interval, "+.1%"),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _remarks(self):
        kept = ", ".join(
            f"{component} {kind} {size / MEGABYTE:.3f}"
            for (component, kind), size in sorted(self.fixed.items(), key=lambda item: -item[1])
        )
        return (
            self.reason,
            f"Budget {self.budget}. Divergence (KL) from the unquantized model, in nats a token: "
            "predicted is the sum over parts and joint is all parts together, both on calibration "
            f"questions; measured is on {self.measured.n:,} held-out questions. 1 MB = 10^6 bytes.",
            f"{sum(self.fixed.values()) / MEGABYTE:.3f} MB are the same under every plan: {kept}.",
        )

    def _parts(self):
        return self.parts[["scope", "format", "bytes", "kl"]].round(4)

    def __repr__(self):
        return f"Result({self.best.name!r}, {self.bytes:,} bytes of {self.budget})"

    def __str__(self):
        return f"{super().__str__()}\n{self._parts().to_string(index=False)}"

    def _repr_html_(self):
        return super()._repr_html_() + self._parts().to_html(index=False)


def verdict(planned, uniform):
    """(whether the uniform Trial is better than the planned one, which of them is returned and
    why, in words with the numbers).

    Better means that the exact paired test (`mcnemar`) finds a difference in accuracy. If it does
    not, the interval of the difference in divergence decides. Both are over the same held-out
    questions.
    """
    if uniform is None:
        return False, "No uniform plan fits into the budget, so there is nothing to compare with."
    if planned.assignment == uniform.assignment:
        name = uniform.name.removeprefix("uniform ")
        return False, f"The best plan found is the uniform one, {name}."
    ours, theirs = planned.measured.outcome, uniform.measured.outcome
    difference, (low, high) = _difference(theirs.correct, ours.correct)
    p = mcnemar(*changes(theirs.correct, ours.correct))
    kl, (kl_low, kl_high) = _divergence(ours.kl - theirs.kl)
    numbers = (
        f"accuracy {difference:+.1%} [{low:+.1%}, {high:+.1%}] (p = {p:.3f}), divergence {kl:+.4f} "
        f"[{kl_low:+.4f}, {kl_high:+.4f}] nats a token against {uniform.name}, on the same "
        f"{planned.measured.n:,} held-out questions"
    )
    better, worse = p < CHANCE and difference > 0, p < CHANCE and difference < 0
    if worse or not better and kl_low > 0:
        return True, f"The uniform plan is returned, since the planned one is worse ({numbers})."
    if better:
        what = "answers more questions right than the best uniform one"
    elif kl_high < 0:
        what = (
            "is closer to the unquantized model than the best uniform one, and no difference in "
            "accuracy was found"
        )
    else:
        what = "is as good as the best uniform one, as far as these questions can tell"
    return False, f"The plan {what}: {numbers}."
