"""Batches: the prompt, or the batch of a training step, that memory is predicted for."""

from dataclasses import dataclass, field

from vlmkit.errors import AnatomyError, SizeError, shown
from vlmkit.families import check_size, family_of, inputs_of, settings_of, side_of, writes_apart

USUAL = 1024, 768
"""Width and height of a picture if its size matters and none is given."""
MOST = {
    "tokens": 10**8, "new_tokens": 10**8, "images": 10_000, "num_frames": 10_000,
    "batch_size": 10**6,
}  # fmt: skip
"""What a prompt or a training step may have. Each picture takes time, a list of a million takes
minutes."""


@dataclass(frozen=True)
class Batch:
    """What goes into the model of `config`.

    tokens: of text in each sample. new_tokens: generated after it. sizes: (width, height) of each
    picture of a sample, and of its video. size: number of samples. pictures: a Picture for each
    size.
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

    @property
    def seen(self):
        """The pictures and the video, in words."""
        stills = [picture for picture in self.pictures if not picture.frames]
        words = [f"{len(stills)} pictures"] if stills or not self.pictures else []
        words += [f"a video of {p.frames} frames" for p in self.pictures if p.frames]
        return " and ".join(words)

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
    config, folder, tokens=0, new_tokens=0, images=0, image_size=None, batch_size=1, limits=None,
    num_frames=0,
):  # fmt: skip
    """The Batch, checked against the model of `config`, whose files are in `folder` (or None).
    limits: those of its processor, see `vlmkit.families.with_limits`.

    Raises SizeError for numbers that cannot be or do not fit the model's context, ImageError for
    pictures that no model takes, AnatomyError if vlmkit has no rule for the family's pictures.
    """
    numbers = {
        "tokens": tokens, "new_tokens": new_tokens, "images": images, "num_frames": num_frames,
        "batch_size": batch_size,
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
    family = family_of(config)
    if num_frames and images and family.either:
        raise SizeError(
            f"a prompt of {config.model_type} has pictures or a video, not both: {family.either}. "
            "Leave out images or num_frames."
        )
    if num_frames and limits and not images and not family.limits_videos:
        raise SizeError(
            f"{', '.join(limits)} does not change a video of {config.model_type}: every frame is "
            "resized to the same size."
        )
    sizes = _sizes(config, images + bool(num_frames), image_size)
    found = _batch(config, folder, tokens, new_tokens, sizes, batch_size, limits, num_frames)
    if new_tokens and not found:
        raise SizeError("new tokens need a prompt: give tokens, images or num_frames")
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = found.length + new_tokens
    if writes_apart(config):  # the answer begins with a token of its own
        length = max(found.length, 1 + new_tokens)
    if room and length > room:
        raise SizeError(
            f"{found.length + new_tokens:,} positions ({tokens:,} of text, "
            f"{found.length - tokens:,} of {found.seen}, {new_tokens:,} new) do not "
            f"fit {config.model_type}'s context of {room:,}: use fewer or smaller pictures or "
            "frames, or less text."
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


def picture_of(config, folder, size, alone=True, limits=None, num_frames=0):
    """(the Picture of a picture of `size` (width, height), or of a video of `num_frames` frames of
    that size, where its settings come from)."""
    settings, source = settings_of(config, folder, limits, video=bool(num_frames))
    family, size = family_of(config), check_size(size)
    if num_frames:
        return family.video(config, settings, num_frames, *size), source
    return family.picture(config, settings, *size, alone), source


def _batch(config, folder, tokens, new_tokens, sizes, batch_size, limits, num_frames=0):
    stills = sizes[:-1] if num_frames else sizes
    made = {
        size: picture_of(config, folder, size, len(stills) == 1, limits)
        for size in dict.fromkeys(stills)
    }
    notes = [*_notes(stills, made)]
    pictures = [made[size][0] for size in stills]
    if num_frames:
        video, source = picture_of(config, folder, sizes[-1], True, limits, num_frames)
        pictures.append(video)
        width, height = sizes[-1]
        notes.append(
            f"a video of {num_frames} frames of {width} x {height} pixels: {video} ({source})."
        )
    return Batch(config, tokens, new_tokens, sizes, batch_size, tuple(pictures), tuple(notes))


def _sizes(config, images, image_size):
    """(width, height) of each picture of a sample. A video counts as one of `images`."""
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
            "there are pictures, and one more for a video"
        )
    return sizes


def _notes(sizes, made):
    """How many visual tokens, and why: a sentence for each size."""
    for size, (picture, source) in made.items():
        number = sizes.count(size)
        many = f"{number} pictures" if number > 1 else "a picture"
        each = " each" if number > 1 else ""
        yield f"{many} of {size[0]} x {size[1]} pixels: {picture}{each} ({source})."
