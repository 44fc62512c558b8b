"""Colors, and what all figures do in the same way: axes, rows, grids, intervals, legends.

The colors are from Okabe and Ito's palette (Color Universal Design, 2008), which people with any
color vision can tell apart, and grays. People without the eye's middle cones cannot tell purple
from the lighter gray, so the component after cross-attention has the darker gray. The colors are
not made for print without color.
"""

from vlmkit import COMPONENTS

BLUE, ORANGE, PURPLE, GREEN, BLACK = "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#000000"
GRAY, DARK_GRAY, YELLOW = "#999999", "#555555", "#F0E442"
SKY, VERMILION = "#56B4E9", "#D55E00"  # never a component's color

COMPONENT_COLORS = dict(zip(COMPONENTS, (BLUE, ORANGE, PURPLE, GREEN, DARK_GRAY), strict=True))
"""The color of each component, the same in every figure."""

MARKS = tuple(zip((VERMILION, SKY, BLACK, GRAY, YELLOW), "os^Dv", strict=True))
"""Colors and marker shapes of series in one Axes. The shape tells them apart without the color."""

PLAN_MARKS = (("o", BLACK), ("s", SKY), ("^", VERMILION), ("D", PURPLE), ("v", BLUE), ("P", GREEN))
"""A shape and a color for each plan. Either is enough to tell the plans apart."""


def mark(number):
    """(color, shape) of a series, by its place among the series."""
    return MARKS[number % len(MARKS)]


def axes_of(ax, width, height, layout="constrained"):
    """`ax`, or if it is None the Axes of a new figure of this size in inches."""
    if ax is None:
        from matplotlib import pyplot as plt

        _, ax = plt.subplots(figsize=(width, height), layout=layout)
    return ax


def finish(ax, grid="both", hide=("top", "right"), legend=None):
    """Draw a gray grid behind the data, hide spines, and add a legend.

    grid: "x", "both", or None for no grid. legend: arguments of `Axes.legend`, or None.
    """
    if grid:
        ax.grid(axis=grid, color="#dddddd")
        ax.set_axisbelow(True)
    ax.spines[[*hide]].set_visible(False)
    if legend is not None:
        ax.legend(frameon=False, fontsize=9, **legend)
    return ax


BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
"""A legend to the right of the Axes."""


def label_rows(ax, labels):
    """Give each row of the Axes its label. The first row is on top."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def write(ax, text, place, offset, **style):
    """Write a text beside a place of the data; offset: (right, up) in points."""
    ax.annotate(text, place, offset, textcoords="offset points", **style)


def draw_intervals(ax, x, values, low, high, scale=100, **style):
    """Draw values with their intervals as error bars, all multiplied by `scale`."""
    import numpy as np

    x, values, low, high = (np.atleast_1d(numbers) for numbers in (x, values, low, high))
    # Rounding can put a share of 0 or 1 just outside its own interval.
    lengths = np.clip([values - low, high - values], 0, None)
    ax.errorbar(x, scale * values, scale * lengths, **style)


def use_log_x(ax, base=10):
    """Make the x axis logarithmic, with plain numbers such as 0.5 and 20 at its ticks."""
    from matplotlib.ticker import NullFormatter

    ax.set_xscale("log", base=base)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
