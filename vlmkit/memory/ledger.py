"""Ledgers: bytes by component and by kind, their sums, and two ledgers side by side."""

from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.rows import KINDS, STATE, STORED, sums
from vlmkit.tables import Table
from vlmkit.units import MEGABYTE

BUFFER = "buffer"
ADAPTER, UPCAST = "adapter", "float32 upcast"
GRADIENT, OPTIMIZER = "gradient", "optimizer state"
CACHE, INPUT, ACTIVATION = "kv cache", "input", "activation"
GATHERED = "gathered weights"
ROUNDING, UNUSED = "allocator rounding", "allocator unused"
ALL_KINDS = (
    *KINDS, STORED, STATE, BUFFER, ADAPTER, UPCAST, GRADIENT, OPTIMIZER, CACHE, INPUT, GATHERED,
    ACTIVATION, ROUNDING, UNUSED,
)  # fmt: skip
"""What bytes are used for, in the order of tables: the kinds of parameters, then the rest."""

BOUNDED = (GATHERED, ACTIVATION, ROUNDING, UNUSED)
"""Kinds that a prediction knows within some percent. It knows the others to the byte."""


@dataclass(frozen=True)
class Ledger(Table):
    """Bytes of a model, and of what it needs to run or to be trained.

    It has `total`, `by_component` and `by_kind` (dicts of bytes), `entries` (Rows), and `notes`:
    sentences on how the less obvious bytes were counted.
    """

    title: str
    entries: tuple = field(repr=False)
    notes: tuple = field(default=(), repr=False)

    @property
    def total(self):
        """All bytes."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def by_component(self):
        """Bytes of each component that has any, in the order of `vlmkit.COMPONENTS`."""
        return sums(self.entries, "component", COMPONENTS)

    @property
    def by_kind(self):
        """Bytes of each kind: linear weights, embeddings, quantization state, kv cache, …"""
        return sums(self.entries, "kind", ALL_KINDS)

    @property
    def bounded(self):
        """Bytes that are bounded, not exact: activations, and what an allocator adds."""
        return sum(entry.bytes for entry in self.entries if entry.kind in BOUNDED)

    def table(self):
        """A pandas DataFrame of bytes: a row for each component, a column for each kind, sums."""
        import pandas as pd

        kinds = list(self.by_kind)
        rows = {
            component or "unknown": [
                sum(e.bytes for e in self.entries if (e.component, e.kind) == (component, kind))
                for kind in kinds
            ]
            for component in self.by_component
        }
        table = pd.DataFrame.from_dict(rows, orient="index", columns=kinds)
        table["total"] = table.sum(axis=1)
        table.loc["total"] = table.sum(axis=0)
        return table

    def _text_table(self):
        return (self.table() / MEGABYTE).map("{:,.3f}".format)

    def _headline(self):
        return f"{self.title}: {self.total / MEGABYTE:,.2f} MB (1 MB = 10^6 bytes)"

    def _remarks(self):
        bounded = [kind for kind in self.by_kind if kind in BOUNDED]
        if bounded:
            yield f"Bounded, not exact: {', '.join(bounded)}. The rest is to the byte."
        yield from self.notes


def compare(predicted, measured):
    """Two Ledgers side by side: a pandas DataFrame with a row for each component and kind.

    The columns are the bytes `predicted` and `measured`, their `difference` (measured minus
    predicted, 0 for a perfect prediction), and `because`: the names of the entries that differ
    most, if the row differs.
    """
    import pandas as pd

    sides = [_by_row(predicted), _by_row(measured)]
    components = (*COMPONENTS, None)
    keys = sorted(
        sides[0].keys() | sides[1].keys(),
        key=lambda key: (components.index(key[0]), ALL_KINDS.index(key[1])),
    )
    rows = []
    for key in keys:
        ours, theirs = (side.get(key, {}) for side in sides)
        a, b = sum(ours.values()), sum(theirs.values())
        rows.append((a, b, b - a, _gaps(ours, theirs) if a != b else ""))
    index = pd.MultiIndex.from_tuples(
        [(component or "unknown", kind) for component, kind in keys], names=["component", "kind"]
    )
    return pd.DataFrame(
        rows, index=index, columns=["predicted", "measured", "difference", "because"]
    )


def _by_row(ledger):
    rows = {}
    for entry in ledger.entries:
        row = rows.setdefault((entry.component, entry.kind), {})
        row[entry.name] = row.get(entry.name, 0) + entry.bytes
    return rows


def _gaps(ours, theirs, most=3):
    """The entries that differ most between two {name: bytes}, in words."""
    gaps = {name: theirs.get(name, 0) - ours.get(name, 0) for name in {**ours, **theirs}}
    gaps = sorted((item for item in gaps.items() if item[1]), key=lambda item: -abs(item[1]))
    words = [f"{name} {gap:+,}" for name, gap in gaps[:most]]
    more = f" and {len(gaps) - most} more" if len(gaps) > most else ""
    return ", ".join(words) + more
