"""Exercises on what a model looks at: pictures of many sizes, mirrored films, fewer frames."""

from vlmkit.course.exercises.answers import Hint, exercise, function, kind, of_type, require, whole


@exercise("tokens of a picture", function)
def tokens_of_a_picture(count, name):
    """A function of (width, height) in pixels: how many tokens a picture of that size is for the
    model `name`."""
    from vlmkit.memory import visual_tokens

    for size in ((1240, 1754), (280, 280), (640, 360), (97, 1500), (1024, 768)):
        found = whole(count(*size), "a number of tokens", least=0)
        right = visual_tokens(name, size).tokens
        width, height = size
        down, up = (width // 28) * (height // 28), (-width // 28) * (-height // 28)
        hints = {
            down: "Sides are rounded to the nearest multiple, not down.",
            up: "Sides are rounded to the nearest multiple, not up.",
            round(width * height / 28**2): "Each side is rounded by itself, not the area.",
            4 * right: "Four patches of 14 × 14 pixels become one token.",
        }
        hint = hints.get(found, "Round each side to multiples of 28 pixels.")
        require(found == right, f"{width} × {height} pixels are {right:,}, not {found:,}. {hint}")
    return "each side is rounded to a multiple of 28 pixels, and 28 × 28 pixels are one token."


@exercise("what fits", whole, "a number of pixels")
def what_fits(side, cost, mb):
    """The side in pixels of the largest square picture whose keys and values take no more than
    `mb` MB; cost(side): these MB."""
    require(side < 20_000, f"{side:,} pixels a side are more than any model takes.")
    now, more = cost(side), cost(side + 1)
    require(now <= mb, f"{now:.1f} MB, and the budget is {mb}.")
    require(
        more > mb,
        f"{now:.1f} MB, and with a pixel more {more:.1f}. A side is rounded to whole tokens, so a "
        "few pixels more can cost nothing.",
    )
    return f"{now:.1f} MB, and with a pixel more {more:.1f}: a whole row and column of tokens."


@exercise("mirrored films", function)
def mirrored_films(mirrored, clips):
    """A function of rows that returns them with every picture mirrored left to right, and with the
    answers that are right then."""
    import numpy as np

    found = mirrored([{**row, "images": list(row["images"])} for row in clips])
    try:
        found = [(np.asarray(row["images"]), row["answer"]) for row in found]
    except Exception:
        raise Hint(f"it should return rows like those it gets, not {kind(found)}.") from None
    require(len(found) == len(clips), f"{len(clips)} rows went in, and {len(found)} come out.")
    swap = {"left": "right", "right": "left"}
    for row, (after, _) in zip(clips, found, strict=True):
        before = np.stack([np.asarray(image) for image in row["images"]])
        require(after.shape == before.shape, "the pictures have another size or number.")
        for turned, hint in (
            (before[:, :, ::-1], None),
            (before, "the pictures are as before."),
            (before[:, ::-1], "this is top to bottom, not left to right."),
            (before[::-1], "this is a film backwards; mirror each picture."),
            (after, "a picture is not its mirror image."),
        ):
            if (after == turned).all():
                require(hint is None, hint)
                break
    answers = [(row["answer"], new) for row, (_, new) in zip(clips, found, strict=True)]
    same = sum(old in swap and new == old for old, new in answers)
    require(not same, f"the pictures are mirrored, and {same} answers should be, but are not.")
    for old, new in answers:
        right = new == swap.get(old, old)
        require(right, f"{old} became {new}; mirroring swaps left and right only.")
    return "left and right change places; up, down and none stay. A control needs both halves."


@exercise("two frames", of_type, (list, tuple), "a list of places, such as [0, 1]")
def two_frames(places, asked):
    """An order of two different frames of four with which nine tenths as many directions are right
    as with all four; asked: (model, processor, clips)."""
    from vlmkit.course.controls import arranged
    from vlmkit.evaluation import evaluate

    model, processor, clips = asked
    order = [whole(place, "a list of places from 0 to 3", least=0) for place in places]
    require(max(order, default=0) <= 3, f"a film has the frames 0 to 3; this asks for {order}.")
    different = len(set(order))
    require(different == 2, f"two different frames are asked for; these are {different}.")
    before = evaluate(model, processor, clips).accuracy
    now = evaluate(model, processor, arranged(clips, order)).accuracy
    hint = ""
    if order != sorted(order):
        hint = " This film runs backwards somewhere, so the direction is another one."
    elif len(order) != 4:
        hint = f" This film has {len(order)} pictures, and the model learned films of four."
    elif order not in ([0, 0, 3, 3], [0, 0, 0, 3], [0, 3, 3, 3]):
        hint = " The farther apart two frames are, the more has moved."
    require(now >= 0.9 * before, f"{now:.0%} right, instead of {before:.0%}.{hint}")
    return f"{now:.0%}, instead of {before:.0%}: two frames show the direction, if they come as 4."
