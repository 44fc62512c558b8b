"""What is lost when bits go: the tables of `vlmkit.sensitivity`, drawn."""

import textwrap
from itertools import cycle

from vlmkit.figures.colors import COMPONENT_COLORS, GRAY, MARKS, VERMILION


def damage(table, worst=None, ax=None):
    """A heat map of scopes (down) × formats (across): the change in right answers in percentage
    points, and below it its 95% interval; bold and framed where the interval leaves zero out.

    table: DataFrame with a row per scope and format, and columns scope, format, difference, low and
    high, from -1 to 1, as `vlmkit.sensitivity.sweep` returns. In the order of the table; a cell
    without a row stays empty. worst: the loss in points at the end of the scale, for several maps
    on one scale; by default the largest of the table.

    The scale grows with the square root, so that a loss of one point is told from none.
    """
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    scopes, formats = (list(dict.fromkeys(table[name])) for name in ("scope", "format"))
    if ax is None:
        size = (2.2 + 0.95 * len(formats), 1.1 + 0.55 * len(scopes))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    lost = np.full((len(scopes), len(formats)), np.nan)
    for row in table.itertuples():
        lost[scopes.index(row.scope), formats.index(row.format)] = -100 * row.difference
    highest = max(1.0, np.nanmax(lost)) if worst is None else worst
    # One hue: read by any color vision, and darker with the loss in print without color.
    shown = ax.imshow(
        np.clip(lost, 0, None), cmap="Blues", norm=PowerNorm(0.5, 0, highest), aspect="auto"
    )
    for row in table.itertuples():
        x, y = formats.index(row.format), scopes.index(row.scope)
        certain = row.low > 0 or row.high < 0
        color = "white" if shown.norm(max(0, -100 * row.difference)) > 0.55 else "black"
        style = {"ha": "center", "color": color, "weight": "bold" if certain else "normal"}
        ax.text(x, y - 0.02, points(row.difference), va="bottom", fontsize=10, **style)
        interval = f"[{points(row.low)}, {points(row.high)}]"
        ax.text(x, y + 0.06, interval, va="top", fontsize=6.5, **style)
        if certain:
            frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, lw=1.6)
            ax.add_patch(frame).set_edgecolor(VERMILION)
    ax.set_xticks(range(len(formats)), [textwrap.fill(name, 11) for name in formats])
    ax.set_yticks(range(len(scopes)), scopes)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(shown, ax=ax, pad=0.02)
    bar.set_label("points lost")
    return ax


def damage_by_bytes(table, ax=None):
    """The change in right answers, in percentage points with 95% intervals, against what is saved,
    in MB = 10^6 bytes on a logarithmic axis: a line for each scope, a shape for each format.

    table: as for `damage`, with the column bytes_saved as well, greater than 0.
    """
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    ax.axhline(0, color="black", lw=0.8)
    shapes = dict(zip(dict.fromkeys(table["format"]), cycle("o^sDvPX"), strict=False))
    for number, (scope, line) in enumerate(table.groupby("scope", sort=False)):
        line = line.sort_values("bytes_saved")
        color = COMPONENT_COLORS.get(scope, MARKS[number % len(MARKS)][0])
        x, y = line["bytes_saved"] / 1e6, 100 * line["difference"]
        intervals = [y - 100 * line["low"], 100 * line["high"] - y]
        ax.errorbar(x, y, intervals, color=color, capsize=2, label=scope)
        for format, *place in zip(line["format"], x, y, strict=True):
            ax.plot(*place, shapes[format], color=color)
    for format, shape in shapes.items():
        ax.plot([], [], shape, color=GRAY, label=format)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="MB saved (logarithmic)", ylabel="right answers, change in points")
    ax.grid(color="#dddddd")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower left", frameon=False, fontsize=9)
    return ax


def points(share):
    """A difference of shares in percentage points, with a sign that is as wide as a plus."""
    value = round(100 * share, 1) + 0.0  # no minus before zero
    return f"{value:+.1f}".replace("-", "−") if value else "0.0"
