"""A dry run runs a few of many equal layers: the bytes are those of running every layer."""

import medium
import pytest

import vlmkit as vk
from vlmkit.memory import predict
from vlmkit.memory.dry_run import DryRun
from vlmkit.memory.layers import ALL

USES = {
    "a prompt": {"tokens": 100},
    "tokens after it": {"tokens": 100, "new_tokens": 50},
    "LoRA": {"tokens": 60, "training": "lora"},
    "LoRA, checkpoints": {"tokens": 60, "training": "lora", "gradient_checkpointing": True},
    "both towers": {
        "tokens": 60,
        "training": {"vision_encoder": vk.LoRA(r=4), "language_model": vk.LoRA(r=4)},
    },
}
NAMES = ["mllama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llava", "gemma3"))]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", [*NAMES, pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_as_if_every_layer_were_run(name, use, monkeypatch):
    config = medium.config_of(name, 12)
    more = USES[use] | {"images": 1, "image_size": (100, 70)}
    few = predict(config, "recommended", **more)
    monkeypatch.setattr("vlmkit.memory.steps.DryRun", lambda model, *_, **__: DryRun(model, ALL))
    every = predict(config, "recommended", **more)
    assert few.by_kind == every.by_kind and few.by_component == every.by_component
