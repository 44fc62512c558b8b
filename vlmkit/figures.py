"""Figures: data in, Axes out.

Each function draws into the Axes it is given, or into a new figure, and returns the Axes. Nothing
global is changed, and the data can be read back from what was drawn.
"""

import textwrap

from vlmkit import COMPONENTS

# From Okabe and Ito's palette (Color Universal Design, 2008), made to be told apart with any colour
# vision. Not in print without colour: purple, green and grey are about as light as each other.
BLUE, ORANGE, PURPLE, GREEN, BLACK = "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#000000"
GREY = "#999999"
SKY, VERMILION = "#56B4E9", "#D55E00"  # not a component's: for parts of something else

COMPONENT_COLORS = dict(zip(COMPONENTS, (BLUE, ORANGE, PURPLE, GREEN, GREY), strict=True))
"""The colour of each component, the same in every figure."""

MEGABYTE, GIGABYTE = 10**6, 10**9


def questions(rows, answers=None, ax=None):
    """Pictures in a row, each with its question and answer below.

    rows: of a dataset of `vlmkit.tasks`, dicts with images (a list of PIL images), question and
    answer. answers: texts to show instead of the rows' own, a model's for example.
    """
    from matplotlib import pyplot as plt

    rows = list(rows)
    answers = [row["answer"] for row in rows] if answers is None else list(answers)
    widths = [len(row["images"]) for row in rows]
    gap = 0.25
    across = sum(widths) + gap * (len(rows) - 1)
    if ax is None:
        _, ax = plt.subplots(figsize=(1.7 * across, 2.6))
    left = 0
    for row, answer, width in zip(rows, answers, widths, strict=True):
        for place, image in enumerate(row["images"]):
            start = left + place
            ax.imshow(image, extent=(start, start + 0.97, 0, 1), interpolation="nearest")
        caption = "\n".join(
            textwrap.fill(line, 22 * width) for line in (row["question"], f"→ {answer}")
        )
        ax.text(left + width / 2, -0.06, caption, ha="center", va="top", fontsize=9)
        left += width + gap
    ax.set(xlim=(0, across), ylim=(0, 1), aspect="equal")
    ax.set_axis_off()
    return ax


def attention(image, weights, most=None, ax=None):
    """A picture in grey with a map of attention over it, in % for each patch, and a colour bar.

    image: anything that `vlmkit.images.read` takes. weights: array (rows, columns) of shares from 0
    to 1, stretched over the whole picture, such as `vlmkit.attention` gives. most: the share at the
    end of the scale, for several maps on one scale; by default the largest of the weights.
    """
    import numpy as np
    from matplotlib import pyplot as plt

    from vlmkit.images import read

    grey = np.asarray(read(image).convert("L"))
    percent = 100 * np.asarray(weights, dtype=float)
    highest = percent.max() if most is None else 100 * most
    if ax is None:
        _, ax = plt.subplots(figsize=(4, 3.3), layout="constrained")
    height, width = grey.shape
    whole = (0, width, height, 0)
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=whole, interpolation="nearest")
    # viridis is read by any colour vision, and gets lighter with the value in print without colour.
    laid_over = ax.imshow(
        percent,
        cmap="viridis",
        vmin=0,
        vmax=highest,
        alpha=0.7,
        extent=whole,
        interpolation="nearest",
    )
    bar = ax.figure.colorbar(laid_over, ax=ax, shrink=0.85)
    bar.set_label("attention to a patch, %")
    ax.set_axis_off()
    return ax


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
    colors = dict(zip(kinds, (SKY, VERMILION, GREY), strict=False))
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


def accuracy(scores, ax=None):
    """A dot for each accuracy in percent, with its 95% interval as a line through it.

    scores: {label: Scores of `vlmkit.evaluation`, or (accuracy, low, high) from 0 to 1}. From top
    to bottom in that order. Two whose intervals overlap widely may differ by chance.
    """
    from matplotlib import pyplot as plt

    points = {
        label: (score.accuracy, *score.interval) if hasattr(score, "interval") else tuple(score)
        for label, score in scores.items()
    }
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 0.9 + 0.35 * len(points)), layout="constrained")
    for y, (share, low, high) in enumerate(points.values()):
        ax.plot([100 * low, 100 * high], [y, y], color=BLUE, linewidth=2, solid_capstyle="butt")
        ax.plot([100 * share], [y], "o", color=BLUE, markersize=7)
    ax.set_yticks(range(len(points)), list(points))
    ax.set(xlabel="right answers, % (line: 95% interval)", ylim=(len(points) - 0.5, -0.5))
    ax.grid(axis="x", color="#dddddd")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def bits(rows, ax=None):
    """The bits of one number in several formats, a row each, by field.

    rows: {label: (sign, exponent, fraction)}, each a text of 0 and 1. From top to bottom in that
    order.
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    widest = max(len("".join(fields)) for fields in rows.values())
    if ax is None:
        _, ax = plt.subplots(figsize=(0.25 * widest + 0.8, 0.6 + 0.35 * len(rows)))
    colors = {"sign": GREY, "exponent": VERMILION, "fraction": SKY}
    for y, fields in enumerate(rows.values()):
        owners = [name for name, field in zip(colors, fields, strict=True) for _ in field]
        for x, (owner, bit) in enumerate(zip(owners, "".join(fields), strict=True)):
            label = owner if y == 0 and x == owners.index(owner) else "_"  # once in the legend
            box = Rectangle((x + 0.04, y - 0.42), 0.92, 0.84, alpha=0.5, label=label)
            ax.add_patch(box).set_facecolor(colors[owner])
            ax.text(x + 0.5, y, bit, ha="center", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlim=(0, widest), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    return ax


def error_by_bits(formats, ax=None):
    """What a format keeps of the weights, in dB of signal to noise, against what a weight costs.

    formats: {label: (bits of a weight with its share of scales, dB)}, drawn as a dot with its label
    beside it; or {label: [(bits, dB), ...]}, one format with more and fewer bits, drawn as a line.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    dots = [points[0] for points in formats.values() if isinstance(points, tuple)]
    for label, points in formats.items():
        if isinstance(points, tuple):
            crowded = any(0 < other - points[0] < 1 for other in dots)  # on the right
            side = {"ha": "right" if crowded else "left", "va": "bottom" if crowded else "top"}
            place = (-4, 2) if crowded else (5, -2)
            ax.plot(*points, "o", color=VERMILION)
            ax.annotate(label, points, place, textcoords="offset points", fontsize=9, **side)
        else:
            ax.plot(*zip(*points, strict=True), "-s", color=SKY, markersize=4, label=label)
            ax.legend(loc="upper left", frameon=False, fontsize=9)
    ax.set(xlabel="bits of a weight, with its share of scales", ylabel="signal to noise, dB")
    ax.grid(color="#dddddd")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


# Told apart by shape as well, since they are drawn on top of each other.
_MARKS = tuple(zip((VERMILION, SKY, BLACK, GREY, "#F0E442"), "os^Dv", strict=True))


def patches(image, grid, block=1, ax=None):
    """A picture under its grid × grid patches, framed in blocks of block × block; the empty patches
    that fill the last blocks are hatched.

    image: anything that `imshow` takes.
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    if ax is None:
        _, ax = plt.subplots(figsize=(3, 3), layout="constrained")
    blocks = -(-grid // block)
    ax.imshow(image, extent=(0, grid, grid, 0), interpolation="nearest")
    for y in range(blocks * block):
        for x in range(blocks * block):
            hatch = "////" if max(x, y) >= grid else None
            ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=GREY, hatch=hatch, lw=0.6))
    for y in range(blocks):
        for x in range(blocks):
            corner = (x * block, y * block)
            ax.add_patch(Rectangle(corner, block, block, fill=False, edgecolor=VERMILION, lw=1.8))
    ax.set(xlim=(-0.1, blocks * block + 0.1), ylim=(blocks * block + 0.1, -0.1), aspect="equal")
    ax.set_title(f"{blocks**2} visual tokens", fontsize=10)
    ax.set_axis_off()
    return ax


def learning(curves, window=30, ax=None):
    """Right answers during training against seconds, as a mean over the last `window` steps.

    curves: {label: DataFrame with a row per step and columns seconds and right, from 0 to 1}.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for number, (label, curve) in enumerate(curves.items()):
        color, mark = _MARKS[number % len(_MARKS)]
        smooth = 100 * curve["right"].rolling(window).mean()
        every = max(1, len(curve) // 8)
        ax.plot(curve["seconds"], smooth, color=color, marker=mark, markevery=every, label=label)
    ax.set(xlabel="seconds of training", ylabel="right answers, %", ylim=(0, 100))
    ax.grid(color="#dddddd")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    return ax


def accuracy_by_tokens(table, ax=None):
    """Right answers against the number of visual tokens, on a logarithmic axis: a line for each
    connector, with 95% intervals.

    table: DataFrame with columns connector, visual_tokens, and accuracy, low and high from 0 to 1.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    lines = list(table.groupby("connector", sort=False))
    for number, (connector, line) in enumerate(lines):
        line = line.sort_values("visual_tokens")
        color, mark = _MARKS[number % len(_MARKS)]
        # Side by side where several have as many tokens.
        x = line["visual_tokens"] * 1.05 ** (number - (len(lines) - 1) / 2)
        below, above = line["accuracy"] - line["low"], line["high"] - line["accuracy"]
        intervals = [100 * below, 100 * above]
        ax.errorbar(x, 100 * line["accuracy"], intervals, color=color, marker=mark, label=connector)
    ticks = sorted(set(table["visual_tokens"]))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set(xlabel="visual tokens", ylabel="right answers, %", ylim=(0, 100))
    ax.grid(color="#dddddd")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def accuracy_against(costs, scores, references=None):
    """Right answers of several models against what they cost, with 95% intervals: a panel for each
    cost (down) and each task (across). Returns the array of Axes.

    costs: DataFrame with a row per model and a column per cost. scores: {model: Scores of
    `vlmkit.evaluation`}, of the same tasks. references: the same for models without costs, drawn as
    dashed lines.
    """
    from matplotlib import pyplot as plt

    shares = {model: 100 * score.by_task for model, score in scores.items()}
    levels = {name: 100 * score.by_task["accuracy"] for name, score in (references or {}).items()}
    tasks = list(next(iter(shares.values())).index)
    size = (0.8 + 2.1 * len(tasks), 0.9 + 1.8 * len(costs.columns))
    _, axes = plt.subplots(
        nrows=len(costs.columns),
        ncols=len(tasks),
        figsize=size,
        sharex="row",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, cost in zip(axes, costs.columns, strict=True):
        # Side by side where several cost the same.
        apart = 0.025 * (costs[cost].max() - costs[cost].min() or 1)
        for ax, task in zip(row, tasks, strict=True):
            for name, level in levels.items():
                ax.axhline(level[task], color=GREY, ls="--", lw=1)
                ax.text(0.01, level[task] + 1, name, fontsize=7, transform=ax.get_yaxis_transform())
            for number, (model, share) in enumerate(shares.items()):
                color, mark = _MARKS[number % len(_MARKS)]
                middle, low, high = share.loc[task, ["accuracy", "low", "high"]]
                x = costs.loc[model, cost] + apart * (number - (len(shares) - 1) / 2)
                interval = [[middle - low], [high - middle]]
                ax.errorbar(x, middle, interval, color=color, marker=mark, ls="", label=model)
            ax.set(ylim=(-3, 105), xlabel=cost)
            ax.margins(x=0.12)
            ax.grid(color="#dddddd")
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("right answers, %")
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.set_title(task, fontsize=10)
    legend = {"loc": "outside upper center", "ncols": len(shares), "frameon": False}
    axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), **legend)
    return axes


PLAN_MARKS = (("o", BLACK), ("s", SKY), ("^", VERMILION), ("D", PURPLE), ("v", BLUE), ("P", GREEN))
"""A marker and a colour for each plan, so that neither has to be told apart alone."""


def what_fits(table, sizes=(8, 16, 24, 80), ax=None):
    """A line for each model, with a mark for what it needs under each plan, on a logarithmic axis.
    What is left of a dashed line fits on a card of that size.

    table: of `vlmkit.fitting.fit`. sizes: nominal memory in GB of the cards to show, as far as the
    table has them. The model that needs least is on top.
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
        ax.plot([values.min(), values.max()], [y, y], color=GREY, linewidth=1.5, zorder=1)
    for plan, (marker, color) in zip(needed, PLAN_MARKS, strict=False):
        ax.plot(needed[plan], range(len(needed)), marker, color=color, label=plan, markersize=7)
    for size, end in ends.items():
        ax.axvline(end, color=GREY, linestyle="--", linewidth=1, zorder=0)
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
