"""Formats of the same size: what is compared at equal nominal bits is not at equal bytes."""

from vlmkit.errors import SensitivityError
from vlmkit.formats import rounding
from vlmkit.formats.experiments import INTEGERS, TABLES
from vlmkit.sensitivity.scopes import chosen


def equal_bits(model, scope, bits, within=0.05):
    """Formats that take about `bits` bits a weight on a scope, scales and zero points included:
    a DataFrame with a row for each, its format and its bits, the closest first.

    Looked through are integers of 2 to 8 bits, per tensor, per row and in groups of 16 to 128, with
    and without zero points and double quantization, and NF4 and FP4 in blocks of 16 to 4096.
    Raises SensitivityError if there is none, with the closest.
    """
    import pandas as pd

    weights = chosen(model, scope).weights
    count = sum(weight.parameter.numel() for weight in weights)
    rows = []
    for name in _spellings():
        format = rounding(name)
        total = sum(format.total_bits(weight.parameter.shape) for weight in weights)
        rows.append((name, total / count))
    rows.sort(key=lambda row: (abs(row[1] - bits), row[0]))
    found = [row for row in rows if abs(row[1] - bits) <= within]
    if not found:
        raise SensitivityError(
            f"no format takes {bits} bits a weight within {within} on {scope!r}: the closest is "
            f"{rows[0][0]} with {rows[0][1]:.3f}."
        )
    return pd.DataFrame(found, columns=["format", "bits"])


def _spellings():
    for kind in INTEGERS:
        for ending in ("", "-asym"):
            yield f"{kind}-tensor{ending}"
            yield f"{kind}-row{ending}"
            for group in (16, 32, 64, 128):
                yield f"{kind}-g{group}{ending}"
                yield f"{kind}-g{group}{ending}-dq"
    for kind in TABLES:
        for block in (16, 32, 64, 128, 256, 1024, 4096):
            yield f"{kind}-b{block}"
            yield f"{kind}-b{block}-dq"
