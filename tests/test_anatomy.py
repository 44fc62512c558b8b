"""Every parameter belongs to one component: in every architecture, format and wrapper."""

import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING

import vlmkit as vk
from vlmkit.anatomy import anatomy_of, decide
from vlmkit.architectures import OWN_RULES, RULES
from vlmkit.errors import AnatomyError, CheckpointError


def test_the_same_for_a_path_a_config_and_a_model(llava):
    model, _ = vk.load(llava, "bf16", processor=False)
    by_path = vk.anatomy(str(llava))
    assert by_path.total == sum(p.numel() for p in model.parameters())
    assert by_path == vk.anatomy(model) == vk.anatomy(model.config)


@pytest.mark.parametrize("plan", ["nf4", "nf4-dq", "fp4", "int8"])
def test_packed_weights_count_in_full(llava, plan):
    model, _ = vk.load(llava, plan, processor=False)
    assert vk.anatomy(model) == vk.anatomy(llava)
    assert vk.anatomy(model).total == model.num_parameters()


def test_tied_weights_count_once(llava, llava_clip):
    assert vk.anatomy(llava)["language_model"].places == ("model.language_model", "lm_head")
    assert vk.anatomy(llava_clip)["language_model"].places == ("model.language_model",)


def test_adapters_count_in_the_component_that_they_adapt(llava):
    from peft import LoraConfig, get_peft_model

    model, _ = vk.load(llava, processor=False)
    before = anatomy_of(model)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*q_proj"))
    after = vk.anatomy(wrapped)
    assert after.architecture == before.architecture
    assert after["vision_encoder"].parameters == before["vision_encoder"].parameters
    assert after["language_model"].parameters - before["language_model"].parameters == 2 * 4 * 256


def test_the_outermost_known_name_decides_and_only_whole_segments_count():
    assert decide("model.vision_tower.encoder.layers.0.connector.weight")[0] == "vision_encoder"
    assert decide("model.visual.merger.mlp.0.weight")[0] == "projector"
    assert decide("model.visual.blocks.0.merger_norm.weight")[0] == "vision_encoder"
    assert decide("model.vision_tower_2.weight") == (None, None)
    assert decide("base_model.model.model.language_model.layers.0.cross_attn.q_proj.weight") == (
        "cross_attention",
        "base_model.model.model.language_model.layers.0.cross_attn",
    )
    for rules in (RULES, *OWN_RULES.values()):
        assert set(rules.values()) <= set(vk.COMPONENTS)


def test_unknown_paths_are_shown_and_never_guessed(llava, monkeypatch):
    import torch

    from vlmkit.anatomy import on_meta
    from vlmkit.checkpoints import read_config

    model = on_meta(read_config(llava))
    model.model.novelty = torch.nn.Linear(2, 3, device="meta")
    a = vk.anatomy(model)
    assert a.unknown == ("model.novelty.weight", "model.novelty.bias")
    assert a.component_of("model.novelty.weight") is None
    assert a.total == vk.anatomy(llava).total + 9
    assert "unknown" in str(a) and "model.novelty" in str(a)
    monkeypatch.setattr("vlmkit.layout.on_meta", lambda *args, **kwargs: model)
    monkeypatch.setattr("vlmkit.layout._KEPT", {})
    with pytest.raises(AnatomyError, match="model.novelty.weight"):
        vk.load(llava)


def test_shown_as_text_and_html(llava):
    a = vk.anatomy(llava)
    assert list(a.table().index) == list(vk.COMPONENTS)
    assert "model.multi_modal_projector" in str(a)
    assert f"{a.total:,} parameters" in a._repr_html_() and "<table" in a._repr_html_()


def test_not_a_vlm():
    with pytest.raises(AnatomyError, match="LlamaConfig .* is not a vision-language model"):
        vk.anatomy(CONFIG_MAPPING["llama"]())
    with pytest.raises(AnatomyError, match="CLIPVisionConfig .* is not a vision-language model"):
        vk.anatomy(CONFIG_MAPPING["clip_vision_model"]())
    with pytest.raises(AnatomyError, match="Did you mean 'projector'"):
        vk.anatomy(CONFIG_MAPPING["llava"]())["projecter"]
    with pytest.raises(CheckpointError, match="no checkpoint 'pebbel'.*Did you mean 'pebble'"):
        vk.anatomy("pebbel")


@pytest.mark.parametrize("first", ["vlmkit.anatomy", "vlmkit.plan", "vlmkit.layout", "vlmkit"])
def test_callable_whatever_was_imported_first(first):
    code = (
        f"import {first}, vlmkit, sys\n"
        "assert callable(vlmkit.anatomy) and vlmkit.anatomy is sys.modules['vlmkit.anatomy']\n"
        "from vlmkit import anatomy\n"
        "assert callable(anatomy) and anatomy.decide('lm_head')[0] == 'language_model'\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
