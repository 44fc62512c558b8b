"""Three hundred random models: weights, keys and values and adapters predicted to the byte."""

import copy

import pytest
import torch
from families import _FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import vlmkit as vk
from vlmkit.finetuning import adapted
from vlmkit.formats import FORMATS, torch_dtype
from vlmkit.layout import layout_of
from vlmkit.memory import cache_of, compare, measure, predict

MODELS, MANY, SOME = 300, 20, 10
pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("llava", "llava_onevision", "qwen2_vl", "mllama", "idefics3", "gemma3", "mistral3")
QUANTIZED = ("nf4", "nf4-dq", "fp4", "int8")
FLOATS = ("fp32", "fp16", "bf16")


@st.composite
def models(draw):
    """(config, plan, tokens, batch, LoRA) of a model small enough to be made in milliseconds."""
    name = draw(st.sampled_from(NAMES))
    family = _FAMILIES[name]
    fields = copy.deepcopy(family.config)
    text, vision = fields["text_config"], fields["vision_config"]
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    width = draw(st.sampled_from([8, 16, 24, 40])) if name != "qwen2_vl" else 48
    text |= {
        "hidden_size": heads * width,
        "intermediate_size": draw(st.integers(1, 300)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 3) if heads % k == 0])),
        "vocab_size": draw(st.integers(40, 300)),
    }
    if "head_dim" in text:
        text["head_dim"] = width
    if "query_pre_attn_scalar" in text:
        text["query_pre_attn_scalar"] = width
    if "sliding_window" in text:
        text["sliding_window"] = draw(st.integers(2, 40))
    if name == "mllama":  # whose first layer is never one of cross-attention alone
        text["num_hidden_layers"] = draw(st.integers(2, 4))
        text["cross_attention_layers"] = [draw(st.integers(1, text["num_hidden_layers"] - 1))]
    if name == "qwen2_vl":
        vision["hidden_size"] = text["hidden_size"]
    vision |= {
        key: draw(st.integers(1, 4)) for key in ("num_hidden_layers", "depth") if key in vision
    }
    if "intermediate_size" in vision:
        vision["intermediate_size"] = draw(st.integers(1, 200))
    text["tie_word_embeddings"] = fields["tie_word_embeddings"] = draw(st.booleans())
    config = CONFIG_MAPPING[family.model_type](**fields)
    formats = {
        "vision_encoder": draw(st.sampled_from(QUANTIZED + FLOATS)),
        "projector": draw(st.sampled_from(FLOATS)),
        "language_model": draw(st.sampled_from(QUANTIZED + FLOATS)),
    }
    lora = vk.LoRA(
        r=draw(st.integers(1, 20)),
        target_modules=draw(st.sampled_from(["attention+mlp", "attention", "mlp"])),
    )
    tokens, batch = draw(st.integers(1, 60)), draw(st.integers(1, 3))
    return config, vk.Plan(**formats), tokens, batch, lora


def made(config, plan):
    """The real model, with bitsandbytes' own layers, as a load gives it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layout = layout_of(config, plan)
    model = AutoModelForImageTextToText.from_config(
        copy.deepcopy(config), dtype=torch_dtype(layout.load_dtype)
    )
    for row in layout.rows:
        if not FORMATS[row.format].quantized:
            parameter = model.get_parameter(row.name)
            parameter.data = parameter.data.to(torch_dtype(row.format))
    for name, given_format in layout.quantized.items():
        old = model.get_submodule(name)
        size, bias = (old.in_features, old.out_features), old.bias is not None
        if given_format == "int8":
            new = Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=6.0)
        else:
            kind, dtype = given_format.removesuffix("-dq"), torch_dtype(given_format)
            nested = given_format.endswith("-dq")
            new = Linear4bit(*size, bias, dtype, compress_statistics=nested, quant_type=kind)
            new.support_avx512bf16_for_cpu = False
        new.weight.data = old.weight.data
        new.bias = old.bias
        model.set_submodule(name, new.to("cpu"))
    formats = set(layout.quantized.values())
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = "int8" in formats, bool(formats - {"int8"})
    return model.eval()


def drawn(examples):
    """Decorates a test of one model, to be run for so many of them, the same ones every time."""
    rules = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: rules(given(models())(test))


def check_weights(model):
    config, plan, tokens, batch, _ = model
    predicted = predict(config, plan, tokens=tokens, batch_size=batch)
    model = made(config, plan)
    ids = torch.full((batch, tokens), 20)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
    same(predicted, measure(model, cache=cache), without=("input", "activation"))


@drawn(MANY)
def test_weights_keys_and_values(model):
    check_weights(model)


@pytest.mark.slow
@drawn(MODELS)
def test_weights_keys_and_values_of_all(model):
    check_weights(model)


def check_adapters(model):
    config, plan, _, _, lora = model
    ways = {"language_model": lora}
    measured = measure(adapted(made(config, plan), ways))
    same(predict(config, plan, training=ways), measured, without=("gradient", "optimizer state"))


@drawn(SOME)
def test_adapters(model):
    check_adapters(model)


@pytest.mark.slow
@drawn(MODELS)
def test_adapters_of_all(model):
    check_adapters(model)


def same(predicted, measured, without):
    table = compare(predicted, measured)
    table = table[~table.index.isin(without, level="kind")]
    assert not table["difference"].any(), table[table["difference"] != 0].to_string()
