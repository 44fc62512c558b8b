"""The rules for visual tokens, compared with the image processors that need no torchvision."""

import __future__

import ast
import json
import math
from collections import defaultdict
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from families import _FAMILIES
from PIL import Image
from transformers import CONFIG_MAPPING, image_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlmkit as vk
from vlmkit.errors import CheckpointError, SizeError
from vlmkit.families import family_of, newer_names, settings_of
from vlmkit.families.tiles import canvas

SIZES = [
    (64, 64), (100, 70), (1024, 768), (333, 1000), (1999, 121), (37, 36), (28, 28), (29, 55),
    (336, 336), (384, 385), (512, 512), (513, 511), (640, 480), (700, 1100), (90, 1500),
    (1280, 720), (256, 1024), (724, 725), (60, 1400), (1001, 999),
]  # fmt: skip


def made(module, name, picture_size, **settings):
    """What the image processor of transformers makes of a picture, and its settings."""
    path = f"transformers.models.{module}.image_processing_pil_{module}"
    processor = getattr(import_module(path), f"{name}ImageProcessorPil")(**settings)
    image = Image.new("RGB", picture_size, (90, 120, 150))
    known = {key: value for key, value in processor.to_dict().items() if value is not None}
    return processor([[image]], return_tensors="pt"), newer_names(known)


def picture(config, settings, size):
    return family_of(config).picture(config, settings, *size)


def config_of(family, **vision):
    fields = _FAMILIES[family].config
    return CONFIG_MAPPING[_FAMILIES[family].model_type](
        **{**fields, "vision_config": {**fields["vision_config"], **vision}}
    )


@pytest.mark.parametrize("name", ["Qwen2VL", "Glm4v"])
def test_patches_in_a_grid(name):
    family = {"Qwen2VL": "qwen2_vl", "Glm4v": "glm4v"}[name]
    config = config_of(family, patch_size=14)
    for size in SIZES:
        out, settings = made(family, name, size)
        ((_, rows, columns),) = out["image_grid_thw"].tolist()
        seen = picture(config, settings, size)
        assert (seen.patches, seen.crop) == (rows * columns, (rows * 14, columns * 14))
        assert seen.tokens == rows * columns // 4


SMALL = {"size": {"longest_edge": 4 * 98}, "max_image_size": {"longest_edge": 98}}


@pytest.mark.parametrize(
    "name, edges",
    [
        ("Idefics2", {}),
        ("Idefics3", SMALL),
        pytest.param("Idefics3", {}, marks=pytest.mark.slow),
        pytest.param("SmolVLM", {}, marks=pytest.mark.slow),
    ],
)
def test_tiles_in_a_row(name, edges):
    side = edges["max_image_size"]["longest_edge"] if edges else 364
    config = config_of(name.lower(), image_size=side, patch_size=14)
    for size in SIZES:
        out, settings = made(name.lower(), name, size, **edges)
        seen = picture(config, settings, size)
        _, count, _, *crop = out["pixel_values"].shape
        assert (seen.count, seen.crop) == (count, tuple(crop))


@pytest.mark.parametrize(
    "module, name", [("llava_next", "LlavaNext"), ("llava_onevision", "LlavaOnevision")]
)
def test_tiles_of_any_resolution(module, name):
    side = 336  # of which the tiles are multiples, as in the published checkpoints
    edges = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if module == "llava_onevision":
        side, edges = 384, {}
    config = config_of(module, image_size=side, patch_size=14)
    for size in SIZES:
        out, settings = made(module, name, size, **edges)
        config.image_grid_pinpoints = settings["image_grid_pinpoints"]
        assert picture(config, settings, size).count == out["pixel_values"].shape[1]


def test_the_canvas_of_llama_3_2_vision():
    for size in SIZES:
        out, settings = made("mllama", "Mllama", size)
        rows, columns = canvas(*size, settings["max_image_tiles"], settings["size"]["height"])
        assert rows * columns == out["num_tiles"][0][0]


def test_rows_of_pixtral():
    config = config_of("mistral3", image_size=1024, patch_size=16)
    config.spatial_merge_size = 1
    for size in SIZES:
        out, settings = made("pixtral", "Pixtral", size)
        assert picture(config, settings, size).crop == tuple(out["image_sizes"][0].tolist())


def test_the_tiles_of_internvl():
    config = config_of("internvl", image_size=112, patch_size=14)
    edges = {"size": {"height": 112, "width": 112}, "crop_to_patches": True}
    for size in SIZES:
        out, settings = made("got_ocr2", "GotOcr2", size, **edges)
        settings["crop_to_patches"] = True
        assert picture(config, settings, size).count == len(out["pixel_values"]), size


def code_of(path, *names):
    """Functions and classes of a module that needs torchvision, without what it imports: none of
    these touches a pixel. A class has no bases and no decorator."""
    source = (Path(transformers.__file__).parent / path).read_text("utf-8")
    parts = [part for part in ast.parse(source).body if getattr(part, "name", None) in names]
    for part in parts:
        part.decorator_list = []
        if isinstance(part, ast.ClassDef):
            methods = (ast.FunctionDef, ast.Assign)
            body = [p for p in part.body if isinstance(p, methods)]
            part.bases, part.body = [], [p for p in body if "valid_kwargs" not in ast.dump(p)]
    known = {**vars(image_utils), "math": math, "torch": torch}
    known |= {"defaultdict": defaultdict, "lru_cache": lru_cache}
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(parts, []), path, "exec", flags, dont_inherit=True), known)
    return [known[name] for name in names]


def test_the_tiles_of_lfm2_vl():
    """Its processor has no version without torchvision: its own arithmetic is compared. With
    torchvision, the processor itself made the same for all sizes."""
    path = "models/lfm2_vl/image_processing_lfm2_vl.py"
    *_, kind = code_of(path, "round_by_factor", "find_closest_aspect_ratio", "Lfm2VlImageProcessor")
    own = kind.__new__(kind)
    config = CONFIG_MAPPING["lfm2_vl"]()
    settings = family_of(config).settings(config)
    assert {name: getattr(own, name) for name in settings} == settings
    limits = {name: settings[name] for name in ("max_image_tokens", "encoder_patch_size")}
    limits["downsample_factor"] = settings["downsample_factor"]
    for width, height in SIZES:
        seen = picture(config, settings, (width, height))
        least = settings["min_image_tokens"]
        whole = own.smart_resize(height, width, min_image_tokens=least, **limits)[::-1]
        count, crop, thumbnail = 1, whole, None
        if own._is_image_too_large(height, width, max_pixels_tolerance=2.0, **limits):
            count = own._get_grid_layout(height, width, 2, 10, 512)[-1] + 1
            crop, thumbnail = (512, 512), whole
        assert (seen.count, seen.crop, seen.thumbnail) == (count, crop, thumbnail)


def test_the_canvas_of_llama_4():
    """As for LFM2-VL."""
    path = "models/llama4/image_processing_llama4.py"
    names = "get_factors", "find_supported_resolutions", "get_best_fit"
    _, resolutions, best = code_of(path, *names)
    config = CONFIG_MAPPING["llama4"](vision_config={"image_size": 336})
    settings = family_of(config).settings(config)
    size = image_utils.SizeDict(height=336, width=336)
    known = torch.tensor(resolutions(settings["max_patches"], size))
    for width, height in SIZES:
        rows, columns = (int(side) // 336 for side in best((height, width), known))
        count = rows * columns + (rows * columns > 1)
        assert picture(config, settings, (width, height)).count == count


@pytest.mark.parametrize("soft_tokens", [70, 280, pytest.param(1120, marks=pytest.mark.slow)])
def test_pooled_patches_of_gemma_4(soft_tokens):
    config = CONFIG_MAPPING["gemma4"](vision_config={}, audio_config=None)
    for size in SIZES:
        out, settings = made("gemma4", "Gemma4", size, max_soft_tokens=soft_tokens)
        seen = picture(config, settings, size)
        assert seen.features == out["num_soft_tokens_per_image"][0] == seen.tokens - 2
        assert seen.patches == out["pixel_values"].shape[1]
        inputs = family_of(config).pixels(config, [seen], [size], 1, torch.ones)
        assert torch.equal(inputs["image_position_ids"], out["image_position_ids"])
        assert inputs["pixel_values"].shape == out["pixel_values"].shape


def test_published_numbers():
    """From the papers and model cards: 576 for LLaVA-1.5, 256 for PaliGemma at 224, 64 for a tile
    of SmolVLM, and 4 tiles of 1,601 states for Llama 3.2 Vision."""
    count = vk.memory.visual_tokens
    assert count("llava-hf/llava-1.5-7b-hf", (1024, 768)).tokens == 576
    assert count("google/paligemma-3b-mix-224", (50, 900)).tokens == 256
    assert count("microsoft/Florence-2-base", (640, 480)).tokens == 577
    assert count("HuggingFaceTB/SmolVLM-256M-Instruct", (512, 512)).features % 64 == 0
    assert count("meta-llama/Llama-3.2-11B-Vision-Instruct", (9, 9)).attended == 4 * 1601
    # 256 for a tile of LFM2-VL, 64 at least; 144 for a tile of Llama 4
    assert count("LiquidAI/LFM2.5-VL-1.6B", (64, 64)).features == 64
    assert count("LiquidAI/LFM2.5-VL-1.6B", (3000, 200)).features == 10 * 256 + 4 * 61
    assert count("meta-llama/Llama-4-Scout-17B-16E-Instruct", (300, 300)).features == 144


@pytest.mark.parametrize(
    "said, tokens",
    [
        ({}, 1230),
        ({"max_pixels": 200_704}, 234),
        ({"min_pixels": 3136}, 1230),
        ({"min_pixels": 3136, "max_pixels": 12_845_056}, 15_552),
        ({"size": {"shortest_edge": 3136, "longest_edge": 200_704}}, 234),
        ({"size": {"shortest_edge": 3136}}, None),
    ],
)
def test_what_a_file_does_not_say_is_as_in_the_class(said, tokens, tmp_path):
    """A photograph of 12 megapixels and Qwen2-VL, whose published file has 3,136 and 12,845,056."""
    for path in vk.catalog.folder_of("Qwen/Qwen2-VL-2B-Instruct").glob("config.json"):
        (tmp_path / "config.json").write_bytes(path.read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    if tokens is None:
        with pytest.raises(SizeError, match="lacks longest_edge"):
            vk.memory.visual_tokens(tmp_path, (4032, 3024))
        return
    assert vk.memory.visual_tokens(tmp_path, (4032, 3024)).tokens == tokens
    size = Qwen2VLImageProcessorPil(**said)
    image = Image.new("RGB", (4032, 3024))
    patches = size(image, return_tensors="pt")["image_grid_thw"][0].prod().item()
    assert patches // 4 == tokens


@pytest.mark.parametrize("name", ["idefics2", "idefics3", "qwen2_vl", "gemma4"])
def test_settings_of_a_class_are_those_of_transformers(name):
    config = CONFIG_MAPPING["gemma4"](vision_config={}) if name == "gemma4" else config_of(name)
    path = f"transformers.models.{name}.image_processing_pil_{name}"
    kind = {"idefics2": "Idefics2", "idefics3": "Idefics3", "qwen2_vl": "Qwen2VL"}.get(name)
    known = getattr(import_module(path), f"{kind or 'Gemma4'}ImageProcessorPil")().to_dict()
    for key, value in family_of(config).unset(config).items():
        assert known[key] == value


@pytest.mark.parametrize("value", ["1003520", -1, 0, True, float("nan"), float("inf"), [5]])
@pytest.mark.parametrize("name", ["max_pixels", "size"])
def test_a_limit_in_a_file_that_is_no_number(name, value, tmp_path):
    said = {"size": {"shortest_edge": 3136, "longest_edge": value}, "max_pixels": value}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({name: said[name]}))
    with pytest.raises(SizeError, match=f"preprocessor_config.json has {name}"):
        settings_of(CONFIG_MAPPING["qwen2_vl"](), tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"image_processor": [1]}', "{", "[" * 10**5])
def test_a_file_of_settings_that_has_none(text, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="preprocessor_config.json is not a JSON object"):
        settings_of(CONFIG_MAPPING["qwen2_vl"](), tmp_path)
