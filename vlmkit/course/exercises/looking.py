"""Exercises on what pictures cost, and on controls that change them."""

from vlmkit.course.exercises.answers import called, exercise, kind, require, whole


@exercise("what fits")
def what_fits(answer, cost, mb):
    """The side in pixels of the largest square picture whose keys and values take no more than
    `mb` MB; cost(side): these MB."""
    side = whole(answer, "a number of pixels")
    now, more = cost(side), cost(side + 1)
    tokens = "A side is rounded to whole tokens, so a few pixels more can cost nothing."
    require(side < 20_000, f"{side:,} pixels a side are more than any model takes.")
    require(now <= mb, f"{now:.1f} MB, and {mb} are there.")
    require(more > mb, f"{now:.1f} MB, and with a pixel more {more:.1f}. {tokens}")
    return (
        f"{now:.1f} MB, and with one pixel more {more:.1f}: tokens come by whole rows and columns."
    )


@exercise("mirrored films")
def mirrored_films(answer, clips):
    """A function of rows that returns them with every picture mirrored left to right, and the
    answers that this makes right."""
    import numpy as np

    given = [{**row, "images": list(row["images"])} for row in clips]
    found = called(answer, given)
    try:
        found = [(np.asarray(row["images"]), row["answer"]) for row in found]
    except Exception:
        require(False, f"it should return rows as it was given them, and returns {kind(found)}.")
    require(len(found) == len(clips), f"{len(clips)} rows went in, and {len(found)} come out.")
    before = [np.stack([np.asarray(image) for image in row["images"]]) for row in clips]
    for (after, _), pictures in zip(found, before, strict=True):
        require(after.shape == pictures.shape, "the pictures have another size or number.")
        if (after == pictures[:, :, ::-1]).all():
            continue
        require((after != pictures).any(), "the pictures are as before.")
        require((after != pictures[:, ::-1]).any(), "this is top to bottom, not left to right.")
        require((after != pictures[::-1]).any(), "this is a film backwards; mirror each picture.")
        require(False, "a picture is not its mirror image.")
    swap = {"left": "right", "right": "left"}
    answers = [(row["answer"], new) for row, (_, new) in zip(clips, found, strict=True)]
    stayed = sum(old in swap and new == old for old, new in answers)
    require(not stayed, f"the pictures are mirrored, and {stayed} answers should be, but are not.")
    strange = [f"{old} became {new}" for old, new in answers if new != swap.get(old, old)]
    require(not strange, f"{strange[0] if strange else ''}; mirroring turns left and right only.")
    return "left and right change places; up, down and none stay. A control needs both halves."


@exercise("two frames")
def two_frames(answer, asked):
    """An order of two different frames of four with which nearly as many directions are right as
    with all, nine tenths; asked: (model, processor, clips)."""
    from vlmkit.course.controls import arranged
    from vlmkit.evaluation import evaluate

    model, processor, clips = asked
    require(
        isinstance(answer, list | tuple) and answer,
        f"what is asked for is a list of places, such as [0, 1]; this is {kind(answer)}.",
    )
    order = [whole(place, "a place from 0 to 3", least=0) for place in answer]
    require(max(order) <= 3, f"a film has the frames 0 to 3; this asks for {max(order)}.")
    different = len(set(order))
    require(different == 2, f"two different frames are asked for; these are {different}.")
    before = evaluate(model, processor, clips).accuracy
    now = evaluate(model, processor, arranged(clips, order)).accuracy
    hint = ""
    if order != sorted(order):
        hint = " This runs backwards somewhere, so the direction is no longer the film's."
    elif len(order) != 4:
        hint = f" This film has {len(order)} pictures, and it has learnt films of four."
    elif order not in ([0, 0, 3, 3], [0, 0, 0, 3], [0, 3, 3, 3]):
        hint = " The farther apart two frames are, the more has moved."
    require(now >= 0.9 * before, f"{now:.0%} right, in place of {before:.0%}.{hint}")
    return (
        f"{now:.0%}, in place of {before:.0%}: two frames hold the direction, if they come as four."
    )
