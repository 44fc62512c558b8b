"""Pictures with something written or drawn over them, and the bits of a number."""

import textwrap

from vlmkit.figures.style import GRAY, SKY, VERMILION, axes_of, finish, label_rows

MOST = 400
"""Pixels of a picture's longer side. A photograph has more than a figure can show."""


def questions(rows, answers=None, ax=None, across=None):
    """Pictures in a row, each with its question and answer below.

    rows: of a dataset of `vlmkit.tasks`, dicts with images (a list of what `vlmkit.images.read`
        takes), question and answer.
    answers: texts to show instead of the rows' own answers, for example a model's.
    across: how many pictures are beside each other, at most. Then the next line begins, and long
        texts are cut. By default all pictures are in one line.
    """
    from vlmkit.images import read

    rows = list(rows)
    answers = [row["answer"] for row in rows] if answers is None else list(answers)
    widths = [max(1, len(row["images"])) for row in rows]
    limit = {"max_lines": 3, "placeholder": " …"} if across else {}
    captions = [
        "\n".join(textwrap.fill(text, 22 * width, **limit) for text in (row["question"], answer))
        for row, answer, width in zip(rows, (f"→ {a}" for a in answers), widths, strict=True)
    ]
    # In heights of a picture: the picture, the space around it, and the lines of the caption
    line = 1.15 + 0.12 * max((caption.count("\n") + 1 for caption in captions), default=0)
    gap, left, top, places = 0.25, 0, 0, []
    for width in widths:
        if across and left and left + width > across * (1 + gap):
            left, top = 0, top - line
        places.append((left, top))
        left += width + gap
    whole = max((x + width for (x, _), width in zip(places, widths, strict=True)), default=1)
    ax = axes_of(ax, 1.7 * whole, 2.6 - 1.72 * top, layout=None)
    highest = 0.0
    for row, caption, width, (left, top) in zip(rows, captions, widths, places, strict=True):
        for number, image in enumerate(row["images"]):
            picture = read(image).copy()
            picture.thumbnail((MOST, MOST))
            wide, high = (side / max(picture.size) for side in picture.size)
            highest = max(highest, top + high)
            start = left + number + 0.97 * (1 - wide) / 2
            place = (start, start + 0.97 * wide, top, top + high)
            ax.imshow(picture, extent=place, interpolation="nearest")
        place = (left + width / 2, top - 0.06)
        ax.text(*place, caption, ha="center", va="top", fontsize=9, parse_math=False)
    ax.set(xlim=(0, whole), ylim=(top, highest or 1), aspect="equal")
    ax.set_axis_off()
    return ax


def mistakes(rows, scores, most=20, ax=None):
    """A wall of wrong answers: pictures with the question, the answer that was given, and the
    expected one. The title counts them.

    rows: the dataset that was asked. scores: what `vk.evaluate` returned for it.
    most: how many are shown, the first ones.
    """
    table = scores.answers
    wrong = table.index[~table["correct"]]
    shown = wrong[:most]
    cut = table[["predicted", "answer"]].map(lambda text: text[:24] + "…" * (len(text) > 24))
    answers = [f"{cut['predicted'][n]} (expected: {cut['answer'][n]})" for n in shown]
    ax = questions([rows[int(n)] for n in shown], answers, ax, across=5)
    counted = f"{len(wrong):,} of {len(table):,} answers are wrong"
    first = f"; the first {most:,}" if len(wrong) > most else ""
    ax.set_title(counted + first, fontsize=10)
    return ax


def attention(image, weights, most=None, ax=None):
    """A picture in pale gray under a map of attention, light to dark blue, in % for each patch, and
    a color bar.

    image: anything that `vlmkit.images.read` takes.
    weights: array (rows, columns) of shares from 0 to 1, such as `vlmkit.attention` gives. It is
        stretched over the whole picture.
    most: the share at the end of the color scale, so that several maps can share a scale; by
        default the largest weight.
    """
    import numpy as np

    from vlmkit.images import read

    gray = np.asarray(read(image).convert("L"))
    percent = 100 * np.asarray(weights, dtype=float)
    highest = percent.max() if most is None else 100 * most
    ax = axes_of(ax, 4, 3.3)
    height, width = gray.shape
    whole = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    # Below the map even black is a light gray. So only the map is dark, and its one hue does not
    # look like a color of the picture.
    ax.imshow(gray, cmap="gray", vmin=-510, vmax=255, **whole)
    heat = ax.imshow(percent, cmap="Blues", vmin=0, vmax=highest, alpha=0.8, **whole)
    ax.figure.colorbar(heat, ax=ax, shrink=0.85).set_label("attention to a patch, %")
    ax.set_axis_off()
    return ax


def patches(image, grid, block=1, ax=None):
    """A picture with its grid × grid patches, framed in blocks of block × block patches. Hatched
    are the empty patches that pad the last blocks.

    image: anything that `imshow` takes.
    """
    from matplotlib.patches import Rectangle

    ax = axes_of(ax, 3, 3)
    blocks = -(-grid // block)
    side = blocks * block
    ax.imshow(image, extent=(0, grid, grid, 0), interpolation="nearest")
    for y in range(side):
        for x in range(side):
            hatch = "////" if max(x, y) >= grid else None
            ax.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=GRAY, hatch=hatch, lw=0.6))
    for y in range(0, side, block):
        for x in range(0, side, block):
            frame = Rectangle((x, y), block, block, fill=False, edgecolor=VERMILION, lw=1.8)
            ax.add_patch(frame)
    ax.set(xlim=(-0.1, side + 0.1), ylim=(side + 0.1, -0.1), aspect="equal")
    ax.set_title(f"{blocks**2} visual tokens", fontsize=10)
    ax.set_axis_off()
    return ax


def bits(rows, ax=None):
    """The bits of one number in several formats, by field: a row for each format.

    rows: {label: (sign, exponent, fraction)}, each a text of 0 and 1. The first is on top.
    """
    from matplotlib.patches import Rectangle

    widest = max(len("".join(fields)) for fields in rows.values())
    ax = axes_of(ax, 0.25 * widest + 0.8, 0.6 + 0.35 * len(rows), layout=None)
    colors = {"sign": GRAY, "exponent": VERMILION, "fraction": SKY}
    for y, fields in enumerate(rows.values()):
        owners = [name for name, field in zip(colors, fields, strict=True) for _ in field]
        for x, (owner, bit) in enumerate(zip(owners, "".join(fields), strict=True)):
            label = owner if y == 0 and x == owners.index(owner) else "_"  # once in the legend
            box = Rectangle((x + 0.04, y - 0.42), 0.92, 0.84, alpha=0.5, label=label)
            ax.add_patch(box).set_facecolor(colors[owner])
            ax.text(x + 0.5, y, bit, ha="center", va="center", fontsize=9)
    label_rows(ax, list(rows))
    ax.set(xlim=(0, widest), xticks=[])
    ax.tick_params(length=0)
    legend = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
    return finish(ax, grid=None, hide=ax.spines, legend=legend)
