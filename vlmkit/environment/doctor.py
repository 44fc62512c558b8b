"""Doctor: what this machine can run, and what is missing.

    print(vlmkit.environment.doctor.diagnose())

`vlmkit.memory.fitting` says which models fit in the memory that is free now, on the GPU with the
most free memory, or on the CPU. Nothing is downloaded and nothing is contacted.
"""

import argparse
import json
from dataclasses import asdict, dataclass

from vlmkit.environment import GIGABYTE, MISSING, Environment, check, columns, limits

RESERVED = GIGABYTE
"""Of the free memory, taken to be lost to CUDA or to Python with PyTorch: an assumption."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found: `environment` as `check` gives it, `machine` (Findings), and `models`,
    of which there are none if `why_none` says why."""

    environment: Environment
    machine: tuple
    models: tuple
    where: str
    memory: int | None
    why_none: str

    @property
    def missing(self):
        """Names of what keeps the course from running."""
        broken = [row.what for row in self.machine if row.state == MISSING]
        return [*self.environment.missing, *broken]

    @property
    def ready(self):
        """Whether the course can run here."""
        return not self.missing

    def to_dict(self):
        """All of it, as JSON has room for; sizes in bytes."""
        return {
            "ready": self.ready,
            "missing": self.missing,
            "environment": [asdict(row) for row in self.environment.rows],
            "machine": [asdict(row) for row in self.machine],
            "where": self.where,
            "memory": self.memory,
            "reserved": RESERVED,
            "models": list(self.models),
            "why_none": self.why_none,
        }

    def __str__(self):
        looked = [(row.what, row.found, row.verdict) for row in self.machine]
        parts = [str(self.environment), "\n".join(columns(looked)), self._models()]
        if self.environment.ready and not self.ready:
            parts.append(f"The course cannot run here: look at {', '.join(self.missing)} above.")
        return "\n\n".join(parts)

    __repr__ = __str__

    def _models(self):
        if self.why_none:
            return f"Which models fit: {self.why_none}."
        plans = list(dict.fromkeys(row["plan"] for row in self.models))
        lines = [("GB needed", *plans)]
        for model in dict.fromkeys(row["model"] for row in self.models):
            own = {row["plan"]: row for row in self.models if row["model"] == model}
            lines.append((model, *(_needed(own[plan]) for plan in plans)))
        return "\n".join(
            [
                f"Which models fit in the {self.memory / GIGABYTE:.1f} GB that are free on the "
                f"{self.where}, asked about one picture in 512 tokens",
                f"(predicted; 1 GB = 10^9 bytes, of which {RESERVED / GIGABYTE:.0f} is left to "
                "PyTorch itself):",
                "",
                *columns(lines),
            ]
        )


def _needed(row):
    if row["needed"] is None:
        return "too long"
    needed = row["needed"] / GIGABYTE
    return f"{needed:.{1 if needed >= 1 else 2}f}" + ("" if row["fits"] else "  does not fit")


def diagnose(models=None, *, progress=False):
    """Look at everything. Returns a Diagnosis; raises nothing, whatever is missing.

    models: names for `vlmkit.fit`; by default pebble and the catalog, which takes some 15 seconds;
        with () the question is left out. progress: whether to show a bar.
    """
    from vlmkit.environment import machine

    environment, looked = check(), machine.look()
    rows, where, memory, why = (), "CPU", None, ""
    if models is not None and not models:
        why = "not asked"
    elif not environment.ready or any(row.state == MISSING for row in looked):
        why = "to be asked again when nothing is missing"
    else:
        try:
            where, memory = _room()
            rows = _fit(models, where, memory, progress)
        except Exception as error:  # a doctor that falls ill helps nobody
            why = f"could not be computed ({type(error).__name__}: {error})"
    return Diagnosis(environment, looked, rows, where, memory, why)


def _room():
    """Where a model would go, and the bytes that are free there."""
    import torch

    if torch.cuda.is_available():
        free = {i: torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
        best = max(free, key=free.get)
        return f"GPU {best}", free[best]
    free = limits.free_memory()
    if free is None:
        raise RuntimeError("the free memory cannot be read: is psutil installed?")
    return "CPU", free


def _fit(models, where, memory, progress):
    from vlmkit.memory import fitting

    table = fitting.fit(
        ("pebble", *fitting.NAMES) if models is None else models,
        gpus=[memory],
        allocator=None if where == "CPU" else "cuda",
        reserved=RESERVED,
        progress=progress,
    )
    table = table[["model", "plan", "needed", "fits"]]
    return tuple(table.astype(object).where(table.notna(), None).to_dict(orient="records"))


def main(argv=None):
    """`python -m vlmkit.environment`: what `vlmkit doctor` does, without typer. Returns 1 where the
    course cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmkit.environment", description="What this machine can run."
    )
    parser.add_argument("--quick", action="store_true", help="leave out which models fit")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    return report(quick=args.quick, as_json=args.json)


def report(*, quick=False, as_json=False, progress=False):
    """Print a diagnosis. Returns the exit status: 1 where the course cannot run."""
    found = diagnose(() if quick else None, progress=progress)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
    return int(not found.ready)
