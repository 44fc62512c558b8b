"""Domains that pebble was not trained on, to fine-tune it on: clocks, and answers in Dutch.

Clocks are new to see: no picture in pebble's training data has a clock face, a hand or a time. At
84 pixels a minute hand is about 28 pixels long. Five minutes move its tip by 15 pixels and one
minute by 3, so times are rounded to five minutes. The hour hand moves with the minutes, as on a
real clock: at five to four it is nearly at 4.

Dutch is new to say: pictures and questions are those of `vqa`. In `dutch` the questions are English
and only the answers are Dutch. In `dutch_throughout` the questions are Dutch too.

Times are four digits without a colon, and Dutch is written in capitals, as on signs. pebble has
learned to say digits and capitals, and it never said a colon or a single small letter. The rows of
its output head for tokens that it never said are nearly equal, so adapters, which leave the head
unchanged, cannot tell these tokens apart.
"""

import math

from vlmkit.tasks.drawing import COLORS, SIZE, background, draw_shape, draw_stroke, shade
from vlmkit.tasks.questions import NONE, Drawing, Recipe, phrased
from vlmkit.tasks.scenes import VQA

# --- clocks ---------------------------------------------------------------------------------------

MINUTES = 5
"""Minutes between two times that are asked for."""

TURN = 12 * 60 // MINUTES


def direction(part):
    """Where a hand points after `part` of TURN equal parts of a turn, clockwise from the top: an
    integer vector (x, y) of length 1024, with y downwards."""
    angle = 2 * math.pi * part / TURN
    return round(1024 * math.sin(angle)), -round(1024 * math.cos(angle))


def draw_clock(rng):
    """The facts are the time, (hour, minute), or None for a clock without hands."""
    pixels = background(rng)
    radius = rng.randrange(32, 39)
    center = [SIZE // 2 + rng.randrange(radius - 39, 40 - radius) for _ in range(2)]
    light, dark = (rng.randrange(215, 250),) * 3, (rng.randrange(5, 45),) * 3
    face, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    draw_shape(pixels, "circle", shade(rng.choice(list(COLORS)), rng), *center, radius)
    draw_shape(pixels, "circle", face, *center, radius - 3)
    for hour in range(12):
        length = 4 if hour % 3 == 0 else 2
        toward = direction(hour * TURN // 12)
        draw_stroke(pixels, ink, center, toward, radius - 5 - length, radius - 5, 2)
    time = None
    if rng.random() > 0.04:
        hour, minute = rng.randrange(12), MINUTES * rng.randrange(60 // MINUTES)
        time = hour, minute
        short, long = direction((60 * hour + minute) // MINUTES), direction(minute * TURN // 60)
        draw_stroke(pixels, ink, center, short, 0, radius * 5 // 9, 5)
        draw_stroke(pixels, ink, center, long, 0, radius - 8, 2)
    return Drawing([pixels], time, [[]])


def clock_text(time):
    """Four digits, as in a timetable ("0305" is five past three), or "none" without hands."""
    return NONE if time is None else f"{time[0] or 12:02}{time[1]:02}"


@phrased(
    "What time is it?",
    "Which time does the clock show?",
    "Read the clock.",
    "What does the clock say?",
)
def ask_time(time, rng):
    return clock_text(time), {}


def describe_clock(time):
    return "a clock without hands." if time is None else f"a clock at {clock_text(time)}."


CLOCK = Recipe("clock", draw_clock, {"time": ask_time}, describe_clock)

# --- Dutch ----------------------------------------------------------------------------------------

NOUNS = {
    "circle": "DE CIRKEL",
    "square": "HET VIERKANT",
    "triangle": "DE DRIEHOEK",
    "diamond": "DE RUIT",
    "cross": "HET KRUIS",
    "ring": "DE RING",
    "object": "HET VOORWERP",
}
ADJECTIVES = {
    "red": ("ROOD", "RODE"),
    "orange": ("ORANJE", "ORANJE"),
    "yellow": ("GEEL", "GELE"),
    "green": ("GROEN", "GROENE"),
    "cyan": ("CYAAN", "CYAAN"),
    "blue": ("BLAUW", "BLAUWE"),
    "purple": ("PAARS", "PAARSE"),
}
"""Without an ending, as in "is red" and "a red cross", and with one, as in "the red cross"."""

WORDS = {"yes": "JA", "no": "NEE", "none": "GEEN"}
RELATIONS = {
    "left of": "LINKS VAN",
    "right of": "RECHTS VAN",
    "above": "BOVEN",
    "below": "ONDER",
}
PHRASINGS = {
    "color": (
        "WELKE KLEUR HEEFT {name}?",
        "WAT IS DE KLEUR VAN {name}?",
        "WAT VOOR KLEUR HEEFT {name}?",
        "NOEM DE KLEUR VAN {name}.",
    ),
    "shape": (
        "WELKE VORM HEEFT {name}?",
        "WAT IS DE VORM VAN {name}?",
        "WAT VOOR VORM HEEFT {name}?",
        "NOEM DE VORM VAN {name}.",
    ),
    "count": (
        "HOEVEEL VOORWERPEN ZIJN ER?",
        "HOEVEEL VORMEN ZIE JE?",
        "TEL DE VOORWERPEN.",
        "WAT IS HET AANTAL VOORWERPEN?",
    ),
    "count_color": (
        "HOEVEEL {color[1]} VOORWERPEN ZIJN ER?",
        "HOEVEEL VOORWERPEN ZIJN {color[0]}?",
        "TEL DE {color[1]} VOORWERPEN.",
        "WAT IS HET AANTAL {color[1]} VOORWERPEN?",
    ),
    "exist": (
        "IS ER {thing}?",
        "ZIE JE {thing}?",
        "TOONT HET PLAATJE {thing}?",
        "KUN JE HIER {thing} ZIEN?",
    ),
    "spatial": (
        "LIGT {first} {relation} {second}?",
        "STAAT {first} {relation} {second}?",
        "BEVINDT {first} ZICH {relation} {second}?",
        "VIND JE DAT {first} {relation} {second} LIGT?",
    ),
}
"""The questions of `vqa`, with the same slots and in the same order as there."""


def _slot_in_dutch(slot, english):
    if slot == "relation":
        return RELATIONS[english]
    if slot == "color":
        return ADJECTIVES[english]
    *words, noun = english.split()
    article, noun = NOUNS[noun].split()
    definite = slot != "thing"  # {thing} is "a red cross", the others are "red cross"
    ending = definite or article == "DE"  # "het rode kruis", "de rode ring", but "een rood kruis"
    adjectives = [ADJECTIVES[color][ending] for color in (words if definite else words[1:])]
    return " ".join([article if definite else "EEN", *adjectives, noun])


def answer_in_dutch(answer):
    """An answer of `vqa` in Dutch: a color, a shape, yes, no or none. A number stays a number."""
    if answer in NOUNS:
        return NOUNS[answer].split()[1]
    if answer in ADJECTIVES:
        return ADJECTIVES[answer][0]
    return WORDS.get(answer, answer)


def _answered(ask):
    def ask_in_english(things, rng):
        asked = ask(things, rng)
        return asked and (asked[0], answer_in_dutch(asked[1]))

    return ask_in_english


def _asked_and_answered(kind, ask):
    @phrased(*PHRASINGS[kind])
    def ask_in_dutch(things, rng):
        found = ask.__wrapped__(things, rng)  # the answer and the slots, without a phrasing
        if found is None:
            return None
        answer, slots = found
        return answer_in_dutch(answer), {s: _slot_in_dutch(s, slots[s]) for s in slots}

    return ask_in_dutch


DUTCH = Recipe(
    "dutch", VQA.draw, {kind: _answered(ask) for kind, ask in VQA.kinds.items()}, VQA.describe
)
DUTCH_THROUGHOUT = Recipe(
    "dutch_throughout",
    VQA.draw,
    {kind: _asked_and_answered(kind, ask) for kind, ask in VQA.kinds.items()},
    VQA.describe,
)
