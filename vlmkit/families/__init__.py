"""Families: a small class for each family of models, with all that is special about it.

    family = family_of(config)
    settings, source = settings_of(config, folder)
    family.picture(config, settings, 1024, 768).tokens       # visual tokens

A family says how a picture becomes visual tokens, which inputs the model takes, which settings its
processor usually has, and what is special about running it. The rules follow transformers' own
processors, which need torchvision or a tokenizer; the tests compare the rules with those that can
be built without.
"""

import json
from pathlib import Path

from vlmkit.families import grids, tiles
from vlmkit.families.base import Family, Picture, check_size, image_id, inputs_of, side_of

__all__ = [
    "FAMILIES",
    "Family",
    "Picture",
    "check_size",
    "family_of",
    "image_id",
    "inputs_of",
    "newer_names",
    "settings_of",
    "side_of",
]


FAMILIES = {
    model_type: kind()
    for module in (grids, tiles)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Family) and kind.__module__ == module.__name__
    for model_type in kind.model_types
}
"""model_type -> the Family."""


def family_of(config):
    """The Family of the model of `config`; where there is none, one that takes text alone."""
    return FAMILIES.get(config.model_type) or Family()


def settings_of(config, folder=None):
    """({setting: value} of the image processor, where they come from in words).

    The settings are read from `processor_config.json` or `preprocessor_config.json` in `folder`,
    the checkpoint's. If `folder` is None, they are the usual ones of the family.
    """
    settings = family_of(config).settings(config)
    source = f"the settings usual for {config.model_type}"
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / file if folder else None
        if path is None or not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found.get("image_processor", found)
        settings.update(newer_names({k: v for k, v in found.items() if v is not None}))
        source = file
    return settings, source


def newer_names(found):
    """The settings `found` with the newer names of the smallest and largest number of pixels."""
    size = dict(found.get("size") or {})
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if old in found:
            size[new] = found[old]
        if old in size:
            size[new] = size.pop(old)
    # InternVL's processor cuts a picture whatever the file of its image processor says.
    found = {key: value for key, value in found.items() if key != "crop_to_patches"}
    return {**found, "size": size} if size else found
