"""Environment: whether this machine has what the course needs, said in words.

    vlmkit.environment.check()       # Python, each package, the processor and the memory
    vlmkit.environment.diagnose()    # also the rest of the machine, and which models fit
    python -m vlmkit.environment     # the same in a terminal, where even typer may be missing

All of it works where packages are missing, because that is when it is needed. So nothing outside
Python's standard library is imported at the top, and not even pandas makes the tables.
"""

import html
import json
import sys
from dataclasses import asdict, dataclass

from vlmkit.catalog import gpus
from vlmkit.environment import machine
from vlmkit.environment.machine import FINE, MISSING, NOTE, PACKAGES, Status
from vlmkit.units import GIGABYTE, parse_size

__all__ = [
    "FINE", "MISSING", "NOTE", "PACKAGES", "Environment", "Status", "check", "diagnose", "report",
]  # fmt: skip

RESERVED = parse_size(gpus.RESERVED)
"""Bytes of the free memory that CUDA, or Python with PyTorch, is assumed to take."""


@dataclass(frozen=True, repr=False)
class Environment:
    """What `check` or `diagnose` found. It shows itself as text and as HTML.

    rows: a Status for Python, each package, the processor and the memory. machine: for the rest.
    models: {"model", "plan", "needed" (bytes), "fits"} for each model and plan, for a model on
        `where` with `memory` free bytes. If there are none, why_none says why.
    """

    rows: tuple
    machine: tuple = ()
    models: tuple = ()
    where: str = "CPU"
    memory: int = None
    why_none: str = ""

    @property
    def missing(self):
        """Names of what is missing and keeps the course from running."""
        return [row.what for row in (*self.rows, *self.machine) if row.state == MISSING]

    @property
    def ready(self):
        """Whether the course can run here."""
        return not self.missing

    @property
    def summary(self):
        """What is missing and how to get it, or that nothing is missing: one or two sentences."""
        packages = [row.what for row in self.rows if row.state == MISSING]
        if packages:
            return (
                f"Missing, too old or broken: {', '.join(packages)}. In a terminal, in the "
                "course's folder, run: make setup (without make: python -m pip install -c "
                f"constraints.txt -e '.[course]'). This notebook runs in {sys.executable}: if you "
                "installed the packages for another Python, choose that Python under Kernel, "
                "Change Kernel."
            )
        if self.missing:
            return f"The course cannot run here: look at {', '.join(self.missing)} above."
        notes = [row.what for row in self.rows if row.state == NOTE]
        more = f" Worth a look: {', '.join(notes)}." if notes else ""
        return f"Everything that the course needs is here.{more}"

    def to_dict(self):
        """All of it as plain lists and dictionaries, for JSON. Sizes are in bytes."""
        return {
            "ready": self.ready,
            "missing": self.missing,
            "environment": [asdict(row) for row in self.rows],
            "machine": [asdict(row) for row in self.machine],
            "where": self.where,
            "memory": self.memory,
            "reserved": RESERVED,
            "models": list(self.models),
            "why_none": self.why_none,
        }

    def _tables(self):
        """The tables as lists of lines of cells; the first line is a head."""
        yield [
            ("", "found", "tested with", "verdict"),
            *((row.what, row.found, row.tested, row.verdict) for row in self.rows),
        ]
        if self.machine:
            yield [
                ("", "found", "verdict"),
                *((row.what, row.found, row.verdict) for row in self.machine),
            ]

    def _fitting(self):
        """Which models fit, as text; empty if nobody asked."""
        if self.why_none:
            return f"Which models fit: {self.why_none}."
        if not self.models:
            return ""
        plans = list(dict.fromkeys(row["plan"] for row in self.models))
        lines = [("GB needed", *plans)]
        for model in dict.fromkeys(row["model"] for row in self.models):
            own = {row["plan"]: row for row in self.models if row["model"] == model}
            lines.append((model, *(_needed(own[plan]) for plan in plans)))
        return (
            f"Which models fit in the {self.memory / GIGABYTE:.1f} GB that are free on the "
            f"{self.where}, for a prompt with one picture and 512 tokens\n"
            f"(predicted; 1 GB = 10^9 bytes; {RESERVED / GIGABYTE:.0f} GB is left for PyTorch "
            f"itself):\n\n{_columns(lines)}"
        )

    def __str__(self):
        texts = "\n\n".join(map(_columns, self._tables())), self.summary
        return "\n\n".join(filter(None, ["\n".join(texts), self._fitting()]))

    __repr__ = __str__

    def _repr_html_(self):
        text = ""
        for lines in self._tables():
            head, *body = [[html.escape(cell) for cell in line] for line in lines]
            rows = ["<tr>" + "".join(f"<th>{c}</th>" for c in head) + "</tr>"]
            rows += [f"<tr><th>{a}</th><td>{'</td><td>'.join(rest)}</td></tr>" for a, *rest in body]
            text += f"<table>{''.join(rows)}</table>"
        fitting = self._fitting() and f"<pre>{html.escape(self._fitting())}</pre>"
        return f"{text}<p>{html.escape(self.summary)}</p>{fitting}"


def _columns(lines):
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines)]  # noqa: B905 (for an old Python too)
    cells = [[cell.ljust(widths[i]) for i, cell in enumerate(line)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def _needed(row):
    if row["needed"] is None:
        return row["why"].partition(":")[0]  # "too long" or "unknown", as `vk.fit` says it
    needed = row["needed"] / GIGABYTE
    return f"{needed:.{1 if needed >= 1 else 2}f}" + ("" if row["fits"] else "  does not fit")


def check():
    """Look at Python, the packages, the processor and the memory. Returns an Environment; raises
    nothing, whatever is missing."""
    return Environment(machine.needs())


def diagnose(models=None, *, progress=False):
    """Look at everything. Returns an Environment; raises nothing, whatever is missing.

    models: names for `vlmkit.fit`. By default pebble, cobble and the catalog, which takes some 15
        seconds; () leaves the models out. progress: whether to show a bar.

    `vlmkit.memory.fitting` says which models fit in the memory that is free now, on the GPU with
    the most free memory, or on the CPU. Nothing is downloaded and nothing is contacted.
    """
    looked = Environment(machine.needs(), machine.rest())
    rows, where, memory, why = (), "CPU", None, ""
    if models is not None and not models:
        why = "not asked"
    elif not looked.ready:
        why = "not asked, because something is missing"
    else:
        try:
            where, memory = _room()
            rows = _fit(models, where, memory, progress)
        except Exception as error:  # a doctor that falls ill helps nobody
            why = f"could not be computed ({type(error).__name__}: {error})"
    return Environment(looked.rows, looked.machine, rows, where, memory, why)


def _room():
    """Where a model would go, and the bytes that are free there."""
    import torch

    if torch.cuda.is_available():
        free = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
        best = max(free, key=free.get)
        return f"GPU {best}", free[best]
    free = machine.free_memory()
    if free is None:
        raise RuntimeError("the free memory cannot be read: is psutil installed?")
    return "CPU", free


def _fit(models, where, memory, progress):
    from vlmkit.catalog import NAMES
    from vlmkit.memory.fitting import fit

    table = fit(
        ("pebble", "cobble", *NAMES) if models is None else models,
        gpus=[memory],
        allocator=None if where == "CPU" else "cuda",
        reserved=RESERVED,
        progress=progress,
    )
    table = table[["model", "plan", "needed", "fits", "why"]]
    return tuple(table.astype(object).where(table.notna(), None).to_dict(orient="records"))


def report(*, quick=False, as_json=False, progress=False):
    """Print a diagnosis. Returns the exit status: 1 if the course cannot run here."""
    found = diagnose(() if quick else None, progress=progress)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
    return int(not found.ready)
