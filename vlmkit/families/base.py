"""What every family shares: the Picture, which can be a video, the class `Family`, and the size of
a picture.

Adding a family is one subclass of `Family`, in `grids` or in `tiles`, and one test.
"""

from dataclasses import dataclass, replace

import torch

from vlmkit.errors import AnatomyError, ImageError, SizeError
from vlmkit.images import LONGEST_SHAPE

FIRST_WORD = 3
"""The first id that can be the id of a word. Ids below it are usually special tokens."""


@dataclass(frozen=True)
class Picture:
    """One picture as a model sees it.

    tokens: positions that the picture takes in the prompt, together with the text that the
        processor puts among them (row and column markers, line breaks). What a chat template writes
        around a picture counts as text.
    features: how many of these positions hold a visual feature.
    crop: (height, width) in pixels of each of the `count` tiles that the vision encoder reads.
    patches: patches that the vision encoder reads, in all tiles.
    attended: states that cross-attention layers read, outside the prompt (Llama 3.2 Vision).
    thumbnail: (height, width) of the last tile, the whole picture, if it is not `crop`.
    frames: of a video; 0 for a still picture. `count` is smaller where the encoder reads several
        frames at once.
    runs: into how many runs the features are split by text, such as the time of each frame.
    why: how the number of tokens comes about, in words.
    """

    tokens: int
    features: int
    crop: tuple
    count: int
    patches: int
    why: str
    attended: int = 0
    thumbnail: tuple | None = None
    frames: int = 0
    runs: int = 1

    def __str__(self):
        return f"{self.tokens:,} visual tokens: {self.why}"


class Family:
    """How models of one family turn pictures into tokens, and what is special about running them.

    A subclass names its `model_types` and defines `picture`. It overrides the rest only where the
    family differs. A family without a subclass is run with text alone.

    model_types: the values of `model_type` in config.json.
    one_size: whether the vision encoder resizes every picture to its own resolution.
    casts: whether the vision encoder casts pixels to its own dtype.
    limits: what limits a picture's size in its processor (see `vlmkit.families.with_limits`).
    limits_videos: whether these limits are also limits of videos.
    videos_apart: whether the model takes videos as inputs of their own (`video_pixels`), and not as
        pictures.
    either: why a prompt cannot have pictures and a video, in words; "" if it can.
    """

    model_types = ()
    one_size = False
    casts = True
    limits = ()
    limits_videos = False
    videos_apart = True
    either = ""

    @property
    def no_limits(self):
        """What to say to somebody who asks for a limit that the family does not have."""
        if self.limits:
            return ""
        if self.one_size:
            return "Every picture is resized to the resolution of the vision encoder."
        if not self.model_types:
            return "vlmkit has no rule for this family. Set it on processor.image_processor."
        return "The model's config lists the tiles into which a picture may be cut."

    def settings(self, config):
        """Settings of the image processor that the family's published checkpoints have. They are
        used when a config comes alone, without the files of its processor."""
        return {}

    def check(self, settings):
        """Raises SizeError for settings of the image processor that the family cannot have."""

    def unset(self, config):
        """Settings of the image processor's class. They hold where a checkpoint has the file of its
        processor, and the file does not say otherwise."""
        return self.settings(config)

    def picture(self, config, settings, width, height, alone=True):
        """The Picture that the processor makes of a picture of `width` x `height` pixels.

        settings: of the image processor, see `settings_of`. alone: whether it is the only picture
            of its prompt.

        Raises AnatomyError if vlmkit does not know how the family does that.
        """
        from vlmkit.families import FAMILIES

        raise AnatomyError(
            f"vlmkit has no rule yet for how {config.model_type} turns a picture into tokens. Count"
            " them with its processor and add them to tokens, with images=0. There are rules for "
            f"{', '.join(sorted(FAMILIES))}."
        )

    def video_settings(self, config):
        """Settings of the video processor that the family's published checkpoints have."""
        return {}

    def unset_video(self, config):
        """Settings of the video processor's class."""
        return self.video_settings(config)

    def video(self, config, settings, num_frames, width, height):
        """The Picture that the processors make of a video of `num_frames` frames of `width` x
        `height` pixels. It holds the text that the processor writes among the frames: the times
        begin at 0 and follow the frames per second that the video processor samples by default.

        settings: of the video processor, see `settings_of`. num_frames: those that remain after the
            processor has chosen some of a film's.

        Raises SizeError if the family takes no videos, or no video of so few frames; AnatomyError
        if vlmkit does not know how the family does that.
        """
        from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

        from vlmkit.families import FAMILIES

        those = [t for t, kind in FAMILIES.items() if type(kind).video is not Family.video]
        if config.model_type in VIDEO_PROCESSOR_MAPPING_NAMES:
            raise AnatomyError(
                f"vlmkit has no rule yet for how {config.model_type} turns a video into tokens. "
                "Count them with its processor and add them to tokens, with num_frames=0. There "
                f"are rules for {', '.join(sorted(those))}."
            )
        raise SizeError(
            f"{config.model_type} takes no videos: transformers has no video processor for it. "
            f"Give the frames as pictures (images). Videos go into {', '.join(sorted(those))}."
        )

    def pixels(self, config, pictures, sizes, batch_size, make):
        """{name: tensor} of what the processor hands to the model for the pictures.

        pictures: Pictures of one sample. sizes: their (width, height). make: a function that
            returns a float32 tensor of a shape.
        """
        shape = batch_size * sum(picture.count for picture in pictures), 3, *pictures[0].crop
        return {"pixel_values": make(shape)}

    def video_pixels(self, config, video, batch_size, make):
        """{name: tensor} of what the processor hands to the model for a video in each sample."""
        raise NotImplementedError

    def video_id(self, config):
        """The id of the token that a feature of a video replaces."""
        return _first_of(config, "video_token_id", "video_token_index")

    def beside(self, config, ids, tensors):
        """{name: tensor} of further inputs. ids: input_ids. tensors: what `pixels` and
        `video_pixels` returned."""
        if not self.three_axes(config):
            return {}
        types = _places(config, ids)
        if "pixel_values_videos" in tensors:
            types[ids == self.video_id(config)] = 2
        return {"mm_token_type_ids": types}

    def decoder(self, model):
        """The module that runs text without a picture, such as a token after the prompt."""
        return model

    def three_axes(self, config):
        """Whether positions are counted along time, height and width (M-RoPE, arXiv 2409.12191)."""
        rope = getattr(config.get_text_config(), "rope_parameters", None)
        return "mrope_section" in (rope or {})


def _places(config, ids):
    return (ids == image_id(config)).long()


class TokenTypes(Family):
    """A family whose models take token_type_ids: 1 where a visual feature is."""

    def beside(self, config, ids, tensors):
        return {"token_type_ids": _places(config, ids)}


def writes_apart(config):
    """Whether an encoder reads the prompt and a decoder with a cache of its own writes the answer
    (Florence-2)."""
    text = getattr(config, "text_config", None)
    return any(getattr(part, "is_encoder_decoder", False) for part in (config, text))


def image_id(config):
    """The id of the token that a visual feature replaces."""
    return _first_of(config, "image_token_id", "image_token_index")


def _first_of(config, *names):
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), None)


def ids_of(family, config, pictures, tokens):
    """Ids of one sample, as a list: each picture's own text, then its features in a row; all other
    text comes at the end, except for one token after each picture, so that pictures do not touch.
    The text of a video is spread evenly over its runs.

    tokens: how many tokens of text the sample has beside those of its pictures.
    """
    if pictures and image_id(config) is None:
        raise AnatomyError(
            f"this config of {config.model_type} names no token for pictures (image_token_id or "
            "image_token_index), as configs of older versions of transformers do: add it, or "
            "predict without pictures."
        )
    named = [value for name, value in vars(config).items() if "token" in name]
    # A config may list several ids that end an answer.
    special = [i for value in named for i in (value if isinstance(value, list) else [value])]
    word = next(i for i in range(FIRST_WORD, 10**6) if i not in special)
    ids = []
    for picture in pictures:
        feature = family.video_id(config) if picture.frames else image_id(config)
        text, runs = picture.tokens - picture.features, picture.runs
        for run in range(runs):
            ids += [word] * (text * (run + 1) // runs - text * run // runs)
            ids += [feature] * (picture.features // runs)
        if tokens:
            ids, tokens = [*ids, word], tokens - 1
    return ids + [word] * tokens


def inputs_of(family, config, pictures, sizes, tokens, batch_size, make):
    """{name: tensor} of the inputs of one forward pass. For the arguments see `Family.pixels` and
    `ids_of`. Integers are real, because the forward pass looks at them."""
    ids = torch.tensor([ids_of(family, config, pictures, tokens)])
    ids = ids.expand(batch_size, -1).contiguous()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    videos = [picture for picture in pictures if picture.frames and family.videos_apart]
    stills = [pair for pair in zip(pictures, sizes, strict=True) if pair[0] not in videos]
    if stills:
        inputs |= family.pixels(config, *map(list, zip(*stills, strict=True)), batch_size, make)
    for video in videos:
        inputs |= family.video_pixels(config, video, batch_size, make)
    return inputs | family.beside(config, ids, inputs)


def check_size(size):
    """(width, height) of a picture, in pixels. Raises SizeError or ImageError if it is none."""
    from PIL import Image

    try:
        width, height = size
    except (TypeError, ValueError):
        raise SizeError(f"a picture's size is (width, height) in pixels, not {size!r}") from None
    for side in (width, height):
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise SizeError(
                f"a picture's size is (width, height) in whole pixels from 1 on, not {size!r}"
            )
    if max(size) > LONGEST_SHAPE * min(size):
        raise ImageError(
            f"a picture of {width:,} x {height:,} pixels is longer than {LONGEST_SHAPE} : 1, which "
            "no family takes: crop it or cut it into several."
        )
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ImageError(
            f"a picture of {width:,} x {height:,} pixels is larger than Pillow opens "
            f"({Image.MAX_IMAGE_PIXELS:,} pixels), and no family takes it: make it smaller."
        )
    return width, height


def side_of(size):
    """One side of a size that a config gives as a number or as a pair."""
    return size[0] if isinstance(size, (list, tuple)) else size


def grid_of(config):
    """Number of patches along a side, at the vision encoder's own resolution."""
    vision = config.vision_config
    return side_of(vision.image_size) // side_of(vision.patch_size)


def whole(config, tokens, why):
    """The Picture of `tokens` features for a picture resized to the encoder's own resolution."""
    side = side_of(config.vision_config.image_size)
    return Picture(tokens, tokens, (side, side), 1, grid_of(config) ** 2, why)


def video_of(frame, num_frames, features, text, runs):
    """The Picture of a video whose frames are the Picture `frame` each. text: tokens of text."""
    why = frame.why + (f", with {text} of text among them" if text else "")
    return replace(
        frame, tokens=features + text, features=features, count=num_frames,
        patches=num_frames * frame.patches, why=why, frames=num_frames, runs=runs,
    )  # fmt: skip
