"""Every plan on every family: what is predicted is loaded, and it runs.

`make test` runs every family under the hardest plan and one other, `make test-all` under all plans.
"""

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from families import FAMILIES, differing, inputs, logits, state

import vlmkit as vk
from vlmkit.backend.cpu import guard_against_cpu_traps
from vlmkit.formats import dequantize, quantize
from vlmkit.layout import layout_of
from vlmkit.memory import compare, measure, predict

pytestmark = pytest.mark.usefixtures("one_thread")

PLANS = {
    "recommended": vk.Plan.recommended(),
    "nf4": vk.Plan.uniform("nf4"),
    "int8": vk.Plan.uniform("int8"),
    "two formats": vk.Plan(vision_encoder="int8", language_model="nf4-dq"),
    # the projector is the Q-Former of BLIP-2 and the resampler of Idefics2
    "connectors kept": vk.Plan(vision_encoder="nf4", language_model="nf4"),
    "a layer kept": vk.Plan.uniform("nf4-dq").override(r"\.(layers?|blocks)\.1\.", "bf16"),
}
MATRIX = [(family, plan) for family in FAMILIES for plan in PLANS]
OTHERS = [name for name in PLANS if name != "two formats"]
SHARP = {(family, "two formats") for family in FAMILIES} | {
    (family, OTHERS[i % len(OTHERS)]) for i, family in enumerate(FAMILIES)
}
MIXED_FLOATS = {
    "vision fp32": vk.Plan(vision_encoder="fp32"),
    "projector fp32": vk.Plan(projector="fp32"),
    "vision fp32, projector fp16": vk.Plan(vision_encoder="fp32", projector="fp16"),
    "language fp32": vk.Plan(language_model="fp32"),
    "first layers fp32": vk.Plan().override(r"\.(layers?|blocks)\.0\.", "fp32"),
    "norms fp32": vk.Plan().override("norm", "fp32"),
}


def load(folder, plan):
    return vk.load(folder, plan, processor=False)[0]


def generate(model):
    out = model.generate(**inputs(model), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return out[0, -3:].tolist()


def agreement(a, b):
    """The smallest cosine, over tokens, between two results of `logits`."""
    return torch.nn.functional.cosine_similarity(a, b, -1).min().item()


def references_logits(folder, layout):
    """The logits of a bf16 model whose weights the reference of vlmkit.formats has rounded."""
    model = load(folder, "bf16")
    for name, given in layout.quantized.items():
        weight = model.get_submodule(name).weight
        weight.data = dequantize(quantize(weight.data, given)).to(weight.dtype)
    return logits(model)


def check(folder, plan):
    """Everything that has to hold for a plan on a family."""
    preview = vk.preview(folder, plan)
    model = load(folder, plan)
    audit = vk.audit(model, plan)
    assert audit.rows == preview.rows  # every parameter: format, count and bytes
    predicted = compare(predict(folder, plan), measure(model))
    assert not predicted["difference"].any(), predicted
    before = state(model)
    assert generate(model) == generate(model)
    assert differing(before, state(model)) == []
    assert vk.audit(model, plan) == audit
    layout = layout_of(folder, plan)
    # LLM.int8 rounds the activations as well, which the reference does not
    least = 0.998 if "int8" in layout.quantized.values() else 0.9999
    assert agreement(logits(model), references_logits(folder, layout)) > least


@pytest.mark.parametrize(
    "name, plan",
    [
        pytest.param(*pair, marks=() if pair in SHARP else pytest.mark.slow, id=", ".join(pair))
        for pair in MATRIX
    ],
)
def test_matrix(name, plan, family):
    check(family(name), PLANS[plan])


@pytest.mark.slow
@pytest.mark.parametrize("name, plan", MATRIX, ids=", ".join)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_matrix_of_shards(name, plan, tie, family):
    check(family(name, shards=True, tie=tie), PLANS[plan])


@pytest.mark.parametrize("name", ["llava", "smolvlm", "gemma3", "blip2"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_shards_and_ties(name, tie, family):
    folder = family(name, shards=True, tie=tie)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = load(folder, "nf4")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == tie
    kept = vk.audit(model, "nf4").left_alone().loc["language_model"]
    assert ("embedding and tied head" in set(kept["kind"])) == tie
    assert ("head" in set(kept["kind"])) == (not tie)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_matters(name, family):
    """The checkpoints and inputs themselves: each family looks at the pixels."""
    model = load(family(name), "bf16")
    batch = inputs(model)
    with torch.no_grad():
        one = model(**batch).logits
        other = model(**batch | {"pixel_values": -batch["pixel_values"]}).logits
    assert one.isfinite().all() and (one - other).abs().max() > 0.005


# --- two formats in one model ---------------------------------------------------------------------


def test_layers_are_what_the_plan_says_component_by_component(family):
    """Seen in the modules alone, without a layout."""
    model = load(family("llava"), PLANS["two formats"])
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            part = next(p for p in ("vision_tower", "projector", "language_model", "lm_head")
                        if p in name)  # fmt: skip
            found.setdefault(part, set()).add(type(module))
    assert found == {
        "vision_tower": {Linear8bitLt},
        "projector": {torch.nn.Linear},
        "language_model": {Linear4bit},
        "lm_head": {torch.nn.Linear},
    }
    assert model.is_loaded_in_4bit and model.is_loaded_in_8bit and model.is_quantized
    with pytest.raises(ValueError, match="dtype"):  # transformers' own guard is on
        model.to(torch.float16)


def test_peft_and_trainer_take_two_formats(family, tmp_path):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import bnb
    from transformers import Trainer, TrainingArguments

    model = load(family("llava"), PLANS["two formats"])
    before = state(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*(q_proj|fc1)"))
    assert {bnb.Linear4bit, bnb.Linear8bitLt} <= {type(m) for m in adapted.modules()}
    batch = inputs(model)
    batch["labels"] = batch["input_ids"]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=0.1, use_cpu=True, report_to="none",
        disable_tqdm=True, per_device_train_batch_size=1, save_strategy="no",
    )  # fmt: skip
    rows = [{name: tensor[0] for name, tensor in batch.items()}] * 2
    Trainer(adapted, arguments, train_dataset=rows).train()
    moved = {n for n, p in adapted.named_parameters() if "lora_B" in n and p.abs().sum() > 0}
    assert len(moved) == 4  # of six: LLaVA does not read the tower's last layer
    assert sum("vision_tower" in name for name in moved) == 2
    adapted.unload()
    assert vk.audit(model, PLANS["two formats"]) and differing(before, state(model)) == []


def test_transformers_can_dequantize_two_formats(family):
    model = load(family("qwen2_vl"), PLANS["two formats"])
    wanted = logits(model)
    plain = model.dequantize(dtype=torch.bfloat16)
    assert {type(m) for m in plain.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    assert agreement(logits(plain), wanted) > 0.99


# --- what cannot be quantized -------------------------------------------------------------------


def left(name, family, plan="nf4"):
    """{(component, kind): (why, bytes)} of what is not quantized, before the load and after it."""
    preview = vk.preview(family(name), plan)
    model = load(family(name), plan)
    before, after = preview.left_alone(), vk.audit(model, plan).left_alone()
    assert before.equals(after) and preview.total == vk.audit(model, plan).total
    assert "MB" in str(preview) and "<table" in preview._repr_html_()
    return {(row.Index, row.kind): (row.why, row.bytes) for row in after.itertuples()}


def test_fused_experts_are_said_with_their_bytes(family):
    kept = left("qwen3_vl_moe", family)
    experts = 4 * (64 * 96 + 96 * 32) * 2
    assert kept["language_model", "fused experts"] == ("", experts)
    assert kept["language_model", "bare parameter"] == ("", 4 * 96 * 2)  # the router
    preview = vk.preview(family("qwen3_vl_moe"), "nf4")
    assert "fused experts 0.074" in preview.table().loc["language_model", "kept"]


def test_bare_parameters_convolutions_and_ties(family):
    kept = left("gemma3", family)
    assert kept["projector", "bare parameter"] == ("", 64 * 96 * 2)
    assert kept["vision_encoder", "convolution"] == ("", (64 * 3 * 36 + 64) * 2)
    assert kept["language_model", "embedding and tied head"] == ("", 128 * 96 * 2)


def test_what_a_class_leaves_out(family):
    """BLIP-2's class keeps the Q-Former out of quantization, whatever is asked."""
    kept = left("blip2", family)
    why, size = kept["projector", "linear"]
    assert why == "left out by its class" and size > 100_000
    assert "(left out by its class)" in str(vk.preview(family("blip2"), "nf4"))


# --- components in different float formats ------------------------------------------------------


@pytest.mark.parametrize(
    "name, plan",
    [
        pytest.param(name, plan, id=f"{name}, {plan}",
                     marks=() if name in ("qwen3_vl", "smolvlm", "blip2") else pytest.mark.slow)
        for name in FAMILIES
        for plan in MIXED_FLOATS
    ],
)  # fmt: skip
def test_components_in_different_float_formats(name, plan, family):
    wanted = logits(load(family(name), "fp32"))
    model = load(family(name), MIXED_FLOATS[plan])
    assert agreement(logits(model), wanted) > 0.98
    generate(model)


def test_gates_of_another_format_than_what_runs_through_them(family):
    wanted = logits(load(family("mllama"), "fp32"))
    model = load(family("mllama"), vk.Plan(cross_attention="fp32"))
    assert agreement(logits(model), wanted) > 0.99
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_models_dtype_is_the_language_models(family):
    plan = vk.Plan(vision_encoder="fp32")
    model = load(family("smolvlm"), plan)
    assert model.dtype == model.model.dtype == torch.bfloat16
    assert model.model.vision_model.dtype == torch.float32
    layers = vk.Plan().override(r"text_model\.layers\.1\.", "fp32")
    model = load(family("smolvlm"), layers)
    indices = [layer.self_attn.layer_idx for layer in model.model.text_model.layers]
    assert indices == [0, 1]


def test_int8_layers_take_tensors_of_any_shape():
    """bitsandbytes' own layer takes two and three dimensions. Llama 3.2 Vision's has four."""

    def layer():
        torch.manual_seed(0)
        made = Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0)
        made.weight = Int8Params(made.weight.data, requires_grad=False).to("cpu")
        return made.eval()

    x = torch.randn(2, 3, 5, 96)
    x[0, 0, 0, 7] = 50  # an outlier
    with pytest.raises(RuntimeError):
        layer()(x)
    guarded = layer()
    guard_against_cpu_traps(guarded)
    wanted = layer()(x.flatten(0, 2))
    for shape in ((30,), (6, 5), (2, 3, 5), (1, 2, 3, 5)):
        assert torch.equal(guarded(x.reshape(*shape, 96)), wanted.reshape(*shape, 40))
