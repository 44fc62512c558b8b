"""What a model is made of and what it takes: parameters, bytes, seconds, cards that it fits on."""

from vlmkit import COMPONENTS
from vlmkit.catalog.gpus import GPUS
from vlmkit.figures import style
from vlmkit.units import GIGABYTE, MEGABYTE


def bytes_by_component(ledgers, ax=None):
    """A horizontal bar for each ledger, stacked by component, in MB = 10^6 bytes, with its total.

    ledgers: {label: Ledger of `vlmkit.memory`, or a dict of bytes by component}. The first is on
        top.
    """
    sizes = {
        label: {component: size / MEGABYTE for component, size in _by_component(ledger).items()}
        for label, ledger in ledgers.items()
    }
    ends = [f"{sum(parts.values()):.2f} MB" for parts in sizes.values()]
    return _stacked(sizes, ends, "MB (1 MB = 10^6 bytes)", ax)


def parameters_by_component(anatomies, ax=None):
    """A horizontal bar for each model: the share of parameters that each component has, and the
    number of all parameters.

    anatomies: {label: Anatomy of `vlmkit.anatomy`, or a dict of parameters by component}. The first
        is on top.
    """
    counts = {label: _by_component(anatomy) for label, anatomy in anatomies.items()}
    totals = {label: sum(parts.values()) for label, parts in counts.items()}
    shares = {
        label: {component: 100 * count / max(totals[label], 1) for component, count in part.items()}
        for label, part in counts.items()
    }
    ends = [_rounded(total) for total in totals.values()]
    return _stacked(shares, ends, "share of the parameters, %", ax)


def seconds(parts, ax=None):
    """A horizontal bar for each label, stacked by what the time was spent on, with its total.

    parts: {label: {kind: seconds}}, with at most three kinds. The first label is on top.
    """
    kinds = dict.fromkeys(kind for times in parts.values() for kind in times)
    colors = dict(zip(kinds, (style.SKY, style.VERMILION, style.GRAY), strict=False))
    ends = [f"{sum(times.values()):.2f} s" for times in parts.values()]
    return _stacked(parts, ends, "seconds", ax, colors)


def architecture(anatomy, ax=None):
    """A model as a row of squares, one for each component, in the order in which a picture passes
    them. The area of a square is the component's share of the parameters. Cross-attention is a
    square inside the language model.

    anatomy: an Anatomy of `vlmkit.anatomy`, or a dict of parameters by component.
    """
    from matplotlib.patches import Rectangle

    parameters = _by_component(anatomy)
    total = sum(parameters.values())
    inside = parameters.get("cross_attention", 0)
    ax = style.axes_of(ax, 7, 3.4)

    def square(left, side, component):
        color = style.COMPONENT_COLORS.get(component, style.BLACK)
        name = component or "unknown"
        ax.add_patch(Rectangle((left, -side / 2), side, side, facecolor=color, label=name))

    gap, left, flow = 0.28, 0.0, []
    for component in (*COMPONENTS, None):
        count = parameters.get(component)
        if not count or component == "cross_attention":
            continue
        text = f"{component or 'unknown'}\n{_rounded(count)}"
        around = inside if component == "language_model" else 0
        side = ((count + around) / total) ** 0.5
        square(left, side, component)
        if around:
            part = (inside / total) ** 0.5
            square(left + (side - part) / 2, part, "cross_attention")
            text += f"\n+ cross_attention {_rounded(inside)}"
        ax.text(left + side / 2, -0.56, text, ha="center", va="top", fontsize=9)
        if component in COMPONENTS[:-1]:
            flow.append((left, left + side))
        left += side + gap
    for (_, end), (start, _) in zip(flow, flow[1:], strict=False):
        ax.annotate("", (start - 0.02, 0), (end + 0.02, 0), arrowprops={"arrowstyle": "->"})
    ax.set(xlim=(-0.15, left - gap + 0.15), ylim=(-0.85, 0.52), aspect="equal")
    ax.set_axis_off()
    return ax


def what_fits(table, sizes=(8, 16, 24, 80), ax=None):
    """The GB that each model needs, on a logarithmic axis: a line for each model with a mark for
    each plan. A dashed line is the usable memory of a card: what is left of it fits.

    table: from `vlmkit.memory.fitting.fit`.
    sizes: the GB that the cards to show are sold with, if the table has such cards. Of cards that
        are sold with as much, the smallest is shown.

    The model that needs least is on top.
    """
    table = table[table["needed"].notna()]
    needed = table.pivot_table("needed", "model", "plan", "first").astype(float) / GIGABYTE
    needed = needed[list(dict.fromkeys(table["plan"]))]
    needed = needed.loc[needed.max(axis=1).sort_values(kind="stable").index]
    ends = {}
    for row in table.sort_values("memory").itertuples():
        sold = GPUS[row.gpu].gigabytes if row.gpu in GPUS else row.memory / GIGABYTE
        if sold in sizes:
            ends.setdefault(sold, row.usable / GIGABYTE)
    ax = style.axes_of(ax, 8, 1.4 + 0.33 * len(needed))
    for y, values in enumerate(needed.to_numpy()):
        ax.plot([values.min(), values.max()], [y, y], color=style.GRAY, linewidth=1.5, zorder=1)
    for plan, (shape, color) in zip(needed, style.PLAN_MARKS, strict=False):
        ax.plot(needed[plan], range(len(needed)), shape, color=color, label=plan, markersize=7)
    for size, end in ends.items():
        ax.axvline(end, color=style.GRAY, linestyle="--", linewidth=1, zorder=0)
        above = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 9}
        style.write(ax, f"{size:g} GB", (end, 1), (0, 3), **above)
    every = [*needed.min(), *needed.max(), *ends.values()]
    style.use_log_x(ax, base=2)
    ax.set_xlim(0.8 * min(every), 1.25 * max(every))
    ax.set_xlabel("GB needed (1 GB = 10^9 bytes); dashed: what is usable on a card")
    style.label_rows(ax, [str(model).rpartition("/")[2] for model in needed.index])
    ax.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return style.finish(ax, grid=None)


def _by_component(thing):
    return dict(getattr(thing, "by_component", thing))


def _rounded(count):
    """A number of parameters as papers write it: 61.8 k, 256 M, 7.06 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _stacked(sizes, ends, xlabel, ax, colors=style.COMPONENT_COLORS):
    """A horizontal bar for each label, stacked in the order of `colors`, with a text at its end.

    sizes: {label: {component, or another key of colors: length}}. ends: a text for each label.
    """
    known = [c for c in colors if any(parts.get(c) for parts in sizes.values())]
    rest = {c for parts in sizes.values() for c in parts if c not in colors}
    ax = style.axes_of(ax, 7, 1.1 + 0.45 * len(sizes))
    labels = list(sizes)
    lefts = [0.0] * len(labels)
    for component in (*known, *rest):
        widths = [parts.get(component, 0) for parts in sizes.values()]
        color = colors.get(component, style.BLACK)
        ax.barh(labels, widths, left=lefts, color=color, label=component or "unknown")
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for y, (left, end) in enumerate(zip(lefts, ends, strict=True)):
        style.write(ax, end, (left, y), (4, 0), va="center")
    ax.set(xlim=(0, 1.18 * max(lefts, default=1) or 1), xlabel=xlabel)
    ax.invert_yaxis()
    # From the right edge: long labels on the left make the Axes narrower than the legend.
    legend = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 4}
    return style.finish(ax, grid=None, legend=legend)
