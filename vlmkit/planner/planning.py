"""Planning: damages measured on calibration questions, a choice, and its proof on other questions.

The questions are split in two. On the calibration half every part is put in every format, alone,
and the divergence from the unquantized model is its damage: it tells apart what accuracy, which a
few hundred questions know within some points, does not. The damages need not add up where several
parts are rounded, so what the knapsack chooses is measured as a whole and held against the best
uniform plan, still on the calibration half. The held-out half is asked once a plan is chosen, of
the model that is loaded under it; it decides nothing but whether the uniform plan is returned.
"""

import copy
import tempfile
from functools import cached_property
from pathlib import Path

from vlmkit.errors import AuditError, SensitivityError, SizeError
from vlmkit.evaluation import check, room_for_answers
from vlmkit.memory import measure, parse_size
from vlmkit.planner.choosing import least_damage
from vlmkit.planner.comparing import is_worse, reason, summary
from vlmkit.planner.parts import parts_of
from vlmkit.planner.results import Result, Trial, row_of
from vlmkit.planner.rounding import applied
from vlmkit.planner.splitting import require_enough, rows_of, split
from vlmkit.sensitivity import Baseline
from vlmkit.sensitivity.swapping import require_float


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
    formats: those to choose from. None is the model's own and all that `vk.load` can quantize to.
        "experimental", or a list with spellings that only `vlmkit.formats.rounding` knows, plans
        for experiments below 4 bits: the result then has no plan, only an assignment, its bytes are
        those of packed weights with their scales, and embeddings and head can be rounded too.
    by: "component", or "layer" for a format for each layer.
    width: how wide the 95% interval of an accuracy difference on the held-out questions may be, as
        a share; too few questions for it are refused with the number needed.
    batch_size, max_new_tokens, progress: as in `vlmkit.sensitivity.sweep`.

    Raises SensitivityError for too few questions, a model that is quantized already or that gets
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
        require_enough(*map(len, self.split), calibration, width)
        self.max_new_tokens = max_new_tokens or room_for_answers(processor, dataset)
        self._kept, self._measured = {}, {}

    @cached_property
    def calibration(self):
        """The unquantized model on the calibration questions: a vlmkit.sensitivity.Baseline."""
        return self._baseline(self.split[0])

    @cached_property
    def held_out(self):
        """The same on the held-out questions."""
        return self._baseline(self.split[1])

    def _baseline(self, rows):
        baseline = Baseline(
            self.model,
            self.processor,
            rows_of(self.dataset, rows),
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        answers = baseline.scores.answers
        if not answers["correct"].any():
            first = answers.iloc[0]
            raise SensitivityError(
                f"The unquantized model answers none of {len(rows):,} questions right, so that no "
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
        more = ""
        if rival is not None and self.joint(rivals[rival]) <= self.joint(planned):
            if rivals[rival] != planned:
                more = (
                    " As a whole, what the parts' damages spoke for diverges by "
                    f"{self.joint(planned):.5f} nats a token on the calibration questions, and "
                    f"this by {self.joint(rivals[rival]):.5f}."
                )
            planned = rivals[rival]
        names = {tuple(a.items()): f"uniform {name}" for name, a in rivals.items()}
        chosen = self._trial(names.get(tuple(planned.items()), "planned"), planned)
        uniform = rival and self._trial(f"uniform {rival}", rivals[rival])
        rejected, why = None, reason(chosen, uniform) + more
        if uniform is not None and is_worse(chosen, uniform):
            chosen, rejected = uniform, chosen
        base = {part.scope: self.parts.base for part in self.parts.parts}
        return Result(
            budget,
            chosen,
            uniform,
            rejected,
            self._trial("unquantized", base),
            why,
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
        smallest = self._smallest()
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
        """The knapsack's assignment, within the budget as the ledger counts it."""
        sizes = {part.scope: part.sizes for part in self.parts.parts}
        room = budget - sum(self.parts.fixed.values())
        while (found := least_damage(sizes, self.damages, room)) is not None:
            over = self.parts.counted(found) - budget
            if over <= 0:
                return found
            room -= over  # buffers that follow the dtype which a model is read in
        return self._smallest()

    def _smallest(self):
        return {part.scope: min(part.sizes, key=part.sizes.get) for part in self.parts.parts}

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
            self._measured[key] = summary(self.held_out, outcome)
        return self._measured[key]

    def _loaded(self, assignment):
        """The Outcome, on the held-out questions, of the model that is loaded under the plan."""
        from vlmkit.loading import audit, load

        plan = self.parts.plan(assignment)
        loaded, _ = load(self._folder, plan, processor=False, device=str(self.model.device))
        audit(loaded, plan)
        if measure(loaded).total != self.parts.counted(assignment):
            raise AuditError(
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
