"""Families that read a picture in one grid of patches."""

import math

import torch

from vlmkit.families.base import Family, Picture, TokenTypes, grid_of, side_of, whole


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
    one_size, casts = True, False

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
    least, frames = 4, 1

    def settings(self, config):
        unit = (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2
        return {"size": {"shortest_edge": self.least * unit, "longest_edge": 16_384 * unit}}

    def unset(self, config):
        return {"size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}}

    def three_axes(self, config):
        return True

    def enlarged(self, width, height, unit):
        """The size before it is rounded."""
        return width, height

    def picture(self, config, settings, width, height, alone=True):
        vision, frames = config.vision_config, self.frames
        merge = vision.spatial_merge_size
        unit = vision.patch_size * merge
        least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
        width, height = self.enlarged(width, height, unit)
        rows, columns = round(height / unit), round(width / unit)
        pixels = frames * height * width
        if frames * rows * columns * unit**2 > most:
            shrink = math.sqrt(pixels / most)
            rows, columns = (max(1, math.floor(s / shrink / unit)) for s in (height, width))
        elif frames * rows * columns * unit**2 < least:
            grow = math.sqrt(least / pixels)
            rows, columns = (math.ceil(s * grow / unit) for s in (height, width))
        tokens, patches = rows * columns, rows * columns * merge**2
        crop = rows * unit, columns * unit
        why = (
            f"resized to {crop[1]} x {crop[0]} pixels, {patches:,} patches, "
            f"merged {merge} x {merge}"
        )
        return Picture(tokens, tokens, crop, 1, patches, why)

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


class Qwen3(Qwen):
    """Qwen3-VL and Qwen3.5: as Qwen2-VL, with 64 visual tokens at least."""

    model_types = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
    least = 64


class Glm4v(Qwen):
    """GLM-4V: as Qwen2-VL, but a still picture counts as two frames."""

    model_types = ("glm4v", "glm4v_moe")
    frames = 2

    def settings(self, config):
        return {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15_000}}

    def unset(self, config):
        return self.settings(config)

    def enlarged(self, width, height, unit):
        if min(width, height) >= unit:
            return width, height
        scale = max(unit / height, unit / width)
        return int(width * scale), int(height * scale)


class Gemma4(Family):
    """Gemma 4: the picture keeps its shape and gets as large as a number of patches allows. They
    are pooled. The pixels are padded to that number."""

    model_types = ("gemma4",)

    def settings(self, config):
        vision = config.vision_config
        return {
            "max_soft_tokens": getattr(vision, "default_output_length", 280),
            "patch_size": vision.patch_size,
            "pooling_kernel_size": vision.pooling_kernel_size,
        }

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
