"""Right answers, with their intervals."""

from vlmkit.figures.colors import BLUE, GRAY, MARKS


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


def learning(curves, window=30, ax=None):
    """Right answers during training against seconds, as a mean over the last `window` steps.

    curves: {label: DataFrame with a row per step and columns seconds and right, from 0 to 1}.
    """
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for number, (label, curve) in enumerate(curves.items()):
        color, mark = MARKS[number % len(MARKS)]
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
        color, mark = MARKS[number % len(MARKS)]
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
                ax.axhline(level[task], color=GRAY, ls="--", lw=1)
                ax.text(0.01, level[task] + 1, name, fontsize=7, transform=ax.get_yaxis_transform())
            for number, (model, share) in enumerate(shares.items()):
                color, mark = MARKS[number % len(MARKS)]
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
