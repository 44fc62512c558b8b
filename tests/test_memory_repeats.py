"""A few of many equal layers are rehearsed: the bytes are those of rehearsing every layer."""

import medium
import pytest

import vlmkit as vk
from vlmkit.memory import predict, running, steps

USES = {
    "a prompt": {"tokens": 100},
    "tokens after it": {"tokens": 100, "new_tokens": 50},
    "LoRA": {"tokens": 60, "training": "lora"},
    "LoRA, checkpoints": {"tokens": 60, "training": "lora", "checkpointing": True},
    "both towers": {
        "tokens": 60,
        "training": {"vision_encoder": vk.LoRA(r=4), "language_model": vk.LoRA(r=4)},
    },
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "name", ["mllama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llava", "gemma3"))]
)
def test_as_if_every_layer_were_run(name, use, monkeypatch):
    config = medium.config_of(name, 12)
    more = USES[use] | {"images": 1, "image_size": (100, 70)}
    short = predict(config, "recommended", **more)
    monkeypatch.setattr(steps, "Stage", lambda model, *_, **__: running.Stage(model, False))
    whole = predict(config, "recommended", **more)
    assert short.by_kind == whole.by_kind and short.by_component == whole.by_component
