"""Number formats: their bits, and what they keep of a weight."""

from vlmkit.figures.colors import GRAY, SKY, VERMILION


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
    colors = {"sign": GRAY, "exponent": VERMILION, "fraction": SKY}
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
