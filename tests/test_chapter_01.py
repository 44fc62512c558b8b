"""Chapter 01. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import chapters
import pandas as pd
import pytest
import torch
from architectures import MODEL_TYPES, NOT_BUILT, config_of
from chapters import cell
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, Blip2Config, LlamaConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import vlmkit as vk
from vlmkit.anatomy import anatomy_of, on_meta

SMOL = "HuggingFaceTB/SmolVLM-256M-Instruct"
QWEN = "Qwen/Qwen2-VL-2B-Instruct"
LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"


def config(name):
    return AutoConfig.from_pretrained(vk.catalog.folder_of(name))


def parameters(name, *segments):
    """The number of language-model parameters whose path contains one of `segments`."""
    model = on_meta(config(name))
    component_of = anatomy_of(model).component_of
    return sum(
        parameter.numel()
        for path, parameter in model.named_parameters()
        if component_of(path) == "language_model" and set(segments) & set(path.split("."))
    )


def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """With fewer questions about pebble's attention, which does not depend on the family."""
    chapters.replace(notebook, ("range(250)", "range(6)"))
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "Idefics3ForConditionalGeneration" in shown and "model.connector" in shown


def test_token_formulas_agree_with_transformers(notebook):
    configs = {name: config(name) for name in (SMOL, QWEN, LLAMA)}
    names = {"vk": vk, "AutoConfig": AutoConfig, "pd": pd, "configs": configs, "smol": SMOL}
    exec(cell(notebook, "grid = ").source, names, scope := {})
    tile = (512 // 16 // 4) ** 2
    smol = Idefics3ImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    )
    mllama = MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)
    for side, row in scope["tokens"].iterrows():
        assert row["fixed grid (LLaVA-1.5)"] == 24 * 24
        assert row["tiles (SmolVLM-256M)"] == smol.get_number_of_image_patches(side, side)[0] * tile
        height, width = smart_resize(side, side, factor=28, max_pixels=28 * 28 * 16384)
        assert row["dynamic (Qwen2-VL)"] == height // 28 * width // 28
        seen = mllama(Image.new("RGB", (side, side)), return_tensors="pt")["pixel_values"]
        assert row["cross-attention (Llama 3.2)"] == seen.shape[2] * (40 * 40 + 1)  # with padding
        counted = vk.memory.visual_tokens(LLAMA, (side, side)).attended
        assert row["cross-attention (Llama 3.2)"] == counted
        assert row["queries (BLIP-2)"] == Blip2Config().num_query_tokens


def test_claims_about_real_models():
    smol, llama = vk.anatomy(SMOL), vk.anatomy(LLAMA)
    vision, language = (smol[c].parameters for c in ("vision_encoder", "language_model"))
    assert vision / language == pytest.approx(0.5, abs=0.05)
    assert parameters(LLAMA, "mlp") / llama.total == pytest.approx(2 / 3, abs=0.01)
    ends = [parameters(name, "embed_tokens", "lm_head") for name in (LLAMA, SMOL)]
    assert ends[0] / llama.total == pytest.approx(0.1, abs=0.005)
    assert ends[1] / language == pytest.approx(1 / 3, abs=0.02)
    qwen = on_meta(config(QWEN))
    assert qwen.get_input_embeddings().weight is qwen.get_output_embeddings().weight


def test_what_is_left_of_llama_without_cross_attention_is_llama_3_1_8b(notebook):
    layers = [str(n) for n in config(LLAMA).text_config.cross_attention_layers]
    left = vk.anatomy(LLAMA)["language_model"].parameters - parameters(LLAMA, *layers)
    assert f"{left:,}" in cell(notebook, "left_over = None").metadata["solution"]["text"]
    llama_3_1_8b = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_3_1_8b)
    assert left - 8 * 4096 == model.num_parameters() == 8_030_261_248


@pytest.mark.slow
def test_how_many_architectures_the_accessors_split_correctly(states):
    correct, built = 0, [model_type for model_type in MODEL_TYPES if model_type not in NOT_BUILT]
    for model_type in built:
        model = on_meta(config_of(model_type))
        path_of = {id(parameter): path for path, parameter in model.named_parameters()}
        component_of = anatomy_of(model).component_of
        expected = {component: set() for component in vk.COMPONENTS}
        for number, path in path_of.items():
            expected[component_of(path)].add(number)
        split = split_by_accessors(model, path_of)
        correct += all(expected[component] == found for component, found in split.items())
    states(len(built), correct)


def split_by_accessors(model, path_of):
    """{component: ids of the parameters that transformers' accessors give it}."""

    def of(accessor, *arguments):
        try:
            module = accessor(*arguments)
        except Exception:  # the accessors of a few classes fail
            module = None
        return set() if module is None else {id(p) for p in module.parameters()} & set(path_of)

    vision = of(model.get_encoder, "image")
    language = of(model.get_decoder) | of(model.get_output_embeddings)
    projector = set(path_of) - vision - language
    return {"vision_encoder": vision, "language_model": language, "projector": projector}
