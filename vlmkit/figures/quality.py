"""How good a model or format is, with intervals, and what that costs."""

from itertools import cycle

from vlmkit.figures import style
from vlmkit.units import MEGABYTE


def accuracy(scores, ax=None):
    """A dot for each accuracy in percent, with its 95% interval as a line through the dot.

    scores: {label: Scores of `vlmkit.evaluation`, or (accuracy, low, high) from 0 to 1}. The first
        is on top. Two intervals are no test of a difference: see `vlmkit.evaluation.paired`.
    """
    shares = {
        label: (score.accuracy, *score.interval) if hasattr(score, "interval") else score
        for label, score in scores.items()
    }
    ax = style.axes_of(ax, 7, 0.9 + 0.35 * len(shares))
    for y, (share, low, high) in enumerate(shares.values()):
        ax.plot([100 * low, 100 * high], [y, y], style.BLUE, lw=2, solid_capstyle="butt")
        ax.plot([100 * share], [y], "o", color=style.BLUE, markersize=7)
    style.label_rows(ax, list(shares))
    ax.set_xlabel("right answers, % (line: 95% interval)")
    return style.finish(ax, grid="x", hide=("top", "right", "left"))


def learning(curves, window=30, ax=None):
    """Right answers during training against seconds, as a mean over the last `window` steps.

    curves: {label: DataFrame with a row per step and columns seconds and right, from 0 to 1}.
    """
    ax = style.axes_of(ax, 7, 3.2)
    for number, (label, curve) in enumerate(curves.items()):
        color, shape = style.mark(number)
        smooth = 100 * curve["right"].rolling(window).mean()
        every = max(1, len(curve) // 8)
        ax.plot(curve["seconds"], smooth, color=color, marker=shape, markevery=every, label=label)
    ax.set(xlabel="seconds of training", ylabel="right answers, %", ylim=(0, 100))
    return style.finish(ax, legend=style.BESIDE)


def accuracy_by_tokens(table, ax=None):
    """Right answers against the number of visual tokens, on a logarithmic axis: a line for each
    connector, with 95% intervals.

    table: DataFrame with columns connector, visual_tokens, and accuracy, low and high from 0 to 1.
    """
    ax = style.axes_of(ax, 4.5, 3.2)
    lines = list(table.groupby("connector", sort=False))
    for number, (connector, line) in enumerate(lines):
        line = line.sort_values("visual_tokens")
        color, shape = style.mark(number)
        # Side by side where several have the same number of tokens.
        x = line["visual_tokens"] * 1.05 ** (number - (len(lines) - 1) / 2)
        columns = (line[name] for name in ("accuracy", "low", "high"))
        style.draw_intervals(ax, x, *columns, color=color, marker=shape, label=connector)
    ticks = sorted(set(table["visual_tokens"]))
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set(xlabel="visual tokens", ylabel="right answers, %", ylim=(0, 100))
    return style.finish(ax)


def accuracy_against(costs, scores, references=None):
    """Right answers of several models against what they cost, with 95% intervals. Returns the array
    of Axes: a panel for each cost (down) and each task (across).

    costs: DataFrame with a row per model and a column per cost.
    scores: {model: Scores of `vlmkit.evaluation`}, all of the same tasks.
    references: the same for models without costs, each drawn as a line of its own dashes.
    """
    from matplotlib import pyplot as plt

    shares = {model: score.by_task for model, score in scores.items()}
    levels = {name: 100 * score.by_task["accuracy"] for name, score in (references or {}).items()}
    tasks = list(next(iter(shares.values())).index)
    _, axes = plt.subplots(
        nrows=len(costs.columns),
        ncols=len(tasks),
        figsize=(0.8 + 2.1 * len(tasks), 0.9 + 1.8 * len(costs.columns)),
        sharex="row",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, cost in zip(axes, costs.columns, strict=True):
        # Side by side where several cost the same, and nowhere else.
        apart = 0.05 * (costs[cost].max() - costs[cost].min() or 1)
        places = costs.groupby(cost).cumcount()
        middles = (costs.groupby(cost)[cost].transform("size") - 1) / 2
        shifted = costs[cost] + apart * (places - middles)
        for ax, task in zip(row, tasks, strict=True):
            for (name, level), dashes in zip(levels.items(), cycle(("--", ":")), strict=False):
                ax.axhline(level[task], color=style.DARK_GRAY, ls=dashes, lw=1.2, label=name)
            for number, (model, share) in enumerate(shares.items()):
                color, shape = style.mark(number)
                columns = share.loc[task, ["accuracy", "low", "high"]]
                look = {"color": color, "marker": shape, "ls": "", "label": model}
                style.draw_intervals(ax, shifted[model], *columns, **look)
            ax.set(ylim=(-6, 105), xlabel=cost)  # a whole marker at 0
            ax.margins(x=0.12)
            style.finish(ax)
        row[0].set_ylabel("right answers, %")
    for ax, task in zip(axes[0], tasks, strict=True):
        ax.set_title(task, fontsize=10)
    legend = {"loc": "outside upper center", "ncols": len(shares | levels), "frameon": False}
    axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), **legend)
    return axes


def frontier(table, column="accuracy", ax=None):
    """Plans against their size in MB = 10^6 bytes, on a logarithmic axis, with 95% intervals.

    A line joins the planned ones. Dashed lines join the uniform ones, with the names of their
    formats; uniform plans that also quantize embeddings and head are a dashed line of their own.
    In accuracy, plans that are as good as the best have no names, because these would lie on each
    other: those whose interval reaches the highest accuracy.

    table: DataFrame with columns kind ("planned" or "uniform"), plan, bytes, and accuracy, low and
        high (from 0 to 1), or kl, kl_low and kl_high, as `Planner.frontier` returns.
    column: "accuracy", or "kl", in nats a token on a logarithmic axis that leaves out 0.
    """
    from matplotlib import patheffects
    from matplotlib.ticker import MaxNLocator

    halo = [patheffects.withStroke(linewidth=2, foreground="white")]  # over the lines, readable
    ax = style.axes_of(ax, 7.6, 3.8)
    low, high, scale, label = {
        "accuracy": ("low", "high", 100, "right answers, %"),
        "kl": ("kl_low", "kl_high", 1, "KL divergence, nats a token"),
    }[column]
    shown = table[table[column] > 0] if column == "kl" else table
    named = shown[high] < shown[column].max() if column == "accuracy" else shown[column] > 0
    parts = shown["plan"].str.partition(", ")[[0, 2]]
    lines = parts[2].where(shown["kind"] == "uniform", "").radd(shown["kind"] + ", ")
    for number, (name, own) in enumerate(shown.groupby(lines.str.removesuffix(", "), sort=False)):
        own = own.sort_values("bytes").drop_duplicates("bytes")
        x, columns = own["bytes"] / MEGABYTE, (own[name] for name in (column, low, high))
        look = {"color": style.MARKS[0][0], "marker": "o", "zorder": 3}
        if name != "planned":
            color, beside = (style.GRAY, (5, -13)) if number else (style.BLACK, (3, 9))
            look = {"color": color, "marker": "sD"[number % 2], "ls": "--", "lw": 1}
            for index in own.index[named[own.index]]:
                text = parts.loc[index, 0].removeprefix("uniform ")
                place = x[index], scale * own.loc[index, column]
                style.write(ax, text, place, beside, fontsize=8, zorder=5, path_effects=halo)
        style.draw_intervals(ax, x, *columns, scale, capsize=2, markersize=5, label=name, **look)
    if column == "kl":
        ax.set_yscale("log")
    style.use_log_x(ax)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    ax.margins(y=0.1)  # leaves room for the names
    ax.set(xlabel="MB of the whole model (logarithmic)", ylabel=label)
    return style.finish(ax, legend={})


def error_by_bits(formats, ax=None):
    """How exactly a format keeps the weights, in dB of signal to noise, against bits per weight.

    formats: {label: (bits of a weight with its share of scales, dB)}, drawn as a dot with its label
        beside it; or {label: [(bits, dB), ...]}, one format with different bits, drawn as a line.
    """
    ax = style.axes_of(ax, 6.4, 3.6)
    dots = [points[0] for points in formats.values() if isinstance(points, tuple)]
    for label, points in formats.items():
        if isinstance(points, tuple):
            ax.plot(*points, "o", color=style.VERMILION)
            if any(0 < other - points[0] < 1 for other in dots):  # no room on the right
                style.write(ax, label, points, (-4, 2), fontsize=9, ha="right", va="bottom")
            else:
                style.write(ax, label, points, (5, -2), fontsize=9, ha="left", va="top")
        else:
            ax.plot(*zip(*points, strict=True), "-s", color=style.SKY, markersize=4, label=label)
            ax.legend(loc="upper left", frameon=False, fontsize=9)
    ax.set(xlabel="bits of a weight, with its share of scales", ylabel="signal to noise, dB")
    return style.finish(ax)
