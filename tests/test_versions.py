"""Facts about transformers, peft and bitsandbytes that vlmkit and the chapters build on.

Each test asks the packages alone. Its docstring is what a failure says: what is no longer so, and
what that means here. They run with the oldest and the newest versions as well (`make test-oldest`,
`make test-newest`). What vlmkit makes of these facts is tested where it does it.
"""

import ast
import copy
import functools
import importlib
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainingArguments

import vlmkit as vk
from vlmkit import environment

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def fact(test):
    """A test that fails with its docstring, and with what was found."""

    @functools.wraps(test)
    def told(*args, **kwargs):
        try:
            return test(*args, **kwargs)
        except (Exception, pytest.fail.Exception) as error:
            sentence = " ".join(test.__doc__.split())
            versions = ", ".join(
                f"{name} {environment.metadata.version(name)}"
                for name in ("transformers", "peft", "bitsandbytes", "torch")
            )
            found = f"{type(error).__name__}: {error}".partition("\nassert")[0]
            pytest.fail(f"No longer so ({versions}): {sentence}\nFound: {found}", pytrace=False)

    return told


def test_a_fact_that_fails_says_what_it_was():
    @fact
    def wrong():
        """The moon is made of cheese, and the
        chapter on the moon says so."""
        raise KeyError("rock")

    with pytest.raises(pytest.fail.Exception) as caught:
        wrong()
    said = str(caught.value)
    assert "cheese, and the chapter on the moon says so." in said and "KeyError: 'rock'" in said
    assert f"transformers {environment.metadata.version('transformers')}" in said


def test_every_fact_has_its_sentence():
    tests = [value for name, value in globals().items() if name.startswith("test_")]
    facts = [test for test in tests if hasattr(test, "__wrapped__")]
    assert len(facts) > 15
    assert all(len(test.__doc__.split()) > 10 for test in facts)


# --- names ----------------------------------------------------------------------------------------


def imported():
    """(module, name) of what vlmkit imports from the insides of these packages."""
    found = set()
    for file in (ROOT / "vlmkit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                package = node.module.partition(".")[0]
                if package in ("transformers", "peft", "bitsandbytes", "accelerate"):
                    found |= {(node.module, alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported(), ids=lambda part: part)
@fact
def test_what_vlmkit_imports_is_there(module, name):
    """vlmkit imports this name; if it is gone, its package's release notes say what replaced it,
    and `grep` finds the place in vlmkit."""
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        getattr(importlib.import_module(module), name)


@fact
def test_checkpointing_has_one_of_two_names():
    """Trainer's arguments turn checkpointing on by the name activation_checkpointing (from 5.23) or
    gradient_checkpointing (before); vlmkit/backend/checkpointing.py chooses between the two."""
    from vlmkit.backend.checkpointing import arguments

    fields = TrainingArguments.__dataclass_fields__
    assert set(arguments(True)) <= set(fields), sorted(n for n in fields if "checkpointing" in n)


@fact
def test_a_quantizer_has_the_parts_that_a_mixed_plan_hands_on():
    """transformers' bitsandbytes quantizers have these members, which vlmkit/backend/mixed.py
    calls for two formats in one model. Without them no plan with two formats can be loaded."""
    from transformers.quantizers.auto import AutoHfQuantizer

    for way in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**way))
        assert quantizer.param_needs_quantization and quantizer.get_quantize_ops
        assert quantizer.quantized_element_size <= 1 and quantizer._dequantize
        assert "deserialize" in quantizer.get_load_operations()
        assert quantizer.serialized_names["weight"]


# --- transformers ---------------------------------------------------------------------------------

NAME = "model.vision_tower.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("entry", "quantized"),
    [
        ("vision_tower", True),  # the bare name that everybody writes
        ("model.vision_tower", False),
        (".*vision_tower", False),
        ("model.vision", True),  # ends within a name
        ("q_proj", False),
        ("self_attn.q_proj", False),
        ("tn.q_proj", False),  # an end, of whatever
        ("attn.q", True),
    ],
)
@fact
def test_an_entry_of_a_skip_list_is_a_regular_expression_from_the_start_or_a_suffix(
    entry, quantized
):
    """An entry of llm_int8_skip_modules keeps a module out if it matches its full name from the
    start as far as a dot, or ends it; a bare name in the middle protects nothing. Plans are written
    as such lists, `vk.lint` explains them, and chapter 03 shows the trap."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert should_convert_module(NAME, [entry]) == quantized


@fact
def test_a_list_of_ones_own_replaces_the_exceptions():
    """Without a skip list the head stays in 16 bits; with any list, even an empty one, it is
    quantized unless it is named. vlmkit therefore always names it, and `vk.lint` warns of it."""
    from transformers.quantizers.base import HfQuantizer

    model = nn.Module()
    model.lm_head, model.get_output_embeddings = nn.Linear(2, 2), lambda: model.lm_head
    model.all_tied_weights_keys, model.base_model_prefix = {}, ""
    model.tie_weights = lambda *args, **kwargs: None
    ask = HfQuantizer.get_modules_to_not_convert
    assert "lm_head" in ask(model, None, None)
    assert ask(model, [], None) == []


@pytest.fixture(scope="module")
def in_4_bits(llava):
    """The tiny LLaVA as transformers alone loads it in 4 bits, its head kept out."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForImageTextToText.from_pretrained(
        llava, quantization_config=config, dtype=torch.bfloat16
    )


@fact
def test_by_default_tower_and_projector_are_quantized_and_embeddings_are_not(in_4_bits):
    """load_in_4bit quantizes the Linear layers of the vision encoder and of the projector too, and
    nothing that is no Linear; chapter 03 and the recommended plan start from that."""
    kinds = {name: type(module) for name, module in in_4_bits.named_modules()}
    quantized = {name for name, kind in kinds.items() if kind is Linear4bit}
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    assert all(any(part in name for name in quantized) for part in parts)
    assert kinds["lm_head"] is nn.Linear
    assert not any(kind is Linear4bit for n, kind in kinds.items() if "embed" in n)


@fact
def test_the_footprint_of_transformers_leaves_out_the_scales(in_4_bits):
    """get_memory_footprint() counts no absmax and no code of a 4-bit weight, and so says less than
    is held; chapter 04 and vk.memory.measure say by how much."""
    tensors = [*in_4_bits.parameters(), *in_4_bits.buffers()]
    states = [m.weight.quant_state for m in in_4_bits.modules() if isinstance(m, Linear4bit)]
    assert sum(state.absmax.nbytes + state.code.nbytes for state in states) > 0
    assert in_4_bits.get_memory_footprint() <= sum(tensor.nbytes for tensor in tensors)


@fact
def test_num_parameters_counts_what_is_packed_in_full(in_4_bits, llava):
    """num_parameters() counts two weights for a packed byte, while p.numel() counts bytes; anatomy
    is compared with it."""
    assert in_4_bits.num_parameters() == vk.anatomy(llava).total
    assert sum(p.numel() for p in in_4_bits.parameters()) < in_4_bits.num_parameters()


@fact
def test_a_quantized_model_refuses_another_dtype(in_4_bits):
    """.to(dtype) of a quantized model raises rather than silently ruining it."""
    with pytest.raises(ValueError, match="dtype"):
        in_4_bits.to(torch.float16)


# --- bitsandbytes ---------------------------------------------------------------------------------


@fact
def test_a_4_bit_weight_keeps_its_state_where_it_is_read():
    """A Linear4bit's quant_state has absmax, code, blocksize, shape and dtype, and nested ones have
    offset and state2; vlmkit measures, audits and dequantizes from these."""
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer.to("cpu")
    state = (
        layer.weight.quant_state
        or functional.quantize_4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")[
            1
        ]
    )
    assert (state.blocksize, tuple(state.shape), state.quant_type) == (64, (64, 64), "nf4")
    assert state.nested and state.offset.numel() == 1 and state.state2.blocksize == 256
    packed = state.as_dict(packed=True)
    assert "quant_state.bitsandbytes__nf4" in packed


@fact
def test_a_layer_can_be_kept_from_the_cpus_own_layout():
    """Linear4bit looks at support_avx512bf16_for_cpu before it repacks its weight in place in an
    evaluating forward pass; set to False, the bytes stay. Without that attribute the bytes of a
    model would change when it is asked, and training afterwards would get no gradient."""
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    layer.weight = layer.weight.__class__(torch.randn(64, 64), quant_type="nf4")
    layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    before = layer.weight.data.clone()
    layer.eval()(torch.randn(3, 64, dtype=torch.bfloat16))
    assert torch.equal(layer.weight.data, before)


@fact
def test_int8_rounds_activations_in_evaluation_only():
    """LLM.int8 multiplies unrounded activations in training mode and rounded ones in evaluation, so
    that the same layer gives two answers; fine-tuning's notes say so."""
    torch.manual_seed(0)
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer.to("cpu")
    x = torch.randn(4, 64, dtype=torch.float16)
    with torch.no_grad():
        assert not torch.equal(layer.train()(x), layer.eval()(x))


@fact
def test_operators_take_kernels_from_elsewhere():
    """bitsandbytes' operators are torch operators, quantize_4bit and dequantize_4bit among them, so
    that vlmkit can give the CPU a faster quantizer and a right dequantizer."""
    for name in ("quantize_4bit", "dequantize_4bit"):
        assert hasattr(torch.ops.bitsandbytes, name)
    assert torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")


# --- peft -----------------------------------------------------------------------------------------


def adapted(model, **config):
    """Full names of the modules that peft adapts, on a copy without weights."""
    bare = copy.deepcopy(model).to("meta")
    peft = get_peft_model(bare, LoraConfig(r=2, **config))
    names = [n.removesuffix(".lora_A") for n, _ in peft.named_modules() if n.endswith(".lora_A")]
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.fixture(scope="module")
def clip(llava_clip):
    """A tiny LLaVA whose tower has layers that are called like the decoder's."""
    return AutoModelForImageTextToText.from_pretrained(llava_clip, dtype=torch.bfloat16)


@fact
def test_a_string_of_targets_is_a_regular_expression_for_full_names(clip):
    """A target_modules that is a string must match a full name from end to end. vlmkit hands over
    full names, and docs/from_unsloth.md writes such strings for others."""
    found = adapted(clip, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    assert found and all("language_model" in name for name in found)
    with pytest.raises(ValueError):
        adapted(clip, target_modules="q_proj")


@fact
def test_a_list_of_targets_is_of_suffixes_and_reaches_the_tower(clip):
    """target_modules=["q_proj", "v_proj"] also adapts a vision encoder with layers of those names:
    the reason that vlmkit adapts by component."""
    found = adapted(clip, target_modules=["q_proj", "v_proj"])
    assert {"vision_tower" in name for name in found} == {True, False}


@fact
def test_all_linear_is_all_of_them(clip):
    """target_modules="all-linear" adapts vision encoder and projector too; chapter 07 and
    docs/from_unsloth.md say so."""
    found = adapted(clip, target_modules="all-linear")
    assert any("vision_tower" in name for name in found)
    assert any("multi_modal_projector" in name for name in found)
    assert "lm_head" not in found


@fact
def test_the_name_of_a_part_excludes_nothing(clip):
    """exclude_modules=["vision_tower"] leaves the tower in: entries are suffixes or full names."""
    targets = ["q_proj", "v_proj"]
    without = adapted(clip, target_modules=targets, exclude_modules=["vision_tower"])
    assert without == adapted(clip, target_modules=targets)


@fact
def test_a_quantized_projector_cannot_be_trained_in_full(in_4_bits):
    """modules_to_save copies modules to train them in full, and fails on quantized ones; vlmkit
    says so beforehand and asks for a plan that keeps the projector in 16 bits."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    with pytest.raises(RuntimeError):
        get_peft_model(copy.deepcopy(in_4_bits), config)


@fact
def test_adapters_of_a_4_bit_layer_are_fp32(in_4_bits):
    """LoRA's matrices are float32 on a 4-bit base whose other weights are bf16; the memory of a
    training step is predicted with 4 bytes a parameter, 4 for its gradient and 8 for AdamW."""
    targets = r".*language_model.*q_proj"
    peft = get_peft_model(copy.deepcopy(in_4_bits), LoraConfig(r=2, target_modules=targets))
    assert {p.dtype for p in peft.parameters() if p.requires_grad} == {torch.float32}


@fact
def test_preparing_for_k_bits_makes_everything_else_fp32(in_4_bits):
    """prepare_model_for_kbit_training turns every weight that is not quantized into float32, and so
    costs a VLM whose tower was kept in 16 bits more than half its memory; the prediction with
    prepare_kbit=True, and the advice against it, are about that."""
    model = prepare_model_for_kbit_training(
        copy.deepcopy(in_4_bits), use_gradient_checkpointing=False
    )
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floating == {torch.float32}
