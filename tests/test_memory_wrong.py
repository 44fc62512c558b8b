"""Questions about memory that have no answer, and what is said instead."""

import pytest

import vlmkit as vk
from vlmkit.errors import (
    AnatomyError,
    CheckpointError,
    FinetuningError,
    ImageError,
    PlanError,
    SizeError,
)
from vlmkit.memory import parse_size, predict

LLAMA, QWEN = "meta-llama/Llama-3.2-11B-Vision-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        ({"tokens": -1}, SizeError, "tokens is a whole number from 0"),
        ({"tokens": 1.5}, SizeError, "tokens is a whole number"),
        ({"tokens": True}, SizeError, "tokens is a whole number"),
        ({"tokens": 8, "batch_size": 0}, SizeError, "batch_size is a whole number from 1"),
        ({"images": -2}, SizeError, "images is a whole number"),
        ({"new_tokens": 5}, SizeError, "need a prompt"),
        ({"tokens": 10**7}, SizeError, "do not fit"),
        ({"tokens": 10**9}, SizeError, "tokens is at most"),
        ({"images": 10**4, "image_size": (1024, 768)}, SizeError, "do not fit"),
        ({"images": 10**6, "image_size": (1024, 768)}, SizeError, "images is at most"),
        ({"images": 1, "image_size": (0, 768)}, SizeError, "from 1 on"),
        ({"images": 1, "image_size": (-1024, 768)}, SizeError, "from 1 on"),
        ({"images": 1, "image_size": "1024x768"}, SizeError, "width"),
        ({"images": 1, "image_size": 1024}, SizeError, "width"),
        ({"images": 3, "image_size": [(64, 64), (32, 32)]}, SizeError, "2 sizes for 3 images"),
        ({"images": 1, "image_size": (100_000, 100_000)}, ImageError, "no family takes it"),
        ({"images": 1, "image_size": (30_000, 20)}, ImageError, "no family takes"),
        ({"tokens": 8, "training": "lora", "new_tokens": 3}, FinetuningError, "generates nothing"),
        ({"training": "lorra"}, FinetuningError, "lorra"),
        ({"training": {"projektor": "full"}}, FinetuningError, "'projector'"),
        ({"training": {"cross_attention": "full"}}, FinetuningError, "has none"),
        ({"training": {"language_model": "full"}}, FinetuningError, "quantized"),
        ({"training": "lora", "optim": "adamw8bit"}, FinetuningError, "'adamw_8bit'"),
        ({"gradient_checkpointing": True}, FinetuningError, "for training"),
        ({"batch": 2}, SizeError, "Did you mean 'batch_size'"),
        ({"checkpointing": True}, SizeError, "Did you mean 'gradient_checkpointing'"),
        ({"optimizer": "adamw"}, SizeError, "Did you mean 'optim'"),
        ({"image_sizes": (8, 8)}, SizeError, "Did you mean 'image_size'"),
        ({"allocator": "tpu"}, SizeError, "'tpu'"),
    ],
)
def test_what_cannot_be(use, error, says):
    with pytest.raises(error, match=says):
        predict(QWEN, **use)


@pytest.mark.parametrize("size", [(4000, 3000), (100, 2900)])
def test_a_large_picture_is_what_the_processor_makes_of_it(size):
    """Larger than a family takes, and yet opened: it is resized, and the ledger says to what."""
    ledger = predict(QWEN, tokens=8, images=1, image_size=size)
    assert any("resized to" in note for note in ledger.notes)


@pytest.mark.parametrize(
    ("model", "plan", "says"),
    [
        ("pebble", {"cross_attention": "nf4"}, "cross_attention"),
        ("pebble", "vision_encoder=nf5", "'nf4'"),
        ("pebble", "visionencoder=nf4", "'vision_encoder'"),
        ("pebble", vk.Plan().override("no_such_module", "nf4"), "no_such_module"),
    ],
)
def test_a_plan_that_the_model_cannot_have(model, plan, says):
    plan = vk.Plan(**plan) if isinstance(plan, dict) else plan
    with pytest.raises(PlanError, match=says):
        predict(model, plan)


def test_a_model_of_no_catalog_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="somebody/a-model"):
        predict("somebody/a-model")


def test_pictures_of_a_family_without_a_rule():
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["fuyu"]()
    with pytest.raises(AnatomyError, match="no rule yet"):
        predict(config, "bf16", images=1)


@pytest.mark.parametrize(
    ("text", "size", "printed"),
    [
        ("8 GB", 8 * 10**9, "8 GB = 8,000,000,000 bytes"),
        ("8GiB", 8 * 2**30, "8 GiB = 8,589,934,592 bytes"),
        ("8000MB", 8 * 10**9, "8000 MB = 8,000,000,000 bytes"),
        ("8,000 mb", 8 * 10**9, "8,000 MB = 8,000,000,000 bytes"),
        ("8.0 GB", 8 * 10**9, "8.0 GB = 8,000,000,000 bytes"),
        ("12,345,678 kB", 12_345_678_000, "12,345,678 kB = 12,345,678,000 bytes"),
        ("1,024.5 kB", 1_024_500, "1,024.5 kB = 1,024,500 bytes"),
        ("8_000 MB", 8 * 10**9, "8_000 MB = 8,000,000,000 bytes"),
        (8e9, 8 * 10**9, "8,000,000,000 bytes"),
        ("0.1 GB", 10**8, "0.1 GB = 100,000,000 bytes"),
        ("1.5 gib", 3 * 2**29, "1.5 GiB = 1,610,612,736 bytes"),
        ("640kB", 640_000, "640 kB = 640,000 bytes"),
        ("12345", 12_345, "12,345 bytes"),
        (12_345, 12_345, "12,345 bytes"),
    ],
)
def test_sizes_as_people_write_them(text, size, printed):
    assert parse_size(text) == size and str(parse_size(text)) == printed


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "GB",
            "8 G",
            "8 apples",
            "-8 GB",
            "0",
            "8 GB 2",
            None,
            True,
            b"8 GB",
            [8],
            float("nan"),
        ],
        *["8,0 GB", "8,00 GB", "8,0000 GB", "80,00,000 B", ",8 GB", "8, GB", "1,000,00 B", "8_ GB"],
        *[
            "8__0 GB",
            "nan",
            "inf GB",
            "1e9",
            "\u0668 GB",
            "9" * 400,
            "9" * 5000,
            10**99,
            -(10**99),
        ],
    ],
)
def test_what_is_no_size(text):
    with pytest.raises(SizeError, match="byte"):
        parse_size(text)
