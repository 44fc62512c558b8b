"""The colors of every figure.

From Okabe and Ito's palette (Color Universal Design, 2008), made to be told apart with any color
vision, and grays. Purple beside the lighter gray is not told apart without the eye's middle cones,
so that the component beside cross-attention has the darker. Not made for print without color.
"""

from vlmkit import COMPONENTS

BLUE, ORANGE, PURPLE, GREEN, BLACK = "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#000000"
GRAY, DARK_GRAY, YELLOW = "#999999", "#555555", "#F0E442"
SKY, VERMILION = "#56B4E9", "#D55E00"  # not a component's: for parts of something else

COMPONENT_COLORS = dict(zip(COMPONENTS, (BLUE, ORANGE, PURPLE, GREEN, DARK_GRAY), strict=True))
"""The color of each component, the same in every figure."""

MARKS = tuple(zip((VERMILION, SKY, BLACK, GRAY, YELLOW), "os^Dv", strict=True))
"""Colors and shapes of what is drawn on top of each other: told apart by shape as well."""
