"""What a model is made of and what it takes: parameters, bytes, seconds, cards that it fits on."""

from vlmkit import COMPONENTS
from vlmkit.figures.colors import BLACK, BLUE, COMPONENT_COLORS, GRAY, GREEN, PURPLE, SKY, VERMILION
from vlmkit.units import GIGABYTE, MEGABYTE


def bytes_by_component(ledgers, ax=None):
    """A horizontal bar for each ledger, stacked by component, in MB = 10^6 bytes, with its total.

    ledgers: {label: Ledger of `vlmkit.memory`, or a dict of bytes by component}. From top to
    bottom in that order.
    """
    bytes_of = {label: getattr(ledger, "by_component", ledger) for label, ledger in ledgers.items()}
    sizes = {
        label: {component: count / MEGABYTE for component, count in parts.items()}
        for label, parts in bytes_of.items()
    }
    ends = {label: f"{sum(parts.values()):.2f} MB" for label, parts in sizes.items()}
    ax = _stacked_by_component(sizes, ends, ax)
    ax.set_xlabel("MB (1 MB = 10^6 bytes)")
    return ax


def parameters_by_component(anatomies, ax=None):
    """A horizontal bar for each model: its components' shares of its parameters, and their number.

    anatomies: {label: Anatomy of `vlmkit.anatomy`, or a dict of parameters by component}. From top
    to bottom in that order.
    """
    parameters_of = {
        label: getattr(anatomy, "by_component", anatomy) for label, anatomy in anatomies.items()
    }
    totals = {label: sum(parts.values()) for label, parts in parameters_of.items()}
    shares = {
        label: {
            component: 100 * count / max(totals[label], 1) for component, count in parts.items()
        }
        for label, parts in parameters_of.items()
    }
    ax = _stacked_by_component(shares, {label: _rounded(n) for label, n in totals.items()}, ax)
    ax.set_xlabel("share of the parameters, %")
    return ax


def seconds(parts, ax=None):
    """A horizontal bar for each label, stacked by what the time went on, with its total.

    parts: {label: {what: seconds}}, of at most three kinds. From top to bottom in that order.
    """
    kinds = dict.fromkeys(kind for times in parts.values() for kind in times)
    colors = dict(zip(kinds, (SKY, VERMILION, GRAY), strict=False))
    ends = {label: f"{sum(times.values()):.2f} s" for label, times in parts.items()}
    ax = _stacked_by_component(parts, ends, ax, colors)
    ax.set_xlabel("seconds")
    return ax


def architecture(anatomy, ax=None):
    """A model as squares in the order in which a picture passes them, each as large in area as its
    component's share of the parameters; cross-attention stands inside the language model.

    anatomy: an Anatomy of `vlmkit.anatomy`, or a dict of parameters by component.
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    parameters = dict(getattr(anatomy, "by_component", anatomy))
    total = sum(parameters.values())
    inside = parameters.get("cross_attention", 0)
    order = [c for c in (*COMPONENTS, None) if parameters.get(c) and c != "cross_attention"]
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")

    def square(left, side, component):
        color = COMPONENT_COLORS.get(component, BLACK)
        name = component or "unknown"
        ax.add_patch(Rectangle((left, -side / 2), side, side, facecolor=color, label=name))

    gap, left, ends = 0.28, 0.0, []
    for component in order:
        count = parameters[component]
        size = count + (inside if component == "language_model" else 0)
        side = (size / total) ** 0.5
        square(left, side, component)
        text = f"{component or 'unknown'}\n{_rounded(count)}"
        if component == "language_model" and inside:
            part = (inside / total) ** 0.5
            square(left + (side - part) / 2, part, "cross_attention")
            text += f"\n+ cross_attention {_rounded(inside)}"
        ax.text(left + side / 2, -0.56, text, ha="center", va="top", fontsize=9)
        ends.append((left, left + side, component))
        left += side + gap
    flow = [end for end in ends if end[2] in COMPONENTS[:-1]]
    for before, after in zip(flow, flow[1:], strict=False):
        ax.annotate(
            "", (after[0] - 0.02, 0), (before[1] + 0.02, 0), arrowprops={"arrowstyle": "->"}
        )
    ax.set(xlim=(-0.15, left - gap + 0.15), ylim=(-0.85, 0.52), aspect="equal")
    ax.set_axis_off()
    return ax


PLAN_MARKS = (("o", BLACK), ("s", SKY), ("^", VERMILION), ("D", PURPLE), ("v", BLUE), ("P", GREEN))
"""A marker and a color for each plan, so that neither has to be told apart alone."""


def what_fits(table, sizes=(8, 16, 24, 80), ax=None):
    """A line for each model, with a mark for what it needs under each plan, on a logarithmic axis.
    What is left of a dashed line fits on a card of that size.

    table: from `vlmkit.memory.fitting.fit`. sizes: nominal memory in GB of the cards to show, as
    far as the table has them. The model that needs least is on top.
    """
    from matplotlib import pyplot as plt

    table = table[table["needed"].notna()]
    needed = table.pivot_table("needed", "model", "plan", "first").astype(float) / GIGABYTE
    needed = needed[list(dict.fromkeys(table["plan"]))]
    needed = needed.loc[needed.max(axis=1).sort_values(kind="stable").index]
    cards = table[table["memory"].isin([size * GIGABYTE for size in sizes])]
    ends = dict(zip(cards["memory"] / GIGABYTE, cards["usable"] / GIGABYTE, strict=True))
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 1.4 + 0.33 * len(needed)), layout="constrained")
    for y, values in enumerate(needed.to_numpy()):
        ax.plot([values.min(), values.max()], [y, y], color=GRAY, linewidth=1.5, zorder=1)
    for plan, (marker, color) in zip(needed, PLAN_MARKS, strict=False):
        ax.plot(needed[plan], range(len(needed)), marker, color=color, label=plan, markersize=7)
    for size, end in ends.items():
        ax.axvline(end, color=GRAY, linestyle="--", linewidth=1, zorder=0)
        above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        ax.annotate(f"{size:g} GB", (end, 1), (0, 3), ha="center", fontsize=9, **above)
    every = [*needed.min(), *needed.max(), *ends.values()]
    ax.set_xscale("log", base=2)
    ax.set_xlim(0.8 * min(every), 1.25 * max(every))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("GB needed (1 GB = 10^9 bytes); dashed: what is usable on a card")
    ax.set_yticks(range(len(needed)), [str(model).rpartition("/")[2] for model in needed.index])
    ax.set_ylim(len(needed) - 0.5, -0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return ax


def _rounded(count):
    """A number of parameters as papers write it: 61.8 k, 256 M, 7.06 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _stacked_by_component(sizes, ends, ax, colors=COMPONENT_COLORS):
    """A horizontal bar for each label, stacked by component (or what else `colors` names, in its
    order); `ends` is written behind it."""
    from matplotlib import pyplot as plt

    known = [c for c in colors if any(parts.get(c) for parts in sizes.values())]
    rest = {c for parts in sizes.values() for c in parts if c not in colors}
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 1.1 + 0.45 * len(sizes)), layout="constrained")
    labels = list(sizes)
    lefts = [0.0] * len(labels)
    for component in (*known, *rest):
        widths = [parts.get(component, 0) for parts in sizes.values()]
        color = colors.get(component, BLACK)
        ax.barh(labels, widths, left=lefts, color=color, label=component or "unknown")
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for y, (left, label) in enumerate(zip(lefts, labels, strict=True)):
        ax.annotate(ends[label], (left, y), (4, 0), textcoords="offset points", va="center")
    ax.set(xlim=(0, 1.18 * max(lefts, default=1) or 1))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    # From the right edge: long labels on the left leave the axes narrower than the legend.
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=9)
    return ax
