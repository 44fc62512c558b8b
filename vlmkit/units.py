"""Units: numbers of bytes as people write them, and back.

Tables give sizes in MB and GB, powers of ten. Graphics cards are sold in GiB, powers of two.
"""

import re

from vlmkit.errors import SizeError

MEGABYTE, GIGABYTE = 10**6, 10**9

UNITS = {
    "": 1, "b": 1, "byte": 1, "bytes": 1,
    "kb": 10**3, "mb": MEGABYTE, "gb": GIGABYTE, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


class Size(int):
    """A number of bytes that prints in the unit it was given in, and in bytes."""

    def __new__(cls, size, text=None):
        new = super().__new__(cls, size)
        new.text = text
        return new

    def __str__(self):
        return f"{self.text} = {int(self):,} bytes" if self.text else f"{int(self):,} bytes"

    __repr__ = __str__


def parse_size(text):
    """A Size from "8 GB", "8GiB", "8000MB" or a number of bytes.

    GB is 10^9 bytes and GiB is 2^30, in upper or lower case. A graphics card that is sold with
    "8 GB" often has 8 GiB.

    Raises SizeError, which lists the units, for anything that is no positive number of bytes.
    """
    if isinstance(text, Size):
        return text
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    match = re.fullmatch(r"\s*(\d[\d,_]*\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", str(text))
    number, unit = match.groups() if match else ("", "")
    if not match or unit.lower() not in UNITS:
        raise SizeError(
            f"{text!r} is not a number of bytes. Write a number and a unit, such as '8 GB' (8 x "
            "10^9 bytes), '8 GiB' (8 x 2^30 bytes) or '8000 MB'. The units are B, kB, MB, GB, TB, "
            "KiB, MiB, GiB and TiB."
        )
    size = round(float(number.replace(",", "").replace("_", "")) * UNITS[unit.lower()])
    if size < 1:
        raise SizeError(f"{text!r} is less than a byte. A size is at least one byte.")
    return Size(size, f"{number} {_spelled(unit)}" if unit.lower() not in ("", "b") else None)


def _spelled(unit):
    unit = unit.lower()
    if unit.startswith("byte"):
        return unit
    return {"kb": "kB"}.get(unit, unit[0].upper() + unit[1:-1] + "B")
