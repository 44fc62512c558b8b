"""Controls: the same questions about other pictures, to see whether a model looks, and at what.

    from vlmkit.course import controls

    rows = vk.tasks.dataset("video", n=100)
    vk.evaluate(model, processor, controls.blank(rows))             # nothing to see
    vk.evaluate(model, processor, controls.exchanged(rows))         # the wrong pictures
    vk.evaluate(model, processor, controls.arranged(rows, [3, 2, 1, 0], OPPOSITE))
    controls.most_frequent(rows)                                    # without a model at all
    vk.evaluate(model, processor, controls.signs(100, letters=6))   # longer than any in training

Right answers prove little where the same number comes without the picture (Goyal et al., 2017,
arXiv 1612.00837, on visual question answering; Buch et al., 2022, arXiv 2206.01720, on video). Each
function takes rows with images, question and answer, as `vlmkit.tasks` makes them, leaves them as
they are, and returns a list of new ones. `charts`, `pages`, `signs` and `crowds` draw rows of their
own: pictures with a bar painted over, or beyond what `vlmkit.tasks` draws.
"""

from collections import Counter

import numpy as np

from vlmkit.errors import TaskError
from vlmkit.images import read_all
from vlmkit.tasks import NONE, RECIPES, chart, drawing, generator, ocr, scenes


def blank(rows, level=128):
    """The rows with every picture replaced by one of its size in a single gray, 0 to 255.

    What is right now is what can be guessed from the question. Where "none" is an honest answer,
    that is among it.
    """
    return [_with(row, [_grey(image, level) for image in read_all(row["images"])]) for row in rows]


def exchanged(rows):
    """Each question with the pictures of the next row of its kind, and the answer that it had.

    Such pictures look as the right ones do, so that a model cannot tell that they are wrong. Kinds
    are told apart by the columns task and kind, where there are any, and by how many pictures a row
    has. Raises TaskError for a kind that has one row only.
    """
    rows, groups = list(rows), {}
    for row in rows:
        groups.setdefault(_kind(row), []).append(row)
    for (task, kind, _), group in groups.items():
        if len(group) == 1:
            name = "/".join(filter(None, (task, kind))) or "this kind"
            raise TaskError(
                f"there is only one row of {name}, and so no other picture to take: give more rows"
            )
    following = {kind: iter(group[1:] + group[:1]) for kind, group in groups.items()}
    return [_with(row, next(following[_kind(row)])["images"]) for row in rows]


def arranged(rows, order, answers=None):
    """The rows with their pictures in another order, some left out or more than once.

    order: the place, from 0 on, that each picture had before: [3, 2, 1, 0] is a video backwards,
        [0, 0, 0, 0] one that stands still, [1, 0] swaps two pictures.
    answers: {answer: what is right in this order}, for those that change.

    Raises TaskError for a place that a row has no picture for.
    """
    order, answers = list(order), answers or {}
    made = []
    for number, row in enumerate(rows):
        images = row["images"]
        if not all(0 <= place < len(images) for place in order):
            raise TaskError(f"Row {number} has {len(images)} pictures, and the order is {order}.")
        answer = answers.get(row["answer"], row["answer"])
        made.append(_with(row, [images[place] for place in order], answer))
    return made


def among(rows, before=0, after=0, level=128):
    """The rows with blank pictures before and after their own, in the size of the first."""
    made = []
    for row in rows:
        images = read_all(row["images"])
        empty = _grey(images[0], level)
        made.append(_with(row, [empty] * before + images + [empty] * after))
    return made


def about(rows, others, answer=NONE):
    """The questions of `rows` with the pictures of `others`, in pairs, and one answer to them all.

    For questions that these pictures have no answer to, such as those about a chart with a picture
    that is none: what a model says then and is not `answer`, it made up.
    """
    return [_with(row, other["images"], answer) for row, other in zip(rows, others, strict=False)]


def most_frequent(rows):
    """`Scores` of an answer that knows the questions and no picture: of each kind the answer that
    is right most often. It is chosen from these same rows, so with few it is a little too good."""
    from vlmkit.evaluation import scored

    rows, counts = list(rows), {}
    for row in rows:
        counts.setdefault(_kind(row), Counter())[row["answer"]] += 1
    return scored(rows, [counts[_kind(row)].most_common(1)[0][0] for row in rows])


def _kind(row):
    return row.get("task"), row.get("kind"), len(row["images"])


def _with(row, images, answer=None):
    return {**row, "images": images, "answer": row["answer"] if answer is None else answer}


def _grey(image, level):
    from PIL import Image

    return Image.new("RGB", image.size, (level,) * 3)


# --- pictures of its own -------------------------------------------------------------------------


def charts(n, hide=None, seed=0):
    """`n` questions for the value of a bar that is there; with hide="asked" it is painted over, so
    that "none" is right, and with hide="another" some other bar is, which changes no answer."""
    rows, index = [], 0
    while len(rows) < n:
        rng, index = generator("controls", seed, "chart", index), index + 1
        picture, question, answer = RECIPES["chart"].example("value", rng)
        if answer == NONE:
            continue
        asked, *others = sorted(picture.marks[0], key=lambda bar: bar.color not in question.split())
        pixels = picture.frames[0]
        if hide is not None:
            x, low = {"asked": asked, "another": others[0]}[hide].x, chart.BOTTOM
            bar = (pixels[low - 2] == pixels[low - 2, x]).all(-1)  # no two bars share a shade
            high = low - chart.HIGHEST * chart.UNIT
            pixels[high:low, bar] = pixels[high:low, chart.LEFT + 1, None]  # left of the first bar
        rows.append(_row(pixels, question, NONE if hide == "asked" else answer, "chart", "value"))
    return rows


def pages(n, seed=0):
    """`n` signs of `vlmkit.tasks`, each on one quarter of an empty page with sides twice as long as
    those of a sign; row["quarter"] is 0 to 3, row by row."""
    rows = []
    for index in range(n):
        kind = ("word", "number", "code")[index % 3]
        rng = generator("controls", seed, "page", index)
        picture, question, answer = RECIPES["ocr"].example(kind, rng)
        sign, quarter = picture.frames[0], rng.randrange(4)
        page = np.full((2 * drawing.SIZE, 2 * drawing.SIZE, 3), sign[0, 0])
        tiles = page.reshape(2, drawing.SIZE, 2, drawing.SIZE, 3).swapaxes(1, 2)  # seen in place
        tiles[quarter // 2, quarter % 2] = sign
        rows.append(_row(page, question, answer, "ocr", kind) | {"quarter": quarter})
    return rows


def signs(n, letters, seed=0):
    """`n` signs of that many random capitals, spaced as those of `vlmkit.tasks`, which have two to
    five. Six fill the picture's width."""
    step = 2 * (drawing.GLYPH_WIDTH + ocr.SPACING)
    left = (drawing.SIZE - step * letters) // 2 + 1
    if letters < 1 or left < 1:
        raise TaskError(f"a sign has room for 1 to {drawing.SIZE // step} letters, not {letters}")
    rows = []
    for index in range(n):
        rng = generator("controls", seed, "sign", letters, index)
        pixels = drawing.background(rng)
        ink = (245,) * 3 if pixels[0, 0, 0] < 128 else (15,) * 3
        text = "".join(rng.choice(ocr.LETTERS) for _ in range(letters))
        top = rng.randrange(4, drawing.SIZE - 2 * drawing.GLYPH_HEIGHT - 3)
        for place, letter in enumerate(text):
            drawing.draw_text(pixels, letter, ink, left + step * place, top, 2)
        rows.append(_row(pixels, "Read the text.", text, "ocr", f"{letters} letters"))
    return rows


def crowds(n, objects, seed=0):
    """`n` pictures of that many objects to count, 0 to 9; those of `vlmkit.tasks` have up to 6."""
    if objects not in range(scenes.CELLS**2 + 1):
        raise TaskError(f"a picture has room for 0 to {scenes.CELLS**2} objects, not {objects}")
    rows = []
    for index in range(n):
        rng = generator("controls", seed, "crowd", objects, index)
        things = scenes.random_things(rng, objects)
        question, answer = scenes.ask_count(things, rng)
        pixels = scenes.paint(things, rng)
        rows.append(_row(pixels, question, answer, "vqa", f"{objects} objects"))
    return rows


def _row(pixels, question, answer, task, kind):
    images = [drawing.to_image(pixels)]
    return {"images": images, "question": question, "answer": answer, "task": task, "kind": kind}
