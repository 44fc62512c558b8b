"""Chapter 01. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import re
import runpy

import chapters
import pandas as pd
import pytest
import torch
from architectures import MODEL_TYPES, NOT_BUILT, config_of
from chapters import cell
from matplotlib import pyplot as plt
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, Blip2Config, LlamaConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import vlmkit as vk
from vlmkit.anatomy import anatomy_of, on_meta
from vlmkit.course.pictures import FIRST

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
    """With fewer questions to pebble and shorter answers, which do not depend on the family."""
    chapters.replace(notebook, ("range(200)", "range(6)"), ("[20, 60, 120]", "[2, 3, 4]"))
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "Idefics3ForConditionalGeneration" in shown and "model.connector" in shown


def test_tokens_are_those_of_transformers_processors(notebook, states):
    names = {"vk": vk, "pd": pd, "smol": SMOL, "qwen": QWEN, "llama": LLAMA}
    exec(cell(notebook, "names = {").source, names)
    smol = Idefics3ImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    )
    tiles, each = {smol.get_number_of_image_patches(s, s)[0] for s in (224, 1792)}, (32 // 4) ** 2
    assert tiles == {17}
    states("17", each)
    for side, row in names["tokens_of"].iterrows():
        fixed, tiled, dynamic, crossed, queries = row
        assert fixed == 24 * 24
        assert 17 * each < tiled < 17 * each + 4 * 17  # and a mark for each tile and row of tiles
        height, width = smart_resize(side, side, factor=28, max_pixels=28 * 28 * 16384)
        assert dynamic == height // 28 * width // 28
        assert (crossed, queries) == (1, Blip2Config().num_query_tokens)


def test_llama_reads_all_four_tiles_however_small_the_picture(states):
    """Chapter 04 says the same. One tile has something of a small picture in it."""
    a_tile, vision = 40 * 40 + 1, config(LLAMA).vision_config
    assert (vision.image_size, vision.max_num_tiles) == (560, 4)
    states(f"{a_tile}", f"{4 * a_tile}")
    processor = MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)
    for side, tiles in ((224, 1), (448, 1), (896, 4), (1792, 4)):
        made = processor(Image.new("RGB", (side, side)), return_tensors="pt")
        assert made["num_tiles"] == [[tiles]] and made["pixel_values"].shape[2] == 4
        assert vk.memory.visual_tokens(LLAMA, (side, side)).attended == 4 * a_tile


def test_claims_about_real_models():
    smol = vk.anatomy(SMOL)
    vision, language = (smol[c].parameters for c in ("vision_encoder", "language_model"))
    assert vision / language == pytest.approx(0.5, abs=0.05)


# --- what the reader writes -----------------------------------------------------------------------


def test_what_the_reader_writes_is_what_pebble_computes(notebook, one_thread, capsys):
    """All cells up to the last stub about generation, with the solutions in place of the stubs."""
    solved = runpy.run_path(str(chapters.FOLDER.parent / "scripts" / "solutions.py"))["solved"]
    code = [one for one in notebook.cells if one.cell_type == "code"]
    last, names = code.index(cell(notebook, "mine = greedy_with_cache(")), {}
    with torch.enable_grad():  # the chapter turns gradients off
        for one in code[: last + 1]:
            exec(solved(one) if "solution" in one.metadata else one.source, names)
            plt.close("all")
    printed = capsys.readouterr().out
    assert "not attempted" not in printed and "compared:" not in printed
    differences = re.findall(r"difference[^:]*: (\S+)", printed)
    assert len(differences) >= 7 and max(map(float, differences)) < 1e-4
    assert printed.count("Right: ") == 8
    assert names["mine"] == names["library"] and len(names["mine"]) > 5


def test_sizes_that_the_text_states(notebook, states):
    """Of pebble, of a model of 7 billion parameters, and of the patch in the middle."""
    pebble = AutoConfig.from_pretrained(vk.models.pebble.path())
    vision, text = pebble.vision_config, pebble.text_config
    states(vision.num_hidden_layers, vision.hidden_size // vision.num_attention_heads)
    states(vision.num_attention_heads, text.num_hidden_layers, text.num_attention_heads)
    states(text.num_hidden_layers * text.num_attention_heads, text.num_hidden_layers - 1)
    large = config("llava-hf/llava-1.5-7b-hf").get_text_config()
    assert large.num_hidden_layers * large.num_attention_heads == pytest.approx(1000, rel=0.05)
    middle = FIRST.draw()["images"][0].crop((36, 36, 48, 48))
    counts = sorted(count for count, _ in middle.getcolors())
    assert counts == [1, 143]  # all pixels but one


def test_the_darkest_patches_are_the_centers_of_the_objects():
    model, processor = vk.load("pebble", "fp32")
    row = FIRST.draw()
    found = vk.attention.over_patches(model, processor, row["images"][0], FIRST.question).mean()
    order = found.argsort(axis=None)[::-1][:3]
    pixels = [row["images"][0].getpixel((n % 7 * 12 + 6, n // 7 * 12 + 6)) for n in order.tolist()]
    purple, yellow, green = pixels
    assert purple[2] > purple[1] and min(yellow[:2]) > yellow[2] and green[1] > max(green[::2])


def test_claims_about_attention(notebook):
    rows = chapters.shown(cell(notebook, "looked = pd.DataFrame(columns"))
    for kind in ("color", "shape"):
        even, asked, another = (int(share.split()[0]) for share in rows[kind][:3])
        right, top, some = (int(count.split()[0]) for count in rows[kind][3:])
        assert even < another < asked < 2 * another
        assert top < right / 5 and some > 0.85 * right


# --- Llama ----------------------------------------------------------------------------------------


def test_what_is_left_of_llama_without_cross_attention_is_llama_3_1_8b(notebook, states):
    layers = [str(n) for n in config(LLAMA).text_config.cross_attention_layers]
    states(len(layers))
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
