"""Findings: what a look at a quantization config found, as data, as a table and as text."""

import html
import textwrap
from dataclasses import asdict, dataclass

from vlmkit import COMPONENTS
from vlmkit.units import MEGABYTE

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
"""What nobody can have meant, what often is not meant, and what is good to know."""

COLUMNS = (
    "severity",
    "code",
    "component",
    "modules",
    "parameters",
    "bytes",
    "found",
    "what to do",
)
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    code: its name, the same in every release. modules: full names of the modules it is about.
    parameters, bytes: of those modules, the bytes as they will be held.
    remedy: what to do next.
    """

    severity: str
    code: str
    message: str
    remedy: str
    component: str = None
    modules: tuple = ()
    parameters: int = 0
    bytes: int = 0

    def __str__(self):
        head = f"{self.severity}: {self.code}"
        lines = textwrap.wrap(self.message, WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += textwrap.wrap(self.remedy, WIDTH, initial_indent="  → ", subsequent_indent="    ")
        return "\n".join([head, *lines])


@dataclass(frozen=True, repr=False)
class Findings:
    """What `vk.lint` found: `for finding in findings`, `.errors`, `.warnings`, `.notes`, `.ok`.

    `fates` has an entry for each parameter, with the format that transformers will hold it in.
    """

    title: str
    items: tuple
    fates: tuple

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)

    def __bool__(self):  # an empty one is no less a result
        return True

    def of(self, severity):
        """The findings of that severity, in order."""
        return tuple(finding for finding in self.items if finding.severity == severity)

    @property
    def errors(self):
        """What nobody can have meant."""
        return self.of(ERROR)

    @property
    def warnings(self):
        """What often is not meant."""
        return self.of(WARNING)

    @property
    def notes(self):
        """What is good to know."""
        return self.of(NOTE)

    @property
    def ok(self):
        """Whether there is no error."""
        return not self.errors

    @property
    def total(self):
        """Bytes of the weights as they will be held, with their quantization states."""
        return sum(fate.bytes for fate in self.fates)

    def table(self):
        """A pandas DataFrame with a row for each finding."""
        import pandas as pd

        rows = [
            (
                finding.severity,
                finding.code,
                finding.component,
                len(finding.modules),
                finding.parameters,
                finding.bytes,
                finding.message,
                finding.remedy,
            )
            for finding in self.items
        ]
        return pd.DataFrame(rows, columns=COLUMNS)

    def modules(self):
        """A pandas DataFrame with a row for each Linear layer: its component, what it will be held
        in, bytes, and the entries of the skip list that keep it."""
        import pandas as pd

        rows = [
            (f.module, f.component, f.format, f.parameters, f.bytes, ", ".join(f.kept_by))
            for f in self.fates
            if f.convertible
        ]
        columns = ["module", "component", "format", "parameters", "bytes", "kept by"]
        return pd.DataFrame(rows, columns=columns).set_index("module")

    def components(self):
        """A pandas DataFrame with a row for each component: its Linear layers, how many of them
        are quantized, and its bytes, with what they were if nothing were quantized."""
        import pandas as pd

        rows = {}
        for component in (*COMPONENTS, None):
            own = [f for f in self.fates if f.component == component]
            if own:
                rows[component or "unknown"] = (
                    sum(f.convertible for f in own),
                    sum(f.quantized for f in own),
                    sum(f.bytes for f in own),
                    sum(f.plain_bytes for f in own),
                )
        columns = ["Linear layers", "quantized", "bytes", "bytes unquantized"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns)

    def to_dict(self):
        """The same as plain lists and dictionaries, for JSON."""
        return {
            "title": self.title,
            "ok": self.ok,
            "bytes": self.total,
            "findings": [{**asdict(f), "modules": list(f.modules)} for f in self.items],
            "components": self.components().to_dict(orient="index"),
        }

    @property
    def summary(self):
        """How many there are of each severity, in words."""
        counts = [(len(self.of(severity)), severity) for severity in SEVERITIES]
        said = [f"{n} {severity}{'s' * (n != 1)}" for n, severity in counts if n]
        return ", ".join(said) or "nothing to say"

    def _components_in_megabytes(self):
        table = self.components()
        for column in ("bytes", "bytes unquantized"):
            table[column.replace("bytes", "MB")] = (table.pop(column) / MEGABYTE).map(
                "{:.2f}".format
            )
        return table

    def __str__(self):
        parts = [self.title, self._components_in_megabytes().to_string(), self.summary]
        return "\n\n".join([*parts, *map(str, self.items)])

    __repr__ = __str__

    def _repr_html_(self):
        lines = [("", "found", "what to do")]
        lines += [(f"{f.severity}: {f.code}", f.message, f.remedy) for f in self.items]
        # Sentences on the left, where a notebook puts numbers on the right.
        cells = (
            "".join(f'<td style="text-align: left">{html.escape(cell)}</td>' for cell in line)
            for line in lines
        )
        body = "".join(f"<tr>{line}</tr>" for line in cells)
        return (
            f"<p><b>{html.escape(self.title)}</b></p>{self._components_in_megabytes().to_html()}"
            f"<p>{self.summary}</p>" + (f"<table>{body}</table>" if self.items else "")
        )
