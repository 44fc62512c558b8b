"""Findings: what `vk.lint` found in a quantization config, as data, as a table and as text."""

import html
import textwrap
from dataclasses import asdict, dataclass

from vlmkit import COMPONENTS
from vlmkit.tables import Table
from vlmkit.units import MEGABYTE

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
"""What nobody can want, what people often do not want, and what is good to know."""

WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One finding.

    code: the name of the kind of finding. It stays the same in every release.
    modules: full names of the modules concerned. parameters, bytes: of those modules; the bytes are
        those after loading.
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
class Findings(Table):
    """What `vk.lint` found: `for finding in findings`, `.errors`, `.warnings`, `.notes`, `.ok`.

    `verdicts` is a tuple with a row for each parameter: the format that it will be held in, and its
    bytes.

    given: the config, a `vlmkit.linting.verdicts.Given`; `given.method.how` says how vlmkit knows
        the method's rule.
    repaired: all remedies together: the skip list to paste, or None if nothing has to change in it.
        It keeps everything but the language model's Linear layers out of quantization, and what the
        config's own list keeps, or seems to keep.
    """

    title: str
    items: tuple
    verdicts: tuple
    given: object = None
    repaired: list = None

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)

    def __bool__(self):  # findings without an item are a result too
        return True

    def of(self, severity):
        """The findings of one severity, in order."""
        return tuple(finding for finding in self.items if finding.severity == severity)

    @property
    def errors(self):
        """What nobody can want."""
        return self.of(ERROR)

    @property
    def warnings(self):
        """What people often do not want."""
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
        """Bytes of the weights after loading, with their quantization states."""
        return sum(row.bytes for row in self.verdicts)

    def table(self):
        """A pandas DataFrame with a row for each finding; `modules` is their number."""
        import pandas as pd

        columns = ["severity", "code", "component", "modules", "parameters", "bytes"]
        columns += ["message", "remedy"]
        table = pd.DataFrame([asdict(finding) for finding in self.items], columns=columns)
        table["modules"] = table["modules"].map(len)
        return table.rename(columns={"message": "found", "remedy": "what to do"})

    def _frame(self, *columns):
        """A DataFrame with these attributes of each verdict."""
        import pandas as pd

        rows = [[getattr(row, column) for column in columns] for row in self.verdicts]
        return pd.DataFrame(rows, columns=columns)

    def modules(self):
        """A pandas DataFrame with a row for each Linear layer: its component, the format it will be
        held in, its parameters and bytes, and the entries of the skip list that keep it."""
        columns = ("module", "component", "format", "parameters", "bytes")
        table = self._frame(*columns, "convertible", "kept_by")
        table["kept by"] = table.pop("kept_by").map(", ".join)
        return table[table.pop("convertible")].set_index("module")

    def components(self):
        """A pandas DataFrame with a row for each component: its Linear layers, how many of them are
        quantized, its bytes, and its bytes without quantization."""
        table = self._frame("component", "convertible", "quantized", "bytes", "bytes_unquantized")
        table = table.fillna({"component": "unknown"}).groupby("component").sum()
        table.columns = ["Linear layers", "quantized", "bytes", "bytes unquantized"]
        there = [name for name in (*COMPONENTS, "unknown") if name in table.index]
        return table.loc[there].rename_axis(None)

    def to_dict(self):
        """The same as plain lists and dictionaries, for JSON."""
        return {
            "title": self.title,
            "ok": self.ok,
            "bytes": self.total,
            "method": self.given.method.name,
            "rule": f"{self.given.method.matching} ({self.given.method.how})",
            "repaired": self.repaired,
            "findings": [{**asdict(f), "modules": list(f.modules)} for f in self.items],
            "components": self.components().to_dict(orient="index"),
        }

    @property
    def summary(self):
        """The number of findings of each severity, in words."""
        counts = [(len(self.of(severity)), severity) for severity in SEVERITIES]
        words = [f"{n} {severity}{'s' * (n != 1)}" for n, severity in counts if n]
        return ", ".join(words) or "nothing to say"

    def _headline(self):
        return self.title

    def _text_table(self):
        table = self.components()
        sizes = table[["bytes", "bytes unquantized"]] / MEGABYTE
        table[["MB", "MB unquantized"]] = sizes.map("{:.2f}".format)
        return table.drop(columns=sizes.columns)

    def _remarks(self):
        yield self.summary
        method, scales = (
            self.given.method,
            "The bytes of quantized weights are without their scales.",
        )
        known = f"The rule of {method.name} was {method.how}. "
        yield from textwrap.wrap(known + scales * (not self.given.bitsandbytes), WIDTH)

    @property
    def _list_to_paste(self):
        if self.repaired is None:
            return ""
        lines = textwrap.wrap(f"{self.given.method.key}={self.repaired!r}", WIDTH - 2)
        return "All remedies together, to paste:\n" + textwrap.indent("\n".join(lines), "  ")

    def __str__(self):
        parts = [super().__str__(), *map(str, self.items), self._list_to_paste]
        return "\n\n".join(filter(None, parts))

    __repr__ = __str__

    def _repr_html_(self):
        items = (
            f"<p><b>{f.severity}: {f.code}</b><br>{html.escape(f.message)}<br>"
            f"→ {html.escape(f.remedy)}</p>"
            for f in self.items
        )
        paste = f"<pre>{html.escape(self._list_to_paste)}</pre>" if self.repaired else ""
        return super()._repr_html_() + "".join(items) + paste
