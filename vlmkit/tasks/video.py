"""Four frames in which one object moves, or none: which one, and which way."""

import dataclasses

from vlmkit.tasks.drawing import COLORS, SHAPES, background, draw_shape, shade
from vlmkit.tasks.recipe import NONE, Picture, Recipe
from vlmkit.tasks.scenes import CELL, CELLS, marks_of, random_thing
from vlmkit.tasks.scenes import describe as describe_scene

FRAMES = 4
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def draw(rng):
    count = rng.randrange(1, 4)
    kinds = rng.sample([(shape, color) for shape in SHAPES for color in COLORS], count)
    direction = rng.choice([*DIRECTIONS, *DIRECTIONS, NONE])
    dx, dy = DIRECTIONS.get(direction, (0, 0))
    # The moving object has a whole row (or column) of cells to itself.
    lane = rng.randrange(CELLS)
    start = 0 if dx + dy >= 0 else CELLS - 1
    column, row = (start, lane) if dx else (lane, start)
    free = [
        (c, r) for c in range(CELLS) for r in range(CELLS) if ((r != lane) if dx else (c != lane))
    ]
    places = [(column, row), *rng.sample(free, count - 1)]
    things = [random_thing(rng, *place, *kind) for place, kind in zip(places, kinds, strict=True)]
    step = rng.randrange(10, 2 * CELL // (FRAMES - 1))
    canvas, shades = background(rng), [shade(thing.color, rng) for thing in things]
    frames, marks, scenes = [], [], []
    for time in range(FRAMES):
        first = things[0]
        moved = dataclasses.replace(
            first, x=first.x + dx * step * time, y=first.y + dy * step * time
        )
        now, pixels = [moved, *things[1:]], canvas.copy()
        for thing, rgb in zip(now, shades, strict=True):
            draw_shape(pixels, thing.shape, rgb, thing.x, thing.y, thing.radius)
        frames.append(pixels)
        marks.append(marks_of(now))
        scenes.append(now)
    return Picture(frames, (direction, scenes), marks)


def ask_direction(facts, rng):
    direction, scenes = facts
    names = [thing.name for thing in scenes[0]]
    # An object that stands still moves no way at all, whatever else does.
    name = names[0] if len(names) == 1 or rng.random() < 0.8 else rng.choice(names[1:])
    question = rng.choice(
        (
            f"Which way does the {name} move?",
            f"In which direction does the {name} move?",
            f"Where is the {name} going?",
            f"Tell me the direction of the {name}.",
        )
    )
    return question, direction if name == names[0] else NONE


def ask_moving(facts, rng):
    direction, scenes = facts
    question = rng.choice(
        (
            "Which object moves?",
            "What is moving?",
            "Which object moved in the video?",
            "Name the object that moves.",
        )
    )
    return question, NONE if direction == NONE else scenes[0][0].name


def describe(facts):
    return " then ".join(describe_scene(sorted(things, key=reading_order)) for things in facts[1])


def reading_order(thing):
    return thing.row, thing.column


VIDEO = Recipe("video", draw, {"direction": ask_direction, "moving": ask_moving}, describe)
MOTION = Recipe("motion", draw, {"direction": ask_direction}, describe)
"""A lesson for training, not a task."""
