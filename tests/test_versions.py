"""Facts about transformers, peft and bitsandbytes on which vlmkit and the chapters depend.

Each test uses the packages alone. A test that fails prints its docstring: the fact that is no
longer true, and what depends on it. `make test-oldest` and `make test-newest` run these tests with
other versions. How vlmkit uses the facts is tested elsewhere.
"""

import ast
import copy
import functools
import importlib
import inspect
from importlib import metadata
from pathlib import Path

import pytest
import torch
from architectures import small_config_of
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from packaging.version import Version
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainingArguments

import vlmkit as vk

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


def fact(test):
    """Make a test fail with its docstring, and with what was found."""

    @functools.wraps(test)
    def checked(*args, **kwargs):
        try:
            return test(*args, **kwargs)
        except (Exception, pytest.fail.Exception) as error:
            sentence = " ".join(test.__doc__.split())
            versions = ", ".join(
                f"{name} {metadata.version(name)}"
                for name in ("transformers", "peft", "bitsandbytes", "torch")
            )
            found = f"{type(error).__name__}: {error}".partition("\nassert")[0]
            pytest.fail(f"No longer true ({versions}): {sentence}\nFound: {found}", pytrace=False)

    return checked


def test_a_fact_that_fails_prints_its_docstring():
    @fact
    def wrong():
        """The moon is made of cheese, and the chapter on the moon says so."""
        raise KeyError("rock")

    with pytest.raises(pytest.fail.Exception) as caught:
        wrong()
    message = str(caught.value)
    assert "cheese, and the chapter on the moon says so." in message
    assert "KeyError: 'rock'" in message
    assert f"transformers {metadata.version('transformers')}" in message


# --- names ----------------------------------------------------------------------------------------


def imported():
    """(module, name) of everything that vlmkit imports from these packages."""
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
    """vlmkit imports this name. If it is gone, the package's release notes say what replaced it,
    and `grep` finds its uses in vlmkit."""
    try:
        importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        getattr(importlib.import_module(module), name)


@fact
def test_checkpointing_has_one_of_two_names():
    """TrainingArguments calls checkpointing activation_checkpointing (from 5.23) or
    gradient_checkpointing (before); vlmkit/backend/checkpointing.py chooses the name."""
    from vlmkit.backend.checkpointing import arguments

    fields = TrainingArguments.__dataclass_fields__
    assert set(arguments(True)) <= set(fields), sorted(n for n in fields if "checkpointing" in n)


@fact
def test_a_cache_has_one_of_two_names():
    """What a forward pass returns has the field cache (from 5.24) or past_key_values (before),
    and a forward pass takes it by that name; vlmkit/backend/caching.py chooses the name."""
    from transformers.models.llava import modeling_llava as llava

    from vlmkit.backend.caching import NAME

    assert NAME in llava.LlavaCausalLMOutputWithPast.__dataclass_fields__
    assert NAME in inspect.signature(llava.LlavaForConditionalGeneration.forward).parameters


@fact
def test_llama_4_does_not_run_in_transformers_5_24():
    """From transformers 5.24 on, every call of Llama 4 ends in an AttributeError. If this fails, it
    is mended there: say in vlmkit/backend/llama4.py until which version its hook is needed."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(small_config_of("llama4"))
        ids = torch.ones(1, 2, dtype=torch.long)
    if Version(metadata.version("transformers")) < Version("5.24"):
        model(ids)
    else:
        with pytest.raises(AttributeError, match="image_outputs"):
            model(ids)


@fact
def test_a_quantizer_has_the_members_that_a_mixed_plan_uses():
    """transformers' bitsandbytes quantizers have these members, which vlmkit/backend/mixed.py uses.
    Without them vlmkit cannot load a plan with two quantized formats."""
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
        ("vision_tower", True),  # the bare name that most people write
        ("model.vision_tower", False),
        (".*vision_tower", False),
        ("model.vision", True),  # ends within a name
        ("q_proj", False),
        ("self_attn.q_proj", False),
        ("tn.q_proj", False),  # the end of a name
        ("attn.q", True),
    ],
)
@fact
def test_an_entry_of_a_skip_list_is_a_regular_expression_from_the_start_or_a_suffix(
    entry, quantized
):
    """An entry of llm_int8_skip_modules protects a module if it matches the full name from the
    start up to a dot, or if the full name ends with it. A bare name in the middle protects nothing.
    Plans become such lists, `vk.lint` explains them, and chapter 03 shows the trap."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert should_convert_module(NAME, [entry]) == quantized


@fact
def test_a_skip_list_replaces_the_default_one():
    """Without a skip list the head stays in 16 bits. With a list, even an empty one, the head is
    quantized unless the list names it. So vlmkit always names it, and `vk.lint` warns about it."""
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
    """The tiny LLaVA as transformers alone loads it in 4 bits, without its head."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForImageTextToText.from_pretrained(
        llava, quantization_config=config, dtype=torch.bfloat16
    )


@fact
def test_by_default_tower_and_projector_are_quantized_and_embeddings_are_not(in_4_bits):
    """load_in_4bit also quantizes the Linear layers of the vision encoder and of the projector, and
    it quantizes Linear layers only; chapter 03 and the recommended plan depend on that."""
    kinds = {name: type(module) for name, module in in_4_bits.named_modules()}
    quantized = {name for name, kind in kinds.items() if kind is Linear4bit}
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    assert all(any(part in name for name in quantized) for part in parts)
    assert kinds["lm_head"] is nn.Linear
    assert not any(kind is Linear4bit for n, kind in kinds.items() if "embed" in n)


@fact
def test_the_footprint_of_transformers_leaves_out_the_scales(in_4_bits):
    """get_memory_footprint() does not count absmax and code of a 4-bit weight, so it is too small;
    chapter 04 and vk.memory.measure show by how much."""
    tensors = [*in_4_bits.parameters(), *in_4_bits.buffers()]
    states = [m.weight.quant_state for m in in_4_bits.modules() if isinstance(m, Linear4bit)]
    assert sum(state.absmax.nbytes + state.code.nbytes for state in states) > 0
    assert in_4_bits.get_memory_footprint() <= sum(tensor.nbytes for tensor in tensors)


@fact
def test_num_parameters_counts_packed_weights(in_4_bits, llava):
    """num_parameters() counts two weights for a packed byte, while p.numel() counts bytes; tests
    compare the anatomy with it."""
    assert in_4_bits.num_parameters() == vk.anatomy(llava).total
    assert sum(p.numel() for p in in_4_bits.parameters()) < in_4_bits.num_parameters()


@fact
def test_a_quantized_model_refuses_another_dtype(in_4_bits):
    """.to(dtype) of a quantized model raises an error and does not silently damage the model."""
    with pytest.raises(ValueError, match="dtype"):
        in_4_bits.to(torch.float16)


# --- bitsandbytes ---------------------------------------------------------------------------------


@fact
def test_a_4_bit_weight_has_the_state_that_vlmkit_reads():
    """A Linear4bit's quant_state has absmax, code, blocksize, shape and dtype, and a nested one has
    offset and state2; vlmkit measures, audits and dequantizes with these."""
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
def test_a_layer_can_be_kept_from_repacking_its_weight():
    """In evaluation mode on a CPU, Linear4bit repacks its weight in place unless
    support_avx512bf16_for_cpu is False. vlmkit sets it. Otherwise a question would change the bytes
    of a model, and training afterwards would get no gradient."""
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
    """LLM.int8 rounds activations in evaluation mode and not in training mode, so one layer gives
    two results; the notes on fine-tuning say so."""
    torch.manual_seed(0)
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    layer.to("cpu")
    x = torch.randn(4, 64, dtype=torch.float16)
    with torch.no_grad():
        assert not torch.equal(layer.train()(x), layer.eval()(x))


@fact
def test_operators_take_kernels_from_elsewhere():
    """quantize_4bit and dequantize_4bit of bitsandbytes are torch operators, so vlmkit can register
    a faster quantizer and a correct dequantizer for the CPU."""
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
    """A tiny LLaVA whose vision tower has layers with the same names as the decoder's."""
    return AutoModelForImageTextToText.from_pretrained(llava_clip, dtype=torch.bfloat16)


@fact
def test_a_string_of_targets_is_a_regular_expression_for_full_names(clip):
    """A string in target_modules must match the whole full name. vlmkit gives peft full names, and
    docs/from_unsloth.md writes such strings for others."""
    found = adapted(clip, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    assert found and all("language_model" in name for name in found)
    with pytest.raises(ValueError):
        adapted(clip, target_modules="q_proj")


@fact
def test_a_list_of_targets_has_suffixes_and_reaches_the_tower(clip):
    """target_modules=["q_proj", "v_proj"] also adapts a vision encoder that has layers of those
    names. This is why vlmkit adapts by component."""
    found = adapted(clip, target_modules=["q_proj", "v_proj"])
    assert {"vision_tower" in name for name in found} == {True, False}


@fact
def test_all_linear_means_every_component(clip):
    """target_modules="all-linear" adapts vision encoder and projector too; chapter 08 and
    docs/from_unsloth.md say so."""
    found = adapted(clip, target_modules="all-linear")
    assert any("vision_tower" in name for name in found)
    assert any("multi_modal_projector" in name for name in found)
    assert "lm_head" not in found


@fact
def test_the_name_of_a_module_in_the_middle_excludes_nothing(clip):
    """exclude_modules=["vision_tower"] does not exclude the tower, because entries are suffixes or
    full names; vlmkit lists full names of what it adapts."""
    targets = ["q_proj", "v_proj"]
    without = adapted(clip, target_modules=targets, exclude_modules=["vision_tower"])
    assert without == adapted(clip, target_modules=targets)


@fact
def test_a_quantized_projector_cannot_be_trained_in_full(in_4_bits):
    """modules_to_save copies modules to train them in full, and fails on quantized ones; vlmkit
    raises its own error before, which asks for a plan with the projector in 16 bits."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["multi_modal_projector"])
    with pytest.raises(RuntimeError):
        get_peft_model(copy.deepcopy(in_4_bits), config)


@fact
def test_adapters_of_a_4_bit_layer_are_fp32(in_4_bits):
    """LoRA's matrices are float32 on a 4-bit base whose other weights are bf16; the prediction for
    a training step counts 4 bytes per parameter, 4 for its gradient and 8 for AdamW."""
    targets = r".*language_model.*q_proj"
    peft = get_peft_model(copy.deepcopy(in_4_bits), LoraConfig(r=2, target_modules=targets))
    assert {p.dtype for p in peft.parameters() if p.requires_grad} == {torch.float32}


@fact
def test_preparing_for_k_bits_makes_everything_else_fp32(in_4_bits):
    """prepare_model_for_kbit_training converts every weight that is not quantized to float32, which
    costs a VLM with a tower in 16 bits more than half its memory; the prediction with
    prepare_kbit=True, and the advice against it, depend on that."""
    model = prepare_model_for_kbit_training(
        copy.deepcopy(in_4_bits), use_gradient_checkpointing=False
    )
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    assert floating == {torch.float32}
