"""Units: numbers of bytes as people write them, and back.

Tables give sizes in MB and GB, powers of ten. Graphics cards are sold in GiB, powers of two.
"""

import numbers
import re
from decimal import Decimal

from vlmkit.errors import SizeError, shown

MEGABYTE, GIGABYTE = 10**6, 10**9

UNITS = {
    "": 1, "b": 1, "byte": 1, "bytes": 1,
    "kb": 10**3, "mb": MEGABYTE, "gb": GIGABYTE, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


MOST = 10**18
_NUMBER = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+"


def _is_number(x):
    """Whether `x` is a number that can be written: Python refuses integers of 4,300 digits."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and abs(x) < MOST


class Size(int):
    """A number of bytes that prints in the unit it was given in, and in bytes."""

    def __new__(cls, size, text=None):
        new = super().__new__(cls, size)
        new.text = text
        return new

    def __str__(self):
        return f"{self.text} = {int(self):,} bytes" if self.text else f"{int(self):,} bytes"

    __repr__ = __str__


def readable(size):
    """Bytes as a text, in GB from one GB on and else in MB: "13.64 GB", "3.78 MB"."""
    unit = "GB" if size >= GIGABYTE else "MB"
    return f"{size / UNITS[unit.lower()]:,.2f} {unit}"


def parse_size(text):
    """A Size from "8 GB", "8GiB", "8000MB" or a number of bytes.

    GB is 10^9 bytes and GiB is 2^30, in upper or lower case. A graphics card that is sold with
    "8 GB" often has 8 GiB. A comma may stand only before each group of three digits: "8,000 MB".
    In many languages "8,0" is eight, and reading it as 80 would be wrong without a word.

    Raises SizeError, which lists the units, for anything that is no positive number of bytes.
    """
    if isinstance(text, Size):
        return text
    given, text = text, str(text) if isinstance(text, str) or _is_number(text) else ""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([a-zA-Z]*)\s*", text)
    number, unit = match.groups() if match else ("", "")
    if not match or unit.lower() not in UNITS:
        point = re.fullmatch(r"\s*([0-9]+),([0-9]+)\s*([a-zA-Z]*)\s*", text)
        hint = (
            f"For a decimal, write a point: '{point[1]}.{point[2]} {point[3]}'. " if point else ""
        )
        raise SizeError(
            f"{shown(given)} is not a number of bytes. {hint}Write a number and a unit, "
            "such as '8 GB' (8 x 10^9 bytes), '8 GiB' (8 x 2^30 bytes) or '8000 MB'. The units "
            "are B, kB, MB, GB, TB, KiB, MiB, GiB and TiB."
        )
    size = round(Decimal(number.replace(",", "").replace("_", "")) * UNITS[unit.lower()])
    if not 1 <= size < MOST:
        raise SizeError(
            f"{shown(given)} is {'less than a byte' if size < 1 else 'more than exists'}. A "
            "size is at least one byte, and less than 10^18 bytes (a million TB)."
        )
    return Size(size, f"{number} {_spelled(unit)}" if unit.lower() not in ("", "b") else None)


def _spelled(unit):
    unit = unit.lower()
    if unit.startswith("byte"):
        return unit
    return {"kb": "kB"}.get(unit, unit[0].upper() + unit[1:-1] + "B")
