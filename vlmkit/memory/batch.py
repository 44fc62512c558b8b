"""Batches: the prompt, or the batch of a training step, that memory is predicted for."""

from dataclasses import dataclass, field

from vlmkit.errors import AnatomyError, SizeError, shown
from vlmkit.families import check_size, family_of, inputs_of, settings_of, side_of, writes_apart

USUAL = 1024, 768
"""Width and height of a picture if its size matters and none is given."""
MOST = {"tokens": 10**8, "new_tokens": 10**8, "images": 10_000, "batch_size": 10**6}
"""What a prompt or a training step may have. Each picture takes time, a list of a million takes
minutes."""


@dataclass(frozen=True)
class Batch:
    """What goes into the model of `config`.

    tokens: of text in each sample. new_tokens: generated after it. sizes: (width, height) of each
    picture of a sample. size: number of samples. pictures: a Picture for each size.
    """

    config: object = field(repr=False)
    tokens: int = 0
    new_tokens: int = 0
    sizes: tuple = ()
    size: int = 1
    pictures: tuple = ()
    notes: tuple = ()

    @property
    def length(self):
        """Positions of the prompt: text and pictures."""
        return self.tokens + sum(picture.tokens for picture in self.pictures)

    def __bool__(self):
        return bool(self.length)

    def inputs(self, make):
        """{name: tensor} of the model's inputs. make: a function that returns a float32 tensor of a
        shape, for the pixels."""
        return inputs_of(
            family_of(self.config), self.config, self.pictures, self.sizes, self.tokens, self.size,
            make,
        )  # fmt: skip


def batch_of(
    config, folder, tokens=0, new_tokens=0, images=0, image_size=None, batch_size=1, limits=None
):
    """The Batch, checked against the model of `config`, whose files are in `folder` (or None).
    limits: those of its processor, see `vlmkit.families.with_limits`.

    Raises SizeError for numbers that cannot be or do not fit the model's context, ImageError for
    pictures that no model takes, AnatomyError if vlmkit has no rule for the family's pictures.
    """
    numbers = {
        "tokens": tokens, "new_tokens": new_tokens, "images": images, "batch_size": batch_size
    }  # fmt: skip
    for name, number in numbers.items():
        least = int(name == "batch_size")
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise SizeError(f"{name} is a whole number from {least} on, not {shown(number)}")
        if number > MOST[name]:
            raise SizeError(
                f"{name} is at most {MOST[name]:,} here, which is more than any model takes, and "
                f"not {shown(number)}. Give the number of one prompt or one training step."
            )
    sizes = _sizes(config, images, image_size)
    found = _batch(config, folder, tokens, new_tokens, sizes, batch_size, limits)
    if new_tokens and not found:
        raise SizeError("new tokens need a prompt: give tokens, images or both")
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = found.length + new_tokens
    if writes_apart(config):  # the answer begins with a token of its own
        length = max(found.length, 1 + new_tokens)
    if room and length > room:
        raise SizeError(
            f"{found.length + new_tokens:,} positions ({tokens:,} of text, "
            f"{found.length - tokens:,} of {len(found.sizes)} pictures, {new_tokens:,} new) do not "
            f"fit {config.model_type}'s context of {room:,}: use fewer or smaller pictures, or "
            "less text."
        )
    return found


def smallest(config, folder, limits=None):
    """The Batch of a training step about which nothing is said: a few words, and a small picture if
    vlmkit has a rule for one."""
    side = side_of(getattr(getattr(config, "vision_config", None), "image_size", 64))
    try:
        return _batch(config, folder, 8, 0, ((side, side),), 1, limits)
    except AnatomyError:
        return Batch(config, tokens=8)


def picture_of(config, folder, size, alone=True, limits=None):
    """(the Picture of a picture of `size` (width, height), where its settings come from)."""
    settings, source = settings_of(config, folder, limits)
    return family_of(config).picture(config, settings, *check_size(size), alone), source


def _batch(config, folder, tokens, new_tokens, sizes, batch_size, limits):
    made = {
        size: picture_of(config, folder, size, len(sizes) == 1, limits)
        for size in dict.fromkeys(sizes)
    }
    seen = [made[size] for size in sizes]
    pictures = tuple(picture for picture, _ in seen)
    notes = tuple(_notes(sizes, pictures, seen[0][1])) if seen else ()
    return Batch(config, tokens, new_tokens, sizes, batch_size, pictures, notes)


def _sizes(config, images, image_size):
    """(width, height) of each picture of a sample."""
    if image_size is None:
        if images and family_of(config).one_size and hasattr(config.vision_config, "image_size"):
            side = side_of(config.vision_config.image_size)
            return ((side, side),) * images
        return (USUAL,) * images
    try:
        many = not isinstance(image_size[0], (int, float, str))
        sizes = tuple(tuple(size) for size in image_size) if many else (tuple(image_size),)
    except (TypeError, KeyError, IndexError):
        raise SizeError(
            f"image_size is (width, height), or a list of one for each picture, not {image_size!r}"
        ) from None
    if len(sizes) == 1:
        return sizes * max(images, 1)
    if images not in (0, len(sizes)):
        raise SizeError(
            f"image_size has {len(sizes)} sizes for {images} images: give one size, or as many as "
            "there are pictures"
        )
    return sizes


def _notes(sizes, pictures, source):
    """How many visual tokens, and why: a sentence for each size."""
    for size in dict.fromkeys(sizes):
        which = [p for s, p in zip(sizes, pictures, strict=True) if s == size]
        many = f"{len(which)} pictures" if len(which) > 1 else "a picture"
        each = " each" if len(which) > 1 else ""
        yield f"{many} of {size[0]} x {size[1]} pixels: {which[0]}{each} ({source})."
