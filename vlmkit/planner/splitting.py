"""Questions split into those that damages are measured on and those held out."""

import math

from vlmkit.errors import SensitivityError
from vlmkit.sensitivity import needed

FEWEST = 30
"""Questions of each half at least: with fewer, a bootstrap interval says nothing."""


def split(dataset, calibration=0.5, seed=0):
    """(row numbers for calibration, row numbers held out), disjoint, both in ascending order.

    A share `calibration` of the rows, drawn at random by `seed`, with the same share of each task
    and kind of question, give or take one row. A question that is in the dataset twice can be in
    both.
    """
    import numpy as np

    if not 0 < calibration < 1:
        raise SensitivityError(f"calibration is a share between 0 and 1, not {calibration!r}.")
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    names = [name for name in ("task", "kind") if name in columns]
    texts = dataset.select_columns(names) if hasattr(dataset, "select_columns") else dataset
    labels = [tuple(str(row[name]) for name in names) for row in texts] if names else None
    order = np.random.default_rng(seed).permutation(len(dataset)).tolist()
    if labels:
        order.sort(key=lambda row: labels[row])  # stable: shuffled within each kind
    taken = [
        math.floor((i + 1) * calibration) > math.floor(i * calibration) for i in range(len(order))
    ]
    return (
        sorted(row for row, take in zip(order, taken, strict=True) if take),
        sorted(row for row, take in zip(order, taken, strict=True) if not take),
    )


def rows_of(dataset, rows):
    """Some rows of a dataset, by number."""
    return dataset.select(rows) if hasattr(dataset, "select") else [dataset[row] for row in rows]


def require_enough(calibration, held_out, share, width):
    """Raise SensitivityError, with the number needed, for too few questions: see Planner."""
    if width is not None and not 0 < width < 2:
        raise SensitivityError(f"the width of an interval is a share such as 0.02, not {width!r}.")
    fewest = max(FEWEST, 0 if width is None else needed(width))
    if held_out >= fewest and calibration >= FEWEST:
        return
    total = max(math.ceil(FEWEST / share), math.ceil(fewest / (1 - share)))
    why = "" if width is None else f" for an interval {width:.3f} wide"
    raise SensitivityError(
        f"{calibration + held_out:,} questions are too few{why}: split into calibration "
        f"({calibration:,}) and held-out ones ({held_out:,}), they have to be {total:,} at least."
    )
