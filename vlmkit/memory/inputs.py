"""Inputs: what a processor would hand to a model for pictures and text, as shapes.

Only what the forward pass looks at is real: where the image tokens are, how large the grids.
"""

import torch

ORDINARY = 3
"""An id of a word; a model's own ids of pictures and videos are avoided, see `_word`."""


def batch_of(config, pictures, tokens, batch, pixels, sizes=()):
    """Inputs of one forward pass: real integers, and pixels as `pixels` makes them.

    pictures: Pictures of one sample. tokens: text tokens of one sample beside those of its
        pictures. sizes: (width, height) of the pictures. pixels: a function of a shape that gives a
        float32 tensor.
    """
    ids = torch.tensor([_ids(config, pictures, tokens)]).expand(batch, -1).contiguous()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pictures:
        inputs |= LAYOUTS[config.model_type](config, pictures, sizes, batch, pixels)
    if config.model_type.startswith(("qwen", "glm")):
        inputs["mm_token_type_ids"] = (ids == image_id(config)).long()
    if config.model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == image_id(config)).long()
    if pictures and config.model_type == "mllama":
        inputs["cross_attention_mask"] = inputs["aspect_ratio_mask"][:, None].expand(
            -1, ids.shape[1], -1, -1
        )
    return inputs


def length_of(pictures, tokens):
    """Positions of one sample: its text and its pictures."""
    return tokens + sum(picture.tokens for picture in pictures)


def image_id(config):
    """The id of the token in whose place a visual feature goes."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _ids(config, pictures, tokens):
    """Each picture's own text, then its features in a row; all other text at the end."""
    image, word = image_id(config), _word(config)
    ids = []
    for picture in pictures:
        ids += [word] * (picture.tokens - picture.features) + [image] * picture.features
        if tokens:  # so that pictures do not touch, as in a prompt
            ids, tokens = [*ids, word], tokens - 1
    return ids + [word] * tokens


def _word(config):
    special = {value for name, value in vars(config).items() if "token" in name}
    return next(i for i in range(ORDINARY, 10**6) if i not in special)


# --- pixels --------------------------------------------------------------------------------------


def _count(pictures):
    return sum(picture.count for picture in pictures)


def _stacked(config, pictures, sizes, batch, pixels):
    """All tiles of all pictures of all samples in one row."""
    return {"pixel_values": pixels((batch * _count(pictures), 3, *pictures[0].crop))}


def _tiled(config, pictures, sizes, batch, pixels):
    """LLaVA-NeXT: pictures padded to the largest number of tiles; sizes are (height, width)."""
    most = max(picture.count for picture in pictures)
    shape = batch * len(pictures), most, 3, *pictures[0].crop
    inputs = {"pixel_values": pixels(shape), "image_sizes": _sizes(sizes, batch)}
    if config.model_type == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([len(pictures)] * batch)
    return inputs


def _sizes(sizes, batch):
    return torch.tensor([(height, width) for width, height in sizes] * batch)


def _padded(config, pictures, sizes, batch, pixels):
    """Mistral 3: pictures padded to the largest, with their sizes after resizing."""
    crop = tuple(max(picture.crop[i] for picture in pictures) for i in (0, 1))
    sizes = torch.tensor([picture.crop for picture in pictures] * batch)
    return {"pixel_values": pixels((batch * len(pictures), 3, *crop)), "image_sizes": sizes}


def _nested(config, pictures, sizes, batch, pixels):
    """Idefics: a row of tiles for each sample, and which of their pixels are no padding."""
    crop = tuple(max(picture.crop[i] for picture in pictures) for i in (0, 1))
    shape = batch, _count(pictures)
    mask = torch.ones(*shape, *crop, dtype=torch.long)
    return {"pixel_values": pixels((*shape, 3, *crop)), "pixel_attention_mask": mask}


def _flattened(config, pictures, sizes, batch, pixels):
    """Qwen-VL and GLM-4V: patches in a row, and the grid that they came from."""
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    grids = [(1, p.crop[0] // vision.patch_size, p.crop[1] // vision.patch_size) for p in pictures]
    patches = batch * sum(picture.patches for picture in pictures)
    return {
        "pixel_values": pixels((patches, width)),
        "image_grid_thw": torch.tensor(grids * batch),
    }


def _all_tiles(config, pictures, sizes, batch, pixels):
    """Llama 3.2 Vision: every picture with room for all tiles, and the shape of its canvas."""
    most = config.vision_config.max_num_tiles
    shape = batch, len(pictures)
    return {
        "pixel_values": pixels((*shape, most, 3, *pictures[0].crop)),
        "aspect_ratio_ids": torch.ones(shape, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(*shape, most, dtype=torch.long),
    }


LAYOUTS = {
    "llava": _stacked,
    "paligemma": _stacked,
    "gemma3": _stacked,
    "blip-2": _stacked,
    "internvl": _stacked,
    "llava_next": _tiled,
    "llava_onevision": _tiled,
    "mistral3": _padded,
    "idefics2": _nested,
    "idefics3": _nested,
    "smolvlm": _nested,
    "qwen2_vl": _flattened,
    "qwen2_5_vl": _flattened,
    "qwen3_vl": _flattened,
    "qwen3_vl_moe": _flattened,
    "glm4v": _flattened,
    "glm4v_moe": _flattened,
    "mllama": _all_tiles,
}
