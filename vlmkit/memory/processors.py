"""Processors' settings: how large a picture may be, and whether it is cut, for one checkpoint.

They are in the checkpoint's `processor_config.json` or `preprocessor_config.json`. A config alone
does not have them; then they are those that the published checkpoints of its family have.
"""

import json
from pathlib import Path

from vlmkit.memory.visual_tokens import side_of


def settings_of(config, folder=None):
    """({setting: value} of the image processor, where they are from in words).

    folder: the checkpoint's, or None for a config alone.
    """
    settings = _published(config)
    source = f"the settings usual for {config.model_type}"
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / file if folder else None
        if path is None or not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("image_processor", found)
        found = {key: value for key, value in found.items() if value is not None}
        settings.update(_pixels(found))
        source = file
    return settings, source


def _published(config):
    """Settings of the published checkpoints of the family of `config`."""
    vision = config.vision_config
    kind = config.model_type
    if kind.startswith("qwen"):  # their model cards: 4 (Qwen3-VL: 64) to 16,384 visual tokens
        unit = (vision.patch_size * vision.spatial_merge_size) ** 2
        least = 64 if kind.startswith("qwen3") else 4
        return {"size": {"shortest_edge": least * unit, "longest_edge": 16_384 * unit}}
    if kind.startswith("glm4v"):
        return {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15_000}}
    if kind in ("idefics3", "smolvlm"):  # four tiles a side
        side = side_of(vision.image_size)
        return {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
    if kind == "idefics2":
        return {"size": {"shortest_edge": 378, "longest_edge": 980}, "do_image_splitting": True}
    if kind == "mistral3":
        return {"size": {"longest_edge": side_of(vision.image_size)}}
    if kind == "internvl":
        return {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
    return {}


def _pixels(found):
    """Settings with the older names of the smallest and largest number of pixels as the newer."""
    size = dict(found.get("size") or {})
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if old in found:
            size[new] = found[old]
        if old in size:
            size[new] = size.pop(old)
    # InternVL's processor cuts whatever its image processor's own file says.
    found = {key: value for key, value in found.items() if key != "crop_to_patches"}
    return {**found, "size": size} if size else found
