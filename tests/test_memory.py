"""Ledgers: predicted from a config and measured on the loaded model, to the byte."""

import pytest
import torch
from families import FAMILIES
from test_families import PLANS as FAMILY_PLANS

import vlmkit as vk
from vlmkit.memory import compare, measure, predict

PLANS = [
    "recommended",
    "bf16",
    "nf4",
    "nf4-dq",
    "fp4",
    "int8",
    "vision_encoder=fp32,language_model=nf4",
    "vision_encoder=fp32,projector=fp16",
    vk.Plan.recommended().override("lm_head", "nf4"),
    vk.Plan.uniform("nf4-dq").override(r"layers\.1\.", "fp32"),
]


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_predicted_is_measured(llava, plan):
    predicted = predict(llava, plan)
    model, _ = vk.load(llava, plan, processor=False)
    found = compare(predicted, measure(model))
    assert not found["difference"].any(), found
    assert predict(model, plan).total == predicted.total


@pytest.mark.parametrize("plan", ["recommended", "int8", "vision_encoder=fp32,projector=nf4-dq"])
@pytest.mark.parametrize("family", ["llava_clip", "other_family", "qwen2_vl"])
def test_other_families(family, plan, request):
    folder = request.getfixturevalue(family)
    model, _ = vk.load(folder, plan, processor=False)
    found = compare(predict(folder, plan), measure(model))
    assert not found["difference"].any(), found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrix(name, family):
    """Every family of `families.py` under every plan that loading is tested with."""
    for plan in FAMILY_PLANS.values():
        model, _ = vk.load(family(name), plan, processor=False)
        found = compare(predict(family(name), plan), measure(model))
        assert not found["difference"].any(), found


@pytest.mark.parametrize("plan", ["bf16", "fp16", "nf4", "vision_encoder=fp32,language_model=nf4"])
def test_what_a_class_keeps_in_fp32(llava, plan, monkeypatch):
    """transformers lets a model's class keep modules in fp32, and out of quantization."""
    from transformers import LlavaForConditionalGeneration as Llava

    monkeypatch.setattr(Llava, "_keep_in_fp32_modules_strict", ["post_layernorm"])
    monkeypatch.setattr(Llava, "_keep_in_fp32_modules", ["linear_2", "model.*.layers.1"])
    model, _ = vk.load(llava, plan, processor=False)
    assert model.model.vision_tower.post_layernorm.weight.dtype == torch.float32
    found = compare(predict(llava, plan), measure(model))
    assert not found["difference"].any(), found


def test_measured_after_forward_passes_too(llava):
    for plan in ("nf4-dq", "int8"):
        model, _ = vk.load(llava, plan, processor=False)
        before = measure(model)
        for _ in range(2):
            model.model.language_model(inputs_embeds=torch.randn(1, 5, 128, dtype=torch.bfloat16))
        assert measure(model).by_kind == before.by_kind


def test_an_odd_shape_is_counted_exactly(tmp_path):
    import tiny

    text = {"intermediate_size": 101, "hidden_size": 96, "head_dim": 48}
    folder = tiny.llava(tmp_path, text=text)
    for plan in ("nf4", "nf4-dq", "int8"):
        model, _ = vk.load(folder, plan, processor=False)
        assert measure(model).by_kind == predict(folder, plan).by_kind


def test_sums_and_tables(llava):
    ledger = predict(llava)
    assert ledger.total == sum(ledger.by_component.values()) == sum(ledger.by_kind.values())
    assert list(ledger.by_component) == ["vision_encoder", "projector", "language_model"]
    assert ledger.table().loc["total", "total"] == ledger.total
    assert "MB = 10^6 bytes" in str(ledger) and "<table" in ledger._repr_html_()


def test_published_sizes():
    """Llama-2-7B's Linear layers at 4.5 bits a weight, and everything else at 16."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["llava"]()
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert predict(config).by_kind["linear"] - predict(config, "bf16").by_kind["linear"] == (
        weights // 2 - 2 * weights
    )
    assert predict(config).by_kind["quantization state"] == weights * 4 // 64 + 64 * 32 * 7
