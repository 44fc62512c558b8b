"""Tables of a model under a plan: what a load will give (Preview), and what it gave (Audit)."""

import textwrap
from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.formats import FORMATS
from vlmkit.tables import Table
from vlmkit.units import MEGABYTE


@dataclass(frozen=True)
class ComponentRow:
    """One component: the format asked for, those found, modules with weights, parameters, bytes.

    kept: what has another format than the component's, which, and its MB, most first: what
        bitsandbytes leaves alone, and what an override of the plan names.
    """

    component: str
    asked: str
    found: str
    modules: int
    parameters: int
    bytes: int
    kept: str = ""


@dataclass(frozen=True)
class Formats(Table):
    """The formats of a model's parameters under a plan. `held`: a `vlmkit.rows.Row` for each."""

    plan: object = field(repr=False)
    held: tuple = field(repr=False)
    found = "found"

    @property
    def rows(self):
        """A ComponentRow for each component that the model has."""
        own = {c: [row for row in self.held if row.component == c] for c in COMPONENTS}
        return tuple(_component_row(c, self.plan[c], rows) for c, rows in own.items() if rows)

    @property
    def total(self):
        """Bytes of all parameters, with their quantization states."""
        return sum(row.bytes for row in self.held)

    def table(self):
        """A pandas DataFrame with a row for each component that the model has."""
        import pandas as pd

        columns = ["component", "asked", "found", "modules", "parameters", "bytes", "kept"]
        rows = [[getattr(row, c) for c in columns] for row in self.rows]
        table = pd.DataFrame(rows, columns=columns).set_index("component")
        return table.rename(columns={"found": self.found})

    def left_alone(self):
        """A pandas DataFrame of what the plan asks to quantize and what is not quantized: by
        component and kind of parameter, with the reason where the kind is none, and the bytes,
        most first."""
        import pandas as pd

        totals = {}
        for row in self.held:
            if FORMATS[row.asked].quantized and row.format != row.asked:
                key = (row.component, row.kind, row.note, row.format)
                count, size = totals.get(key, (0, 0))
                totals[key] = (count + row.parameters, size + row.bytes)
        columns = ["component", "kind", "why", "format", "parameters", "bytes"]
        rows = [(*key, *totals[key]) for key in sorted(totals, key=lambda key: -totals[key][1])]
        return pd.DataFrame(rows, columns=columns).set_index("component")

    def _text_table(self):
        table = self.table().drop(columns="kept")
        table["parameters"] = table["parameters"].map("{:,}".format)
        table.insert(4, "MB", (table.pop("bytes") / MEGABYTE).map("{:.2f}".format))
        return table

    def _remarks(self):
        yield f"total {self.total / MEGABYTE:.2f} MB (1 MB = 10^6 bytes)"
        others = [f"{row.component} {row.kept}" for row in self.rows if row.kept]
        if others:
            yield "in other formats, in MB:"
        for text in others:
            yield textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="    ")


class Preview(Formats):
    """What loading under a plan will give, in bytes that are predicted to the last one."""

    found = "gets"


class Audit(Formats):
    """The result of an audit that found no difference: what every parameter is held in."""


def _component_row(component, asked, rows):
    others = {}  # format -> what has it -> bytes
    for row in rows:
        if row.format != asked:
            what = f"{row.kind} ({row.note})" if row.note else row.kind
            sizes = others.setdefault(row.format, {})
            sizes[what] = sizes.get(what, 0) + row.bytes
    kept = "; ".join(f"{name}: {_list(sizes)}" for name, sizes in others.items())
    formats = list(dict.fromkeys(row.format for row in rows))
    return ComponentRow(
        component,
        asked,
        " + ".join(sorted(formats, key=lambda f: f != asked)),
        len({row.module for row in rows}),
        sum(row.parameters for row in rows),
        sum(row.bytes for row in rows),
        kept,
    )


def _list(sizes):
    """{what: bytes} as "what MB, what MB", most first."""
    most_first = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{what} {_in_megabytes(size)}" for what, size in most_first)


def _in_megabytes(size):
    if size < MEGABYTE / 2000:
        return "<0.001"
    return f"{size / MEGABYTE:.3f}" if size < MEGABYTE / 10 else f"{size / MEGABYTE:.2f}"
