"""Controls: the same questions about other pictures, to see whether a model looks, and at what.

    rows = vk.tasks.dataset("video", n=100)
    vk.evaluate(model, processor, vk.controls.blank(rows))             # nothing to see
    vk.evaluate(model, processor, vk.controls.exchanged(rows))         # the wrong pictures
    vk.evaluate(model, processor, vk.controls.arranged(rows, [3, 2, 1, 0], OPPOSITE))
    vk.controls.most_frequent(rows)                                    # without a model at all

Right answers prove little where the same number comes without the picture (Goyal et al., 2017,
arXiv 1612.00837, on visual question answering; Buch et al., 2022, arXiv 2206.01720, on video). Each
function takes rows with images, question and answer, as `vlmkit.tasks` makes them, leaves them as
they are, and returns a list of new ones.
"""

from collections import Counter

from vlmkit.errors import TaskError
from vlmkit.images import read_all


def blank(rows, level=128):
    """The rows with every picture replaced by one of its size in a single grey, 0 to 255.

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
