"""Two pictures compared (in the manner of NLVR2, Suhr et al., 2019, arXiv 1811.00491)."""

from vlmkit.tasks.drawing import COLORS, SHAPES
from vlmkit.tasks.recipe import NONE, Picture, Recipe, article, balanced
from vlmkit.tasks.scenes import describe as describe_scene
from vlmkit.tasks.scenes import marks_of, paint, random_thing, random_things

PLACES = {(True, False): "first", (False, True): "second", (True, True): "both"}


def _alone(rng, shape, color):
    return [random_thing(rng, rng.randrange(3), rng.randrange(3), shape, color)]


def draw(rng):
    if rng.random() < 0.4:  # one object each, alike in shape or color more often than by chance
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        other_shape = shape if rng.random() < 0.5 else rng.choice(SHAPES)
        other_color = color if rng.random() < 0.5 else rng.choice(list(COLORS))
        both = [_alone(rng, shape, color), _alone(rng, other_shape, other_color)]
    else:
        both = [random_things(rng, rng.randrange(1, 5)) for _ in range(2)]
    return _picture(both, rng)


def _picture(both, rng):
    return Picture(
        [paint(things, rng) for things in both], both, [marks_of(things) for things in both]
    )


def ask_which(both, rng):
    """In which picture is a shape, or a color: first, second, both or none."""
    attribute = rng.choice(("shape", "color"))
    values = [{getattr(thing, attribute) for thing in things} for things in both]
    by_answer = {"first": [], "second": [], "both": [], NONE: []}
    for value in SHAPES if attribute == "shape" else COLORS:
        where = (value in values[0], value in values[1])
        by_answer[PLACES.get(where, NONE)].append(value)
    answer, value = balanced(rng, by_answer)
    noun = article(value if attribute == "shape" else f"{value} object")
    question = rng.choice(
        (
            f"Which picture shows {noun}?",
            f"In which picture is there {noun}?",
            f"Where do you see {noun}?",
            f"Which image has {noun}?",
        )
    )
    return question, answer


def ask_more(both, rng):
    """Which picture has more objects: first, second, or none where they have as many."""
    first, second = (len(things) for things in both)
    if first == second == 1 and rng.random() < 0.8:  # else most answers would be "none"
        return None
    question = rng.choice(
        (
            "Which picture has more objects?",
            "Which image shows more objects?",
            "Where are there more objects?",
            "In which picture do you count more objects?",
        )
    )
    return question, "first" if first > second else "second" if second > first else NONE


def _same(attribute):
    def ask(both, rng):
        if any(len(things) != 1 for things in both):
            return None
        first, second = (getattr(things[0], attribute) for things in both)
        question = rng.choice(
            (
                f"Do both objects have the same {attribute}?",
                f"Are the two objects of the same {attribute}?",
                f"Is the {attribute} of the two objects the same?",
                f"Do the objects in both pictures share their {attribute}?",
            )
        )
        return question, "yes" if first == second else "no"

    return ask


def describe(both):
    first, second = (describe_scene(things) for things in both)
    return f"first: {first} second: {second}"


MULTI_IMAGE = Recipe(
    "multi_image",
    draw,
    {
        "which": ask_which,
        "more": ask_more,
        "same_color": _same("color"),
        "same_shape": _same("shape"),
    },
    describe,
)


def draw_few(rng):
    return _picture([random_things(rng, rng.randrange(1, 3)) for _ in range(2)], rng)


# Lessons for training, not tasks: one skill.
MATCH = Recipe("match", draw, {"same_shape": _same("shape")}, describe)
SEARCH = Recipe("search", draw_few, {"which": ask_which}, describe)
