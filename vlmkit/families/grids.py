"""Families that read a picture in one grid of patches."""

import math
from dataclasses import replace

import torch

from vlmkit.errors import SizeError
from vlmkit.families.base import (
    Family,
    Picture,
    TokenTypes,
    grid_of,
    image_id,
    side_of,
    video_of,
    whole,
)


class Llava(Family):
    """LLaVA-1.5: a grid at the encoder's own resolution, whatever the picture's shape."""

    model_types = ("llava",)
    one_size = True

    def picture(self, config, settings, width, height, alone=True):
        grid = grid_of(config)
        # CLIP's class token is one more, and the strategy "default" drops it.
        extra = int("clip" in config.vision_config.model_type)
        extra -= getattr(config, "vision_feature_select_strategy", "full") == "default"
        return whole(config, grid**2 + extra, f"resized to {grid} x {grid} patches")


class PaliGemma(TokenTypes, Llava):
    """PaliGemma: the same grid as LLaVA's."""

    model_types = ("paligemma",)


class Gemma3(TokenTypes):
    """Gemma 3: the patches are pooled to a fixed number of tokens."""

    model_types = ("gemma3",)
    one_size = True

    def picture(self, config, settings, width, height, alone=True):
        tokens, patches = config.mm_tokens_per_image, grid_of(config) ** 2
        return whole(config, tokens, f"resized to {patches:,} patches, pooled to {tokens}")


class Blip2(Family):
    """BLIP-2: the queries of the Q-Former, always the same number."""

    model_types = ("blip-2",)
    one_size = True

    def picture(self, config, settings, width, height, alone=True):
        tokens = config.num_query_tokens
        return whole(config, tokens, f"{tokens} queries of the Q-Former, whatever the picture")

    def decoder(self, model):
        return model.language_model  # the whole model's own forward requires a picture


class Florence2(Family):
    """Florence-2 (arXiv 2311.06242, section 3.1): every picture is resized to one square; each
    place of the last grid is a token, and one more is the mean of all. An encoder reads them and
    the text."""

    model_types = ("florence2",)
    one_size = True

    def settings(self, config):
        return {"size": {"height": 768, "width": 768}}

    def picture(self, config, settings, width, height, alone=True):
        vision, crop = config.vision_config, (settings["size"]["height"], settings["size"]["width"])
        first, last = vision.patch_stride[0], math.prod(vision.patch_stride)
        tokens = math.prod(side // last for side in crop) + 1
        patches = math.prod(side // first for side in crop)
        why = (
            f"resized to {crop[1]} x {crop[0]} pixels, a token for each {last} x {last} and for all"
        )
        return Picture(tokens, tokens, crop, 1, patches, why)


class Qwen(Family):
    """Qwen2-VL (arXiv 2409.12191, section 2.1) and later: both sides are rounded to multiples of a
    merged patch, and the number of pixels is kept between a smallest and a largest one.

    least: the smallest number of visual tokens, by the model cards; the largest is 16,384.
    frames: how many frames a still picture counts as.
    """

    model_types = ("qwen2_vl", "qwen2_5_vl")
    limits = ("min_pixels", "max_pixels", "size")
    limits_videos = True
    least, frames = 4, 1

    def settings(self, config):
        unit = (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2
        return {"size": {"shortest_edge": self.least * unit, "longest_edge": 16_384 * unit}}

    def unset(self, config):
        return {"size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}}

    def three_axes(self, config):
        return True

    def video_settings(self, config):
        return self.settings(config)  # published without a file for videos: that for pictures holds

    def unset_video(self, config):
        return {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}}

    def enlarged(self, width, height, unit):
        """The size of a picture before it is rounded."""
        return width, height

    def picture(self, config, settings, width, height, alone=True):
        merge = config.vision_config.spatial_merge_size
        unit = config.vision_config.patch_size * merge
        least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
        size = self.enlarged(width, height, unit)
        rows, columns = _rounded(*size, unit, least, most, self.frames, self.frames)
        tokens, patches = rows * columns, rows * columns * merge**2
        crop = rows * unit, columns * unit
        why = (
            f"resized to {crop[1]} x {crop[0]} pixels, {patches:,} patches, "
            f"merged {merge} x {merge}"
        )
        return Picture(tokens, tokens, crop, 1, patches, why)

    def video(self, config, settings, num_frames, width, height):
        vision = config.vision_config
        merge, together = vision.spatial_merge_size, vision.temporal_patch_size
        unit = vision.patch_size * merge
        rows, columns = self.frame(settings, num_frames, together, unit, width, height)
        count = math.ceil(num_frames / together)  # the last frame is repeated if one is missing
        each, crop = rows * columns, (rows * unit, columns * unit)
        text = sum(self.text(i * together, together, settings) for i in range(count))
        why = (
            f"each frame resized to {crop[1]} x {crop[0]} pixels; {count} x {each} tokens, one for "
            f"{merge} x {merge} patches of {together} frames"
        )
        why += f", with {text} of text among them" if text else ""
        features, runs = count * each, count if text else 1
        return Picture(
            features + text, features, crop, count, features * merge**2, why, frames=num_frames,
            runs=runs,
        )  # fmt: skip

    def frame(self, settings, num_frames, together, unit, width, height):
        """(rows, columns) of merged patches in a frame. Each frame has the limits of pixels, and no
        other, unless the setting `cap_pixels_per_frame` divides 90% of `max_video_tokens` among all
        frames."""
        least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
        if settings.get("cap_pixels_per_frame"):
            total = int(settings.get("max_video_tokens", 128_000) * unit**2 * 0.9)
            most = max(min(most, total * together // num_frames), int(least * 1.05))
        return _rounded(width, height, unit, least, most)

    def text(self, first, together, settings):
        """Tokens of text beside the features of `together` frames, from the frame `first` on."""
        return 0

    def pixels(self, config, pictures, sizes, batch_size, make):
        """Patches in a row, and the grid that they come from."""
        vision = config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        patch = vision.patch_size
        grids = [(1, picture.crop[0] // patch, picture.crop[1] // patch) for picture in pictures]
        patches = batch_size * sum(picture.patches for picture in pictures)
        return {
            "pixel_values": make((patches, width)),
            "image_grid_thw": torch.tensor(grids * batch_size),
        }

    def video_pixels(self, config, video, batch_size, make):
        inputs = self.pixels(config, [video], None, batch_size, make)
        grid = inputs["image_grid_thw"]
        grid[:, 0] = video.count
        return {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": grid}


class Qwen3(Qwen):
    """Qwen3-VL and Qwen3.5: as Qwen2-VL, with 64 visual tokens at least. The limits of pixels are
    for a whole video, and its time is written before every two frames, with a marker on both sides
    of their features."""

    model_types = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
    least = 64

    def video_settings(self, config):
        unit = (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2
        return {"size": {"shortest_edge": 4 * unit, "longest_edge": 24_576 * unit}}

    def unset_video(self, config):
        return {"size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}}

    def frame(self, settings, num_frames, together, unit, width, height):
        if num_frames < together:
            raise SizeError(
                f"a video has {together} frames or more for this family, not {num_frames}: give a "
                "single frame as a picture (images)."
            )
        least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
        if settings.get("cap_pixels_per_frame"):
            most_each = min(settings.get("max_video_tokens", 768) * unit**2, most // num_frames)
            most = max(most_each, int(least * 1.05)) * num_frames
        size = _at_least(unit, width, height)
        counted = round(num_frames / together) * together  # of an odd number, the nearest even half
        return _rounded(*size, unit, least, most, num_frames, counted)

    def text(self, first, together, settings):
        fps = settings.get("fps") or 2
        digits = len(f"{(first + (together - 1) / 2) / fps:.1f}") - 1
        return digits + 6  # each digit, "<", ".", " seconds", ">" and two markers


class Glm4v(Qwen3):
    """GLM-4V: as Qwen3-VL, but a still picture counts as two frames, and the time in whole seconds
    follows the features. The model finds pictures and frames by the same token, so that it cannot
    tell them apart."""

    model_types = ("glm4v", "glm4v_moe")
    frames = 2
    either = "its model finds the features of both by the same token"

    def settings(self, config):
        return {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15_000}}

    def unset(self, config):
        return self.settings(config)

    def video_settings(self, config):
        return {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30_000}}

    def unset_video(self, config):
        return self.video_settings(config)

    def video_id(self, config):
        return image_id(config)

    def text(self, first, together, settings):
        return 3  # two markers, and a number of up to three digits, which is one token

    def enlarged(self, width, height, unit):
        return _at_least(unit, width, height)


def _at_least(unit, width, height):
    """The size, enlarged so that no side is shorter than `unit`."""
    if min(width, height) >= unit:
        return width, height
    scale = max(unit / height, unit / width)
    return int(width * scale), int(height * scale)


def _rounded(width, height, unit, least, most, frames=1, counted=1):
    """(rows, columns) of squares of `unit` pixels: both sides are rounded, and the pixels of all
    frames are kept between `least` and `most`. counted: the frames that count after rounding."""
    rows, columns = round(height / unit), round(width / unit)
    pixels, rounded = frames * height * width, counted * rows * columns * unit**2
    if rounded > most:
        shrink = math.sqrt(pixels / most)
        rows, columns = (max(1, math.floor(s / shrink / unit)) for s in (height, width))
    elif rounded < least:
        grow = math.sqrt(least / pixels)
        rows, columns = (math.ceil(s * grow / unit) for s in (height, width))
    return rows, columns


class Gemma4(Family):
    """Gemma 4: the picture keeps its shape and gets as large as a number of patches allows. They
    are pooled. The pixels are padded to that number. A frame of a video is a picture with fewer
    patches, and its time as mm:ss is written before it."""

    model_types = ("gemma4",)

    def settings(self, config):
        vision = config.vision_config
        return {
            "max_soft_tokens": getattr(vision, "default_output_length", 280),
            "patch_size": vision.patch_size,
            "pooling_kernel_size": vision.pooling_kernel_size,
        }

    def video_settings(self, config):
        return self.settings(config) | {"max_soft_tokens": 70}

    def picture(self, config, settings, width, height, alone=True):
        most, pool = settings["max_soft_tokens"], settings["pooling_kernel_size"]
        unit = settings["patch_size"] * pool
        scale = math.sqrt(most * unit**2 / (width * height))
        rows, columns = (math.floor(scale * side / unit) for side in (height, width))
        # A long picture is one pooled patch high or wide.
        if not rows:
            rows, columns = 1, min(width // height, most)
        elif not columns:
            rows, columns = min(height // width, most), 1
        tokens, patches = rows * columns, most * pool**2
        why = f"{rows} x {columns} patches after pooling {pool} x {pool}, and 2 markers"
        return Picture(tokens + 2, tokens, (rows * unit, columns * unit), 1, patches, why)

    def pixels(self, config, pictures, sizes, batch_size, make):
        """Patches in a row with the place of each, (-1, -1) for padding."""
        patch, places = config.vision_config.patch_size, []
        for picture in pictures:
            rows, columns = (side // patch for side in picture.crop)
            grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
            padding = torch.full((picture.patches - len(grid), 2), -1)
            places.append(torch.cat([grid, padding]))
        shape = batch_size * len(pictures), pictures[0].patches, 3 * patch**2
        return {
            "pixel_values": make(shape),
            "image_position_ids": torch.stack(places * batch_size),
        }

    def video(self, config, settings, num_frames, width, height):
        one = self.picture(config, settings, width, height)
        # Digits, colon and a space are 6 tokens, and a space is between two frames.
        text = num_frames * (one.tokens - one.features + 6) + num_frames - 1
        why = f"{num_frames} frames of {one.features}, {one.crop[1]} x {one.crop[0]} pixels each"
        features = num_frames * one.features
        return video_of(replace(one, why=why), num_frames, features, text, num_frames)

    def video_pixels(self, config, video, batch_size, make):
        frame = replace(video, patches=video.patches // video.frames)
        inputs = self.pixels(config, [frame] * video.frames, None, batch_size, make)
        return {
            "pixel_values_videos": inputs["pixel_values"],
            "video_position_ids": inputs["image_position_ids"],
            "num_frames_per_video": torch.tensor([video.frames] * batch_size),
        }


class Mistral3(Family):
    """Mistral 3: Pixtral's encoder (arXiv 2410.07073, section 2.2). No side is longer than
    `longest_edge` pixels. A token follows each row: it breaks the line or ends the picture."""

    model_types = ("mistral3",)
    limits = ("size",)

    def settings(self, config):
        return {"size": {"longest_edge": side_of(config.vision_config.image_size)}}

    def picture(self, config, settings, width, height, alone=True):
        merge = config.spatial_merge_size
        unit = config.vision_config.patch_size * merge
        shrink = max(1, max(width, height) / settings["size"]["longest_edge"])
        rows, columns = (
            max(1, math.ceil(math.floor(side / shrink) / unit)) for side in (height, width)
        )
        features = rows * columns
        why = f"{rows} rows of {columns} merged patches, a break or the end after each"
        crop = rows * unit, columns * unit
        return Picture(features + rows, features, crop, 1, features * merge**2, why)

    def pixels(self, config, pictures, sizes, batch_size, make):
        """Pictures padded to the largest, with their sizes after resizing."""
        crop = largest(pictures)
        sizes = torch.tensor([picture.crop for picture in pictures] * batch_size)
        return {
            "pixel_values": make((batch_size * len(pictures), 3, *crop)),
            "image_sizes": sizes,
        }


def largest(pictures):
    """(height, width) that every crop of `pictures` fits in."""
    return tuple(max(picture.crop[i] for picture in pictures) for i in (0, 1))
