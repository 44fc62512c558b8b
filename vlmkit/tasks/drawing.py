"""Pictures made of integers: the same bytes on every machine.

Shapes are drawn with integer comparisons on a pixel grid, and text with Pillow's built-in bitmap
font. So no pixel depends on floating point, on anti-aliasing or on a version of FreeType.
"""

import functools

import numpy as np
from PIL import Image, ImageFont

SIZE = 84
"""Side of every picture, in pixels."""

COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 26),
    "yellow": (245, 222, 50),
    "green": (40, 160, 60),
    "cyan": (60, 200, 215),
    "blue": (45, 85, 215),
    "purple": (140, 60, 180),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")


@functools.cache
def _grid():
    return np.mgrid[0:SIZE, 0:SIZE].astype(np.int32)


def background(rng):
    """An empty picture, (SIZE, SIZE, 3) uint8, of one dark or light gray."""
    level = rng.choice((rng.randrange(10, 60), rng.randrange(200, 246)))
    return np.full((SIZE, SIZE, 3), level, dtype=np.uint8)


def shade(color, rng):
    """(red, green, blue) of a color's name, changed a little at random: no two reds are equal."""
    return tuple(min(255, max(0, channel + rng.randrange(-14, 15))) for channel in COLORS[color])


def draw_shape(pixels, shape, rgb, x, y, radius):
    """Paint one of `SHAPES` around pixel (x, y), with `radius` pixels from center to edge."""
    ys, xs = _grid()
    dx, dy = xs - x, ys - y
    if shape == "circle":
        mask = dx * dx + dy * dy <= radius * radius
    elif shape == "square":
        mask = np.maximum(abs(dx), abs(dy)) * 8 <= radius * 7
    elif shape == "triangle":
        mask = (abs(dx) * 2 <= dy + radius) & (dy <= radius)
    elif shape == "diamond":
        mask = abs(dx) + abs(dy) <= radius
    elif shape == "cross":
        near, far = np.minimum(abs(dx), abs(dy)), np.maximum(abs(dx), abs(dy))
        mask = (near * 3 <= radius) & (far <= radius)
    else:  # ring
        square = dx * dx + dy * dy
        mask = (square <= radius * radius) & (square * 10 >= radius * radius * 3)
    pixels[mask] = rgb


def draw_rectangle(pixels, rgb, left, top, right, bottom):
    """Paint the pixels with left ≤ x < right and top ≤ y < bottom."""
    pixels[top:bottom, left:right] = rgb


def draw_stroke(pixels, rgb, center, toward, near, far, width):
    """Paint a straight stroke, `width` pixels wide, from `near` to `far` pixels away from `center`,
    (x, y). toward: its direction, an integer vector (x, y) of length 1024."""
    ys, xs = _grid()
    dx, dy = xs - center[0], ys - center[1]
    along = dx * toward[0] + dy * toward[1]
    across = abs(dx * toward[1] - dy * toward[0])
    pixels[(near * 1024 <= along) & (along <= far * 1024) & (across * 2 <= width * 1024)] = rgb


GLYPH_WIDTH, GLYPH_HEIGHT = 6, 11
"""Pixels of one character of the bitmap font, before scaling."""


@functools.cache
def _glyph(character, scale):
    mask = ImageFont.load_default_imagefont().getmask(character)
    bits = np.array(mask, dtype=bool).reshape(mask.size[1], mask.size[0])
    return bits.repeat(scale, axis=0).repeat(scale, axis=1)


def draw_text(pixels, text, rgb, left, top, scale):
    """Print `text` with its upper left corner at (left, top). scale: GLYPH sizes are multiplied by
    this whole number."""
    for character in text:
        glyph = _glyph(character, scale)
        height, width = glyph.shape
        pixels[top : top + height, left : left + width][glyph] = rgb
        left += width


def to_image(pixels):
    return Image.fromarray(pixels)
