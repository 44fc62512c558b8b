"""Printed text on a sign: words, numbers and codes of two to five characters."""

import string

from vlmkit.tasks.drawing import (
    COLORS,
    GLYPH_HEIGHT,
    GLYPH_WIDTH,
    SIZE,
    background,
    draw_rectangle,
    draw_text,
    shade,
)
from vlmkit.tasks.questions import NONE, Drawing, Mark, Recipe, phrased

WORDS = """AN AT BE BY DO GO HI IF IN IT ME MY NO OF ON OR SO TO UP WE
ALL AND ANT ART BAG BAR BED BEE BIG BOX BUS CAR CAT COW CUP DAY DOG EAR EGG END EYE FAR FIG FLY FOX
FUN GAS HAT HEN HOT ICE INK JAM JET JOB JOY KEY LAB LEG LOW MAP MIX MUD NET NEW NUT OAK OIL OLD OWL
PAN PEN PIE PIG RED RUN SEA SKY SUN TEA TOP TOY VAN WAX WEB YES ZOO
BAKE BALL BANK BIRD BLUE BOAT BOOK CAFE CAKE CITY CLUB COLD DESK DOOR DUCK EAST EXIT FARM FISH FIVE
FOOD FROG GATE GIFT GOLD HILL HOME JAZZ KING KITE LAKE LAMP LION MILK MOON NEST NORTH OPEN PARK PLUM
QUIZ RAIN RICE ROAD ROSE SALE SAND SHIP SHOP SNOW SOUP STAR STOP TAXI TREE WAVE WEST WIND WOLF YARD
ZERO ZONE APPLE BEACH BREAD BRICK CHAIR CLOCK CLOUD DANCE EAGLE EARTH FLAME FRUIT GLASS GRAPE GREEN
HEART HORSE HOTEL HOUSE JUICE KNIFE LEMON LIGHT MAPLE METRO MONEY MOUSE MUSIC NIGHT OCEAN OLIVE
PAPER PEACH PIANO PIZZA PLANT QUEEN RIVER ROBOT SALAD SHELL SOUTH SPOON STONE STORM SUGAR TABLE
TIGER TODAY TOWER TRAIN TRUCK WATER WHEEL WHITE WORLD ZEBRA""".split()  # noqa: SIM905 (a list of 190 quoted words is no easier to read)
LETTERS, DIGITS = string.ascii_uppercase, string.digits
SPACING = 1
"""Empty columns of pixels between two characters, before scaling."""


def _word(rng):
    # Half are real words and half are random letters, so that guessing the word is not enough.
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(2, 6)))


def _number(rng):
    return "".join(rng.choice(DIGITS) for _ in range(rng.randrange(2, 6)))


def _code(rng):
    """Letters and digits, at least one of each."""
    length = rng.randrange(2, 6)
    characters = [rng.choice(LETTERS), rng.choice(DIGITS)]
    characters += [rng.choice(LETTERS + DIGITS) for _ in range(length - 2)]
    rng.shuffle(characters)
    return "".join(characters)


def draw(rng):
    """The facts are the kind of text and the text, which is empty on a sign without text."""
    maker = rng.choice((_word, _number, _code))
    text = maker(rng) if rng.random() > 0.04 else ""
    pixels = background(rng)
    dark = pixels[0, 0, 0] < 128
    color = rng.choice(list(COLORS))
    # The sign has one color, and its letters are much lighter or much darker.
    plate, ink = shade(color, rng), (250, 250, 250) if sum(COLORS[color]) < 380 else (10, 10, 10)
    if rng.random() < 0.5:  # no plate: the letters are on the background itself
        plate, ink = None, (245, 245, 245) if dark else (15, 15, 15)
    scale = 3 if 0 < len(text) < 4 and rng.random() < 0.3 else 2
    advance = (GLYPH_WIDTH + SPACING) * scale
    width, height = max(2, len(text)) * advance, GLYPH_HEIGHT * scale
    left = rng.randrange(4, SIZE - width - 3)
    top = rng.randrange(4, SIZE - height - 3)
    if plate:
        draw_rectangle(pixels, plate, left - 4, top - 4, left + width + 3, top + height + 4)
    elif not text:
        draw_rectangle(pixels, shade(color, rng), left, top, left + width, top + height)
    marks = []
    for index, character in enumerate(text):
        x = left + index * advance
        draw_text(pixels, character, ink, x, top, scale)
        center = (x + GLYPH_WIDTH * scale // 2, top + height // 2)
        marks.append(Mark(*center, character, NONE))
    kind = {_word: "word", _number: "number", _code: "code"}[maker]
    return Drawing([pixels], (kind, text), [marks])


def _ask(kind):
    @phrased(
        "What does the sign say?",
        "What is written here?",
        "Read the text.",
        "Which text is printed in the picture?",
    )
    def ask(facts, rng):
        return (facts[1] or NONE, {}) if facts[0] == kind else None

    return ask


def describe(facts):
    return f"a sign that says {facts[1]}." if facts[1] else "a sign without text."


ORDINALS = ("first", "second", "third", "fourth", "fifth")


@phrased(
    "What is the {place} character?",
    "Which character comes {place}?",
    "Read the {place} character.",
    "Name the {place} character of the text.",
)
def ask_character(facts, rng):
    """One character of the text by its place, or none if the text is shorter."""
    text = facts[1]
    places = dict(zip(ORDINALS, text.ljust(len(ORDINALS)), strict=True))
    if text:
        places["last"] = text[-1]
    beyond = rng.random() < 0.1
    possible = [place for place, character in places.items() if (character == " ") == beyond]
    place = rng.choice(possible or list(places))
    return places[place].strip() or NONE, {"place": place}


OCR = Recipe("ocr", draw, {kind: _ask(kind) for kind in ("word", "number", "code")}, describe)
SPELLING = Recipe("spelling", draw, {"character": ask_character}, describe)
"""An auxiliary task, for training only: with single characters, reading is learned faster."""
