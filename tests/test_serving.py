"""What vLLM would keep: its published rules, worked out by hand for a few models."""

import json

import pytest

import vlmkit as vk
from vlmkit.cli import main
from vlmkit.errors import AnatomyError, SizeError
from vlmkit.memory.serving import _blocks

QWEN, GEMMA = "Qwen/Qwen2-VL-2B-Instruct", "google/gemma-3-4b-it"


def test_grouped_queries_by_hand():
    """28 layers, 2 heads of keys and values, 128 wide, 16 bits: 28,672 bytes a token."""
    found = vk.memory.serving(QWEN, "24 GiB", max_model_len=8192, image_size=(448, 448))
    assert found.requested == -(-24 * 2**30 * 92 // 100) and found.reserved == 10**9
    assert found.block == 16 * 28 * 2 * 2 * 128 * 2 and found.blocks_per_request == 8192 // 16
    assert found.weights == vk.memory.predict(QWEN, "bf16").total
    assert found.encoder_cache == 2048 * 1536 * 2  # a picture has fewer tokens than a step
    parts = found.weights, found.activations, found.encoder_cache, found.reserved
    assert found.cache == found.requested - sum(parts)
    assert found.blocks == found.cache // found.block
    assert found.requests == found.blocks / 512 and f"{found.requests:.2f}" in str(found)
    half = vk.memory.serving(QWEN, "24 GiB", max_model_len=4096, image_size=(448, 448))
    assert half.blocks_per_request == 256


def test_windows_by_hand():
    """5 layers of full attention and 29 with a window of 1,024 make 7 groups of 5 at most; each
    request takes 512 blocks of the first, and ceil(3071 / 16) + 1 = 193 of each other."""
    found = vk.memory.serving(GEMMA, "24 GiB", max_model_len=8192)
    assert found.block == 5 * 16 * 4 * 256 * 2 * 2
    assert found.blocks_per_request == 512 + 6 * 193


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({("full_attention", None, 100): 4}, (4 * 1600, 63)),
        # 12 is less than half as many again as 9: groups of 12, one each
        ({("full_attention", None, 8): 9, ("sliding_attention", 64, 8): 12}, (12 * 128, 63 + 12)),
        # pages of half the size hold 32 tokens
        ({("full_attention", None, 8): 2, ("sliding_attention", 64, 4): 2}, (2 * 128, 63 + 7)),
        ({("chunked_attention", 64, 8): 3}, (3 * 128, 11)),
    ],
)
def test_groups(layers, expected):
    assert _blocks(layers, 1000, 100) == expected


def test_what_has_no_rule_is_refused():
    with pytest.raises(AnatomyError, match="no rule"):
        vk.memory.serving("Qwen/Qwen3.5-0.8B", "24 GB")
    with pytest.raises(AnatomyError, match="multiples"):
        _blocks({("full_attention", None, 12): 1, ("sliding_attention", 64, 8): 1}, 100, 100)
    for wrong in ({"gpu_memory_utilization": 1.1}, {"max_model_len": 10**7}, {"max_model_len": 0}):
        with pytest.raises(SizeError, match=next(iter(wrong))):
            vk.memory.serving("pebble", "8 GB", **wrong)


def test_the_command(capsys):
    words = ["fit", "pebble", "--serve", "--json", "--reserve", "1 MB", "--card"]
    assert main([*words, "60 MB"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["requests"] > 1 and document["requested"] == 55_200_000
    assert main([*words, "20 MB"]) == 1


@pytest.mark.parametrize(
    "card, tokens", {"L40S": 2048, "A100 80GB": 2048, "H100": 8192, "180 GiB": 16384}.items()
)
def test_tokens_of_a_step_by_default(card, tokens):
    assert vk.memory.serving("pebble", card, images=0).max_num_batched_tokens == tokens
