"""Scopes × formats on a dataset: a row for each, against the unquantized model."""

import os
from pathlib import Path

from vlmkit.errors import SensitivityError
from vlmkit.evaluation import check, room_for_answers
from vlmkit.evaluation.statistics import FLIPS, expected_width, mcnemar, needed, paired_interval
from vlmkit.formats import rounding
from vlmkit.sensitivity.baseline import Baseline
from vlmkit.sensitivity.records import Records, fingerprint
from vlmkit.sensitivity.scopes import label_of
from vlmkit.sensitivity.swapping import Swap, require_float

COLUMNS = (
    "scope",
    "format",
    "accuracy",
    "difference",
    "low",
    "high",
    "p",
    "kl",
    "lost",
    "gained",
    "n",
    "parameters",
    "bits",
    "bytes_saved",
    "kinds",
)


def sweep(
    model,
    processor,
    dataset,
    formats,
    scopes,
    *,
    path=None,
    width=None,
    batch_size=64,
    max_new_tokens=None,
    progress=True,
):
    """Quantize each scope in each format, ask the dataset's questions, and compare: a DataFrame.

    model: one that `vk.load` returned in a float format. It is given back as it was.
    dataset, batch_size, max_new_tokens: as in `vk.evaluate`, whose answers these are. A dictionary
        of datasets, of several seeds for one, gives a table with one more column, data, and a file
        for each, with its name.
    formats: spellings that `vlmkit.formats.rounding` reads. scopes: see
    `vlmkit.sensitivity.scopes`.
    path: a file for the results, to which each is written when it is there. A sweep that finds it
        there leaves out what it has; another model, dataset or setting is refused.
    width: how wide a 95% interval of the difference may be, as a share (0.02 is plus and minus one
        point); too few questions for it are refused, with the number needed.
    progress: show a progress bar.

    A row per scope and format, with the columns
      accuracy              with the scope in the format
      difference, low, high accuracy minus that of the unquantized model, on the same questions,
                            and its 95% paired-bootstrap interval
      p                     McNemar's exact test of that difference
      kl                    mean Kullback-Leibler divergence to the unquantized model, in nats a
                            token of the unquantized model's own answers, each answer weighing the
                            same
      lost, gained          answers that went from right to wrong, and from wrong to right
      n                     questions
      parameters, bits      numbers that are rounded, and bits each takes with its share of scales
      bytes_saved           against the dtype that the model is in
      kinds                 the same per kind of question: see `by_kind`

    Under `accelerate launch` the processes share the work, and each returns the whole table.

    Raises SensitivityError if a scope matches nothing, if the model is quantized already or gets
    every question wrong, for too few questions; PlanError for a format; and what `vk.evaluate`
    raises.
    """
    import pandas as pd
    from tqdm import tqdm

    if isinstance(dataset, dict):
        tables = {}
        for name, one in dataset.items():
            tables[name] = sweep(
                model,
                processor,
                one,
                formats,
                scopes,
                path=path and Path(path).with_stem(f"{Path(path).stem}-{name}"),
                width=width,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
            )
        return pd.concat(tables, names=["data"]).reset_index("data").reset_index(drop=True)
    check(processor, dataset, batch_size)
    _require_enough(len(dataset), width)
    require_float(model)
    cells = _cells(model, scopes, formats)
    if max_new_tokens is None:
        max_new_tokens = room_for_answers(processor, dataset)
    records = Records(path, _fingerprint(path, model, dataset, max_new_tokens))
    state = _processes(model)
    done = dict(records.done)  # before any of the processes adds to it
    if state:
        state.wait_for_everyone()
    if not state or state.is_main_process:
        records.begin()
    if state:
        state.wait_for_everyone()
    open_cells = [cell for cell in cells if cell.key not in done]
    mine = open_cells[state.process_index :: state.num_processes] if state else open_cells
    if mine:
        baseline = Baseline(
            model, processor, dataset, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        _require_right_answers(baseline.scores)
        for cell in tqdm(mine, unit="cell", disable=not progress):
            row = {"key": cell.key, **measured(baseline, cell.swap), **cell.names}
            records.add(row)
            done[cell.key] = row
    if state:
        from accelerate.utils import gather_object

        done |= {tuple(row["key"]): row for row in gather_object([done[c.key] for c in mine])}
    return pd.DataFrame([done[cell.key] for cell in cells], columns=list(COLUMNS))


def measured(baseline, swap):
    """One row of `sweep`, without its names: the model of a Baseline with a Swap in it."""
    with swap:
        outcome = baseline.compare(
            [weight.parameter for weight in swap.chosen.weights],
            as_asked=swap.format.activations,
            by_steps=swap.format.activations and swap.format.share == "tensor",
        )
    before = baseline.scores.answers["correct"].to_numpy()
    answers = baseline.scores.answers
    kinds = [
        {"task": task, "kind": kind, **_compared(before[rows], outcome, rows)}
        for (task, kind), rows in answers.groupby(["task", "kind"], sort=False).indices.items()
    ]
    return {
        **_compared(before, outcome, slice(None)),
        "parameters": swap.parameters,
        "bits": swap.effective_bits,
        "bytes_saved": swap.bytes_saved,
        "kinds": kinds,
    }


def by_kind(table):
    """The rows of `sweep`'s table taken apart: one for each scope, format, task and kind."""
    import pandas as pd

    rows = [
        {"scope": row.scope, "format": row.format, **kind}
        for row in table.itertuples()
        for kind in row.kinds
    ]
    return pd.DataFrame(rows)


def _compared(before, outcome, rows):
    after = outcome.correct[rows]
    n = len(after)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    low, high = paired_interval(lost, gained, n)
    return {
        "accuracy": float(after.mean()),
        "difference": (gained - lost) / n,
        "low": low,
        "high": high,
        "p": mcnemar(lost, gained),
        "kl": float(outcome.kl[rows].mean()),
        "lost": lost,
        "gained": gained,
        "n": n,
    }


class _Cell:
    """A scope and a format. The key tells it from another of the same names."""

    def __init__(self, model, scope, format):
        self.swap = Swap(model, scope, format)
        self.names = {"scope": label_of(scope), "format": str(format)}
        self.key = (label_of(scope), self.swap.format.name, self.swap.parameters)


def _cells(model, scopes, formats):
    for name, given in (("scopes", scopes), ("formats", formats)):
        if isinstance(given, str) or not len(list(given)):
            raise SensitivityError(f"{name} is a list of one or more, not {given!r}.")
    for format in formats:
        rounding(format)
    cells = {}
    for scope in scopes:
        for format in formats:
            cell = _Cell(model, scope, format)
            if cell.key in cells:
                raise SensitivityError(
                    f"{cell.names['format']!r} on {cell.names['scope']!r} is asked for twice "
                    f"(it is {cell.swap.format.name} in full): name it once."
                )
            cells[cell.key] = cell
    return list(cells.values())


def _fingerprint(path, model, dataset, max_new_tokens):
    if path is None:
        return {}
    return fingerprint(model, dataset, {"max_new_tokens": max_new_tokens})


def _require_enough(n, width):
    if width is None:
        return
    if not 0 < width < 2:
        raise SensitivityError(f"the width of an interval is a share such as 0.02, not {width!r}.")
    if n < needed(width):
        raise SensitivityError(
            f"{n:,} questions are too few for an interval {width:.3f} wide: that takes "
            f"{needed(width):,} if one answer in {round(1 / FLIPS)} changes between right and "
            f"wrong, and with these it would be about {expected_width(n):.3f} wide. Ask more "
            "questions, or ask for a wider interval."
        )


def _require_right_answers(scores):
    if scores.answers["correct"].any():
        return
    first = scores.answers.iloc[0]
    raise SensitivityError(
        f"The unquantized model answers none of the {scores.n:,} questions right, so there is "
        f"nothing that quantizing could break. The first answer is {first['predicted']!r} and "
        f"{first['answer']!r} was expected: does the model fit the questions, and are the expected "
        "answers in its words?"
    )


def _processes(model):
    """accelerate's state where several processes were launched, else None."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=model.device.type == "cpu")
