"""Families: a small class for each family of models, with all that is special about it.

    family = family_of(config)
    settings, source = settings_of(config, folder)
    family.picture(config, settings, 1024, 768).tokens       # visual tokens
    settings, source = settings_of(config, folder, video=True)
    family.video(config, settings, 16, 640, 360).tokens      # of a video of 16 frames

A family says how a picture and a video become visual tokens, which inputs the model takes, which
settings its processors usually have, and what is special about running it. The rules follow
transformers' own processors, which need torchvision or a tokenizer; the tests compare the rules
with those that can be built without.

No video processor can be built without torchvision. The rules for videos are compared with the
processors' arithmetic, which runs without it (`smart_resize`, `get_num_of_video_patches`), with the
text that they write (`replace_video_token`), and with a small model of each family, which refuses a
wrong number of features. With torchvision 0.28, the video processors themselves made the same of
twenty pairs of frames and sizes, also with `cap_pixels_per_frame`. How many tokens the text among
the frames is was seen with the tokenizers of Qwen and SmolLM2. For GLM-4V and Gemma 4 it follows
from their tokenizers' rules for digits, and was not seen.
"""

import json
from pathlib import Path

from vlmkit.errors import CheckpointError, SizeError, brief, shown
from vlmkit.families import grids, tiles
from vlmkit.families.base import (
    Family,
    Picture,
    check_size,
    image_id,
    inputs_of,
    side_of,
    writes_apart,
)

__all__ = [
    "FAMILIES",
    "LIMITS",
    "Family",
    "Picture",
    "check_size",
    "family_of",
    "image_id",
    "inputs_of",
    "newer_names",
    "settings_of",
    "side_of",
    "with_limits",
    "writes_apart",
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


def settings_of(config, folder=None, limits=None, video=False):
    """({setting: value} of the image processor, where they come from in words).

    The settings are read from `processor_config.json` or `preprocessor_config.json` in `folder`,
    the checkpoint's; what the file does not say is as in the processor's class. If `folder` has
    neither file, or is None, they are the usual ones of the family. limits: those of
    `with_limits`, which go before them.

    video: whether the settings are the video processor's. They are also read from
        `video_preprocessor_config.json`. In a checkpoint from before that file, such as Qwen2-VL's,
        those of the image processor hold for videos too, as in transformers.

    Raises SizeError for a file whose size lacks a limit, or has one that is no positive number, and
    CheckpointError for a file that cannot be read.
    """
    family, kind = family_of(config), "video" if video else "image"
    settings = family.video_settings(config) if video else family.settings(config)
    unset = family.unset_video(config) if video else family.unset(config)
    source = f"the settings usual for {config.model_type}"
    files = ["preprocessor_config.json", "processor_config.json"]
    files[1:1] = ["video_preprocessor_config.json"] if video else []
    for file in files:
        path = Path(folder) / file if folder else None
        if path is None or not path.is_file():
            continue
        found = _read(path)
        if file == "processor_config.json" and f"{kind}_processor" not in found:
            continue  # from before the settings of all processors went into it
        found = _checked(path, found.get(f"{kind}_processor", found))
        found = newer_names({k: v for k, v in found.items() if v is not None}, unset.get("size"))
        settings, source = unset | found, file
        lacking = unset.get("size", {}).keys() - settings.get("size", {}).keys()
        if lacking:
            raise SizeError(
                f"size in {path} has {', '.join(found['size'])} and lacks "
                f"{', '.join(sorted(lacking))}, without which the processor cannot work either."
            )
    if limits and (family.limits_videos or not video):
        settings = with_limits(config, settings, limits)
        source += f", with {', '.join(f'{name} {limits[name]}' for name in limits)}"
    return settings, source


def _read(path):
    """The settings in the JSON file `path`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a JSON object: {brief(error)}. Copy or download it again."
        ) from error
    return _checked(path, found)


def _checked(path, found):
    """The settings `found` of the file `path`, if they are settings and their limits numbers."""
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} is not a JSON object with settings. Copy or download it again."
        )
    for name in ("min_pixels", "max_pixels", "size"):
        value = found.get(name)
        for one in value.values() if isinstance(value, dict) else [value]:
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if one is not None and not (number and 0 < one < 10**12):
                raise SizeError(
                    f"{path} has {name} {shown(value)}, and every number there has to be from 1 to "
                    "10^12. Correct it, or take it out: then the limit of the processor's class "
                    "counts."
                )
    return found


LIMITS = (
    "min_pixels", "max_pixels", "size", "min_patches", "max_patches", "do_image_splitting"
)  # fmt: skip
"""Limits of a picture's size that some family's image processor has, by transformers' names."""


def with_limits(config, settings, limits):
    """The `settings` of an image processor with `limits`: {name of LIMITS: value}.

    min_pixels, max_pixels: the least and the most pixels of a picture, one of them or both. They
        limit videos too: each frame for Qwen2-VL and Qwen2.5-VL, and all frames together for
        Qwen3-VL, Qwen3.5 and GLM-4V.
    size: a dictionary with the keys that the processor's own size has, such as {"longest_edge":
        1024}; a key that is left out stays. For Qwen-VL and GLM-4V shortest_edge and longest_edge
        are numbers of pixels too, and for others they are sides.
    min_patches, max_patches: the least and the most tiles.
    do_image_splitting: whether a picture is cut into tiles at all.

    Raises SizeError for a limit that the family of `config` does not have, naming those that it
    has, and for values that cannot be.
    """
    family = family_of(config)
    for name, value in limits.items():
        if name not in family.limits:
            has = f"It has {', '.join(family.limits)}." if family.limits else "It has none."
            raise SizeError(
                f"{config.model_type} has no limit called {name}. {has} {family.no_limits}"
            )
        _check_limit(name, value)
    given = {name: limits[name] for name in limits if "pixels" not in name}
    size = dict(given.pop("size", {}))
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    pixels = {edges[name]: limits[name] for name in edges if name in limits}
    if size and pixels:
        raise SizeError("size and min_pixels or max_pixels say the same. Give one of them.")
    before = settings.get("size") or {}
    if size.keys() - before.keys():
        raise SizeError(
            f"size of {config.model_type} has {', '.join(before)}, not {', '.join(size)}."
        )
    new = {**settings, **given, "size": {**before, **size, **pixels}}
    least, most = new["size"].get("shortest_edge", 0), new["size"].get("longest_edge", 0)
    pairs = [(least, most or least), (new.get("min_patches", 0), new.get("max_patches", 0))]
    for least, most in pairs:
        if least > most:
            raise SizeError(
                f"the smallest size, {least:,}, is larger than the largest, {most:,}. The "
                f"processor's own settings are {shown(before)}; give both limits to change both."
            )
    family.check(new)
    return new


MOST_PIXELS, MOST_PATCHES = 10**9, 100


def _check_limit(name, value):
    if name == "do_image_splitting":
        right, kind = isinstance(value, bool), "True or False"
    else:
        values = value.values() if isinstance(value, dict) and value else [value]
        most = MOST_PATCHES if "patches" in name else MOST_PIXELS
        right = (name == "size") == isinstance(value, dict) and all(
            type(one) is int and 1 <= one <= most for one in values
        )
        kind = f"a whole number from 1 to {most:,}"
        kind = f"a dictionary of sizes, each {kind}" if name == "size" else kind
    if not right:
        raise SizeError(f"{name} is {kind}, not {shown(value)}.")


def newer_names(found, size=None):
    """The settings `found` with the newer names of the smallest and largest number of pixels.

    size: where `found` has none, and limits of pixels at most: the size of the processor's class.
    """
    size = dict(found.get("size") or size or {})
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if old in found:
            size[new] = found[old]
        if old in size:
            size[new] = size.pop(old)
    # InternVL's processor cuts a picture whatever the file of its image processor says.
    found = {key: value for key, value in found.items() if key != "crop_to_patches"}
    return {**found, "size": size} if size else found
