"""Scopes × formats on a dataset: a row for each cell, compared with the unquantized model."""

from pathlib import Path

from vlmkit.backend.processes import count
from vlmkit.errors import SensitivityError, public
from vlmkit.evaluation import check, room_for_answers
from vlmkit.evaluation.statistics import FLIPS, expected_width, mcnemar, needed, paired_interval
from vlmkit.formats import rounding
from vlmkit.sensitivity.baseline import Baseline
from vlmkit.sensitivity.records import Records, fingerprint
from vlmkit.sensitivity.scopes import label_of
from vlmkit.sensitivity.temporary import Rounded, require_float


@public
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

    model: one that `vk.load` returned in a float format. It is the same afterwards, bit for bit.
    dataset, batch_size, max_new_tokens: as in `vk.evaluate`, whose answers these are. A dictionary
        of datasets, such as one for each seed, gives a table with one more column, data, and a file
        for each dataset, with its name.
    formats: spellings that `vlmkit.formats.rounding` reads.
    scopes: see `vlmkit.sensitivity.scopes`.
    path: a file for the results. Each cell is written as soon as it is measured, and a sweep that
        finds the file skips the cells in it. It refuses the file of another model, dataset or
        setting.
    width: how wide a 95% interval of the difference may be, as a share (0.02 is plus and minus one
        point). Too few questions for it are refused, with the number needed.
    progress: show a progress bar.

    A row per scope and format, with the columns
      accuracy              with the scope in the format
      difference, low, high accuracy minus that of the unquantized model, on the same questions,
                            and its 95% paired-bootstrap interval
      p                     McNemar's exact test of that difference
      kl                    mean Kullback-Leibler divergence from the unquantized model, in nats per
                            token of the unquantized model's own answers. All answers have the same
                            weight.
      regressions, fixes    answers that changed from right to wrong, and from wrong to right
      n                     questions
      parameters, bits      numbers that are rounded, and bits of each with its share of scales
      bytes_saved           against the dtype that the model is in
      kinds                 the same per kind of question: see `by_kind`

    Under `accelerate launch` the processes share the work, and each returns the whole table.

    Raises SensitivityError if a scope matches nothing, if the model is quantized already or gets
    every question wrong, and for too few questions; PlanError for a format; and the errors of
    `vk.evaluate`.
    """
    import pandas as pd
    from tqdm import tqdm

    settings = {"width": width, "batch_size": batch_size, "progress": progress}
    settings["max_new_tokens"] = max_new_tokens
    if isinstance(dataset, dict):
        tables = {}
        for name, one in dataset.items():
            own = path and Path(path).with_stem(f"{Path(path).stem}-{name}")
            tables[name] = sweep(model, processor, one, formats, scopes, path=own, **settings)
        return pd.concat(tables, names=["data"]).reset_index("data").reset_index(drop=True)
    check(processor, dataset, batch_size)
    _require_enough(len(dataset), width)
    require_float(model)
    cells = _cells(model, scopes, formats)
    if max_new_tokens is None:
        max_new_tokens = room_for_answers(processor, dataset)
    found = path and fingerprint(model, dataset, {"max_new_tokens": max_new_tokens})
    records, processes = Records(path, found), _processes(model)
    done = dict(records.done)  # before any of the processes adds to it
    if processes:
        processes.wait_for_everyone()
    if not processes or processes.is_main_process:
        records.begin()
    if processes:
        processes.wait_for_everyone()
    mine = [key for key in cells if key not in done]
    if processes:
        mine = mine[processes.process_index :: processes.num_processes]
    if mine:
        baseline = Baseline(
            model, processor, dataset, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
        baseline.require_right_answers()
        for key in tqdm(mine, unit="cell", disable=not progress):
            names, rounded = cells[key]
            done[key] = {"key": key, **names, **measured(baseline, rounded)}
            records.add(done[key])
    if processes:
        from accelerate.utils import gather_object

        done |= {tuple(row["key"]): row for row in gather_object([done[key] for key in mine])}
    return pd.DataFrame([done[key] for key in cells]).drop(columns="key")


def measured(baseline, rounded):
    """One row of `sweep`, without its names: the model of a Baseline in a `quantized` context."""
    format, weights = rounded.format, rounded.selection.weights
    by_steps = format.activations and format.share == "tensor"
    with rounded:
        outcome = baseline.compare(weights, as_asked=format.activations, by_steps=by_steps)
    answers = baseline.scores.answers
    before = answers["correct"].to_numpy()
    kinds = [
        {"task": task, "kind": kind, **_compared(before[rows], outcome, rows)}
        for (task, kind), rows in answers.groupby(["task", "kind"], sort=False).indices.items()
    ]
    return {
        **_compared(before, outcome, slice(None)),
        "parameters": rounded.parameters,
        "bits": rounded.effective_bits,
        "bytes_saved": rounded.bytes_saved,
        "kinds": kinds,
    }


def by_kind(table):
    """The rows of `sweep`'s table, split into one for each scope, format, task and kind."""
    import pandas as pd

    return pd.DataFrame(
        {"scope": row.scope, "format": row.format, **kind}
        for row in table.itertuples()
        for kind in row.kinds
    )


def changes(before, after):
    """(regressions, fixes) between two arrays of right (True) and wrong answers."""
    return int((before & ~after).sum()), int((~before & after).sum())


def _compared(before, outcome, rows):
    after = outcome.correct[rows]
    n = len(after)
    regressions, fixes = changes(before, after)
    low, high = paired_interval(regressions, fixes, n)
    return {
        "accuracy": float(after.mean()),
        "difference": (fixes - regressions) / n,
        "low": low,
        "high": high,
        "p": mcnemar(regressions, fixes),
        "kl": float(outcome.kl[rows].mean()),
        "regressions": regressions,
        "fixes": fixes,
        "n": n,
    }


def _cells(model, scopes, formats):
    """{key: (the names of scope and format, the context that rounds)}"""
    for name, given in (("scopes", scopes), ("formats", formats)):
        if isinstance(given, str) or not len(list(given)):
            raise SensitivityError(f"{name} is a list of one or more, not {given!r}.")
    for format in formats:
        rounding(format)
    cells = {}
    for scope in scopes:
        for format in formats:
            rounded, label = Rounded(model, scope, format), label_of(scope)
            # Some scopes have the same label. Their number of weights tells most of them apart.
            key = (label, rounded.format.name, rounded.parameters)
            if key in cells:
                raise SensitivityError(
                    f"{str(format)!r} on {label!r} is asked for twice (it is {rounded.format.name} "
                    "in full): name it once."
                )
            cells[key] = {"scope": label, "format": str(format)}, rounded
    return cells


def questions_for(width):
    """How many questions an interval of `width` needs; 0 if width is None. Raises SensitivityError
    if the width is not a share."""
    if width is None:
        return 0
    if not 0 < width < 2:
        raise SensitivityError(f"the width of an interval is a share such as 0.02, not {width!r}.")
    return needed(width)


def _require_enough(n, width):
    if n < (least := questions_for(width)):
        raise SensitivityError(
            f"{n:,} questions are too few for an interval {width:.3f} wide: that takes "
            f"{least:,} if one answer in {round(1 / FLIPS)} changes between right and wrong. With "
            f"{n:,} the interval would be about {expected_width(n):.3f} wide. Ask more questions, "
            "or ask for a wider interval."
        )


def _processes(model):
    """accelerate's state if several processes were launched, else None."""
    if count() < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=model.device.type == "cpu")
