"""A case: a config, what it will make of a model, and what the rules ask of the two."""

import re
from dataclasses import dataclass
from functools import cached_property

from vlmkit import COMPONENTS
from vlmkit.layout import outermost
from vlmkit.linting.fates import keepers, why_unusable
from vlmkit.linting.findings import MEGABYTE, Finding
from vlmkit.plan import Plan
from vlmkit.rows import HEAD


@dataclass(frozen=True)
class Case:
    """What the rules look at.

    given: the config, a `Given`. fates: of `vlmkit.linting.fates`. modules: full names of all
    modules. stored: {parameter: format} of weights that are quantized already, else empty.
    overruled: the Given that transformers will not look at, or None.
    """

    given: object
    fates: tuple
    modules: tuple
    stored: dict
    overruled: object = None

    @cached_property
    def layers(self):
        """The fates of what bitsandbytes converts if it is let: the weights of Linear layers."""
        return [fate for fate in self.fates if fate.convertible]

    @property
    def patterns(self):
        """The skip list as it was given, without what transformers cannot read."""
        return [p for p in self.given.patterns or [] if why_unusable(p) is None]

    def finding(self, severity, code, message, remedy, fates=(), component=None):
        """A Finding about `fates`."""
        return Finding(
            severity,
            code,
            message,
            remedy,
            component,
            tuple(dict.fromkeys(fate.module for fate in fates)),
            sum(fate.parameters for fate in fates),
            sum(fate.bytes for fate in fates),
        )

    def names_for(self, layers):
        """The fewest entries of a skip list that keep `layers` and no other Linear layer: full
        module names, with one pattern for those that differ in a number alone."""
        inside = {fate.module for fate in layers}
        names = outermost(
            [f.module for f in layers], [f.module for f in self.layers if f.module not in inside]
        )
        patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
        exact = all(bool(keepers(f.module, patterns)) == (f.module in inside) for f in self.layers)
        return patterns if exact and len(patterns) < len(names) else names

    @cached_property
    def spared(self):
        """The components of which every Linear layer is kept, or was meant to be."""
        return {
            component
            for component in {fate.component for fate in self.layers}
            if all(f.kept_by or self.meant_by(f) for f in self.layers if f.component == component)
        }

    def meant_by(self, fate):
        """The entries that do not keep a layer and read as if they were to."""
        return [p for p in self.patterns if p not in fate.kept_by and reads_as(p, fate.module)]

    @property
    def starts(self):
        """Where the Linear layers are, the head aside: a full module name for each component."""
        parts = {}
        for fate in self.layers:
            if fate.kind != HEAD:
                parts.setdefault(fate.component, []).append(fate)
        return [self.names_for(layers)[0] for layers in parts.values()]

    def plan_that_keeps(self, *components):
        """A Plan of the same format, with `components` and what else is spared in bf16, as code."""
        kept = {*components, *self.spared}
        has = {fate.component for fate in self.layers}
        formats = {c: "bf16" if c in kept else self.given.format for c in COMPONENTS if c in has}
        return f"vk.{Plan(**formats)!r}"


def reads_as(pattern, name):
    """Whether one who takes `pattern` for a substring, or for a regular expression that is looked
    for anywhere, would think that it covers the module `name`."""
    return bool(pattern.strip(".")) and (pattern in name or re.search(pattern, name) is not None)


def titled(component):
    return component or "what no rule knows"


def listed(names):
    return ", ".join(map(repr, names))


def size_of(fates):
    parameters = sum(fate.parameters for fate in fates)
    before, after = (sum(getattr(f, what) for f in fates) for what in ("plain_bytes", "bytes"))
    return (
        f"{parameters:,} parameters, {after / MEGABYTE:,.2f} MB instead of "
        f"{before / MEGABYTE:,.2f} MB"
    )
