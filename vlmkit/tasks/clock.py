"""Analogue clocks: which time it is, to five minutes.

No picture that pebble was made with has a hand, a face or a time in it, so that this is a new thing
to see. At 84 pixels a minute hand is about 28 long: five minutes move its tip by 15 of them, and
one minute by 3, so five minutes is what a careful reader can be held to. The hour hand moves on
with the minutes, as it does on a clock: at five to four it is nearly at 4.

Times are digits without a colon, since pebble has said digits and never a colon. The rows of its
output head for what it never said are all but equal, and adapters leave that head alone.
"""

import math

from vlmkit.tasks.drawing import COLORS, SIZE, background, draw_shape, draw_stroke, shade
from vlmkit.tasks.recipe import NONE, Picture, Recipe

MINUTES = 5
"""Minutes between two times that are asked for."""

TURN = 12 * 60 // MINUTES


def direction(part):
    """Where a hand points after `part` of TURN equal parts of a turn, from the top, clockwise: a
    vector (x, y) of length 1024 in integers, y downwards."""
    angle = 2 * math.pi * part / TURN
    return round(1024 * math.sin(angle)), -round(1024 * math.cos(angle))


def draw(rng):
    pixels = background(rng)
    radius = rng.randrange(32, 39)
    x, y = (SIZE // 2 + rng.randrange(radius - 39, 40 - radius) for _ in range(2))
    light, dark = (rng.randrange(215, 250),) * 3, (rng.randrange(5, 45),) * 3
    face, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    draw_shape(pixels, "circle", shade(rng.choice(list(COLORS)), rng), x, y, radius)
    draw_shape(pixels, "circle", face, x, y, radius - 3)
    for hour in range(12):
        toward = direction(hour * TURN // 12)
        draw_stroke(
            pixels, ink, (x, y), toward, radius - (9 if hour % 3 == 0 else 7), radius - 5, 2
        )
    time = None
    if rng.random() > 0.04:
        hour, minute = rng.randrange(12), MINUTES * rng.randrange(60 // MINUTES)
        time = hour, minute
        short, long = direction((60 * hour + minute) // MINUTES), direction(minute * TURN // 60)
        draw_stroke(pixels, ink, (x, y), short, 0, radius * 5 // 9, 5)
        draw_stroke(pixels, ink, (x, y), long, 0, radius - 8, 2)
    return Picture([pixels], time, [[]])


def clock_text(time):
    """Four digits, as in a timetable ("0305" is five past three), or none where a face has no
    hands."""
    return NONE if time is None else f"{time[0] or 12:02}{time[1]:02}"


def ask_time(time, rng):
    question = rng.choice(
        (
            "What time is it?",
            "Which time does the clock show?",
            "Read the clock.",
            "What does the clock say?",
        )
    )
    return question, clock_text(time)


def describe(time):
    return "a clock without hands." if time is None else f"a clock at {clock_text(time)}."


CLOCK = Recipe("clock", draw, {"time": ask_time}, describe)
