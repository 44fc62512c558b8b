"""Chapter 01: runs on a model of another family as well, and says what is so.

That it runs on pebble and prints what is stored in it is nbval's part (`make test`).
"""

import chapters
import pytest
import torch
from architectures import MODEL_TYPES as LISTED
from architectures import NOT_BUILT, config_of
from chapters import sources, text
from transformers import AutoConfig, AutoModelForCausalLM, Blip2Config, LlamaConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import vlmkit as vk
from vlmkit.anatomy import anatomy_of, on_meta

SMOL = "HuggingFaceTB/SmolVLM-256M-Instruct"
QWEN = "Qwen/Qwen2-VL-2B-Instruct"
LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"


@pytest.fixture
def notebook():
    return chapters.read("01_anatomy.ipynb")


def config(name):
    return AutoConfig.from_pretrained(vk.catalog.folder_of(name))


def parameters(name, *segments):
    """Of the language model, in paths that hold one of `segments`."""
    model = on_meta(config(name))
    component_of = anatomy_of(model).component_of
    return sum(
        parameter.numel()
        for path, parameter in model.named_parameters()
        if component_of(path) == "language_model" and set(segments) & set(path.split("."))
    )


def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """With few questions about pebble's attention, which no other family has a part in."""
    (measuring,) = (cell for cell in notebook.cells if "range(250)" in cell.source)
    measuring.source = measuring.source.replace("range(250)", "range(6)")
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "Idefics3ForConditionalGeneration" in shown and "model.connector" in shown


def test_keeps_to_the_measure_of_a_chapter(notebook):
    # A step from pixels to answer is one cell, longer than most cells of other chapters.
    chapters.check_measure(notebook, middle=8)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_tokens_by_formula_are_those_of_transformers(notebook):
    (cell,) = (s for s in sources(notebook, "code") if s.startswith("grid = "))
    configs = {name: config(name) for name in (SMOL, QWEN, LLAMA)}
    names = {"vk": vk, "AutoConfig": AutoConfig, "pd": __import__("pandas")}
    exec(cell, names | {"configs": configs, "smol": SMOL}, scope := {})
    tokens = scope["tokens"]
    tile = (512 // 16 // 4) ** 2
    smol = Idefics3ImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    )
    for side, row in tokens.iterrows():
        assert row["fixed grid (LLaVA-1.5)"] == 24 * 24
        assert row["tiles (SmolVLM-256M)"] == smol.get_number_of_image_patches(side, side)[0] * tile
        height, width = smart_resize(side, side, factor=28, max_pixels=28 * 28 * 16384)
        assert row["dynamic (Qwen2-VL)"] == height // 28 * width // 28
        height, width = get_optimal_tiled_canvas(side, side, max_image_tiles=4, tile_size=560)
        tiles = (height // 560) * (width // 560)
        assert row["cross-attention (Llama 3.2)"] == tiles * (40 * 40 + 1)
        assert row["queries (BLIP-2)"] == Blip2Config().num_query_tokens


def test_what_is_said_of_real_models_is_so(notebook):
    said = " ".join(text(notebook).split())
    smol, llama = vk.anatomy(SMOL), vk.anatomy(LLAMA)
    assert "the vision encoder is half as large as the language model" in said
    sizes = smol["vision_encoder"].parameters, smol["language_model"].parameters
    assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.05)
    assert """Two thirds of Llama's "11B" are the MLPs of its language model""" in said
    assert parameters(LLAMA, "mlp") / llama.total == pytest.approx(2 / 3, abs=0.01)
    assert "a tenth are embedding and head" in said
    ends = parameters(LLAMA, "embed_tokens", "lm_head")
    assert ends / llama.total == pytest.approx(0.1, abs=0.005)
    assert "Of SmolVLM's language model these two are a third" in said
    ends = parameters(SMOL, "embed_tokens", "lm_head")
    assert ends / sizes[1] == pytest.approx(1 / 3, abs=0.02)
    qwen = on_meta(config(QWEN))
    assert qwen.get_input_embeddings().weight is qwen.get_output_embeddings().weight


def test_the_solution_of_the_first_exercise(notebook):
    text_config = config(LLAMA).text_config
    layers = [str(n) for n in text_config.cross_attention_layers]
    left = vk.anatomy(LLAMA)["language_model"].parameters - parameters(LLAMA, *layers)
    (stub,) = (cell for cell in notebook.cells if cell.source.startswith("left_over = None"))
    assert f"{left:,}" in stub.metadata["solution"]["text"]
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
def test_how_many_architectures_the_accessors_split_rightly(notebook):
    right, built = 0, [model_type for model_type in LISTED if model_type not in NOT_BUILT]
    for model_type in built:
        model = on_meta(config_of(model_type))
        path_of = {id(parameter): path for path, parameter in model.named_parameters()}
        a = anatomy_of(model)
        expected = {
            component: {i for i, path in path_of.items() if a.component_of(path) == component}
            for component in vk.COMPONENTS
        }
        right += given(model, path_of) == [
            expected[component] for component in ("vision_encoder", "language_model", "projector")
        ]
    assert f"Of the {len(built)} architectures that vlmkit can build" in text(notebook)
    assert f"the accessors for encoder, decoder and head split {right} rightly" in text(notebook)


def given(model, path_of):
    """What the accessors call encoder, what decoder and head, and what is left for a projector."""

    def of(accessor, *arguments):
        try:
            module = accessor(*arguments)
        except Exception:  # an accessor of a few classes fails
            module = None
        return set() if module is None else {id(p) for p in module.parameters()} & set(path_of)

    encoder = of(model.get_encoder, "image")
    decoder = of(model.get_decoder) | of(model.get_output_embeddings)
    return [encoder, decoder, set(path_of) - encoder - decoder]
