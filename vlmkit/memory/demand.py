"""Demand: the prompt, or the batch of a training step, that memory is predicted for."""

from dataclasses import dataclass

from vlmkit.errors import AnatomyError, SizeError
from vlmkit.memory.processors import settings_of
from vlmkit.memory.visual_tokens import own_size, picture, side_of

USUAL = 1024, 768
"""Width and height of a picture where its size matters and none is given."""


@dataclass(frozen=True)
class Demand:
    """What goes into the model. sizes: (width, height) of each picture of a sample."""

    tokens: int = 0
    new_tokens: int = 0
    sizes: tuple = ()
    batch: int = 1
    pictures: tuple = ()
    notes: tuple = ()

    @property
    def length(self):
        """Positions of the prompt: text and pictures."""
        return self.tokens + sum(picture.tokens for picture in self.pictures)

    def __bool__(self):
        return bool(self.length)


def demand_of(config, folder, tokens=0, new_tokens=0, images=0, image_size=None, batch=1):
    """The Demand, checked against the model of `config`, whose files are in `folder` (or None).

    Raises SizeError for numbers that cannot be or do not fit the model's context, ImageError for
    pictures that no model takes, AnatomyError where the family's way with pictures is not known.
    """
    numbers = {"tokens": tokens, "new_tokens": new_tokens, "images": images, "batch": batch}
    for name, number in numbers.items():
        least = int(name == "batch")
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise SizeError(f"{name} is a whole number from {least} on, not {number!r}")
    found = _demand(config, folder, tokens, new_tokens, _sizes(config, images, image_size), batch)
    if new_tokens and not found:
        raise SizeError("new tokens need a prompt: give tokens, images or both")
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    if room and found.length + new_tokens > room:
        raise SizeError(
            f"{found.length + new_tokens:,} positions ({tokens:,} of text, "
            f"{found.length - tokens:,} of {len(found.sizes)} pictures, {new_tokens:,} new) do not "
            f"fit {config.model_type}'s context of {room:,}: fewer or smaller pictures, or less "
            "text."
        )
    return found


def smallest(config, folder):
    """The Demand of a training step of which nothing is said: a few words, and a small picture
    where there is a rule for one."""
    side = side_of(getattr(getattr(config, "vision_config", None), "image_size", 64))
    try:
        return _demand(config, folder, 8, 0, ((side, side),), 1)
    except AnatomyError:
        return Demand(tokens=8)


def _demand(config, folder, tokens, new_tokens, sizes, batch):
    if not sizes:
        return Demand(tokens, new_tokens, (), batch)
    settings, source = settings_of(config, folder)
    pictures = tuple(picture(config, settings, size, len(sizes) == 1) for size in sizes)
    notes = tuple(_told(sizes, pictures, source))
    return Demand(tokens, new_tokens, sizes, batch, pictures, notes)


def _sizes(config, images, image_size):
    """(width, height) of each picture of a sample."""
    if image_size is None:
        return (own_size(config) or USUAL,) * images if images else ()
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


def _told(sizes, pictures, source):
    """How many visual tokens, and why, a sentence for each size."""
    for size in dict.fromkeys(sizes):
        which = [p for s, p in zip(sizes, pictures, strict=True) if s == size]
        many = f"{len(which)} pictures" if len(which) > 1 else "a picture"
        each = " each" if len(which) > 1 else ""
        yield f"{many} of {size[0]} x {size[1]} pixels: {which[0]}{each} ({source})."
