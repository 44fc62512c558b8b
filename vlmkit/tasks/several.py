"""Questions about several pictures: two that are compared, and the four frames of a video.

Comparing two pictures follows NLVR2 (Suhr et al., 2019, arXiv 1811.00491).
"""

import dataclasses

from vlmkit.tasks.drawing import COLORS, SHAPES, background, draw_shape, shade
from vlmkit.tasks.questions import NONE, Drawing, Recipe, article, balanced, phrased
from vlmkit.tasks.scenes import CELL, CELLS, marks_of, picture_of, random_thing, random_things
from vlmkit.tasks.scenes import describe as describe_scene

# --- two pictures ---------------------------------------------------------------------------------

PLACES = {(True, False): "first", (False, True): "second", (True, True): "both"}


def draw_pair(rng):
    if rng.random() < 0.4:  # one object each, of equal shape or color more often than by chance
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        other_shape = shape if rng.random() < 0.5 else rng.choice(SHAPES)
        other_color = color if rng.random() < 0.5 else rng.choice(list(COLORS))
        both = [
            [random_thing(rng, rng.randrange(CELLS), rng.randrange(CELLS), *kind)]
            for kind in ((shape, color), (other_shape, other_color))
        ]
    else:
        both = [random_things(rng, rng.randrange(1, 5)) for _ in range(2)]
    return picture_of(both, both, rng)


@phrased(
    "Which picture shows {thing}?",
    "In which picture is there {thing}?",
    "Where do you see {thing}?",
    "Which image has {thing}?",
)
def ask_which(both, rng):
    """Which picture has a shape, or a color: first, second, both or none."""
    attribute = rng.choice(("shape", "color"))
    values = [{getattr(thing, attribute) for thing in things} for things in both]
    by_answer = {"first": [], "second": [], "both": [], NONE: []}
    for value in SHAPES if attribute == "shape" else COLORS:
        where = (value in values[0], value in values[1])
        by_answer[PLACES.get(where, NONE)].append(value)
    answer, value = balanced(rng, by_answer)
    return answer, {"thing": article(value if attribute == "shape" else f"{value} object")}


@phrased(
    "Which picture has more objects?",
    "Which image shows more objects?",
    "Where are there more objects?",
    "In which picture do you count more objects?",
)
def ask_more(both, rng):
    """Which picture has more objects: first, second, or none if the numbers are equal."""
    first, second = (len(things) for things in both)
    if first == second == 1 and rng.random() < 0.8:  # else most answers would be "none"
        return None
    return "first" if first > second else "second" if second > first else NONE, {}


def _same(attribute):
    @phrased(
        f"Do both objects have the same {attribute}?",
        f"Are the two objects of the same {attribute}?",
        f"Is the {attribute} of the two objects the same?",
        f"Do the objects in both pictures share their {attribute}?",
    )
    def ask(both, rng):
        if any(len(things) != 1 for things in both):
            return None
        first, second = (getattr(things[0], attribute) for things in both)
        return "yes" if first == second else "no", {}

    return ask


def describe_pair(both):
    first, second = (describe_scene(things) for things in both)
    return f"first: {first} second: {second}"


MULTI_IMAGE = Recipe(
    "multi_image",
    draw_pair,
    {
        "which": ask_which,
        "more": ask_more,
        "same_color": _same("color"),
        "same_shape": _same("shape"),
    },
    describe_pair,
)


def _draw_few(rng):
    both = [random_things(rng, rng.randrange(1, 3)) for _ in range(2)]
    return picture_of(both, both, rng)


# Auxiliary tasks, for training only.
MATCH = Recipe("match", draw_pair, {"same_shape": _same("shape")}, describe_pair)
SEARCH = Recipe("search", _draw_few, {"which": ask_which}, describe_pair)

# --- video ----------------------------------------------------------------------------------------

FRAMES = 4
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def draw_video(rng):
    """One object moves, or none. The facts are the direction and the things of each frame."""
    count = rng.randrange(1, 4)
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], count)
    direction = rng.choice([*DIRECTIONS, *DIRECTIONS, NONE])
    dx, dy = DIRECTIONS.get(direction, (0, 0))
    # The moving object has a whole row (or column) of cells to itself.
    lane = rng.randrange(CELLS)
    start = 0 if dx + dy >= 0 else CELLS - 1
    first_cell = (start, lane) if dx else (lane, start)
    free = [
        (c, r) for c in range(CELLS) for r in range(CELLS) if ((r != lane) if dx else (c != lane))
    ]
    cells = [first_cell, *rng.sample(free, count - 1)]
    first, *rest = [random_thing(rng, *c, *kind) for c, kind in zip(cells, kinds, strict=True)]
    step = rng.randrange(10, 2 * CELL // (FRAMES - 1))
    scenes = [
        [dataclasses.replace(first, x=first.x + dx * step * t, y=first.y + dy * step * t), *rest]
        for t in range(FRAMES)
    ]
    canvas, shades = background(rng), [shade(thing.color, rng) for thing in scenes[0]]
    frames = []
    for things in scenes:
        frames.append(canvas.copy())
        for thing, rgb in zip(things, shades, strict=True):
            draw_shape(frames[-1], thing.shape, rgb, thing.x, thing.y, thing.radius)
    return Drawing(frames, (direction, scenes), list(map(marks_of, scenes)))


@phrased(
    "Which way does the {name} move?",
    "In which direction does the {name} move?",
    "Where is the {name} going?",
    "Tell me the direction of the {name}.",
)
def ask_direction(facts, rng):
    direction, scenes = facts
    names = [thing.name for thing in scenes[0]]
    # The right answer about an object that does not move is none, even if another one moves.
    name = names[0] if len(names) == 1 or rng.random() < 0.8 else rng.choice(names[1:])
    return direction if name == names[0] else NONE, {"name": name}


@phrased(
    "Which object moves?",
    "What is moving?",
    "Which object moved in the video?",
    "Name the object that moves.",
)
def ask_moving(facts, rng):
    direction, scenes = facts
    return NONE if direction == NONE else scenes[0][0].name, {}


def describe_video(facts):
    return " then ".join(
        describe_scene(sorted(things, key=lambda thing: (thing.row, thing.column)))
        for things in facts[1]
    )


VIDEO = Recipe(
    "video", draw_video, {"direction": ask_direction, "moving": ask_moving}, describe_video
)
MOTION = Recipe("motion", draw_video, {"direction": ask_direction}, describe_video)
"""An auxiliary task, for training only."""
