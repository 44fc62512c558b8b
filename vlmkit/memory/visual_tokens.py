"""Visual tokens: what a picture becomes on its way into a model, as its own processor counts it.

    vk.memory.visual_tokens("Qwen/Qwen2.5-VL-7B-Instruct", (1024, 768))

A picture costs what it is resized and cut into, and every family does that in its own way. The rule
of each is a function, here (one grid for a picture) or in `vlmkit.memory.tiles`: it takes a config,
the processor's settings and a size in pixels, and gives a Picture. The processors themselves need
torchvision or a tokenizer; the tests hold the rules against those that can be built without.
"""

import math
from dataclasses import dataclass

from vlmkit.errors import AnatomyError, ImageError, SizeError


@dataclass(frozen=True)
class Picture:
    """One picture as a model sees it.

    tokens: positions that it takes in the prompt, with the text that the processor puts among them
        (row and column markers, line breaks). What a chat template writes around a picture is text.
    features: of these, the positions that hold a visual feature.
    crop: (height, width) in pixels of each of the `count` tiles that the vision encoder reads.
    patches: that the vision encoder reads, in all tiles.
    attended: states that cross-attention layers read, beside the prompt (Llama 3.2 Vision).
    why: how it came about, in words.
    """

    tokens: int
    features: int
    crop: tuple
    count: int
    patches: int
    why: str
    attended: int = 0

    def __str__(self):
        return f"{self.tokens:,} visual tokens: {self.why}"


def picture(config, settings, size, alone=True):
    """The Picture that the model of `config` makes of a picture of `size` (width, height).

    settings: of the image processor, see `vlmkit.memory.processors`.
    alone: whether it is the only picture of its prompt, which LLaVA-OneVision treats differently.

    Raises AnatomyError if there is no rule for the architecture, and SizeError or ImageError for a
    size that no model takes.
    """
    rule = rule_of(config)
    width, height = check_size(size)
    if config.model_type == "llava_onevision" and not alone:
        rule = one_of_several
    return rule(config, settings, width, height)


def rule_of(config):
    """The rule of the architecture of `config`. Raises AnatomyError if there is none."""
    from vlmkit.memory.tiles import RULES as TILING

    rules = RULES | TILING
    if config.model_type not in rules:
        raise AnatomyError(
            f"vlmkit has no rule yet for how {config.model_type} turns a picture into tokens. Count"
            " them with its processor and add them to tokens, with images=0. There are rules for "
            f"{', '.join(sorted(rules))}."
        )
    return rules[config.model_type]


def own_size(config):
    """(width, height) that the vision encoder has for every picture, or None where pictures of
    different sizes make different numbers of tokens."""
    if rule_of(config) not in (_fixed, _pooled, _queried):
        return None
    side = side_of(config.vision_config.image_size)
    return side, side


def check_size(size):
    """(width, height) of a picture, in pixels. Raises SizeError or ImageError if it is none."""
    from PIL import Image

    from vlmkit.images import LONGEST_SHAPE

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
    """Patches a side of the vision encoder at its own resolution."""
    vision = config.vision_config
    return side_of(vision.image_size) // side_of(vision.patch_size)


# --- one grid, whatever the picture's shape ------------------------------------------------------


def whole(config, tokens, why):
    """The Picture of `tokens` features for a picture resized to the encoder's own resolution."""
    side = side_of(config.vision_config.image_size)
    return Picture(tokens, tokens, (side, side), 1, grid_of(config) ** 2, why)


def _fixed(config, settings, width, height):
    grid = grid_of(config)
    # CLIP's class token is one more, and the strategy "default" drops it.
    extra = int("clip" in config.vision_config.model_type)
    extra -= getattr(config, "vision_feature_select_strategy", "full") == "default"
    return whole(config, grid**2 + extra, f"resized to {grid} x {grid} patches")


def _pooled(config, settings, width, height):
    tokens, patches = config.mm_tokens_per_image, grid_of(config) ** 2
    return whole(config, tokens, f"resized to {patches:,} patches, pooled to {tokens}")


def _queried(config, settings, width, height):
    tokens = config.num_query_tokens
    return whole(config, tokens, f"{tokens} queries of the Q-Former, whatever the picture")


def one_of_several(config, settings, width, height):
    """LLaVA-OneVision with several pictures: no tiles, one grid and a separator each."""
    tokens = grid_of(config) ** 2 + 1
    return whole(config, tokens, "one of several pictures: not cut, a separator after it")


# --- a grid that follows the picture's shape -----------------------------------------------------


def _smart(config, settings, width, height):
    """Qwen2-VL (arXiv 2409.12191, section 2.1): sides rounded to multiples of a merged patch, and
    between them a smallest and a largest number of pixels. GLM-4V does the same, and counts a still
    as two frames."""
    vision = config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    unit, frames = patch * merge, 2 if config.model_type.startswith("glm") else 1
    least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    if frames == 2 and min(width, height) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
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
    why = f"resized to {crop[1]} x {crop[0]} pixels, {patches:,} patches, merged {merge} x {merge}"
    return Picture(tokens, tokens, crop, 1, patches, why)


def _rows(config, settings, width, height):
    """Mistral 3: Pixtral's encoder (arXiv 2410.07073, section 2.2) at `longest_edge` pixels a side
    at most, and a token after each row, which breaks the line or ends the picture."""
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


RULES = {
    "llava": _fixed,
    "paligemma": _fixed,
    "gemma3": _pooled,
    "blip-2": _queried,
    "qwen2_vl": _smart,
    "qwen2_5_vl": _smart,
    "qwen3_vl": _smart,
    "qwen3_vl_moe": _smart,
    "glm4v": _smart,
    "glm4v_moe": _smart,
    "mistral3": _rows,
}
"""model_type -> the rule by which its processor turns a picture into tokens."""
