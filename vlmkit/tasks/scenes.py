"""Scenes of colored shapes: captions, and the questions that visual question answering began with.

The kinds of question follow CLEVR (Johnson et al., 2017, arXiv 1612.06890, section 3): attribute,
existence, counting, comparison of positions.
"""

import dataclasses

from vlmkit.tasks.drawing import COLORS, SHAPES, SIZE, background, draw_shape, shade
from vlmkit.tasks.recipe import NONE, Mark, Picture, Recipe, article, balanced, listing

CELLS = 3
"""Objects stand in the cells of a 3 × 3 grid, off its middle, so that none hides another."""

CELL = SIZE // CELLS


PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)


@dataclasses.dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    x: int
    y: int
    radius: int

    @property
    def name(self):
        return f"{self.color} {self.shape}"

    @property
    def column(self):
        return self.x // CELL

    @property
    def row(self):
        return self.y // CELL

    @property
    def place(self):
        return PLACES[self.row][self.column]


def random_thing(rng, column, row, shape, color):
    radius = rng.randrange(8, 12)
    slack = CELL // 2 - radius - 1
    x = column * CELL + CELL // 2 + rng.randrange(-slack, slack + 1)
    y = row * CELL + CELL // 2 + rng.randrange(-slack, slack + 1)
    return Thing(shape, color, x, y, radius)


def random_things(rng, count):
    """`count` objects in reading order (row by row), of few colors and shapes: they repeat."""
    colors = rng.sample(list(COLORS), rng.randrange(2, 5))
    shapes = rng.sample(SHAPES, rng.randrange(2, 5))
    cells = sorted(rng.sample(range(CELLS * CELLS), count))
    return [
        random_thing(rng, cell % CELLS, cell // CELLS, rng.choice(shapes), rng.choice(colors))
        for cell in cells
    ]


def paint(things, rng):
    """The pixels of a picture of `things`."""
    pixels = background(rng)
    for thing in things:
        rgb = shade(thing.color, rng)
        draw_shape(pixels, thing.shape, rgb, thing.x, thing.y, thing.radius)
    return pixels


def marks_of(things):
    return [Mark(thing.x, thing.y, thing.shape, thing.color) for thing in things]


def describe(things):
    """What a picture shows, in words: what a language model without eyes can answer from."""
    if not things:
        return "nothing."
    return listing([f"{article(thing.name)} at the {thing.place}" for thing in things]) + "."


def draw(rng):
    things = random_things(rng, rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6)))
    return Picture([paint(things, rng)], things, [marks_of(things)])


def draw_captioned(rng):
    things = random_things(rng, rng.choice((0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)))
    return Picture([paint(things, rng)], things, [marks_of(things)])


def ask_caption(things, rng):
    if len(things) > 3:
        return None
    question = rng.choice(
        (
            "Describe the picture.",
            "What is in the picture?",
            "Write a caption for this image.",
            "What do you see?",
        )
    )
    answer = listing([article(thing.name) for thing in things]) if things else "nothing"
    return question, answer


def _single(things, attribute):
    """Values of `attribute` that exactly one object has, with that object."""
    values = [getattr(thing, attribute) for thing in things]
    return {
        getattr(thing, attribute): thing
        for thing in things
        if values.count(getattr(thing, attribute)) == 1
    }


def _alone(things):
    """The objects of which there is no second: "the red circle" means one of these."""
    names = [thing.name for thing in things]
    return [thing for thing in things if names.count(thing.name) == 1]


def _absent(things, attribute, possible):
    present = {getattr(thing, attribute) for thing in things}
    return [value for value in possible if value not in present]


def _ask_attribute(asked, known, possible, noun):
    """Questions for one attribute of the object that alone has a value of the other."""

    def ask(things, rng):
        single = _single(things, known)
        if single and rng.random() < 0.85:
            value, thing = rng.choice(list(single.items()))
            answer = getattr(thing, asked)
        else:
            value, answer = rng.choice(_absent(things, known, possible)), NONE
        name = noun.format(value)
        question = rng.choice(
            (
                f"What {asked} is the {name}?",
                f"What is the {asked} of the {name}?",
                f"Which {asked} does the {name} have?",
                f"Tell me the {asked} of the {name}.",
            )
        )
        return question, answer

    return ask


ask_color = _ask_attribute("color", "shape", SHAPES, "{}")
ask_shape = _ask_attribute("shape", "color", COLORS, "{} object")


def ask_count(things, rng):
    question = rng.choice(
        (
            "How many objects are there?",
            "How many shapes do you see?",
            "Count the objects.",
            "What is the number of objects?",
        )
    )
    return question, str(len(things))


def ask_count_color(things, rng):
    colors = [thing.color for thing in things]
    by_count = {}
    for color in COLORS:
        by_count.setdefault(colors.count(color), []).append(color)
    count, color = balanced(rng, by_count)
    question = rng.choice(
        (
            f"How many {color} objects are there?",
            f"How many objects are {color}?",
            f"Count the {color} objects.",
            f"What is the number of {color} objects?",
        )
    )
    return question, str(count)


def ask_exist(things, rng):
    """Half the answers are "no"; most of those name a shape and a color that are both there."""
    names = {thing.name for thing in things}
    if rng.random() < 0.5:
        if not things:
            return None
        name, answer = rng.choice(sorted(names)), "yes"
    else:
        near = {f"{a.color} {b.shape}" for a in things for b in things} - names
        far = {f"{color} {shape}" for color in COLORS for shape in SHAPES} - names
        name, answer = rng.choice(sorted(near if near and rng.random() < 0.6 else far)), "no"
    question = rng.choice(
        (
            f"Is there {article(name)}?",
            f"Do you see {article(name)}?",
            f"Does the picture show {article(name)}?",
            f"Can you see {article(name)} here?",
        )
    )
    return question, answer


# How far `a` is in that direction of `b`, in cells: 0 is neither, and is not asked about.
RELATIONS = {
    "left of": lambda a, b: b.column - a.column,
    "right of": lambda a, b: a.column - b.column,
    "above": lambda a, b: b.row - a.row,
    "below": lambda a, b: a.row - b.row,
}


def ask_spatial(things, rng):
    """ "Is the red circle left of the ring?": yes, no, or none where one of them is not there."""
    single = _alone(things)
    relation = rng.choice(list(RELATIONS))
    if single and rng.random() < 0.1:
        known = rng.choice(single).name
        missing = f"{rng.choice(_absent(things, 'color', COLORS))} {rng.choice(SHAPES)}"
        pair, answer = [known, missing], NONE
        rng.shuffle(pair)
        first, second = pair
    else:
        by_answer = {"yes": [], "no": []}
        for a in single:
            for b in single:
                distance = RELATIONS[relation](a, b)
                if distance > 0:
                    by_answer["yes"].append((a.name, b.name))
                elif distance < 0:
                    by_answer["no"].append((a.name, b.name))
        if not by_answer["yes"]:
            return None
        answer, (first, second) = balanced(rng, by_answer)
    question = rng.choice(
        (
            f"Is the {first} {relation} the {second}?",
            f"Does the {first} lie {relation} the {second}?",
            f"Is the {first} placed {relation} the {second}?",
            f"Would you say that the {first} is {relation} the {second}?",
        )
    )
    return question, answer


VQA = Recipe(
    "vqa",
    draw,
    {
        "color": ask_color,
        "shape": ask_shape,
        "count": ask_count,
        "count_color": ask_count_color,
        "exist": ask_exist,
        "spatial": ask_spatial,
    },
    describe,
)
CAPTION = Recipe("caption", draw_captioned, {"caption": ask_caption}, describe)


def draw_few(rng):
    things = random_things(rng, rng.choice((1, 2, 2, 3)))
    return Picture([paint(things, rng)], things, [marks_of(things)])


def ask_where(things, rng):
    """The place of an object: what "left of" is made of."""
    single = _alone(things)
    if not single:
        return None
    thing = rng.choice(single)
    question = rng.choice(
        (
            f"Where is the {thing.name}?",
            f"In which place is the {thing.name}?",
            f"Where do you see the {thing.name}?",
            f"Tell me where the {thing.name} is.",
        )
    )
    return question, thing.place


def ask_relation(things, rng):
    """On which side of another object an object is: a relation, before it is a yes or no."""
    single = _alone(things)
    yes, no = rng.choice((("left of", "right of"), ("above", "below")))
    by_answer = {yes: [], no: []}
    for a in single:
        for b in single:
            distance = RELATIONS[yes](a, b)
            if distance:
                by_answer[yes if distance > 0 else no].append((a.name, b.name))
    if not by_answer[yes]:
        return None
    answer, (first, second) = balanced(rng, by_answer)
    either, other = yes.split()[0], no.split()[0]
    question = rng.choice(
        (
            f"Is the {first} {either} or {no} the {second}?",
            f"Is the {first} {other} or {yes} the {second}?",
            f"Does the {first} lie {either} or {no} the {second}?",
            f"Would you say that the {first} is {either} or {no} the {second}?",
        )
    )
    return question, answer.split()[0]


# Lessons for training, not tasks: one skill, among few objects.
LOOKUP = Recipe("lookup", draw_few, {"color": ask_color}, describe)
PLACE = Recipe("place", draw_few, {"spatial": ask_spatial}, describe)
EXISTENCE = Recipe("existence", draw_few, {"exist": ask_exist}, describe)
WHERE = Recipe("where", draw_few, {"where": ask_where}, describe)
RELATION = Recipe("relation", draw_few, {"relation": ask_relation}, describe)
COLOR_COUNT = Recipe("color_count", draw_few, {"count_color": ask_count_color}, describe)
