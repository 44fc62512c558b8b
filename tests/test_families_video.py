"""The rules for videos, compared with the arithmetic and the text of transformers' own processors,
and with small models. The video processors themselves need torchvision."""

import json
import math
import re
from importlib import import_module
from types import SimpleNamespace

import medium
import numpy as np
import pytest
import torch
from families import FAMILIES, VIDEO
from measuring import peak_of
from test_families_pictures import code_of, config_of
from test_memory_activations import PASSES, a_pass, predicted
from test_memory_caches import FIELDS, model_of, run_of
from transformers import CONFIG_MAPPING
from transformers.models.gemma4.processing_gemma4 import get_aspect_ratio_preserving_size

import vlmkit as vk
from vlmkit.errors import SizeError
from vlmkit.families import family_of, side_of
from vlmkit.memory import predict

PAIRS = [
    (2, (64, 64)), (3, (100, 70)), (4, (640, 360)), (5, (1280, 720)), (7, (333, 1000)),
    (8, (28, 28)), (9, (29, 55)), (10, (500, 20)), (11, (37, 600)), (12, (320, 240)),
    (13, (321, 243)), (16, (256, 256)), (17, (640, 480)), (20, (90, 700)), (24, (1920, 1080)),
    (31, (199, 149)), (32, (426, 240)), (64, (112, 112)), (129, (640, 360)), (768, (854, 480)),
]  # fmt: skip
"""Frames, and their width and height."""


def video(config, settings, frames, size):
    return family_of(config).video(config, settings, frames, *size)


GRIDS = {
    "qwen2_vl": (14, ({}, {"size": {"shortest_edge": 3136, "longest_edge": 50_000}})),
    "qwen3_vl": (
        16,
        (
            {},
            {"size": {"shortest_edge": 4096, "longest_edge": 25_165_824}},
            {"cap_pixels_per_frame": True},
        ),
    ),
    "glm4v": (14, ({}, {"size": {"shortest_edge": 12_544, "longest_edge": 900_000}})),
}


@pytest.mark.parametrize("name", GRIDS)
def test_patches_of_several_frames(name):
    """Odd numbers of frames are padded. The limits of pixels are a frame's or the whole video's."""
    kind = {"qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL", "glm4v": "Glm4v"}[name]
    path = f"models/{name}/video_processing_{name}.py"
    resize, kind = code_of(path, "smart_resize", f"{kind}VideoProcessor")
    own, (patch, cases) = kind.__new__(kind), GRIDS[name]
    config = config_of(name, patch_size=patch)
    assert family_of(config).unset_video(config)["size"] == own.size
    for given in cases:
        settings = {"size": own.size} | given
        for frames, (width, height) in PAIRS:
            seen = video(config, settings, frames, (width, height))
            patches = own.get_num_of_video_patches(frames, height, width, given)
            assert (seen.patches, seen.features) == (patches, patches // 4)
            assert seen.count == math.ceil(frames / 2)
            if not given:
                least, most = own.size["shortest_edge"], own.size["longest_edge"]
                asked = [] if name == "qwen2_vl" else [frames]
                more = {"factor": 2 * patch, "min_pixels": least, "max_pixels": most}
                assert seen.crop == resize(*asked, height, width, **more)


def test_an_even_share_of_a_budget_of_tokens():
    """`resize` of Qwen2-VL's video processor, written out: it needs torchvision."""
    (resize,) = code_of("models/qwen2_vl/video_processing_qwen2_vl.py", "smart_resize")
    config = config_of("qwen2_vl", patch_size=14)
    settings = family_of(config).unset_video(config) | {"cap_pixels_per_frame": True}
    least, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    for frames, (width, height) in PAIRS:
        share = max(min(most, int(128_000 * 28 * 28 * 0.9) * 2 // frames), int(least * 1.05))
        crop = resize(height, width, min_pixels=least, max_pixels=share)
        assert video(config, settings, frames, (width, height)).crop == crop


def test_frames_of_gemma_4():
    config = CONFIG_MAPPING["gemma4"](vision_config={}, audio_config=None)
    settings = family_of(config).video_settings(config)
    assert settings == {"max_soft_tokens": 70, "patch_size": 16, "pooling_kernel_size": 3}
    for frames, (width, height) in PAIRS:
        crop = get_aspect_ratio_preserving_size(height, width, 16, 70 * 9, 3)
        seen = video(config, settings, frames, (width, height))
        assert seen.crop == crop
        assert seen.features == frames * math.prod(side // 48 for side in crop)


# --- the text among the frames --------------------------------------------------------------------

QWEN = r"[^\r\n\w]?[A-Za-z]+|\d| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+"
RULES = {
    "qwen3_vl": QWEN,
    "internvl": QWEN,
    "glm4v": r"\d{1,3}",
    "gemma4": r"\d|[^\d]",
    "smolvlm": r" ?[A-Za-z]+|\d|\s(?=\d|\n)| ?[^\s\w]+|\s",
}
"""What is one token of text, without the markers in <>. Every piece of Qwen's rule and SmolVLM's
was one in the vocabulary of Qwen, and in SmolLM2's."""


def written(name, config, seen):
    """(the text that the processor writes for a video, the token that stands for a feature)."""
    module = import_module(f"transformers.models.{name}.processing_{name}")
    kind = next(k for k in vars(module) if k.endswith("Processor") and k != "ProcessorMixin")
    processor = getattr(module, kind)
    side, patch = (
        side_of(getattr(config.vision_config, f"{n}_size", 1)) for n in ("image", "patch")
    )
    own = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        image_seq_length=getattr(config, "image_seq_length", 0), image_seq_len=seen.features,
        num_image_tokens=(side // patch) ** 2,
        **dict.fromkeys(("image_token", "video_token"), "§"),
        **dict.fromkeys(("start_image_token", "vision_start_token", "boi_token"), "<start>"),
        **dict.fromkeys(("end_image_token", "vision_end_token", "eoi_token"), "<end>"),
        fake_image_token="<fake>", global_image_token="<global>",
        replace_frame_token_id=lambda second, num_image_tokens: (
            f"<start>{'§' * num_image_tokens}<end>{int(second)}"
        ),
    )  # fmt: skip
    own._calculate_timestamps = lambda *given: processor._calculate_timestamps(own, *given)
    indices = np.arange(seen.frames)
    metadata = SimpleNamespace(
        fps=2, frames_indices=indices, timestamps=[i / 2 for i in indices], duration=seen.frames / 2
    )
    grid = torch.tensor([[seen.count, *(side // patch for side in seen.crop)]])
    pixels = torch.empty(1, seen.frames, 1, device="meta")
    inputs = {
        "video_metadata": [metadata], "video_grid_thw": grid, "pixel_values_videos": pixels,
        "pixel_values": pixels, "num_soft_tokens_per_video": [seen.features // seen.frames],
    }  # fmt: skip
    if name == "smolvlm":
        own.image_seq_len = seen.features // seen.frames
    return processor.replace_video_token(own, inputs, 0)


@pytest.mark.parametrize("name", [*RULES, "qwen2_vl", "llava_onevision"])
def test_the_text_among_the_frames(name, monkeypatch):
    """Times, numbers and markers, up to minutes; features and their runs."""
    config = config_of(name) if name != "gemma4" else CONFIG_MAPPING[name](**FIELDS[name])
    module = import_module("transformers.models.smolvlm.processing_smolvlm")
    monkeypatch.setattr(module, "num2words", lambda number: "thirty-two")
    settings = family_of(config).video_settings(config)
    for frames in (2, 5, 12, 32, 260):
        seen = video(config, settings, frames, (64, 48))
        text = written(name, config, seen)
        assert text.count("§") == seen.features
        assert len(re.findall("§+", text)) == seen.runs
        markers = re.findall(r"<(?:start|end|fake|global)>", text)
        pieces = re.split(r"<(?:start|end|fake|global)>|§+", text)
        tokens = sum(len(re.findall(RULES.get(name, "."), piece)) for piece in pieces)
        assert tokens + len(markers) == seen.tokens - seen.features


# --- models ---------------------------------------------------------------------------------------

TINY = [name for name in FAMILIES if name.startswith(("qwen", "glm", "smol", "internvl"))]
TINY += ["llava_onevision", "qwen3_5", "gemma4"]
QUICK = ("qwen3_vl", "glm4v", "internvl", "llava_onevision", "gemma4")


def small(name):
    if name in FIELDS:
        config = CONFIG_MAPPING[name](**FIELDS[name])
        config.video_token_id = VIDEO
    else:
        config = config_of(name)
    config.get_text_config().max_position_embeddings = 4096
    return config


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TINY]
)
def test_a_model_takes_the_video_that_is_predicted(name):
    """It refuses a wrong number of features. With a picture too, where the model takes both."""
    config = small(name)
    model, family = model_of(config), family_of(config)
    for images in (0,) if family.either else (0, 1):
        asked = {"tokens": 30, "num_frames": 5, "images": images, "batch_size": 2}
        tensors, prompt = run_of(model, **asked, image_size=(64, 48))
        prompt()
    feature = family.video_id(config)
    place = (tensors["input_ids"] == feature).nonzero()[0]
    tensors["input_ids"][tuple(place)] = 20
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        prompt()


PEAKS = [(name, kind) for name in TINY[:-2] for kind in ("prompt", "LoRA, checkpoints")]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name, kind",
    [
        pair if pair == ("qwen2_5_vl", "prompt") else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in PEAKS
    ],
)
def test_the_peak_with_a_video(name, kind, tmp_path):
    """Within 4%: attention of each frame alone, windows, and the features of all frames."""
    folder, batch = medium.save(name, tmp_path), {"tokens": 100, "num_frames": 9, "batch_size": 2}
    run = a_pass(folder, *PASSES[kind], **batch, image_size=(64, 48))
    run()
    found = predicted(folder, *PASSES[kind], **batch, image_size=(64, 48))
    assert abs(found / peak_of(run) - 1) < 0.04


def test_what_takes_no_video_says_so():
    for name in ("google/gemma-3-4b-it", "LiquidAI/LFM2.5-VL-1.6B", "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(SizeError, match="takes no videos"):
            predict(name, "bf16", num_frames=8)
    with pytest.raises(SizeError, match="2 frames or more"):
        predict("Qwen/Qwen3-VL-2B-Instruct", "bf16", num_frames=1)
    assert vk.memory.visual_tokens("Qwen/Qwen2-VL-2B-Instruct", (56, 56), num_frames=1).count == 1
    for name in ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "zai-org/GLM-4.1V-9B-Thinking"):
        with pytest.raises(SizeError, match="not both"):
            predict(name, "bf16", num_frames=8, images=1)
    with pytest.raises(SizeError, match="does not change a video"):
        predict(small("internvl"), "bf16", num_frames=8, max_patches=3)
    with pytest.raises(SizeError, match="Did you mean 'num_frames'"):
        predict("pebble", frames=8)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, tokens",
    [
        # From before a file for videos: a frame of 12 megapixels may have 16,384 tokens.
        ({"preprocessor_config": {"min_pixels": 3136, "max_pixels": 12_845_056}}, 15_552),
        ({"preprocessor_config": {"max_pixels": 200_704}}, 234),
        ({"preprocessor_config": {}}, 768),
        (
            {
                "preprocessor_config": {"max_pixels": 12_845_056},
                "video_preprocessor_config": {"max_pixels": 200_704},
                "processor_config": {"processor_class": "Qwen2VLProcessor"},
            },
            234,
        ),
        (
            {
                "video_preprocessor_config": {"max_pixels": 12_845_056},
                "processor_config": {
                    "video_processor": {"size": {"shortest_edge": 3136, "longest_edge": 200_704}}
                },
            },
            234,
        ),
        ({}, 15_552),  # as published
    ],
)
def test_where_the_settings_of_videos_come_from(files, tokens, tmp_path):
    """As in transformers' `get_video_processor_dict`: from processor_config.json if it has them,
    else from the file for videos, else from that for pictures."""
    path = vk.catalog.folder_of("Qwen/Qwen2-VL-2B-Instruct") / "config.json"
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    for name, said in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    seen = vk.memory.visual_tokens(tmp_path, (4032, 3024), num_frames=4)
    assert seen.tokens == 2 * tokens
    limited = vk.memory.visual_tokens(tmp_path, (4032, 3024), num_frames=4, max_pixels=200_704)
    assert limited.tokens == 2 * 234


def test_an_old_processor_config_does_not_hide_the_settings_of_pictures(tmp_path):
    """SmolVLM was published with both files, of which processor_config.json has no settings."""
    folder = vk.catalog.folder_of("HuggingFaceTB/SmolVLM-256M-Instruct")
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "processor_config.json").write_text('{"image_seq_len": 64}')
    count = vk.memory.visual_tokens
    assert count(tmp_path, (1024, 768)) == count(folder, (1024, 768))


def test_numbers_of_published_models():
    """32 frames of 640 x 360: Qwen3-VL's 16 x 220 features, its times and 32 markers."""
    count = vk.memory.visual_tokens
    seen = count("Qwen/Qwen3-VL-2B-Instruct", (640, 360), num_frames=32)
    assert (seen.features, seen.tokens) == (3520, 3520 + 16 * 8 + 6)
    assert count("Qwen/Qwen3-VL-2B-Instruct", (1920, 1080), num_frames=768).features <= 12_288
    assert count("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", (9, 9), num_frames=3).features == 192
    assert count("google/gemma-4-E2B-it", (640, 360), num_frames=2).features == 2 * 66
