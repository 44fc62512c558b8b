"""The questions about scenes, answered in Dutch: a new way to speak of what is seen.

Pictures and questions are those of `vqa`, so that nothing new has to be seen. In `dutch` the
question stays in English, and only the answer is new; in `dutch_throughout` it is asked in Dutch as
well, which has to be read first. There each phrasing is translated as a whole, and what stands in
it, a shape or a color, gets the article and the ending that Dutch wants: "the red cross" is "het
rode kruis", "a red cross" is "een rood kruis".

All Dutch is written in capitals, as on signs. Capitals are the letters that pebble has learnt to
say, on signs; it never said a small one by itself, and the rows of its output head for what it
never said are all but equal: adapters, which leave that head alone, cannot part them.
"""

import re

from vlmkit.tasks.drawing import COLORS, SHAPES
from vlmkit.tasks.recipe import Recipe
from vlmkit.tasks.scenes import VQA

NOUNS = {
    "circle": "de cirkel",
    "square": "het vierkant",
    "triangle": "de driehoek",
    "diamond": "de ruit",
    "cross": "het kruis",
    "ring": "de ring",
}
ADJECTIVES = {
    "red": ("rood", "rode"),
    "orange": ("oranje", "oranje"),
    "yellow": ("geel", "gele"),
    "green": ("groen", "groene"),
    "cyan": ("cyaan", "cyaan"),
    "blue": ("blauw", "blauwe"),
    "purple": ("paars", "paarse"),
}
"""Without an ending, as in "is red" and "a red cross", and with one."""

RELATIONS = {
    "left of": "links van",
    "right of": "rechts van",
    "above": "boven",
    "below": "onder",
}
WORDS = {"yes": "ja", "no": "nee", "none": "geen"}

PHRASES = {
    "What color is the SHAPE?": "Welke kleur heeft THE?",
    "What is the color of the SHAPE?": "Wat is de kleur van THE?",
    "Which color does the SHAPE have?": "Wat voor kleur heeft THE?",
    "Tell me the color of the SHAPE.": "Noem de kleur van THE.",
    "What shape is the COLOR object?": "Welke vorm heeft het COLORED voorwerp?",
    "What is the shape of the COLOR object?": "Wat is de vorm van het COLORED voorwerp?",
    "Which shape does the COLOR object have?": "Wat voor vorm heeft het COLORED voorwerp?",
    "Tell me the shape of the COLOR object.": "Noem de vorm van het COLORED voorwerp.",
    "How many objects are there?": "Hoeveel voorwerpen zijn er?",
    "How many shapes do you see?": "Hoeveel vormen zie je?",
    "Count the objects.": "Tel de voorwerpen.",
    "What is the number of objects?": "Wat is het aantal voorwerpen?",
    "How many COLOR objects are there?": "Hoeveel COLORED voorwerpen zijn er?",
    "How many objects are COLOR?": "Hoeveel voorwerpen zijn COLOR?",
    "Count the COLOR objects.": "Tel de COLORED voorwerpen.",
    "What is the number of COLOR objects?": "Wat is het aantal COLORED voorwerpen?",
    "Is there ONE?": "Is er ONE?",
    "Do you see ONE?": "Zie je ONE?",
    "Does the picture show ONE?": "Toont het plaatje ONE?",
    "Can you see ONE here?": "Kun je hier ONE zien?",
    "Is the THING RELATION the THING?": "Ligt THE RELATION THE?",
    "Does the THING lie RELATION the THING?": "Staat THE RELATION THE?",
    "Is the THING placed RELATION the THING?": "Bevindt THE zich RELATION THE?",
    "Would you say that the THING is RELATION the THING?": "Vind je dat THE RELATION THE ligt?",
}
"""Words in capitals are slots: what they stand for in English, and in Dutch, in order, THE and ONE
for an object with its article, COLORED for a color with its ending."""

_THING = rf"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"
SLOTS = {
    "SHAPE": "|".join(SHAPES),
    "COLOR": "|".join(COLORS),
    "RELATION": "|".join(RELATIONS),
    "THING": _THING,
    "ONE": f"an? {_THING}",
}


SLOT = re.compile(r"\b[A-Z]{3,}\b")


def _pattern(english):
    slots = SLOT.sub(lambda slot: f"({SLOTS[slot[0]]})", re.escape(english))
    return re.compile(f"^{slots}$")


PATTERNS = [(_pattern(english), dutch) for english, dutch in PHRASES.items()]


def _filled(slot, english):
    """What stands in a Dutch `slot` for a part of an English question."""
    if slot == "RELATION":
        return RELATIONS[english]
    if slot in ("COLOR", "COLORED"):
        return ADJECTIVES[english][slot == "COLORED"]
    *color, shape = english.removeprefix("an ").removeprefix("a ").split()
    article, noun = NOUNS[shape].split()
    ending = slot == "THE" or article == "de"  # none after "een", before a noun with "het"
    words = [ADJECTIVES[name][ending] for name in color]
    return " ".join([article if slot == "THE" else "een", *words, noun])


def question_in_dutch(question):
    """A question of `vqa` in Dutch. Raises KeyError for any other."""
    for pattern, dutch in PATTERNS:
        found = pattern.match(question)
        if found:
            for part in found.groups():
                slot = SLOT.search(dutch)[0]
                dutch = SLOT.sub(_filled(slot, part), dutch, count=1)
            return dutch.upper()
    raise KeyError(question)


def answer_in_dutch(answer):
    """An answer of `vqa` in Dutch: a color, a shape, yes, no, none, or a number, which stays."""
    if answer in NOUNS:
        return NOUNS[answer].split()[1].upper()
    if answer in ADJECTIVES:
        return ADJECTIVES[answer][0].upper()
    return WORDS.get(answer, answer).upper()


def _asking(kind, question):
    def ask(things, rng):
        asked = VQA.kinds[kind](things, rng)
        return asked and (question(asked[0]), answer_in_dutch(asked[1]))

    return ask


def _recipe(name, question):
    return Recipe(
        name, VQA.draw, {kind: _asking(kind, question) for kind in VQA.kinds}, VQA.describe
    )


DUTCH = _recipe("dutch", str)
DUTCH_THROUGHOUT = _recipe("dutch_throughout", question_in_dutch)
