"""Loading under a plan: what is asked is what is there, and bad input says what is wrong."""

import gc
import os
import subprocess
import sys

import pytest
import torch

import vlmkit as vk
from vlmkit.anatomy import on_meta
from vlmkit.backend import converting, cpu
from vlmkit.backend.boundaries import join_dtypes
from vlmkit.checkpoints import read_config
from vlmkit.errors import AuditError, CheckpointError, PlanError
from vlmkit.formats import dequantize, quantize
from vlmkit.layout import layout_of

MIXED = [  # quantized formats beside several float formats; test_families.py has the float formats
    "vision_encoder=fp32,language_model=nf4",
    "language_model=fp32,vision_encoder=nf4",
    vk.Plan.recommended().override(r"(language|text)_model\.layers\.1\.", "fp32"),
]


def load(folder, plan=None, **kwargs):
    return vk.load(folder, plan, processor=False, **kwargs)[0]


def inputs(processor, text="What is it?", images=1):
    from PIL import Image

    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    pictures = [Image.new("RGB", (30, 20), (200, 40 * i, 90)) for i in range(images)]
    return processor(text=prompt, images=pictures, return_tensors="pt")


def linear4bit(inside=128, outside=96, nested=False, bias=False):
    """A quantized layer as load leaves it, and the weight that it was made from."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    options = {"quant_type": "nf4", "compress_statistics": nested}
    layer = bnb.nn.Linear4bit(inside, outside, bias, compute_dtype=torch.bfloat16, **options)
    weight = torch.randn(outside, inside, dtype=torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **options)
    layer = layer.to("cpu")
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(outside, dtype=torch.bfloat16))
    cpu.guard_against_cpu_traps(layer)
    return layer.eval(), weight


# --- what load returns --------------------------------------------------------------------------


def test_returns_a_plain_model_and_processor(llava):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, processor = vk.load(llava)
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor
    assert not model.training and model.is_loaded_in_4bit
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert skipped == ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    out = model.generate(**inputs(processor, images=2), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 3


def test_without_a_processor(llava, copy):
    folder = copy(llava)
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    model, processor = vk.load(folder, "bf16", processor=False)
    assert processor is None and model.dtype == torch.bfloat16


def test_weights_are_the_checkpoints(llava):
    from safetensors.torch import load_file

    saved = load_file(llava / "model.safetensors")
    ours = dict(load(llava, "vision_encoder=fp32,projector=fp16").named_parameters())
    assert len(ours) == len(saved)
    key = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    name = next(n for n in ours if n.endswith(key))
    theirs = next(t for n, t in saved.items() if n.endswith(key))
    assert ours[name].dtype == torch.float32 and torch.equal(ours[name], theirs.float())


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "int8"])
def test_quantized_weights_are_the_references(llava, name):
    path = "model.language_model.layers.1.mlp.down_proj"
    packed = quantize(load(llava, "bf16").get_submodule(path).weight.data, name)
    weight = load(llava, name).get_submodule(path).weight
    assert torch.equal(weight.data.flatten(), packed.data.flatten())


@pytest.mark.parametrize("plan", MIXED, ids=repr)
@pytest.mark.parametrize("family", ["llava", "other_family"])
def test_components_in_different_dtypes_work_together(family, plan, request):
    model, processor = vk.load(request.getfixturevalue(family), plan)
    batch = inputs(processor)
    out = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > batch["input_ids"].shape[1]


def test_fp32_everywhere_but_one_place_is_joined_there(qwen2_vl):
    """Qwen's projector is inside its vision module: joined on both sides, and nowhere else."""

    def joined(plan):
        return join_dtypes(on_meta(read_config(qwen2_vl)), layout_of(qwen2_vl, plan))

    assert joined("projector=fp32") == ["model.visual.merger"]
    assert joined("vision_encoder=fp32") == ["model.visual", "model.visual.merger"]


def test_default_model(monkeypatch):
    monkeypatch.delenv("VLMKIT_MODEL", raising=False)
    assert vk.default_model() == "pebble"
    monkeypatch.setenv("VLMKIT_MODEL", "owner/name")
    assert vk.default_model() == "owner/name"


def test_pebble_loads():
    model, _ = vk.load("pebble")
    found = vk.audit(model, "recommended").table()
    assert list(found.index) == ["vision_encoder", "projector", "language_model"]
    assert vk.memory.predict("pebble").total == vk.memory.measure(model).total


def test_a_prediction_and_a_load_print_nothing(llava):
    code = (
        "import vlmkit as vk, torch\n"
        f"vk.memory.predict({str(llava)!r}, 'nf4')\n"
        "for plan in ('recommended', 'int8'):\n"
        f"    model, processor = vk.load({str(llava)!r}, plan)\n"
        "    model.model.language_model(inputs_embeds=torch.randn(1, 5, 128).bfloat16())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("watched", [False, True])
def test_a_long_load_shows_the_bar_of_transformers_to_whoever_looks(
    llava, monkeypatch, capsys, large, watched
):
    monkeypatch.setattr("vlmkit.loading.GIGABYTE", 1000 if large else 10**9)
    monkeypatch.setattr("vlmkit.loading.is_watched", lambda: watched)
    load(llava, "bf16")
    assert ("Loading weights" in capsys.readouterr().err) == (large and watched)


# --- the audit ----------------------------------------------------------------------------------


def test_audit_table(llava):
    model = load(llava)
    found = vk.audit(model, "recommended")
    table = found.table()
    assert list(table["asked"]) == ["bf16", "bf16", "nf4"]
    assert list(table["found"]) == ["bf16", "bf16", "nf4 + bf16"]
    assert table["parameters"].sum() == vk.anatomy(llava).total
    ledger = vk.memory.measure(model)
    assert table["bytes"].sum() == ledger.total - ledger.by_kind["buffer"]
    assert "head" in table.loc["language_model", "kept"]
    assert "10^6" in str(found) and "<table" in found._repr_html_()


def test_audit_refuses_what_the_plan_did_not_ask_for(llava):
    model = load(llava)
    with pytest.raises(AuditError, match="down_proj.weight: asked for bf16; found nf4"):
        vk.audit(model, "bf16")
    with pytest.raises(AuditError, match="asked for nf4-dq; found nf4"):
        vk.audit(model, "language_model=nf4-dq")
    model.model.multi_modal_projector.linear_2.float()
    wrong = "in 2 of 62 .*\n.*linear_2.bias: asked for bf16; found fp32"
    with pytest.raises(AuditError, match=wrong):
        vk.audit(model, "recommended")


def test_audit_finds_the_skip_list_trap(llava):
    """A bare name in transformers' skip list protects nothing, and transformers does not say so."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    trap = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(llava, quantization_config=trap)
    with pytest.raises(AuditError, match="model.vision_tower.*asked for bf16.*found nf4"):
        vk.audit(model, "recommended")


def test_load_audits(llava, monkeypatch):
    monkeypatch.setattr(converting, "skip_list", lambda *names: ["vision_tower", "lm_head"])
    monkeypatch.setattr(converting, "_require_exact", lambda *names: None)
    with pytest.raises(AuditError, match="model.multi_modal_projector"):
        load(llava)


def test_audit_looks_through_peft(llava):
    from peft import LoraConfig, get_peft_model

    model = load(llava)
    before = vk.audit(model, "recommended")
    config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["linear_1"])
    assert vk.audit(get_peft_model(model, config), "recommended") == before


# --- bitsandbytes on a CPU ----------------------------------------------------------------------


SHAPES = [(128, 96), (192, 64), (96, 64), (4304, 8), (3420, 8), (100, 30), (33, 7)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("inside, outside", SHAPES)
def test_any_shape_multiplies_by_the_reference_weight(inside, outside, nested):
    """In eval mode, in train mode, for one row and for several: one kernel is wrong where rows are
    no whole number of blocks, another crashes."""
    layer, weight = linear4bit(inside, outside, nested=nested, bias=True)
    reference = dequantize(quantize(weight, "nf4-dq" if nested else "nf4")).bfloat16()
    before = layer.weight.data.clone()
    for mode in (False, True, False):
        layer.train(mode)
        for rows in (1, 5):
            x = torch.randn(rows, inside, dtype=torch.bfloat16)
            wanted = torch.nn.functional.linear(x, reference, layer.bias)
            torch.testing.assert_close(layer(x), wanted, rtol=0.02, atol=0.05 * inside**0.5)
    assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inside", [128, 96, 33])
def test_training_after_evaluation_still_gets_gradients(inside, bias):
    layer, _ = linear4bit(inside, 64, bias=bias)
    with torch.no_grad():
        layer(torch.randn(3, inside, dtype=torch.bfloat16))
    layer.train()
    x = torch.randn(3, inside, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_loaded_model_trains_after_it_was_evaluated(llava):
    from peft import LoraConfig, get_peft_model

    model, processor = vk.load(llava)
    batch = inputs(processor)
    model.generate(**batch, max_new_tokens=2)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*(q|down)_proj"))
    adapted.train()
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(gradients) == 4 and all(g is not None and g.abs().sum() > 0 for g in gradients)


# --- what is refused ------------------------------------------------------------------------


def test_devices(llava, monkeypatch):
    missing = ["tpu9"] if torch.cuda.is_available() else ["tpu9", "cuda"]
    for device in missing:
        with pytest.raises(PlanError, match=f"device '{device}' cannot be used here"):
            load(llava, device=device)
    with pytest.raises(PlanError, match="meta"):
        load(llava, device="meta")
    monkeypatch.setattr("vlmkit.loading.resolve_device", lambda device: torch.device("mps"))
    with pytest.raises(PlanError, match="nf4 does not run on the device 'mps'.*Use bf16"):
        load(llava, device="mps")


def test_mistaken_plans_stop_before_anything_is_read(llava, monkeypatch):
    monkeypatch.setattr("vlmkit.loading.load_weights", None)
    with pytest.raises(PlanError, match="Did you mean 'nf4'"):
        vk.load("owner/no-such-model", "nf44")
    with pytest.raises(PlanError, match="matches no module"):
        load(llava, vk.Plan().override("vision_towr", "nf4"))
    with pytest.raises(PlanError, match="has no cross_attention"):
        load(llava, "cross_attention=nf4,language_model=nf4")


# --- what a load keeps, and what it leaves as it was ----------------------------------------------


def test_garbage_is_collected_again_after_a_load_and_after_a_failure(llava, tmp_path):
    load(llava)
    assert gc.isenabled()
    with pytest.raises(CheckpointError):
        load(tmp_path)
    assert gc.isenabled()
    gc.disable()
    try:
        load(llava)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_layout_is_kept_for_the_same_config_and_plan_alone(llava):
    config, plan = read_config(llava), vk.Plan()
    rows = layout_of(config, plan).rows
    assert layout_of(llava, vk.Plan()).rows is rows
    assert layout_of(config, "nf4").rows is not rows
    config.text_config.num_hidden_layers += 1
    assert len(layout_of(config, plan).rows) > len(rows)


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_is_as_it_was_after_a_load(llava, before, monkeypatch):
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    load(llava, "bf16")
    assert os.environ.get(name) == before


def test_a_layout_follows_what_the_class_keeps_in_fp32(llava, monkeypatch):
    from transformers import LlavaForConditionalGeneration as Llava

    def dtype():
        return load(llava, "bf16").model.vision_tower.post_layernorm.weight.dtype

    assert dtype() == torch.bfloat16
    with monkeypatch.context() as patched:
        patched.setattr(Llava, "_keep_in_fp32_modules_strict", ["post_layernorm"])
        assert dtype() == torch.float32
    assert dtype() == torch.bfloat16
