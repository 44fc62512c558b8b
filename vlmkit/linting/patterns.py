"""The entries of a skip list: which keep nothing, and which something else than they seem to."""

import difflib
import re

from vlmkit import COMPONENTS
from vlmkit.linting.case import listed, size_of, titled
from vlmkit.linting.fates import keepers
from vlmkit.linting.findings import ERROR, NOTE, WARNING, Finding


def patterns(case):
    """Entries that keep nothing, or not what they seem to be meant for."""
    for pattern in dict.fromkeys(case.patterns):
        kept = [fate for fate in case.layers if pattern in fate.kept_by]
        missed = [fate for fate in case.layers if pattern in case.meant_by(fate)]
        if kept:  # what else has it somewhere in its name counts only if it is a whole part of it
            missed = [fate for fate in missed if f".{pattern}." in f".{fate.module}."]
        if missed:
            yield _no_substring(case, pattern, kept, missed)
        elif not kept:
            yield _keeps_nothing(case, pattern)
        components = [c for c in (*COMPONENTS, None) if any(f.component == c for f in kept)]
        if len(components) > 1 and len(kept) < len(case.layers):
            counts = (f"{sum(f.component == c for f in kept)} in {titled(c)}" for c in components)
            yield case.finding(
                NOTE,
                "several-components",
                f"{pattern!r} keeps Linear layers of several components: {', '.join(counts)}. An "
                "entry is also compared with the end of each name.",
                "If only one of them is meant, write its full module name.",
                kept,
            )


def _no_substring(case, pattern, kept, missed):
    lost = [fate for fate in missed if fate.quantized]
    count = f"{len(kept) or 'none'} of the {len(kept) + len(missed)} Linear layers"
    text = f"{pattern!r} keeps {count} with it in their names, such as {missed[0].module}. "
    text += "An entry is matched from the start of a full name, or at its end, not in the middle. "
    text += f"{len(lost)} are quantized: {size_of(lost)}." if lost else "Other entries keep them."
    components = {fate.component for fate in missed}
    remedy = f"Write {listed(_covering(case, pattern, missed))}"
    if components <= case.spared:
        remedy += f", or plan it by component: {case.plan_that_keeps(*components)}"
    return case.finding(
        NOTE if not lost else WARNING if kept else ERROR,
        "not-a-substring",
        text,
        f"{remedy}.",
        lost or missed,
        components.pop() if len(components) == 1 else None,
    )


def _covering(case, pattern, missed):
    """Entries that keep all of `missed`, as close to `pattern` as can be."""
    names = {}
    for fate in missed:
        found = re.search(pattern, fate.module) or re.search(re.escape(pattern), fate.module)
        end = fate.module.find(".", found.end())
        names[fate.module[: end if end >= 0 else None]] = True
    for entries in ([*names] if len(names) <= 3 else None, [f".*{pattern}"], [f".*{pattern}[^.]*"]):
        if entries and all(keepers(fate.module, entries) for fate in missed):
            return entries
    return case.names_for(missed)


def _keeps_nothing(case, pattern):
    reached = [name for name in case.modules if name and keepers(name, [pattern])]
    if reached:
        more = f" and {len(reached) - 1} more" if len(reached) > 1 else ""
        return Finding(
            NOTE,
            "nothing-to-keep",
            f"{pattern!r} matches {reached[0]}{more}, and no Linear layer: bitsandbytes converts "
            "nothing else.",
            "It does no harm, and can be left out.",
            modules=tuple(reached),
        )
    near = _nearest(case, pattern)
    hint = f"Did you mean {near!r}?" if near else "If it is for another model, it does no harm."
    return Finding(
        WARNING,
        "matches-nothing",
        f"{pattern!r} matches no module of this model.",
        f"{hint} Its Linear layers are in {listed(case.starts)}.",
    )


def _nearest(case, pattern):
    """An entry that keeps something and looks like `pattern`, or None."""
    parts = pattern.split(".")
    ends = [".".join(parts[i:]) for i in range(1, len(parts))]  # under another name in the front
    for entry in filter(None, ends):
        if any(keepers(fate.module, [entry]) for fate in case.layers):
            return entry
    segments = {part: True for fate in case.layers for part in fate.module.split(".")}
    near = difflib.get_close_matches(pattern.strip(".*"), segments, n=1)
    if not near:
        return None
    like = [fate for fate in case.layers if near[0] in fate.module.split(".")]
    return _covering(case, re.escape(near[0]), like)[0]
