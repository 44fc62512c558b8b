"""What rules look at, a `Context`, and what a rule is: a `Rule`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from vlmkit import COMPONENTS
from vlmkit.backend.converting import skip_list
from vlmkit.linting.findings import Finding
from vlmkit.linting.methods import tag
from vlmkit.plan import Plan
from vlmkit.rows import HEAD
from vlmkit.units import MEGABYTE


@dataclass(frozen=True)
class Context:
    """What the rules look at: a config, and what it makes of a model.

    given: the config, a `Given`. verdicts: of `vlmkit.linting.verdicts`. modules: {full name of a
    module: names of its classes}. stored: {parameter: format} of weights that are already
    quantized.
    overruled: the Given that transformers ignores, or None.
    """

    given: object
    verdicts: tuple
    modules: dict
    stored: dict
    overruled: object = None

    def entries_that_keep(self, module, entries):
        """Those of `entries`, as they are read, that keep the module of this full name."""
        keeps, classes = self.given.method.keeps, self.modules.get(module, ())
        return tuple(entry for entry in entries if keeps(entry, module, classes))

    @cached_property
    def layers(self):
        """The verdicts on the weights that the method can convert: of Linear layers, mostly."""
        return [row for row in self.verdicts if row.convertible]

    @cached_property
    def effects(self):
        """(entry, the layers that it keeps, those that it only seems to keep) for each entry. It
        seems to keep what contains it: one takes an entry for a substring, or for an expression
        that is searched for anywhere in a name."""
        found = []
        for entry in dict.fromkeys(self.given.usable or ()):
            kept = [row for row in self.layers if entry in row.kept_by]
            missed = [
                row
                for row in self.layers
                if entry not in row.kept_by
                and entry.strip(".")
                and (plain(entry) in row.module or _found(plain(entry), row.module))
            ]
            if kept:  # then a name counts only if the entry is a whole part of it
                missed = [row for row in missed if f".{plain(entry)}." in f".{row.module}."]
            found.append((entry, kept, missed))
        return found

    @cached_property
    def spared(self):
        """The components whose Linear layers are all kept, or seem to be."""
        spared = {row.name for _, _, missed in self.effects for row in missed}
        spared |= {row.name for row in self.layers if row.kept_by}
        exposed = {row.component for row in self.layers if row.name not in spared}
        return {row.component for row in self.layers} - exposed

    @property
    def places(self):
        """Full names of modules: where each component has its Linear layers, without the head."""
        layers = [row for row in self.layers if row.kind != HEAD]
        components = dict.fromkeys(row.component for row in layers)
        return [self.entries_for([r for r in layers if r.component == c])[0] for c in components]

    def entries_for(self, layers):
        """The fewest entries that keep `layers` and no other Linear layer: full module names, or
        one expression for names that differ in a number only."""
        inside = {row.module for row in layers}
        if self.given.method.syntax == "tag":
            return list(dict.fromkeys(tag(row.module) for row in layers))
        others = [row.module for row in self.layers if row.module not in inside]
        names = skip_list([row.module for row in layers], others)
        short = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
        if self.given.method.syntax == "re":  # an expression, except for a single layer
            names, short = [[self._below(n, n in inside) for n in some] for some in (names, short)]
        kept = {row.module for row in self.layers if self.entries_that_keep(row.module, short)}
        return short if kept == inside and len(short) < len(names) else names

    @staticmethod
    def _below(name, layer):
        parts = (r"\d+" if part == "*" else re.escape(part) for part in name.split("."))
        return name if layer else "re:" + r"\.".join(parts) + r"(\.|$)"

    @cached_property
    def repaired(self):
        """The list to paste, in place of the config's own: it keeps what is kept now, what an entry
        only seems to keep, every component but the language model, and the head. None for a method
        without a list."""
        if not self.given.method.key or not any(row.quantized for row in self.layers):
            return None
        missed = {row.name for _, _, rows in self.effects for row in rows}
        wanted = [
            row
            for row in self.layers
            if row.kept_by
            or row.name in missed
            or row.kind == HEAD
            or row.component not in ("language_model", None)
        ]
        return self.entries_for(wanted)

    def plan_that_keeps(self, components):
        """Code of a Plan with the config's format that leaves in bf16 these components, and those
        that the skip list spares."""
        kept, has = {*components, *self.spared}, {row.component for row in self.layers}
        formats = {c: "bf16" if c in kept else self.given.format for c in COMPONENTS if c in has}
        return f"vk.{Plan(**formats)!r}"


@dataclass(frozen=True)
class Rule:
    """One kind of mistake.

    title: the severity and the code, as a finding shows them.
    look: a function of a Context. It yields a dictionary for each finding: `rows`, the verdicts
        that the finding is about, and every other word that the texts need.
    message, remedy: what happens, and what to do next, with {words}.
    """

    title: str
    look: Callable
    message: str
    remedy: str

    def finding(self, context, rows=(), severity=None, modules=(), **words):
        """A Finding about `rows`, or about `modules` without a row."""
        usual, code = self.title.split(": ")
        modules = modules or tuple(dict.fromkeys(row.module for row in rows))
        components = {row.component for row in rows}
        parameters, size = sum(row.parameters for row in rows), sum(row.bytes for row in rows)
        words = {
            "given": context.given,
            "overruled": context.overruled,
            "skip": context.given.method.key,
            "method": context.given.method,
            "modules": modules,
            "names": listed(modules),
            "count": len(rows),
            "first": rows[0] if rows else None,
            "stored": context.stored.get(rows[0].name) if rows else None,
            "entries": listed(entry for row in rows for entry in row.kept_by),
            "parameters": parameters,
            "MB": size / MEGABYTE,
            "share": size / max(1, sum(row.bytes for row in context.verdicts)),
            "size": size_of(rows),
            **words,
        }
        return Finding(
            severity or usual,
            code,
            self.message.format(**words),
            self.remedy.format(**words),
            components.pop() if len(components) == 1 else None,
            modules,
            parameters,
            size,
        )


def listed(names):
    """Names as Python writes the elements of a list, each of them once."""
    return ", ".join(map(repr, dict.fromkeys(names)))


def size_of(rows):
    """The size of parameters as they will be held, and as they are without quantization."""
    held, plain = (sum(getattr(r, a) for r in rows) for a in ("bytes", "bytes_unquantized"))
    return (
        f"{sum(row.parameters for row in rows):,} parameters, {held / MEGABYTE:,.2f} MB instead of "
        f"{plain / MEGABYTE:,.2f} MB"
    )


def layers_that(test, among="layers"):
    """A `look` for one finding about all the layers for which test(context, row) is true."""

    def look(context):
        rows = [row for row in getattr(context, among) if test(context, row)]
        return [{"rows": rows}] if rows else []

    return look


def when(test):
    """A `look` for one finding about the config, if test(context) is true."""
    return lambda context: [{}] if test(context) else []


def plain(entry):
    """An entry without the `re:` that marks a regular expression."""
    return entry.removeprefix("re:")


def _found(expression, name):
    try:
        return re.search(expression, name) is not None
    except re.error:  # a method that compares names can have an entry that is no expression
        return False
