"""Planning: damages measured on calibration questions, a choice, and its proof on other questions.

The questions are split in two. On the calibration half every part is put in every format, alone,
and the divergence from the unquantised model is its damage: it tells apart what accuracy, which a
few hundred questions know within some points, does not. The damages do not add up where several
parts are rounded, so the choice that the knapsack makes of them is measured as a whole, corrected,
and held against the best uniform plan, all on the calibration half. The held-out half is asked once
a plan is chosen, of the model that is loaded under it.
"""

import copy
import math
import tempfile
from functools import cached_property
from pathlib import Path

from vlmkit.errors import SensitivityError, SizeError
from vlmkit.evaluation import check, room_for_answers, wilson
from vlmkit.memory import measure, parse_size
from vlmkit.planner.choosing import least_damage
from vlmkit.planner.parts import parts_of
from vlmkit.planner.results import Measured, Result, Trial, row_of
from vlmkit.planner.rounding import applied
from vlmkit.sensitivity import Baseline, needed, paired_interval
from vlmkit.sensitivity.swapping import require_float

FEWEST = 30
"""Questions of each half at least: with fewer, a bootstrap interval says nothing."""


def best_plan(model, processor, dataset, budget, **options):
    """The plan with the least damage within a budget of bytes, verified: a Result.

        result = vk.planner.best_plan(model, processor, dataset, budget="3 MB")
        model, processor = vk.load("pebble", plan=result.plan)

    budget: bytes of the loaded model, as `vlmkit.memory.parse_size` reads them: "2 MB", "2 MiB",
    2_000_000. The other arguments, and the errors, are those of Planner and Planner.best.
    """
    budget = parse_size(budget)
    return Planner(model, processor, dataset, **options).best(budget)


class Planner:
    """Plans of one model for any number of budgets. What is measured is kept.

    model: one that `vk.load` returned in a float format. It is given back as it was.
    dataset: questions, as in `vk.evaluate`. They are split in two by row, each kind of question in
        the same proportion: `calibration` is the share that damages are measured on, `seed` which.
    formats: those to choose from. None is the model's own and all that `vk.load` can quantise to.
        "experimental", or a list with spellings that only `vlmkit.formats.rounding` knows, plans
        for experiments below 4 bits: the result then has no plan, only an assignment, its bytes are
        those of packed weights with their scales, and embeddings and head can be rounded too.
    by: "component", or "layer" for a format for each layer.
    width: how wide the 95% interval of an accuracy difference on the held-out questions may be, as
        a share; too few questions for it are refused with the number needed.
    batch_size, max_new_tokens, progress: as in `vlmkit.sensitivity.sweep`.

    Raises SensitivityError for too few questions, a model that is quantised already or that gets
    every question wrong; PlanError for a format; and what `vk.evaluate` raises.
    """

    def __init__(
        self,
        model,
        processor,
        dataset,
        *,
        formats=None,
        by="component",
        calibration=0.5,
        seed=0,
        width=None,
        batch_size=64,
        max_new_tokens=None,
        progress=True,
    ):
        check(processor, dataset, batch_size)
        require_float(model)
        self.model, self.processor, self.dataset = model, processor, dataset
        self.batch_size, self.progress = batch_size, progress
        self.parts = parts_of(model, formats, by)
        self.split = split(dataset, calibration, seed)
        _require_enough(*map(len, self.split), calibration, width)
        self.max_new_tokens = max_new_tokens or room_for_answers(processor, dataset)
        self._kept, self._measured = {}, {}

    @cached_property
    def calibration(self):
        """The unquantised model on the calibration questions: a vlmkit.sensitivity.Baseline."""
        return self._baseline(self.split[0])

    @cached_property
    def held_out(self):
        """The same on the held-out questions."""
        return self._baseline(self.split[1])

    def _baseline(self, rows):
        baseline = Baseline(
            self.model,
            self.processor,
            _rows(self.dataset, rows),
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        answers = baseline.scores.answers
        if not answers["correct"].any():
            first = answers.iloc[0]
            raise SensitivityError(
                f"The unquantised model answers none of {len(rows):,} questions right, so that no "
                f"plan can be told from another. The first answer is {first['predicted']!r} and "
                f"{first['answer']!r} was expected: does the model fit the questions, and are the "
                "expected answers in its words?"
            )
        return baseline

    @cached_property
    def damages(self):
        """{scope: {format: divergence}} of each part alone, on the calibration questions."""
        from tqdm import tqdm

        cells = [(part, name) for part in self.parts.parts for name in self.parts.formats]
        found = {part.scope: {} for part in self.parts.parts}
        for part, name in tqdm(cells, unit="cell", disable=not self.progress):
            own = name == self.parts.base
            found[part.scope][name] = 0.0 if own else self.joint({part.scope: name})
        return found

    def joint(self, assignment):
        """Mean divergence on the calibration questions with an assignment as a whole, {scope:
        format}; parts that it does not name stay as they are."""
        full = {part.scope: self.parts.base for part in self.parts.parts} | assignment
        key = tuple(full.items())
        if key not in self._kept:
            self._kept[key] = self._outcome(self.calibration, full).kl.mean().item()
        return self._kept[key]

    def _outcome(self, baseline, assignment):
        with applied(self.model, self.parts.parts, assignment, self.parts.loadable) as changed:
            return baseline.compare(changed)

    def table(self):
        """A pandas DataFrame of the damages: a row for each part and format, with its bytes."""
        import pandas as pd

        return pd.DataFrame(
            {
                "scope": part.scope,
                "format": name,
                "parameters": part.parameters,
                "bytes": part.sizes[name],
                "kl": self.damages[part.scope][name],
            }
            for part in self.parts.parts
            for name in self.parts.formats
        )

    def best(self, budget):
        """The Result for a budget, in bytes of the loaded model.

        Raises SizeError, with the smallest plan there is, if that does not fit.
        """
        budget = parse_size(budget)
        self._require_room(budget)
        planned = self._planned(budget)
        rivals = self._uniform_within(budget)
        rival = min(rivals, key=lambda name: self.joint(rivals[name]), default=None)
        if rival is not None and self.joint(rivals[rival]) <= self.joint(planned):
            planned = rivals[rival]
        names = {tuple(a.items()): f"uniform {name}" for name, a in rivals.items()}
        chosen = self._trial(names.get(tuple(planned.items()), "planned"), planned)
        uniform = rival and self._trial(f"uniform {rival}", rivals[rival])
        rejected, reason = None, _reason(chosen, uniform)
        if uniform is not None and _worse(chosen, uniform):
            chosen, rejected = uniform, chosen
        base = {part.scope: self.parts.base for part in self.parts.parts}
        return Result(
            budget,
            chosen,
            uniform,
            rejected,
            self._trial("unquantised", base),
            reason,
            self._described(chosen.assignment),
            self.parts.fixed,
        )

    def frontier(self, budgets=None):
        """Planned against uniform plans: a pandas DataFrame, a row for each uniform plan and one
        for the best plan in each budget, with the columns of Result.table and `kind`, "planned" or
        "uniform", and `budget`. budgets: sizes; by default those of the uniform plans."""
        import pandas as pd

        rows = []
        uniform = self.parts.uniform()
        for name, assignment in uniform.items():
            trial = self._trial(f"uniform {name}", assignment)
            rows.append({"kind": "uniform", "budget": trial.bytes, **row_of(trial)})
        for budget in budgets or sorted({row["bytes"] for row in rows}, reverse=True):
            result = self.best(budget)
            rows.append({"kind": "planned", "budget": int(result.budget), **row_of(result.chosen)})
        return pd.DataFrame(rows)

    def _require_room(self, budget):
        smallest = {p.scope: min(p.sizes, key=p.sizes.get) for p in self.parts.parts}
        size = self.parts.counted(smallest)
        if size <= budget:
            return
        formats = ", ".join(f"{scope} {name}" for scope, name in smallest.items())
        kept = ", ".join(
            f"{component} {kind} {n:,}" for (component, kind), n in self.parts.fixed.items()
        )
        raise SizeError(
            f"No plan fits into {budget}: the smallest takes {size:,} bytes, with {formats}. Of "
            f"these, {sum(self.parts.fixed.values()):,} are the same under every plan ({kept}). "
            "Allow more bytes, or formats with fewer bits."
        )

    def _planned(self, budget):
        """The best assignment found for a budget, by its joint damage on calibration questions."""
        best = self._allocated(self.damages, budget)
        for _ in range(2):
            again = self._allocated(self._corrected(best), budget)
            if self.joint(again) >= self.joint(best):
                break
            best = again
        return best

    def _allocated(self, damages, budget):
        """The knapsack's assignment, within the budget as the ledger counts it."""
        sizes = {part.scope: part.sizes for part in self.parts.parts}
        room = budget - sum(self.parts.fixed.values())
        while True:
            found = least_damage(sizes, damages, room)
            over = self.parts.counted(found) - budget
            if over <= 0:
                return found
            room -= over  # buffers that follow the dtype which a model is read in

    def _corrected(self, assignment):
        """The damages in the company of an assignment's others: each part's are scaled by what
        putting it back in its own format saves there, against what it costs alone."""
        whole, found = self.joint(assignment), {}
        for scope, name in assignment.items():
            alone, scale = self.damages[scope][name], 1
            if alone > 0:
                saved = whole - self.joint(assignment | {scope: self.parts.base})
                scale = max(saved, 0) / alone
            found[scope] = {f: scale * kl for f, kl in self.damages[scope].items()}
        return found

    def _uniform_within(self, budget):
        return {
            name: assignment
            for name, assignment in self.parts.uniform().items()
            if self.parts.counted(assignment) <= budget
        }

    def _trial(self, name, assignment):
        return Trial(
            name,
            assignment,
            self.parts.plan(assignment),
            self.parts.counted(assignment),
            sum(self.damages[scope][given] for scope, given in assignment.items()),
            self.joint(assignment),
            self._verified(assignment),
        )

    def _verified(self, assignment):
        key = tuple(assignment.items())
        if key not in self._measured:
            if self.parts.loadable:
                outcome = self._loaded(assignment)
            else:
                outcome = self._outcome(self.held_out, assignment)
            self._measured[key] = _summary(self.held_out, outcome)
        return self._measured[key]

    def _loaded(self, assignment):
        """The Outcome, on the held-out questions, of the model that is loaded under the plan."""
        from vlmkit.loading import audit, load

        plan = self.parts.plan(assignment)
        loaded, _ = load(self._folder, plan, processor=False, device=str(self.model.device))
        audit(loaded, plan)
        if measure(loaded).total != self.parts.counted(assignment):
            raise SizeError(
                f"loaded under {plan!r} the model takes {measure(loaded).total:,} bytes, and "
                f"{self.parts.counted(assignment):,} were counted: please report it."
            )
        other = copy.copy(self.held_out)
        other.model = loaded
        return other.compare()

    @cached_property
    def _folder(self):
        """The model as it is, saved for the time that the planner is used."""
        from vlmkit.loading import save

        self._temporary = tempfile.TemporaryDirectory()
        return save(self.model, None, Path(self._temporary.name) / "model")

    def _described(self, assignment):
        import pandas as pd

        return pd.DataFrame(
            {
                "scope": part.scope,
                "format": assignment[part.scope],
                "parameters": part.parameters,
                "bytes": part.sizes[assignment[part.scope]],
                "kl": self.damages[part.scope][assignment[part.scope]],
                "unchanged": assignment[part.scope] == self.parts.base,
            }
            for part in self.parts.parts
        )


def split(dataset, calibration=0.5, seed=0):
    """(row numbers for calibration, row numbers held out), disjoint, both in ascending order.

    A share `calibration` of the rows, drawn at random by `seed`, with the same share of each task
    and kind of question, give or take one row.
    """
    import numpy as np

    if not 0 < calibration < 1:
        raise SensitivityError(f"calibration is a share between 0 and 1, not {calibration!r}.")
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    names = [name for name in ("task", "kind") if name in columns]
    texts = dataset.select_columns(names) if hasattr(dataset, "select_columns") else dataset
    labels = [tuple(str(row[name]) for name in names) for row in texts] if names else None
    order = np.random.default_rng(seed).permutation(len(dataset))
    order = order.tolist()
    if labels:
        order.sort(key=lambda row: labels[row])  # stable: shuffled within each kind
    taken = [
        math.floor((i + 1) * calibration) > math.floor(i * calibration) for i in range(len(order))
    ]
    return (
        sorted(row for row, take in zip(order, taken, strict=True) if take),
        sorted(row for row, take in zip(order, taken, strict=True) if not take),
    )


def _rows(dataset, rows):
    return dataset.select(rows) if hasattr(dataset, "select") else [dataset[row] for row in rows]


def _require_enough(calibration, held_out, share, width):
    fewest = max(FEWEST, 0 if width is None else needed(width))
    if width is not None and not 0 < width < 2:
        raise SensitivityError(f"the width of an interval is a share such as 0.02, not {width!r}.")
    if held_out >= fewest and calibration >= FEWEST:
        return
    total = max(math.ceil(FEWEST / share), math.ceil(fewest / (1 - share)))
    why = "" if width is None else f" for an interval {width:.3f} wide"
    raise SensitivityError(
        f"{calibration + held_out:,} questions are too few{why}: split into calibration "
        f"({calibration:,}) and held-out ones ({held_out:,}), they have to be {total:,} at least."
    )


def _summary(baseline, outcome):
    before = baseline.scores.answers["correct"].to_numpy()
    return Measured(
        outcome.kl.mean().item(),
        _bootstrap(outcome.kl),
        outcome.correct.mean().item(),
        wilson(int(outcome.correct.sum()), len(before)),
        *_paired(before, outcome.correct),
        len(before),
        outcome,
    )


def _paired(before, after):
    """(difference in accuracy, its interval)"""
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    n = len(before)
    return (gained - lost) / n, paired_interval(lost, gained, n)


def _bootstrap(values, draws=2_000, seed=0):
    """95% percentile-bootstrap interval of a mean over questions."""
    import numpy as np

    n = len(values)
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _against(chosen, uniform):
    """(accuracy difference, interval, divergence difference, interval): chosen minus uniform, on
    the same held-out questions."""
    ours, theirs = chosen.measured.outcome, uniform.measured.outcome
    kl = ours.kl - theirs.kl
    return (*_paired(theirs.correct, ours.correct), kl.mean().item(), _bootstrap(kl))


def _worse(chosen, uniform):
    """Whether the uniform plan is better beyond its interval: in accuracy, or where that does not
    decide, in divergence."""
    _, (low, high), _, (kl_low, _) = _against(chosen, uniform)
    return high < 0 or low <= 0 and kl_low > 0


def _reason(chosen, uniform):
    if uniform is None:
        return "No uniform plan fits into the budget: there is nothing to compare the plan with."
    if chosen.assignment == uniform.assignment:
        return f"The best plan found is the uniform one, {uniform.name.removeprefix('uniform ')}."
    difference, (low, high), kl, (kl_low, kl_high) = _against(chosen, uniform)
    measured = (
        f"accuracy {difference:+.1%} [{low:+.1%}, {high:+.1%}], divergence {kl:+.4f} "
        f"[{kl_low:+.4f}, {kl_high:+.4f}] nats a token against {uniform.name}, on the same "
        f"{chosen.measured.n:,} held-out questions"
    )
    if _worse(chosen, uniform):
        return f"The uniform plan is returned: what was planned is worse ({measured})."
    if low > 0 or high >= 0 and kl_high < 0:
        return f"The plan is better than the best uniform one: {measured}."
    return f"The plan is as good as the best uniform one, within the interval: {measured}."
