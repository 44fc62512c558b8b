"""Bar charts: which bar is the tallest or the shortest, and the value of a bar."""

from vlmkit.tasks.drawing import COLORS, SIZE, background, draw_rectangle, shade
from vlmkit.tasks.questions import NONE, Drawing, Mark, Recipe, article, phrased

LEFT, BOTTOM, UNIT, HIGHEST = 8, 78, 8, 9
"""Where the axes meet, the pixels of one unit of value, and the largest value (the least is 1)."""


def draw(rng):
    """The facts are the bars from left to right, (color, value)."""
    pixels = background(rng)
    dark = pixels[0, 0, 0] < 128
    line, axis = ((95,) * 3, (230,) * 3) if dark else ((165,) * 3, (20,) * 3)
    count = rng.randrange(2, 6)
    bars = [(color, rng.randrange(1, HIGHEST + 1)) for color in rng.sample(list(COLORS), count)]
    for value in range(1, HIGHEST + 1):  # one grid line a unit, so that values can be read
        y = BOTTOM - value * UNIT
        draw_rectangle(pixels, axis if value == 5 else line, LEFT, y, SIZE - 2, y + 1)
    slot = (SIZE - 2 - LEFT) // count
    width = min(slot - 3, rng.randrange(10, 17))
    marks = []
    for index, (color, value) in enumerate(bars):
        left = LEFT + index * slot + (slot - width) // 2 + 1
        top = BOTTOM - value * UNIT
        draw_rectangle(pixels, shade(color, rng), left, top, left + width, BOTTOM)
        marks.append(Mark(left + width // 2, BOTTOM - 3, "bar", color, value))
    draw_rectangle(pixels, axis, LEFT, BOTTOM, SIZE - 2, BOTTOM + 2)
    draw_rectangle(pixels, axis, LEFT - 1, BOTTOM - HIGHEST * UNIT, LEFT + 1, BOTTOM + 2)
    return Drawing([pixels], bars, [marks])


def _extreme(adjectives, pick):
    @phrased(
        "Which bar is the {adjective}?",
        "What color is the {adjective} bar?",
        "Name the color of the {adjective} bar.",
        "Which color has the {adjective} bar?",
    )
    def ask(bars, rng):
        value = pick(value for _, value in bars)
        colors = [color for color, height in bars if height == value]
        if len(colors) > 1:
            return None
        return colors[0], {"adjective": rng.choice(adjectives)}

    return ask


@phrased(
    "What is the value of the {color} bar?",
    "How high is the {color} bar?",
    "Which value does the {color} bar have?",
    "Read the value of the {color} bar.",
)
def ask_value(bars, rng):
    present = dict(bars)
    if rng.random() < 0.1:
        color = rng.choice([color for color in COLORS if color not in present])
    else:
        color = rng.choice(list(present))
    return str(present.get(color, NONE)), {"color": color}


def describe(bars):
    shown = ", ".join(f"{article(color)} bar of {value}" for color, value in bars)
    return f"a chart with {shown}."


CHART = Recipe(
    "chart",
    draw,
    {
        "tallest": _extreme(("tallest", "highest"), max),
        "shortest": _extreme(("shortest", "lowest"), min),
        "value": ask_value,
    },
    describe,
)
