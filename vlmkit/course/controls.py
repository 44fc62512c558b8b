"""Controls: the same questions about other pictures, to see whether a model looks, and at what.

    from vlmkit.course import controls

    rows = vk.tasks.dataset("video", n=100)
    vk.evaluate(model, processor, controls.blank(rows))             # nothing to see
    vk.evaluate(model, processor, controls.exchanged(rows))         # the wrong pictures
    vk.evaluate(model, processor, controls.arranged(rows, [3, 2, 1, 0], OPPOSITE))
    controls.most_frequent(rows)                                    # without a model
    vk.evaluate(model, processor, controls.signs(100, letters=6))   # longer than any in training

Right answers prove little if the model gives as many without the picture (Goyal et al., 2017,
arXiv 1612.00837, on visual question answering; Buch et al., 2022, arXiv 2206.01720, on video).

Functions of `rows` take dicts with images, question and answer, as `vlmkit.tasks` makes them, and
return a list of new ones. `charts`, `pages`, `signs` and `crowds` draw their own rows: pictures
with a bar painted over, or beyond what `vlmkit.tasks` draws.
"""

from collections import Counter

import numpy as np

from vlmkit.errors import TaskError
from vlmkit.images import read_all
from vlmkit.tasks import NONE, RECIPES, chart, drawing, generator, ocr, scenes


def blank(rows, level=128):
    """The rows with every picture replaced by a gray one of the same size; level: from 0 to 255.

    A model can only guess these answers from the question. If it may answer "none", that is among
    the right answers.
    """
    return [_with(row, [_gray(image, level) for image in read_all(row["images"])]) for row in rows]


def exchanged(rows):
    """Each question with the pictures of the next row of its kind, and with its own answer.

    Such pictures look like the right ones, so a model cannot tell that they are wrong. A kind is
    the columns task and kind, if there are any, together with the number of pictures. Raises
    TaskError for a kind with only one row.
    """
    rows, groups = list(rows), {}
    for row in rows:
        groups.setdefault(_kind(row), []).append(row)
    for (task, kind, _), group in groups.items():
        if len(group) == 1:
            name = "/".join(filter(None, (task, kind))) or "this kind"
            raise TaskError(
                f"There is only one row of {name}, so there is no other picture: give more rows."
            )
    following = {kind: iter(group[1:] + group[:1]) for kind, group in groups.items()}
    return [_with(row, next(following[_kind(row)])["images"]) for row in rows]


def arranged(rows, order, answers=None):
    """The rows with their pictures in another order, some left out or repeated.

    order: for each new place the old place, from 0 on: [3, 2, 1, 0] is a video backwards,
        [0, 0, 0, 0] one that stands still, and [1, 0] exchanges two pictures.
    answers: {answer: what is right in this order}, for the answers that change.

    Raises TaskError for a place at which a row has no picture.
    """
    order, answers = list(order), answers or {}
    made = []
    for number, row in enumerate(rows):
        images, answer = row["images"], row["answer"]
        if not all(0 <= place < len(images) for place in order):
            raise TaskError(f"Row {number} has {len(images)} pictures, and the order is {order}.")
        made.append(_with(row, [images[place] for place in order], answers.get(answer, answer)))
    return made


def among(rows, before=0, after=0, level=128):
    """The rows with gray pictures before and after their own, in the size of the first one."""
    made = []
    for row in rows:
        images = read_all(row["images"])
        empty = _gray(images[0], level)
        made.append(_with(row, [empty] * before + images + [empty] * after))
    return made


def about(rows, others, answer=NONE):
    """The questions of `rows` with the pictures of `others`, in pairs, and one answer for all.

    For questions that these pictures cannot answer, such as questions about a chart with a picture
    of something else. A model that gives another answer has made it up.
    """
    return [_with(row, other["images"], answer) for row, other in zip(rows, others, strict=False)]


def most_frequent(rows):
    """`Scores` of giving each kind of question its most frequent right answer, without any picture.

    The answers are counted in these same rows, so with few rows the scores are a little too good.
    """
    from vlmkit.evaluation import scored

    rows, counts = list(rows), {}
    for row in rows:
        counts.setdefault(_kind(row), Counter())[row["answer"]] += 1
    return scored(rows, [counts[_kind(row)].most_common(1)[0][0] for row in rows])


def _kind(row):
    return row.get("task"), row.get("kind"), len(row["images"])


def _with(row, images, answer=None):
    return {**row, "images": images, "answer": row["answer"] if answer is None else answer}


def _gray(image, level):
    from PIL import Image

    return Image.new("RGB", image.size, (level,) * 3)


# --- rows of its own ------------------------------------------------------------------------------


def charts(n, hide=None, seed=0):
    """`n` questions for the value of a bar that is there.

    hide: "asked" paints over this bar, so that "none" is right; "another" paints over another bar,
        which changes no answer.
    """
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
    """`n` signs of `vlmkit.tasks`, each on one quarter of an empty page with sides twice as long;
    row["quarter"] is 0 to 3, in reading order."""
    rows = []
    for index in range(n):
        kind = ("word", "number", "code")[index % 3]
        rng = generator("controls", seed, "page", index)
        picture, question, answer = RECIPES["ocr"].example(kind, rng)
        sign, (down, right) = picture.frames[0], divmod(quarter := rng.randrange(4), 2)
        size = drawing.SIZE
        page = np.full((2 * size, 2 * size, 3), sign[0, 0])
        page[down * size :, right * size :][:size, :size] = sign
        rows.append(_row(page, question, answer, "ocr", kind) | {"quarter": quarter})
    return rows


def signs(n, letters, seed=0):
    """`n` signs with that many random capitals, spaced as those of `vlmkit.tasks`, which have two
    to five. Six fill the width of the picture."""
    step = 2 * (drawing.GLYPH_WIDTH + ocr.SPACING)
    left = (drawing.SIZE - step * letters) // 2 + 1
    if letters < 1 or left < 1:
        raise TaskError(f"A sign has room for 1 to {drawing.SIZE // step} letters, not {letters}.")
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
    """`n` pictures of that many objects to count, 0 to 9. Those of `vlmkit.tasks` have up to 6."""
    if objects not in range(scenes.CELLS**2 + 1):
        raise TaskError(f"A picture has room for 0 to {scenes.CELLS**2} objects, not {objects}.")
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
