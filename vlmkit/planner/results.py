"""What planning comes to: plans with their predicted and their measured damage, and the reason."""

from dataclasses import dataclass, field

from vlmkit.units import MEGABYTE


@dataclass(frozen=True)
class Measured:
    """A plan on the held-out questions. Intervals are 95%, (low, high).

    kl: mean divergence from the unquantized model, in nats a token of its answers, and its
    bootstrap interval. accuracy: share of right answers, and its Wilson interval. difference: from
    the unquantized model's accuracy on the same questions, and its paired-bootstrap interval.
    """

    kl: float
    kl_interval: tuple
    accuracy: float
    interval: tuple
    difference: float
    difference_interval: tuple
    n: int
    outcome: object = field(repr=False, compare=False, default=None)


@dataclass(frozen=True)
class Trial:
    """One plan. name: what it is called in tables. assignment: {scope: format}. plan: a vk.Plan, or
    None where no model is loaded in these formats. bytes: of the loaded model, by the ledger.
    predicted: the sum of what each part costs alone, joint: what all cost together, both mean
    divergences on the calibration questions, in nats a token. measured: see Measured."""

    name: str
    assignment: dict
    plan: object
    bytes: int
    predicted: float
    joint: float
    measured: Measured


@dataclass(frozen=True)
class Result:
    """The best plan under a budget. Made by `best_plan` and `Planner.best`.

    chosen: the Trial to use, whose `plan`, `assignment`, `bytes`, `predicted` and `measured` the
    result has too. uniform: the Trial of the best plan with one format for all within the same
    budget, or None where none fits. rejected: the Trial that the planner chose and that held-out
    questions showed to be worse than the uniform one, else None. unquantized: the Trial of the
    model as it is. reason: why, in words. parts: a DataFrame, a row for each part with its format,
    bytes and damage alone; fixed: {(component, kind): bytes} of what no plan changes.
    """

    budget: object
    chosen: Trial
    uniform: Trial
    rejected: Trial
    unquantized: Trial
    reason: str
    parts: object = field(repr=False)
    fixed: dict = field(repr=False)

    @property
    def plan(self):
        return self.chosen.plan

    @property
    def assignment(self):
        return self.chosen.assignment

    @property
    def bytes(self):
        return self.chosen.bytes

    @property
    def predicted(self):
        return self.chosen.predicted

    @property
    def measured(self):
        return self.chosen.measured

    def applied(self, model):
        """A context in which the float `model` has the assignment's formats for experiments: one
        `vlmkit.sensitivity.quantized` for each part. Raises SensitivityError where there is a
        plan, which is to be loaded."""
        import contextlib

        from vlmkit.errors import SensitivityError
        from vlmkit.sensitivity import quantized

        if self.plan is not None:
            raise SensitivityError("these formats can be loaded: vk.load(name, plan=result.plan).")

        stack = contextlib.ExitStack()
        for part in self.parts.itertuples():
            if not part.unchanged:
                stack.enter_context(quantized(model, part.scope, part.format))
        return stack

    def table(self):
        """A pandas DataFrame: a row for the plan, one for its uniform rival, one for the model as
        it is. Bytes; predicted, joint and measured divergence; accuracy and its difference."""
        import pandas as pd

        return pd.DataFrame([row_of(trial) for trial in self._trials()]).set_index("plan")

    def _trials(self):
        trials = [self.chosen, self.rejected, self.uniform, self.unquantized]
        seen = []
        for trial in trials:
            if trial is not None and all(trial.assignment != t.assignment for t in seen):
                seen.append(trial)
        return seen

    def _text_table(self):
        import pandas as pd

        rows = {}
        for trial in self._trials():
            found = trial.measured
            rows[trial.name] = {
                "MB": f"{trial.bytes / MEGABYTE:.3f}",
                "predicted KL": f"{trial.predicted:.4f}",
                "joint KL": f"{trial.joint:.4f}",
                "measured KL": f"{found.kl:.4f} {_span(found.kl_interval, '{:.4f}')}",
                "accuracy": f"{found.accuracy:.1%} {_span(found.interval, '{:.1%}')}",
                "difference": f"{found.difference:+.1%} "
                f"{_span(found.difference_interval, '{:+.1%}')}",
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _remarks(self):
        n = self.measured.n
        kept = ", ".join(
            f"{component} {kind} {size / MEGABYTE:.3f}"
            for (component, kind), size in sorted(self.fixed.items(), key=lambda item: -item[1])
        )
        yield self.reason
        yield (
            f"Budget {self.budget}. Divergence (KL) from the unquantized model in nats a token: "
            "predicted is the sum over parts, joint all together, both on calibration questions; "
            f"measured is on {n:,} held-out ones. 1 MB = 10^6 bytes."
        )
        yield (
            f"{sum(self.fixed.values()) / MEGABYTE:.3f} MB are the same under every plan: {kept}."
        )

    def __repr__(self):
        return f"Result({self.chosen.name!r}, {self.bytes:,} bytes of {self.budget})"

    def __str__(self):
        parts = self.parts[["scope", "format", "bytes", "kl"]].round(4).to_string(index=False)
        return "\n".join([self._text_table().to_string(), *self._remarks(), parts])

    def _repr_html_(self):
        import html

        parts = self.parts[["scope", "format", "bytes", "kl"]].round(4).to_html(index=False)
        remarks = "<br>".join(map(html.escape, self._remarks()))
        return f"{self._text_table().to_html()}<p>{remarks}</p>{parts}"


def row_of(trial):
    """A Trial as a dict of numbers, for tables and figures."""
    found = trial.measured
    return {
        "plan": trial.name,
        "bytes": trial.bytes,
        "predicted": trial.predicted,
        "joint": trial.joint,
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


def _span(interval, form):
    return f"[{form.format(interval[0])}, {form.format(interval[1])}]"
