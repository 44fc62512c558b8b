"""Chapter 04: runs on a model of another family as well, and says what is so.

That it runs on pebble and prints what is stored in it is nbval's part (`make test`).
"""

import chapters
import pytest
from transformers import AutoConfig

import vlmkit as vk

LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"
LLAVA = "llava-hf/llava-1.5-7b-hf"
SMOL = "HuggingFaceTB/SmolVLM-256M-Instruct"
QWEN3, QWEN = (f"Qwen/Qwen2.5-VL-{size}B-Instruct" for size in (3, 7))
SIZE = 1024, 768


@pytest.fixture
def notebook():
    return chapters.read("04_memory.ipynb")


@pytest.mark.slow  # chapters 00, 01 and 03 are run so each time
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """With the catalog's models that do not take long, where it is about them."""
    (fitting,) = (c for c in notebook.cells if c.source.startswith("cards = "))
    fitting.source = fitting.source.replace("qwen3, qwen7, llama", "")
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "bytes of keys and values, predicted and measured" in shown
    assert "optimizer state" in shown


def test_keeps_to_the_measure_of_a_chapter(notebook):
    chapters.check_measure(notebook, middle=9)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_what_is_said_of_the_quoted_example_is_so(said):
    plan = vk.Plan(vision_encoder="fp16", projector="fp16", language_model="nf4")
    ledger, half = vk.memory.predict(LLAMA, plan), vk.memory.predict(LLAMA, "fp16")
    of, kinds = ledger.by_component, ledger.by_kind
    assert "22 GB in fp16 is within 3% (the model has 10.67 billion parameters, not 11)" in said
    assert 0.97 <= half.total / 22e9 < 1 and round(vk.anatomy(LLAMA).total / 1e7) == 1067
    assert (
        "the vision encoder takes almost three times what was said, the projector a third" in said
    )
    assert 2.8 < of["vision_encoder"] / 600e6 < 3
    assert of["projector"] / 200e6 == pytest.approx(1 / 3, abs=0.03)
    assert "the language model takes 0.8 GB more, and the whole 9.3 GB in place of 7" in said
    assert round((of["language_model"] - 6e9) / 1e8) == 8 and round(ledger.total / 1e8) == 93
    assert "Not a third but 43% of the model is left" in said
    assert round(100 * ledger.total / half.total) == 43
    assert "Their 4.2 GB come with 0.5 of scales" in said
    packed = vk.memory.predict(LLAMA, plan).table().loc["language_model"]
    assert [round(packed[k] / 1e8) for k in ("linear", "quantization state")] == [42, 5]
    assert "stay in 16 bits, 2.1 GB" in said
    assert round((kinds["head"] + packed["embedding"]) / 1e8) == 21
    vision = AutoConfig.from_pretrained(vk.catalog.folder_of(LLAMA)).vision_config
    assert vision.hidden_size == 1280  # ViT-L has 1024
    encoder = vk.anatomy(LLAVA)["vision_encoder"].parameters
    assert f"the ViT-L/14 of LLaVA-1.5 ({encoder / 1e6:.1f} million" in said
    assert round(2 * encoder / 1e8) == 6 and round(vk.anatomy(LLAMA).total * 4.5 / 8 / 1e8) == 60
    by = vk.anatomy(LLAMA).by_component
    assert [round(n / 1e5) for n in by.values()][:3] == [8636, 315, 3355]


def test_tied_embeddings_are_one_matrix(said):
    tied, own = (AutoConfig.from_pretrained(vk.catalog.folder_of(n)) for n in (QWEN3, LLAMA))
    assert "Where they are *tied*, as in Qwen2.5-VL-3B, they are one matrix" in said
    assert "head" not in vk.memory.predict(QWEN3).by_kind
    assert tied.get_text_config().tie_word_embeddings
    assert not own.get_text_config().tie_word_embeddings


def test_what_is_said_of_bits_and_training_is_so(said):
    all_nf4, recommended = (
        8 * vk.memory.predict(SMOL, plan).total / vk.anatomy(SMOL).total for plan in ("nf4", None)
    )
    assert f"{all_nf4:.1f} bits even if every component is in NF4, and {recommended:.1f} if" in said
    weights = vk.memory.predict(QWEN).total
    adapted = vk.memory.predict(QWEN, training={"language_model": vk.LoRA(r=16)}).total
    added = f"{(adapted - weights) / 1e6:.0f} MB to {weights / 1e9:.1f} GB"
    assert f"of rank 16 on the whole language model add {added}" in said
    full, half = vk.memory.predict(QWEN, "bf16", training="full"), vk.memory.predict(QWEN, "bf16")
    assert "four times the weights, 66 GB" in said
    assert full.total / half.total == pytest.approx(4, abs=0.01) and full.total // 10**9 == 66


def test_without_checkpointing_activations_are_more_than_the_weights(said):
    assert "they are more than all the 4-bit weights" in said
    use = {"tokens": 512, "images": 1, "image_size": SIZE}
    use |= {"training": {"language_model": vk.LoRA(r=16)}}
    weights = vk.memory.predict(QWEN).total
    step, again = (vk.memory.predict(QWEN, checkpointing=c, **use) for c in (False, True))
    assert step.bounded > weights and again.bounded < weights / 2


def test_what_is_said_to_fit_does_so(said):
    assert "Qwen2.5-VL-7B just misses 8 GB" in said
    assert "The 11B, which in bf16 needs 24 GB or more, fits on 16" in said
    table = vk.fit([QWEN, LLAMA], gpus=["8 GB", "16 GB"], image_size=SIZE)
    fits = table.groupby(["model", "plan"])["fits"].sum()
    assert fits[QWEN, "language model nf4"] == fits[LLAMA, "language model nf4"] == 1
    assert fits[LLAMA, "bf16"] == 0


def test_what_is_said_of_pictures_is_so(said):
    seen = {n: vk.memory.visual_tokens(n, SIZE) for n in (QWEN, LLAVA, LLAMA)}
    mb = {
        n: vk.memory.predict(n, tokens=16, images=1, image_size=SIZE).by_kind["kv cache"]
        - vk.memory.predict(n, tokens=16).by_kind["kv cache"]
        for n in (QWEN, LLAVA)
    }
    assert f"makes {seen[QWEN].tokens} of the picture and keeps {mb[QWEN] / 1e6:.0f} MB" in said
    assert f"LLaVA-1.5 makes {seen[LLAVA].tokens} and keeps {mb[LLAVA] / 1e6:.0f}" in said
    text_config = AutoConfig.from_pretrained(vk.catalog.folder_of(QWEN)).get_text_config()
    assert "Qwen's 28 share four" in said
    assert (text_config.num_attention_heads, text_config.num_key_value_heads) == (28, 4)
    assert f"and {seen[LLAMA].attended:,} states that eight cross-attention layers" in said
