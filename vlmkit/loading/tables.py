"""Tables of a model under a plan: what a load will give (Preview), and what it gave (Audit)."""

import textwrap
from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.formats import FORMATS

MEGABYTE = 10**6


@dataclass(frozen=True)
class Held:
    """One parameter as it is held, or will be: its row of the layout, format, count and bytes (with
    its quantisation state)."""

    row: object
    format: str
    parameters: int
    bytes: int


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
class Table:
    """A row per component, made of `held`, an entry per parameter."""

    plan: object = field(repr=False)
    held: tuple = field(repr=False)
    found = "found"

    @property
    def rows(self):
        """A ComponentRow for each component that the model has."""
        own = {c: [h for h in self.held if h.row.component == c] for c in COMPONENTS}
        return tuple(_row(c, self.plan[c], held) for c, held in own.items() if held)

    @property
    def total(self):
        """Bytes of all parameters, with their quantisation states."""
        return sum(held.bytes for held in self.held)

    def table(self):
        """A pandas DataFrame with a row for each component that the model has."""
        import pandas as pd

        columns = ["component", "asked", "found", "modules", "parameters", "bytes", "kept"]
        rows = [[getattr(row, c) for c in columns] for row in self.rows]
        table = pd.DataFrame(rows, columns=columns).set_index("component")
        return table.rename(columns={"found": self.found})

    def left_alone(self):
        """A pandas DataFrame of what the plan asks to be quantised and is not: by component and
        kind of parameter, with the reason where the kind is none, and the bytes, most first."""
        import pandas as pd

        sums = {}
        for held in self.held:
            row = held.row
            if FORMATS[row.asked].quantized and held.format != row.asked:
                key = (row.component, row.kind, row.note, held.format)
                count, size = sums.get(key, (0, 0))
                sums[key] = (count + held.parameters, size + held.bytes)
        columns = ["component", "kind", "why", "format", "parameters", "bytes"]
        rows = [(*key, *sums[key]) for key in sorted(sums, key=lambda key: -sums[key][1])]
        return pd.DataFrame(rows, columns=columns).set_index("component")

    def _text_table(self):
        table = self.table()
        table["parameters"] = table["parameters"].map("{:,}".format)
        table.insert(4, "MB", (table.pop("bytes") / MEGABYTE).map("{:.2f}".format))
        return table.rename(columns={"kept": "besides (MB)"})

    def __str__(self):
        table = self._text_table()
        besides = [f"{c} {text}" for c, text in table.pop("besides (MB)").items() if text]
        lines = [
            table.to_string(),
            f"total {self.total / MEGABYTE:.2f} MB (1 MB = 10^6 bytes)",
            *(["besides, in MB:"] if besides else ()),
            *(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="    ")
              for text in besides),
        ]  # fmt: skip
        return "\n".join(lines)

    def _repr_html_(self):
        text = self._text_table().to_html()
        return f"{text}<p>total {self.total / MEGABYTE:.2f} MB (1 MB = 10<sup>6</sup> bytes)</p>"


class Preview(Table):
    """What loading under a plan will give, in bytes that are predicted to the last one."""

    found = "gets"


class Audit(Table):
    """The result of an audit that found no difference: what every parameter is held in."""


def _row(component, asked, held):
    others = {}  # format -> what is held in it -> bytes
    for h in held:
        if h.format != asked:
            what = f"{h.row.kind} ({h.row.note})" if h.row.note else h.row.kind
            sizes = others.setdefault(h.format, {})
            sizes[what] = sizes.get(what, 0) + h.bytes
    kept = "; ".join(f"{name}: {_list(sizes)}" for name, sizes in others.items())
    formats = list(dict.fromkeys(h.format for h in held))
    return ComponentRow(
        component,
        asked,
        " + ".join(sorted(formats, key=lambda f: f != asked)),
        len({h.row.module for h in held}),
        sum(h.parameters for h in held),
        sum(h.bytes for h in held),
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
