"""What quantization damages: the tables of `vlmkit.sensitivity`, drawn."""

import textwrap
from itertools import cycle

from vlmkit.evaluation.statistics import CHANCE, mcnemar
from vlmkit.figures import style
from vlmkit.units import MEGABYTE

SCORE_LABELS = {
    "weight_error": "relative weight error",
    "sqnr": "SQNR of outputs, dB",
    "fisher": "Fisher × squared change, nats",
    "kl": "one-layer KL, nats",
}


def damage(table, worst=None, ax=None):
    """A heat map of scopes (down) × formats (across).

    A cell holds the change in right answers in percentage points, and below it the 95% interval of
    this change. The cell is bold and framed where the exact paired test (`mcnemar`) finds a change.

    table: DataFrame with a row per scope and format, and columns scope, format, difference, low,
        high (from -1 to 1), regressions and fixes, as `vlmkit.sensitivity.sweep` returns. The map
        keeps the order of the table. A cell without a row stays empty.
    worst: the loss in points at the end of the color scale, so that several maps can share a scale;
        by default the largest loss in the table.

    The color follows the square root of the loss, so that one point can be told from none.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    scopes, formats = _in_order(table)
    labels = 1.2 + 0.075 * max(map(len, scopes))  # inches, with those of the color scale
    ax = style.axes_of(ax, labels + 1.05 * len(formats), 1.1 + 0.55 * len(scopes))
    loss = np.full((len(scopes), len(formats)), np.nan)
    for row in table.itertuples():
        loss[scopes.index(row.scope), formats.index(row.format)] = -100 * row.difference
    highest = max(1.0, np.nanmax(loss)) if worst is None else worst
    # One hue, darker with the loss: readable with any color vision and in print without color.
    shown = ax.imshow(
        np.clip(loss, 0, None), cmap="Blues", norm=PowerNorm(0.5, 0, highest), aspect="auto"
    )
    for row in table.itertuples():
        x, y = formats.index(row.format), scopes.index(row.scope)
        certain = mcnemar(row.regressions, row.fixes) < CHANCE
        color = "white" if shown.norm(max(0, -100 * row.difference)) > 0.55 else "black"
        look = {"ha": "center", "color": color, "weight": "bold" if certain else "normal"}
        ax.text(x, y - 0.02, _points(row.difference), va="bottom", fontsize=10, **look)
        interval = f"[{_points(row.low)}, {_points(row.high)}]"
        ax.text(x, y + 0.06, interval, va="top", fontsize=7.5, **look)
        if certain:
            frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, lw=1.6)
            ax.add_patch(frame).set_edgecolor(style.VERMILION)
    ax.set_xticks(range(len(formats)), [textwrap.fill(name, 11) for name in formats])
    ax.set_yticks(range(len(scopes)), scopes)
    ax.tick_params(length=0)
    ax.figure.colorbar(shown, ax=ax, pad=0.02).set_label("points lost")
    return style.finish(ax, grid=None, hide=ax.spines)


def damage_by_bytes(table, ax=None):
    """The change in right answers, in percentage points with 95% intervals, against the bytes
    saved, in MB = 10^6 bytes on a logarithmic axis. Each scope is a line, each format a shape.

    table: as for `damage`, with the column bytes_saved as well, greater than 0.
    """
    from matplotlib.ticker import LogLocator

    ax = style.axes_of(ax, 7.2, 3.6)
    ax.axhline(0, color="black", lw=0.8)
    shapes = dict(zip(dict.fromkeys(table["format"]), cycle("o^sDvPX"), strict=False))
    for number, (scope, line) in enumerate(table.groupby("scope", sort=False)):
        line = line.sort_values("bytes_saved")
        color = style.COMPONENT_COLORS.get(scope, style.mark(number)[0])
        x = line["bytes_saved"] / MEGABYTE
        columns = (line[n] for n in ("difference", "low", "high"))
        style.draw_intervals(ax, x, *columns, color=color, capsize=2, label=scope)
        for format, *place in zip(line["format"], x, 100 * line["difference"], strict=True):
            ax.plot(*place, shapes[format], color=color)
    for format, shape in shapes.items():
        ax.plot([], [], shape, color=style.GRAY, label=format)
    style.use_log_x(ax)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.set(xlabel="MB saved (logarithmic)", ylabel="right answers, change in points")
    return style.finish(ax, legend={"loc": "lower left"})


def layer_damage(table, ax=None):
    """The divergence that each scope causes alone, on a logarithmic axis.

    Each scope is a row in the color of its component, and each format a shape. The change in right
    answers, in percentage points, stands beside the format that causes the largest divergence.

    table: DataFrame with columns scope, format, kl and difference, as `vlmkit.sensitivity.sweep`
        returns. The first scope is on top. A divergence of 0 is not drawn.
    """
    scopes, formats = _in_order(table)
    ax = style.axes_of(ax, 7.2, 1 + 0.27 * len(scopes))
    shapes = {name: style.mark(number)[1] for number, name in enumerate(formats)}
    seen = table[table["kl"] > 0]
    left = seen["kl"].min() / 2
    for scope, rows in seen.groupby("scope", sort=False):
        worst = rows.loc[rows["kl"].idxmax()]
        y, color = scopes.index(scope), style.COMPONENT_COLORS.get(_component(worst), style.GRAY)
        ax.plot([left, worst["kl"]], [y, y], color=color, lw=5, alpha=0.35, solid_capstyle="butt")
        text = f"{_points(worst['difference'])} points"
        style.write(ax, text, (worst["kl"], y), (8, 0), va="center", fontsize=8)
        for row in rows.itertuples():
            shape = shapes[row.format]
            ax.plot([row.kl], [y], shape, color=color, markeredgecolor="black", markersize=7)
    for name, shape in shapes.items():
        ax.plot([], [], shape, color="white", markeredgecolor="black", label=name)
    ax.set_xscale("log")
    ax.set_xlim(left, 10 * seen["kl"].max())  # leaves room for the texts
    ax.set_xlabel("KL divergence, nats a token (logarithmic)")
    style.label_rows(ax, scopes)
    return style.finish(ax, grid="x", hide=("top", "right", "left"), legend=style.BESIDE)


def scores_against_damage(table, correlation, damage="kl_true"):
    """Each score of a layer against the layer's true damage. Returns the array of Axes.

    Each score has a panel with a dot per scope, in the color of its component, and the rank
    correlation with its interval as the title.

    table: DataFrame of one format with a column per score, the column `damage`, which is drawn on a
        logarithmic axis, and scope or component.
    correlation: DataFrame with columns score, spearman, low and high, as
        `vlmkit.sensitivity.correlation` returns for that format. Its scores are drawn.
    """
    from matplotlib import pyplot as plt

    size = (2.7 * len(correlation), 2.9)
    _, axes = plt.subplots(1, len(correlation), figsize=size, sharey=True, layout="constrained")
    components = {}
    for ax, found in zip(axes, correlation.itertuples(), strict=True):
        for _, row in table.iterrows():
            component = _component(row)
            color = style.COMPONENT_COLORS.get(component, style.GRAY)
            (dot,) = ax.plot([row[found.score]], [row[damage]], "o", color=color, markersize=5)
            components.setdefault(component, dot)
        interval = f"{found.spearman:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-", "−")
        ax.set_title(f"Spearman {interval}", fontsize=9)
        ax.set_xlabel(SCORE_LABELS.get(found.score, found.score))
        if found.score in ("fisher", "kl"):
            ax.set_xscale("log")
        if found.score == "sqnr":
            ax.invert_xaxis()  # in every panel, damage grows to the right
        ax.set_yscale("log")
        style.finish(ax)
    axes[0].set_ylabel("true damage: KL, nats")
    legend = {"loc": "outside lower center", "ncols": len(components), "frameon": False}
    axes[0].figure.legend(components.values(), components.keys(), **legend)
    return axes


def _in_order(table):
    """The scopes and the formats of a table, each once, in the table's order."""
    return [list(dict.fromkeys(table[name])) for name in ("scope", "format")]


def _component(row):
    return row["component"] if "component" in row else row["scope"].partition(":")[0]


def _points(share):
    """A difference of shares in percentage points, with a minus sign as wide as the plus."""
    value = round(100 * share, 1) + 0.0  # no minus before zero
    return f"{value:+.1f}".replace("-", "−") if value else "0.0"
