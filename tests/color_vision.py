"""Colors as people with a color vision deficiency see them, and the distance between two.

The matrices are those of Machado, Oliveira and Fernandes, "A physiologically-based model for
simulation of color vision deficiency" (IEEE TVCG 15, 2009), table 1 for severity 1.0, on linear
RGB. Distances are those of CIE 1976 L*a*b* at the white point D65. A distance of about 2.3 is the
smallest that people notice side by side.
"""

import itertools

import numpy as np
from matplotlib.colors import to_rgb


def matrix(*rows):
    return np.array([row.split() for row in rows], dtype=float)


SIMULATED = {
    "normal vision": np.eye(3),
    "protanopia": matrix(
        "0.152286 1.052583 -0.204868", "0.114503 0.786281 0.099216", "-0.003882 -0.048116 1.051998"
    ),
    "deuteranopia": matrix(
        "0.367322 0.860646 -0.227968", "0.280085 0.672501 0.047413", "-0.011820 0.042940 0.968881"
    ),
}
TO_XYZ = matrix(
    "0.4124564 0.3575761 0.1804375",
    "0.2126729 0.7151522 0.0721750",
    "0.0193339 0.1191920 0.9503041",
)


def lab(color, vision="normal vision"):
    """L*, a* and b* of a matplotlib color, as it is seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SIMULATED[vision] @ linear, 0, 1)
    x, y, z = np.cbrt(curve := TO_XYZ @ seen / (TO_XYZ @ np.ones(3)))
    x, y, z = (
        root if ratio > (6 / 29) ** 3 else ratio * (29 / 6) ** 2 / 3 + 4 / 29
        for root, ratio in zip((x, y, z), curve, strict=True)
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one, other, vision="normal vision"):
    return float(np.linalg.norm(lab(one, vision) - lab(other, vision)))


def nearest(colors, vision="normal vision"):
    """(distance, one, other) of the two of `colors` that are hardest to tell apart."""
    pairs = itertools.combinations(colors, 2)
    return min((distance(one, other, vision), one, other) for one, other in pairs)
