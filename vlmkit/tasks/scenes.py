"""Scenes of colored shapes: captions, and the first kinds of visual question answering.

The kinds of question follow CLEVR (Johnson et al., 2017, arXiv 1612.06890, section 3): attributes,
existence, counting, comparison of positions.
"""

import dataclasses
import itertools

from vlmkit.tasks.drawing import COLORS, SHAPES, SIZE, background, draw_shape, shade
from vlmkit.tasks.questions import NONE, Drawing, Mark, Recipe, article, balanced, listing, phrased

CELLS = 3
"""Each object is in its own cell of a 3 × 3 grid, so no object hides another."""

CELL = SIZE // CELLS

PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. x, y: its center. radius: from its center to its edge. All in pixels."""

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
    """`count` objects, row by row. Few colors and shapes are used, so that they repeat."""
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


def picture_of(scenes, facts, rng):
    """A Drawing with a frame for each of `scenes`, which are lists of things."""
    return Drawing([paint(things, rng) for things in scenes], facts, list(map(marks_of, scenes)))


def describe(things):
    """What a picture shows, in words. A language model without eyes can answer from this text."""
    if not things:
        return "nothing."
    return listing([f"{article(thing.name)} at the {thing.place}" for thing in things]) + "."


def _drawing(*counts):
    """A function that draws a scene with one of these numbers of objects."""

    def draw(rng):
        things = random_things(rng, rng.choice(counts))
        return picture_of([things], things, rng)

    return draw


# --- choosing what to ask about -------------------------------------------------------------------


def _single(things, attribute):
    """{value: object} for each value of `attribute` that exactly one object has."""
    values = [getattr(thing, attribute) for thing in things]
    return {v: thing for v, thing in zip(values, things, strict=True) if values.count(v) == 1}


def _unique(things):
    """The objects that no other equals, so that a name such as "the red circle" means only one."""
    names = [thing.name for thing in things]
    return [thing for thing in things if names.count(thing.name) == 1]


def _absent(things, attribute, possible):
    present = {getattr(thing, attribute) for thing in things}
    return [value for value in possible if value not in present]


# How many cells `a` is from `b` in that direction. 0 is neither yes nor no and is not asked about.
RELATIONS = {
    "left of": lambda a, b: b.column - a.column,
    "right of": lambda a, b: a.column - b.column,
    "above": lambda a, b: b.row - a.row,
    "below": lambda a, b: a.row - b.row,
}


def _related(things, relation):
    """Pairs of names of objects: those in the relation, and those in the opposite relation."""
    inside, opposite = [], []
    for a, b in itertools.product(things, repeat=2):
        distance = RELATIONS[relation](a, b)
        if distance:
            (inside if distance > 0 else opposite).append((a.name, b.name))
    return inside, opposite


# --- the questions --------------------------------------------------------------------------------


@phrased(
    "Describe the picture.",
    "What is in the picture?",
    "Write a caption for this image.",
    "What do you see?",
)
def ask_caption(things, rng):
    if len(things) > 3:
        return None
    return listing([article(thing.name) for thing in things]) if things else "nothing", {}


def _ask_attribute(asked, known, possible, noun):
    """A question about one attribute of an object that is known by its other attribute."""

    @phrased(
        f"What {asked} is the {{name}}?",
        f"What is the {asked} of the {{name}}?",
        f"Which {asked} does the {{name}} have?",
        f"Tell me the {asked} of the {{name}}.",
    )
    def ask(things, rng):
        single = _single(things, known)
        if single and rng.random() < 0.85:
            value, thing = rng.choice(list(single.items()))
            answer = getattr(thing, asked)
        else:
            value, answer = rng.choice(_absent(things, known, possible)), NONE
        return answer, {"name": noun.format(value)}

    return ask


ask_color = _ask_attribute("color", "shape", SHAPES, "{}")
ask_shape = _ask_attribute("shape", "color", COLORS, "{} object")


@phrased(
    "How many objects are there?",
    "How many shapes do you see?",
    "Count the objects.",
    "What is the number of objects?",
)
def ask_count(things, rng):
    return str(len(things)), {}


@phrased(
    "How many {color} objects are there?",
    "How many objects are {color}?",
    "Count the {color} objects.",
    "What is the number of {color} objects?",
)
def ask_count_color(things, rng):
    colors = [thing.color for thing in things]
    by_count = {}
    for color in COLORS:
        by_count.setdefault(colors.count(color), []).append(color)
    count, color = balanced(rng, by_count)
    return str(count), {"color": color}


@phrased(
    "Is there {thing}?",
    "Do you see {thing}?",
    "Does the picture show {thing}?",
    "Can you see {thing} here?",
)
def ask_exist(things, rng):
    """Half of the answers are "no". Most of those combine a shape and a color that are both in the
    picture, on different objects."""
    names = {thing.name for thing in things}
    if rng.random() < 0.5:
        if not things:
            return None
        name, answer = rng.choice(sorted(names)), "yes"
    else:
        near = {f"{a.color} {b.shape}" for a in things for b in things} - names
        far = {f"{color} {shape}" for color in COLORS for shape in SHAPES} - names
        name, answer = rng.choice(sorted(near if near and rng.random() < 0.6 else far)), "no"
    return answer, {"thing": article(name)}


@phrased(
    "Is the {first} {relation} the {second}?",
    "Does the {first} lie {relation} the {second}?",
    "Is the {first} placed {relation} the {second}?",
    "Would you say that the {first} is {relation} the {second}?",
)
def ask_spatial(things, rng):
    """ "Is the red circle left of the ring?": yes, no, or none if one of the two is not there."""
    single = _unique(things)
    relation = rng.choice(list(RELATIONS))
    if single and rng.random() < 0.1:
        known = rng.choice(single).name
        missing = f"{rng.choice(_absent(things, 'color', COLORS))} {rng.choice(SHAPES)}"
        pair, answer = [known, missing], NONE
        rng.shuffle(pair)
    else:
        yes, no = _related(single, relation)
        if not yes:
            return None
        answer, pair = balanced(rng, {"yes": yes, "no": no})
    return answer, {"first": pair[0], "relation": relation, "second": pair[1]}


@phrased(
    "Where is the {name}?",
    "In which place is the {name}?",
    "Where do you see the {name}?",
    "Tell me where the {name} is.",
)
def ask_where(things, rng):
    """The place of an object. Relations such as "left of" build on places."""
    single = _unique(things)
    if not single:
        return None
    thing = rng.choice(single)
    return thing.place, {"name": thing.name}


@phrased(
    "Is the {first} {either} or {no} the {second}?",
    "Is the {first} {other} or {yes} the {second}?",
    "Does the {first} lie {either} or {no} the {second}?",
    "Would you say that the {first} is {either} or {no} the {second}?",
)
def ask_relation(things, rng):
    """On which side of another object an object is: easier than a yes or no about it."""
    single = _unique(things)
    yes, no = rng.choice((("left of", "right of"), ("above", "below")))
    inside, opposite = _related(single, yes)
    if not inside:
        return None
    answer, (first, second) = balanced(rng, {yes: inside, no: opposite})
    slots = {"first": first, "second": second, "yes": yes, "no": no}
    return answer.split()[0], slots | {"either": yes.split()[0], "other": no.split()[0]}


# --- the recipes ----------------------------------------------------------------------------------

VQA = Recipe(
    "vqa",
    _drawing(0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6),
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
CAPTION = Recipe(
    "caption", _drawing(0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), {"caption": ask_caption}, describe
)

# Auxiliary tasks, for training only: each asks one kind of question about few objects.
_few = _drawing(1, 2, 2, 3)
LOOKUP = Recipe("lookup", _few, {"color": ask_color}, describe)
PLACE = Recipe("place", _few, {"spatial": ask_spatial}, describe)
EXISTENCE = Recipe("existence", _few, {"exist": ask_exist}, describe)
WHERE = Recipe("where", _few, {"where": ask_where}, describe)
RELATION = Recipe("relation", _few, {"relation": ask_relation}, describe)
COLOR_COUNT = Recipe("color_count", _few, {"count_color": ask_count_color}, describe)
