"""Layers and budgets: what `vlmkit.sensitivity` says of layers, and `vlmkit.planner` of plans."""

from vlmkit.figures.colors import BLACK, COMPONENT_COLORS, GRAY, MARKS
from vlmkit.figures.damage import points

WORDS = {
    "weight_error": "relative weight error",
    "sqnr": "SQNR of outputs, dB",
    "fisher": "Fisher × squared change, nats",
    "kl": "one-layer KL, nats",
}


def layer_damage(table, ax=None):
    """The divergence that each scope alone causes, on a logarithmic axis: a row per scope, in the
    color of its component, and a mark per format; the change in right answers, in percentage
    points, is written beside the mark of the format that does most.

    table: DataFrame with columns scope, format, kl and difference, as `vlmkit.sensitivity.sweep`
    returns, from top to bottom in that order. A divergence of 0 is not drawn.
    """
    from matplotlib import pyplot as plt

    scopes, formats = (list(dict.fromkeys(table[name])) for name in ("scope", "format"))
    if ax is None:
        _, ax = plt.subplots(figsize=(7.2, 1 + 0.27 * len(scopes)), layout="constrained")
    seen = table[table["kl"] > 0]
    left = seen["kl"].min() / 2
    for scope, rows in seen.groupby("scope", sort=False):
        worst = rows.loc[rows["kl"].idxmax()]
        y, color = scopes.index(scope), _color(worst)
        ax.plot([left, worst["kl"]], [y, y], color=color, lw=5, alpha=0.35, solid_capstyle="butt")
        said = f"{points(worst['difference'])} points"
        place = (worst["kl"], y)
        ax.annotate(said, place, (8, 0), textcoords="offset points", va="center", fontsize=8)
        for row in rows.itertuples():
            mark = MARKS[formats.index(row.format) % len(MARKS)][1]
            ax.plot([row.kl], [y], mark, color=color, markeredgecolor="black", markersize=7)
    for number, name in enumerate(formats):
        mark = MARKS[number % len(MARKS)][1]
        ax.plot([], [], mark, color="white", markeredgecolor="black", label=name)
    ax.set_xscale("log")
    ax.set_yticks(range(len(scopes)), scopes)
    ax.set_xlim(left, 10 * seen["kl"].max())  # room for what is written
    ax.set(xlabel="KL divergence, nats a token (logarithmic)", ylim=(len(scopes) - 0.5, -0.5))
    ax.grid(axis="x", color="#dddddd")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    return ax


def scores_against_damage(table, correlation, damage="kl_true"):
    """Each score of a layer against its true damage: a panel per score, a dot per scope in the
    color of its component, the rank correlation with its interval above. Returns the Axes.

    table: DataFrame of one format with a column per score, `damage`, which is drawn on a
    logarithmic axis, and scope or component. correlation: DataFrame with columns score, spearman,
    low and high, as `vlmkit.sensitivity.correlation` returns for that format: its scores are drawn.
    """
    from matplotlib import pyplot as plt

    size = (2.7 * len(correlation), 2.9)
    _, axes = plt.subplots(1, len(correlation), figsize=size, sharey=True, layout="constrained")
    components = {}
    for ax, found in zip(axes, correlation.itertuples(), strict=True):
        for _, row in table.iterrows():
            color = _color(row)
            (dot,) = ax.plot([row[found.score]], [row[damage]], "o", color=color, markersize=5)
            components.setdefault(_component(row), dot)
        interval = f"{found.spearman:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-", "−")
        ax.set_title(f"Spearman {interval}", fontsize=9)
        ax.set_xlabel(WORDS.get(found.score, found.score))
        if found.score in ("fisher", "kl"):
            ax.set_xscale("log")
        if found.score == "sqnr":
            ax.invert_xaxis()  # to the right means more damage in every panel
        ax.set_yscale("log")
        ax.grid(color="#dddddd")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("true damage: KL, nats")
    legend = {"loc": "outside lower center", "ncols": len(components), "frameon": False}
    axes[0].figure.legend(components.values(), components.keys(), **legend)
    return axes


def frontier(table, column="accuracy", ax=None):
    """Plans against their size in MB = 10^6 bytes, on a logarithmic axis, with 95% intervals: the
    planned ones joined by a line, the uniform ones by a dashed line, with the names of their
    formats; those that round embeddings and head too are a line of their own.

    table: DataFrame with columns kind ("planned" or "uniform"), plan, bytes, and accuracy, low and
    high (from 0 to 1), or kl, kl_low and kl_high, as `Planner.frontier` returns. column:
    "accuracy", or "kl", in nats a token on a logarithmic axis, on which 0 is not drawn.
    """
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if ax is None:
        _, ax = plt.subplots(figsize=(7.6, 3.8), layout="constrained")
    low, high = {"accuracy": ("low", "high"), "kl": ("kl_low", "kl_high")}[column]
    scale, label = {
        "accuracy": (100, "right answers, %"),
        "kl": (1, "KL divergence, nats a token"),
    }[column]
    shown = table[table[column] > 0] if column == "kl" else table
    parts = shown["plan"].str.partition(", ")[[0, 2]]
    lines = parts[2].where(shown["kind"] == "uniform", "").radd(shown["kind"] + ", ")
    for number, (name, own) in enumerate(shown.groupby(lines.str.removesuffix(", "), sort=False)):
        own = own.sort_values("bytes").drop_duplicates("bytes")
        x, y = own["bytes"] / 1e6, scale * own[column]
        # Where few answers are wrong, a share may lie on the very end of its interval
        interval = [(y - scale * own[low]).clip(lower=0), (scale * own[high] - y).clip(lower=0)]
        style = {"color": MARKS[0][0], "marker": "o", "zorder": 3}
        if name != "planned":
            color, below = (GRAY, -9) if number else (BLACK, 4)
            style = {"color": color, "marker": "sD"[number % 2], "ls": "--", "lw": 1}
            for place in zip(x, y, parts[0][own.index], strict=True):
                said = place[2].removeprefix("uniform ")
                ax.annotate(said, place[:2], (5, below), textcoords="offset points", fontsize=7)
        ax.errorbar(x, y, interval, capsize=2, markersize=5, label=name, **style)
    if column == "kl":
        ax.set_yscale("log")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="MB of the whole model (logarithmic)", ylabel=label)
    ax.grid(color="#dddddd")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    return ax


def _component(row):
    return row["component"] if "component" in row else row["scope"].partition(":")[0]


def _color(row):
    return COMPONENT_COLORS.get(_component(row), GRAY)
