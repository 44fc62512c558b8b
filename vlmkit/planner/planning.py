"""Planning: damages measured on calibration questions, a choice, and its proof on other questions.

The questions are split in two. On the calibration half, every item gets every format, alone, and
its damage is the divergence from the unquantized model. Divergence shows small differences;
accuracy does not, since a few hundred questions give it within some points only. The damages of
several items need not add up. So the choice of the knapsack is measured as a whole and compared
with the best uniform plan, still on the calibration half. The held-out half is asked after a plan
is chosen, of the model that is loaded under it. It only decides whether the uniform plan is
returned.
"""

import copy
import math
import tempfile
from functools import cached_property
from pathlib import Path

from vlmkit.errors import AuditError, SensitivityError, SizeError, public
from vlmkit.evaluation import check, room_for_answers
from vlmkit.memory import measure
from vlmkit.planner.choices import as_loaded, choices_of, least_damage
from vlmkit.planner.results import Measured, Result, Trial, verdict
from vlmkit.sensitivity import Baseline
from vlmkit.sensitivity.sweeping import questions_for
from vlmkit.sensitivity.temporary import require_float
from vlmkit.units import parse_size

FEWEST = 30
"""Each half has at least so many questions: with fewer, a bootstrap interval means nothing."""


@public
def best_plan(model, processor, dataset, budget, **options):
    """The plan with the least damage within a budget of bytes, verified: a Result.

        result = vk.planner.best_plan(model, processor, dataset, budget="3 MB")
        model, processor = vk.load("pebble", plan=result.plan)

    budget: bytes of the loaded model, as `vlmkit.units.parse_size` reads them: "2 MB", "2 MiB",
    2_000_000. The other arguments, and the errors, are those of Planner and Planner.best.
    """
    budget = parse_size(budget)
    return Planner(model, processor, dataset, **options).best(budget)


class Planner:
    """Plans of one model for any number of budgets. Each measurement is made once.

    model: one that `vk.load` returned in a float format. It is the same afterwards, bit for bit.
    dataset: questions, as in `vk.evaluate`. The rows are split in two, with the same share of each
        kind of question. `calibration` is the share that damages are measured on; `seed` draws it.
    formats: those to choose from. None is the model's own and all that `vk.load` can quantize to.
        "experimental", or a list with spellings that only `vlmkit.formats.rounding` knows, is for
        experiments below 4 bits: the result then has no plan, only an assignment. Its bytes are
        those of packed weights with their scales, and embeddings and head can be rounded, too.
    by: "component", or "layer" for a format for each layer.
    width: how wide the 95% interval of an accuracy difference on the held-out questions may be, as
        a share. Too few questions for it are refused, with the number needed.
    batch_size, max_new_tokens, progress: as in `vlmkit.sensitivity.sweep`.

    Raises SensitivityError for too few questions, and for a model that is quantized already or gets
    every question wrong; PlanError for a format; and the errors of `vk.evaluate`.
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
        self.choices = choices_of(model, formats, by)
        self.split = split(dataset, calibration, seed)
        _require_enough(*map(len, self.split), calibration, width)
        self.max_new_tokens = max_new_tokens or room_for_answers(processor, dataset)
        self._joint, self._measured = {}, {}

    @cached_property
    def calibration(self):
        """The unquantized model on the calibration questions: a vlmkit.sensitivity.Baseline."""
        return self._baseline(self.split[0])

    @cached_property
    def held_out(self):
        """The same on the held-out questions."""
        return self._baseline(self.split[1])

    def _baseline(self, rows):
        data = self.dataset
        baseline = Baseline(
            self.model,
            self.processor,
            data.select(rows) if hasattr(data, "select") else [data[row] for row in rows],
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        baseline.require_right_answers()
        return baseline

    @cached_property
    def damages(self):
        """{scope: {format: divergence}} of each item alone, on the calibration questions."""
        from tqdm import tqdm

        scopes, base = [item.scope for item in self.choices.items], self.choices.base
        cells = [(scope, name) for scope in scopes for name in self.choices.formats]
        found = {scope: {} for scope in scopes}
        for scope, name in tqdm(cells, unit="cell", disable=not self.progress):
            found[scope][name] = 0.0 if name == base else self.joint({scope: name})
        return found

    def joint(self, assignment):
        """Mean divergence on the calibration questions under an assignment as a whole, {scope:
        format}. Items that it does not name stay as they are."""
        full = self.choices.all_in(self.choices.base) | assignment
        key = tuple(full.items())
        if key not in self._joint:
            outcome = self._outcome(self.calibration, full, answers=False)
            self._joint[key] = outcome.kl.mean().item()
        return self._joint[key]

    def _outcome(self, baseline, assignment, **options):
        with as_loaded(self.model, self.choices, assignment) as changed:
            return baseline.compare(changed, **options)

    def table(self):
        """A pandas DataFrame of the damages: a row for each item and format, with its bytes."""
        import pandas as pd

        return pd.DataFrame(
            {
                "scope": item.scope,
                "format": name,
                "parameters": item.parameters,
                "bytes": item.sizes[name],
                "kl": self.damages[item.scope][name],
            }
            for item in self.choices.items
            for name in self.choices.formats
        )

    def best(self, budget):
        """The Result for a budget, in bytes of the loaded model.

        Raises SizeError, with the smallest plan there is, if that does not fit.
        """
        budget = parse_size(budget)
        self._require_room(budget)
        planned, more = self._planned(budget), ""
        rivals = {
            name: assignment
            for name, assignment in self.choices.uniform().items()
            if self.choices.counted(assignment) <= budget
        }
        uniform = None
        if rivals:
            rival = min(rivals, key=lambda name: self.joint(rivals[name]))
            uniform = self._trial(f"uniform {rival}", rivals[rival])
            if uniform.joint <= self.joint(planned):
                if uniform.assignment != planned:
                    more = (
                        " The items' damages spoke for another plan. As a whole that one diverges "
                        f"by {self.joint(planned):.5f} nats a token on the calibration questions, "
                        f"and the uniform one by {uniform.joint:.5f}."
                    )
                planned = uniform.assignment
        names = {tuple(a.items()): f"uniform {name}" for name, a in rivals.items()}
        best, rejected = self._trial(names.get(tuple(planned.items()), "planned"), planned), None
        is_worse, why = verdict(best, uniform)
        if is_worse:
            best, rejected = uniform, best
        base = self.choices.base
        parts = self.table()
        parts = parts[parts["format"] == parts["scope"].map(best.assignment)]
        parts = parts.assign(unchanged=parts["format"] == base).reset_index(drop=True)
        unquantized = self._trial("unquantized", self.choices.all_in(base))
        return Result(
            budget, best, uniform, rejected, unquantized, why + more, parts, self.choices.fixed
        )

    def frontier(self, budgets=None):
        """Planned plans against uniform plans: a pandas DataFrame.

        It has a row for each uniform plan and one for the best plan in each budget, with the
        columns of Result.table, `kind` ("planned" or "uniform") and `budget`. budgets: sizes; by
        default those of the uniform plans.
        """
        import pandas as pd

        rows = []
        for name, assignment in self.choices.uniform().items():
            trial = self._trial(f"uniform {name}", assignment)
            rows.append({"kind": "uniform", "budget": trial.bytes, **trial.row()})
        for budget in budgets or sorted({row["bytes"] for row in rows}, reverse=True):
            result = self.best(budget)
            rows.append({"kind": "planned", "budget": int(result.budget), **result.best.row()})
        return pd.DataFrame(rows)

    def _require_room(self, budget):
        smallest, fixed = self.choices.smallest(), self.choices.fixed
        size = self.choices.counted(smallest)
        if size <= budget:
            return
        formats = ", ".join(f"{scope} {name}" for scope, name in smallest.items())
        kept = ", ".join(f"{component} {kind} {n:,}" for (component, kind), n in fixed.items())
        raise SizeError(
            f"No plan fits into {budget}: the smallest takes {size:,} bytes, with {formats}. Of "
            f"these, {sum(fixed.values()):,} are the same under every plan ({kept}). "
            "Allow more bytes, or formats with fewer bits."
        )

    def _planned(self, budget):
        """The knapsack's assignment, within the budget as the ledger counts it."""
        sizes = {item.scope: item.sizes for item in self.choices.items}
        room = budget - sum(self.choices.fixed.values())
        while (found := least_damage(sizes, self.damages, room)) is not None:
            over = self.choices.counted(found) - budget
            if over <= 0:
                return found
            room -= over  # some buffers follow the dtype that a model is read in
        return self.choices.smallest()

    def _trial(self, name, assignment):
        return Trial(
            name,
            assignment,
            self.choices.plan(assignment),
            self.choices.counted(assignment),
            sum(self.damages[scope][given] for scope, given in assignment.items()),
            self.joint(assignment),
            self._verified(assignment),
        )

    def _verified(self, assignment):
        key = tuple(assignment.items())
        if key not in self._measured:
            if self.choices.loadable:
                outcome = self._loaded(assignment)
            else:
                outcome = self._outcome(self.held_out, assignment)
            self._measured[key] = Measured.of(self.held_out, outcome)
        return self._measured[key]

    def _loaded(self, assignment):
        """The Outcome, on the held-out questions, of the model that is loaded under the plan."""
        from vlmkit.loading import audit, load

        plan, counted = self.choices.plan(assignment), self.choices.counted(assignment)
        loaded, _ = load(self._folder, plan, processor=False, device=str(self.model.device))
        audit(loaded, plan)
        if (size := measure(loaded).total) != counted:
            raise AuditError(
                f"loaded under {plan!r} the model takes {size:,} bytes, and {counted:,} were "
                "counted: please report it."
            )
        other = copy.copy(self.held_out)
        other.model = loaded
        return other.compare()

    @cached_property
    def _folder(self):
        """The model as it is, saved for as long as the planner exists."""
        from vlmkit.loading import save

        self._temporary = tempfile.TemporaryDirectory()
        return save(self.model, None, Path(self._temporary.name) / "model")


def split(dataset, calibration=0.5, seed=0):
    """(row numbers for calibration, row numbers held out), disjoint, both in ascending order.

    A share `calibration` of the rows is drawn at random by `seed`, with the same share of each task
    and kind of question, give or take one row. A question that is in the dataset twice can be in
    both.
    """
    import numpy as np

    if not 0 < calibration < 1:
        raise SensitivityError(f"calibration is a share between 0 and 1, not {calibration!r}.")
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    names = [name for name in ("task", "kind") if name in columns]
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    if names:
        texts = dataset.select_columns(names) if hasattr(dataset, "select_columns") else dataset
        labels = [tuple(str(row[name]) for name in names) for row in texts]
        order.sort(key=lambda row: labels[row])  # stable: shuffled within each kind
    halves = [], []
    for place, row in enumerate(order):
        taken = math.floor((place + 1) * calibration) > math.floor(place * calibration)
        halves[not taken].append(row)
    return sorted(halves[0]), sorted(halves[1])


def _require_enough(calibration, held_out, share, width):
    fewest = max(FEWEST, questions_for(width))
    if held_out >= fewest and calibration >= FEWEST:
        return
    total = max(math.ceil(FEWEST / share), math.ceil(fewest / (1 - share)))
    why = "" if width is None else f" for an interval {width:.3f} wide"
    raise SensitivityError(
        f"{calibration + held_out:,} questions are too few{why}. They are split into calibration "
        f"({calibration:,}) and held-out questions ({held_out:,}), and there have to be "
        f"{total:,} at least."
    )
