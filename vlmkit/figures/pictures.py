"""Pictures with something written or laid over them."""

import textwrap

from vlmkit.figures.colors import GRAY, VERMILION


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
    """A picture in gray with a map of attention over it, in % for each patch, and a color bar.

    image: anything that `vlmkit.images.read` takes. weights: array (rows, columns) of shares from 0
    to 1, stretched over the whole picture, such as `vlmkit.attention` gives. most: the share at the
    end of the scale, for several maps on one scale; by default the largest of the weights.
    """
    import numpy as np
    from matplotlib import pyplot as plt

    from vlmkit.images import read

    gray = np.asarray(read(image).convert("L"))
    percent = 100 * np.asarray(weights, dtype=float)
    highest = percent.max() if most is None else 100 * most
    if ax is None:
        _, ax = plt.subplots(figsize=(4, 3.3), layout="constrained")
    height, width = gray.shape
    whole = (0, width, height, 0)
    ax.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=whole, interpolation="nearest")
    # viridis is read by any color vision, and gets lighter with the value in print without color.
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
            ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=GRAY, hatch=hatch, lw=0.6))
    for y in range(blocks):
        for x in range(blocks):
            corner = (x * block, y * block)
            ax.add_patch(Rectangle(corner, block, block, fill=False, edgecolor=VERMILION, lw=1.8))
    ax.set(xlim=(-0.1, blocks * block + 0.1), ylim=(blocks * block + 0.1, -0.1), aspect="equal")
    ax.set_title(f"{blocks**2} visual tokens", fontsize=10)
    ax.set_axis_off()
    return ax
