"""Families that cut a picture into tiles."""

import math
from dataclasses import replace

import torch

from vlmkit.errors import SizeError
from vlmkit.families.base import Family, Picture, grid_of, image_id, side_of, video_of, whole
from vlmkit.families.grids import largest


class LlavaNext(Family):
    """LLaVA-NeXT: the whole picture, and a grid of tiles in the best of the resolutions that the
    config lists, without its padding, with a separator at the end of each row of patches."""

    model_types = ("llava_next",)

    def picture(self, config, settings, width, height, alone=True):
        from transformers.image_processing_utils import select_best_resolution

        side, grid = side_of(config.vision_config.image_size), grid_of(config)
        best = select_best_resolution([height, width], config.image_grid_pinpoints)
        rows, columns = best[0] // side, best[1] // side
        h, w = grid * rows, grid * columns
        if width / height > w / h:
            h -= (h - int(round(height * (w / width), 7))) // 2 * 2
        else:
            w -= (w - int(round(width * (h / height), 7))) // 2 * 2
        why = f"{grid**2:,} for the whole, and {rows} x {columns} tiles, {h} x {w} without padding"
        h, w, more = self.shrunk(config, h, w)
        tokens, count = grid**2 + h * (w + 1), 1 + rows * columns
        why += f"{more}, a separator a row"
        return Picture(tokens, tokens, (side, side), count, count * grid**2, why)

    def shrunk(self, config, h, w):
        """Rows and columns of features that are kept, and what to say about it."""
        return h, w, ""

    def pixels(self, config, pictures, sizes, batch_size, make):
        """Pictures padded to the largest number of tiles, and their sizes as (height, width)."""
        most = max(picture.count for picture in pictures)
        sizes = torch.tensor([(height, width) for width, height in sizes] * batch_size)
        shape = batch_size * len(pictures), most, 3, *pictures[0].crop
        return {"pixel_values": make(shape), "image_sizes": sizes}


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision (arXiv 2408.03326, section 3.2): as LLaVA-NeXT, but more features than nine
    tiles have are shrunk, and one of several pictures is not cut. A frame of a video is not cut,
    its features are pooled 2 x 2, and a separator follows the last."""

    model_types = ("llava_onevision",)

    def picture(self, config, settings, width, height, alone=True):
        if alone:
            return super().picture(config, settings, width, height)
        tokens = grid_of(config) ** 2 + 1
        return whole(config, tokens, "one of several pictures: not cut, a separator after it")

    def shrunk(self, config, h, w):
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(h * w / (most * grid_of(config) ** 2))
        if ratio <= 1.1:
            return h, w, ""
        h, w = int(h // ratio), int(w // ratio)
        return h, w, f", shrunk to {h} x {w}"

    def pixels(self, config, pictures, sizes, batch_size, make):
        inputs = super().pixels(config, pictures, sizes, batch_size, make)
        return inputs | {"batch_num_images": torch.tensor([len(pictures)] * batch_size)}

    def video(self, config, settings, num_frames, width, height):
        pooled = math.ceil(grid_of(config) / 2) ** 2
        frame = whole(config, pooled, f"{num_frames} frames of {pooled}, and a separator")
        return video_of(frame, num_frames, num_frames * pooled + 1, 0, runs=1)

    def video_pixels(self, config, video, batch_size, make):
        return {"pixel_values_videos": make((batch_size, video.frames, 3, *video.crop))}


class Idefics2(Family):
    """Idefics2 (arXiv 2405.02246, section 3): a resampler makes the same number of tokens of
    everything that it is given: the picture, or its four quarters and the picture."""

    model_types = ("idefics2",)
    limits = ("size", "do_image_splitting")

    def settings(self, config):
        return {"size": {"shortest_edge": 378, "longest_edge": 980}, "do_image_splitting": True}

    def unset(self, config):
        return Idefics2.settings(self, config) | {"do_image_splitting": False}

    def picture(self, config, settings, width, height, alone=True):
        each = config.perceiver_config.resampler_n_latents
        pieces = [(width, height)]
        if settings.get("do_image_splitting", False):
            halves = [(width // 2, width - width // 2), (height // 2, height - height // 2)]
            pieces += [(w, h) for w in halves[0] for h in halves[1]]
        resized = [_within(*piece, settings["size"]) for piece in pieces]
        # Every piece is padded to the largest.
        crop = max(h for _, h in resized), max(w for w, _ in resized)
        patch, count = config.vision_config.patch_size, len(pieces)
        patches = count * (crop[0] // patch) * (crop[1] // patch)
        # One marker is between two pieces: it ends the first and begins the second.
        why = f"{count} x {each} latents of the resampler, with {count + 1} markers"
        return Picture(count * each + count + 1, count * each, crop, count, patches, why)

    def pixels(self, config, pictures, sizes, batch_size, make):
        """A row of tiles for each sample, and which of their pixels are not padding."""
        crop = largest(pictures)
        shape = batch_size, sum(picture.count for picture in pictures)
        mask = torch.ones(*shape, *crop, dtype=torch.long)
        return {"pixel_values": make((*shape, 3, *crop)), "pixel_attention_mask": mask}


def _within(width, height, size):
    """The size with its sides between `shortest_edge` and `longest_edge`."""
    most, shape = size["longest_edge"], width / height
    if width >= height and width > most:
        width, height = most, int(most / shape)
    elif height > width and height > most:
        width, height = int(most * shape), most
    return max(width, size["shortest_edge"]), max(height, size["shortest_edge"])


MOST_TILES = 6
"""The published tokenizers have markers from <row_1_col_1> to <row_6_col_6>."""


class Idefics3(Idefics2):
    """Idefics3 (arXiv 2408.12637, section 3): the picture is enlarged to `longest_edge`
    and cut into tiles, each with its row and column written before it; the whole picture follows.
    """

    model_types = ("idefics3",)

    def settings(self, config):  # four tiles a side
        side = side_of(config.vision_config.image_size)
        return {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}

    def unset(self, config):
        return {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}}

    def check(self, settings):
        side, longest = settings["max_image_size"]["longest_edge"], settings["size"]["longest_edge"]
        if settings.get("do_image_splitting", True) and longest > MOST_TILES * side:
            raise SizeError(
                f"size longest_edge {longest:,} makes more than {MOST_TILES} tiles of {side} pixels"
                " in a row, and the tokenizer has no marker for more."
            )

    def picture(self, config, settings, width, height, alone=True):
        side, patches = settings["max_image_size"]["longest_edge"], grid_of(config) ** 2
        each = (grid_of(config) // config.scale_factor) ** 2
        rows = columns = 1
        if settings.get("do_image_splitting", True):
            rows, columns = _tiles_of(*_enlarged(width, height, settings["size"]), side)
        end = f"{each} for the whole picture, with 3 markers"
        if rows * columns == 1:
            return Picture(each + 3, each, (side, side), 1, patches, end)
        count = rows * columns + 1
        # A tile has two markers and a row has a line break. The blank line before the whole picture
        # is the last of these: the published tokenizers write "\n\n" as one token.
        tokens = rows * columns * (each + 2) + rows + each + 3
        why = f"{rows} x {columns} tiles of {each} with 2 markers each, {rows} line breaks, {end}"
        return Picture(tokens, each * count, (side, side), count, count * patches, why)


class SmolVLM(Idefics3):
    """SmolVLM (arXiv 2504.05299, section 2): as Idefics3. A frame of a video is resized to one
    tile; its time is written before it, and a sentence before the first."""

    model_types = ("smolvlm",)
    videos_apart = False
    either = "its processor hands over the pixels of both under the same name"

    def video_settings(self, config):
        return {"max_image_size": {"longest_edge": side_of(config.vision_config.image_size)}}

    def unset_video(self, config):
        return {"max_image_size": {"longest_edge": 364}}

    def video_id(self, config):
        return image_id(config)

    def video(self, config, settings, num_frames, width, height):
        settings = settings | {"do_image_splitting": False}
        frame = self.picture(config, settings, width, height)
        each = frame.features
        frame = replace(frame, why=f"{num_frames} frames of {each}, {frame.crop[0]} pixels a side")
        # "\nFrame from 00:00:" is 10 tokens. The sentence is 31 for a number of three tokens, such
        # as "thirty-two", and the end is two line breaks.
        text = num_frames * (10 + frame.tokens - each) + 31 + 2
        return video_of(frame, num_frames, num_frames * each, text, num_frames)


def _enlarged(width, height, size):
    """The size with its longer side at `longest_edge`, the other even, and neither above 4,096."""
    longest, shape = size["longest_edge"], width / height
    if width >= height:
        width, height = longest, max(1, _even(int(longest / shape)))
    else:
        width, height = max(1, _even(int(longest * shape))), longest
    shape = width / height
    if width >= height and width > 4096:
        return 4096, max(1, int(4096 / shape))
    if height > width and height > 4096:
        return max(1, int(4096 * shape)), 4096
    return width, height


def _even(n):
    return n + n % 2


def _tiles_of(width, height, side):
    """(rows, columns) of tiles that cover a picture."""
    shape = width / height
    if width >= height:
        columns = math.ceil(width / side)
        return math.ceil(int(columns * side / shape) / side), columns
    rows = math.ceil(height / side)
    return rows, math.ceil(int(rows * side * shape) / side)


class InternVL(Family):
    """InternVL (arXiv 2404.16821, section 3.2): the grid of tiles that is nearest in shape, and the
    whole picture. Of equally near grids it takes the larger one while that is less than twice the
    picture. A frame of a video is not cut, and its number is written before it."""

    model_types = ("internvl",)
    limits = ("min_patches", "max_patches")
    videos_apart = False

    def settings(self, config):
        return {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}

    def picture(self, config, settings, width, height, alone=True):
        side, each = side_of(config.vision_config.image_size), config.image_seq_length
        least, most = settings["min_patches"], settings["max_patches"]
        rows, columns = nearest_shape(width, height, least, most, side)
        count = rows * columns if settings["crop_to_patches"] else 1
        count += count > 1
        why = f"{count} tiles of {each} with the whole picture, and 2 markers"
        if count == 1:
            why = f"the whole picture in {each}, and 2 markers"
        patches = count * grid_of(config) ** 2
        return Picture(count * each + 2, count * each, (side, side), count, patches, why)

    def video_id(self, config):
        return image_id(config)

    def video(self, config, settings, num_frames, width, height):
        each = config.image_seq_length
        frame = whole(config, each, f"{num_frames} frames of {each}")
        # "Frame12: ", of which each digit is a token, two markers, and a line break between frames.
        text = sum(5 + len(str(number)) for number in range(1, num_frames + 1)) + num_frames - 1
        return video_of(frame, num_frames, num_frames * each, text, num_frames)


def nearest_shape(width, height, least, most, side):
    """(rows, columns) of `least` to `most` tiles of `side` pixels whose shape is nearest to the
    picture's. Of equally near ones it is the last that is less than twice the picture."""
    best, gap = (1, 1), math.inf
    shapes = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1)]
    shapes = [shape for shape in shapes if least <= shape[0] * shape[1] <= most]
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        distance = abs(width / height - columns / rows)
        roomy = width * height > 0.5 * side**2 * columns * rows
        if distance < gap or distance == gap and roomy:
            best, gap = (rows, columns), distance
    return best


class Lfm2Vl(Family):
    """LFM2-VL (arXiv 2511.23404, section 5.2): a picture of up to `max_image_tokens` as it is,
    rounded as Qwen2-VL does; a larger one in the grid of tiles that is nearest in shape, as
    InternVL's, and whole. The processor's settings are also in the config."""

    model_types = ("lfm2_vl",)

    def settings(self, config):
        usual = {
            "downsample_factor": 2,
            "do_image_splitting": True,
            "min_tiles": 2,
            "max_tiles": 10,
            "use_thumbnail": True,
            "min_image_tokens": 64,
            "max_image_tokens": 256,
            "encoder_patch_size": 16,
            "tile_size": 512,
            "max_pixels_tolerance": 2.0,
        }
        return {name: getattr(config, name, value) for name, value in usual.items()}

    def picture(self, config, settings, width, height, alone=True):
        patch, side = settings["encoder_patch_size"], settings["tile_size"]
        unit = patch * settings["downsample_factor"]
        least, most = settings["min_image_tokens"], settings["max_image_tokens"]
        rows, columns = (max(1, round(s / unit)) for s in (height, width))
        large = rows * columns > most * settings["max_pixels_tolerance"]
        if rows * columns > most:
            shrink = math.sqrt(height * width / (most * unit**2))
            rows, columns = (max(1, math.floor(s / shrink / unit)) for s in (height, width))
        elif rows * columns < least:
            grow = math.sqrt(least * unit**2 / (height * width))
            rows, columns = (math.ceil(s * grow / unit) for s in (height, width))
        tokens = features = rows * columns
        crop, merged, count = (rows * unit, columns * unit), (unit // patch) ** 2, 1
        whole_picture = None
        why = f"resized to {crop[1]} x {crop[0]} pixels"
        if large and settings["do_image_splitting"]:
            down, across = nearest_shape(
                width, height, settings["min_tiles"], settings["max_tiles"], side
            )
            count, each = (
                down * across,
                math.ceil(side // patch / settings["downsample_factor"]) ** 2,
            )
            thumbnail = (features + 1) * bool(settings["use_thumbnail"])
            features = count * each + max(0, thumbnail - 1)
            tokens = count * (each + 1) + thumbnail
            why = f"{down} x {across} tiles of {each} with a marker each, and the whole picture"
            count += bool(thumbnail)
            crop, whole_picture = (side, side), crop if thumbnail else None
        patches = count * max(most * merged, (side // patch) ** 2)
        why += ", and 2 markers"
        return Picture(tokens + 2, features, crop, count, patches, why, thumbnail=whole_picture)

    def pixels(self, config, pictures, sizes, batch_size, make):
        """Patches of every tile, padded to the same number, and the tiles' shapes in patches."""
        patch = config.vision_config.patch_size
        crops = []
        for picture in pictures:
            last = picture.thumbnail or picture.crop
            crops += [picture.crop] * (picture.count - 1) + [last]
        shapes = torch.tensor(crops * batch_size) // patch
        each = pictures[0].patches // pictures[0].count
        return {
            "pixel_values": make((len(shapes), each, 3 * patch**2)),
            "pixel_attention_mask": (torch.arange(each) < shapes.prod(1)[:, None]).int(),
            "spatial_shapes": shapes,
        }


class Llama4(Family):
    """Llama 4: the picture on the canvas of tiles that enlarges it least, as in Llama 3.2 Vision,
    and whole. A separator follows each tile, and there are three markers."""

    model_types = ("llama4",)
    casts = False

    def settings(self, config):
        return {"max_patches": 16, "size": {"height": config.vision_config.image_size}}

    def picture(self, config, settings, width, height, alone=True):
        side = settings["size"]["height"]
        each = int(grid_of(config) ** 2 * config.vision_config.pixel_shuffle_ratio**2)
        rows, columns = canvas(width, height, settings["max_patches"], side)
        count = rows * columns
        count += count > 1
        features, separators = count * each, (count - 1) * (count > 1)
        why = f"{rows} x {columns} tiles of {each}, the whole picture, and separators"
        tokens, patches = features + separators + 3, count * grid_of(config) ** 2
        return Picture(tokens, features, (side, side), count, patches, why)


class Mllama(Family):
    """Llama 3.2 Vision: one token in the prompt. The cross-attention layers read the states of as
    many tiles as a picture can have, including empty ones."""

    model_types = ("mllama",)

    def picture(self, config, settings, width, height, alone=True):
        vision = config.vision_config
        side, most = side_of(vision.image_size), vision.max_num_tiles
        states = most * (grid_of(config) ** 2 + 1)
        rows, columns = canvas(width, height, most, side)
        why = (
            f"a place in the prompt; {rows} x {columns} tiles, padded to {most}, whose {states:,} "
            "states the cross-attention layers read"
        )
        return Picture(1, 1, (side, side), most, most * grid_of(config) ** 2, why, attended=states)

    def pixels(self, config, pictures, sizes, batch_size, make):
        """Every picture with room for all tiles, and the shape of its canvas."""
        most = config.vision_config.max_num_tiles
        shape = batch_size, len(pictures)
        return {
            "pixel_values": make((*shape, most, 3, *pictures[0].crop)),
            "aspect_ratio_ids": torch.ones(shape, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(*shape, most, dtype=torch.long),
        }

    def beside(self, config, ids, tensors):
        if "aspect_ratio_mask" not in tensors:
            return {}
        mask = tensors["aspect_ratio_mask"][:, None].expand(-1, ids.shape[1], -1, -1)
        return {"cross_attention_mask": mask}


def canvas(width, height, most, side):
    """(rows, columns) of the tiles of `side` pixels that Llama 3.2 Vision puts a picture on: the
    canvas that enlarges it least or, if none does, the one that shrinks it least."""
    shapes = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    scales = {shape: min(shape[0] * side / height, shape[1] * side / width) for shape in shapes}
    enlarging = [scale for scale in scales.values() if scale >= 1]
    best = min(enlarging) if enlarging else max(scales.values())
    return min((s for s in shapes if scales[s] == best), key=lambda s: s[0] * s[1])
