"""Environment: whether this Python has what the course needs, said in words.

    vlmkit.environment.check()      # a row for Python, each package, the processor and the memory
    vlmkit.environment.doctor.diagnose()    # that, the rest of the machine, and which models fit
    python -m vlmkit.environment            # the same in a terminal, as `vlmkit doctor` is

It works where packages are missing, since that is when it is needed: nothing outside Python's own
library is imported at the top, and not even pandas makes the table.
"""

import html
import re
import sys
from dataclasses import dataclass
from importlib import metadata

from vlmkit.environment import limits
from vlmkit.units import GIGABYTE

__all__ = ["FINE", "MISSING", "NOTE", "OLDEST", "TESTED", "Environment", "Finding", "check"]

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "tqdm": "4.70.1",
    "numpy": "2.4.6",
    "pandas": "3.1.1",
    "scipy": "1.17.1",
    "rapidfuzz": "3.14.6",
    "pillow": "13.0.0",
    "matplotlib": "3.11.2",
    "typer": "0.29.2",
    "pyyaml": "6.0.3",
}
"""The packages that the course needs, in the versions it was tested with: those of
`constraints.txt`, which an installed package does not bring along."""

OLDEST = {
    "torch": "2.13",
    "transformers": "5.21",
    "bitsandbytes": "0.50",
    "accelerate": "1.12",
    "peft": "0.19",
    "datasets": "4.0",
    "safetensors": "0.8",
    "tqdm": "4.67.1",
    "numpy": "2.0.2",
    "pandas": "2.2.3",
    "scipy": "1.15.3",
    "rapidfuzz": "3.13",
    "pillow": "11.3",
    "matplotlib": "3.10",
    "typer": "0.20",
    "pyyaml": "6.0.2",
}
"""The oldest versions that were tried: the lower bounds of `pyproject.toml`. They are written out
here, because the installed package's own metadata may be missing, or of an earlier set-up."""

OLDEST_PYTHON = (3, 11)
WANTED_MEMORY = 2 * GIGABYTE
"""Free memory for the bundled model: Python with torch and the data is most of it, not pebble."""

FINE, NOTE, MISSING = "fine", "note", "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `state`: FINE, NOTE (works, but worth a look) or MISSING."""

    what: str
    found: str
    tested: str
    state: str
    verdict: str


@dataclass(frozen=True, repr=False)
class Environment:
    """What `check` found: `rows` (Findings), `ready`, `missing`; text and HTML table."""

    rows: tuple

    @property
    def missing(self):
        """Names of what the course cannot do without, and which is not there."""
        return [row.what for row in self.rows if row.state == MISSING]

    @property
    def ready(self):
        """Whether nothing is missing."""
        return not self.missing

    @property
    def summary(self):
        """One or two sentences: what is missing and how to get it, or that nothing is."""
        notes = [row.what for row in self.rows if row.state == NOTE]
        if self.ready:
            more = f" Worth a look: {', '.join(notes)}." if notes else ""
            return f"Everything that the course needs is here.{more}"
        return (
            f"Missing or too old: {', '.join(self.missing)}. In a terminal, in the folder of the "
            "course, run: make setup (without make: python -m pip install -c constraints.txt -e "
            f"'.[course]'). This notebook runs in {sys.executable}: if the packages were installed "
            "for another Python, choose that one under Kernel, Change Kernel."
        )

    def _cells(self):
        yield ("", "found", "tested with", "verdict")
        for row in self.rows:
            yield (row.what, row.found, row.tested, row.verdict)

    def __str__(self):
        return "\n".join([*columns(list(self._cells())), self.summary])

    __repr__ = __str__

    def _repr_html_(self):
        head, *body = [[html.escape(cell) for cell in line] for line in self._cells()]
        rows = ["<tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>"]
        rows += [f"<tr><th>{a}</th><td>{'</td><td>'.join(rest)}</td></tr>" for a, *rest in body]
        return f"<table>{''.join(rows)}</table><p>{html.escape(self.summary)}</p>"


def columns(lines):
    """Lines of cells as lines of text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]  # noqa: B905 (for an old Python too)
    cells = [[cell.ljust(widths[i]) for i, cell in enumerate(line)] for line in lines]
    return ["  ".join(line).rstrip() for line in cells]


def check():
    """Look at Python, the packages, the processor and the memory. Returns an Environment; raises
    nothing, whatever is missing."""
    packages = [_package(name, tested) for name, tested in TESTED.items()]
    return Environment((_python(), *packages, _processor(), _memory()))


def _python():
    found = ".".join(map(str, sys.version_info[:3]))
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", found, oldest, MISSING, f"too old: needs {oldest} or newer")
    return Finding("Python", found, f"{oldest} and newer", FINE, "fine")


def _package(name, tested):
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "none", tested, MISSING, "missing")
    if _release(found) == _release(tested):
        return Finding(name, found, tested, FINE, "fine")
    if _release(found) < _release(OLDEST[name]):
        return Finding(name, found, tested, MISSING, f"too old: needs {OLDEST[name]} or newer")
    verdict = "not the tested version: numbers may differ, the rest should work"
    return Finding(name, found, tested, NOTE, verdict)


def _release(version):
    """ "2.13.0+cpu" as (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _processor():
    cores = limits.cores()
    cpu = f"CPU, {cores} core{'s' * (cores != 1)}"
    try:
        import torch

        gpu = torch.cuda.is_available() and torch.cuda.get_device_properties(0)
    except Exception as error:  # a torch that is installed and broken fails in ways of its own
        reason = str(error).partition("\n")[0]
        verdict = f"PyTorch cannot be used: {type(error).__name__}: {reason}"
        return Finding("processor", cpu, "CPU, 2 cores", MISSING, verdict)
    if gpu:
        found = f"{gpu.name}, {gpu.total_memory / GIGABYTE:.0f} GB"
        return Finding("processor", found, "CPU, 2 cores", FINE, "fine: models load on the GPU")
    return Finding("processor", cpu, "CPU, 2 cores", FINE, "fine: no GPU is needed")


def _memory():
    free = limits.free_memory()
    if free is None:
        return Finding("free memory", "unknown", "", NOTE, "cannot be read")
    wanted = f"{WANTED_MEMORY / GIGABYTE:.0f} GB"
    found = f"{free / GIGABYTE:.1f} GB"
    if free < WANTED_MEMORY:
        verdict = f"little: close other programs if the kernel dies ({wanted} are plenty)"
        return Finding("free memory", found, wanted, NOTE, verdict)
    return Finding("free memory", found, wanted, FINE, "fine")
