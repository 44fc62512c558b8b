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

MEGABYTE = 10**6


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
    for label, points in formats.items():
        if isinstance(points, tuple):
            ax.plot(*points, "o", color=VERMILION)
            ax.annotate(label, points, (6, -4), textcoords="offset points", fontsize=9, va="top")
        else:
            ax.plot(*zip(*points, strict=True), "-s", color=SKY, markersize=4, label=label)
            ax.legend(loc="upper left", frameon=False, fontsize=9)
    ax.set(xlabel="bits of a weight, with its share of scales", ylabel="signal to noise, dB")
    ax.grid(color="#dddddd")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
