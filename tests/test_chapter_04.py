"""Chapter 04. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import shutil

import chapters
import pandas as pd
import pytest
import test_memory_activations
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vlmkit as vk

LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"
LLAVA = "llava-hf/llava-1.5-7b-hf"
SMOL = "HuggingFaceTB/SmolVLM-256M-Instruct"
HYBRID = "Qwen/Qwen3.5-9B"
QWEN3, QWEN = (f"Qwen/Qwen2.5-VL-{size}B-Instruct" for size in (3, 7))
SIZE = 1024, 768


def config(name):
    return AutoConfig.from_pretrained(vk.catalog.folder_of(name))


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """Without the large models of the catalog, which take long."""
    chapters.replace(notebook, ("[smol, qwen3, qwen7, llama]", "[smol]"))
    shown = chapters.run(notebook, other_family, monkeypatch)
    assert "bytes of keys and values, predicted and measured" in shown
    assert "optimizer state" in shown


def test_numbers_about_the_quoted_example(states):
    plan = vk.Plan(vision_encoder="fp16", projector="fp16", language_model="nf4")
    ledger, half = vk.memory.predict(LLAMA, plan), vk.memory.predict(LLAMA, "fp16")
    llama, of = vk.anatomy(LLAMA), ledger.by_component
    packed = ledger.table().loc["language_model"]
    assert 0.97 <= half.total / 22e9 < 1  # within 3%
    assert 2.8 < of["vision_encoder"] / 600e6 < 3  # almost three times
    assert of["projector"] / 200e6 == pytest.approx(1 / 3, abs=0.03)
    states(f"{llama.total / 1e9:.2f}", f"{ledger.total / 1e9:.1f}")
    states(f"{(of['language_model'] - 6e9) / 1e9:.1f}", f"{100 * ledger.total / half.total:.0f}")
    states(*(f"{packed[kind] / 1e9:.1f}" for kind in ("linear", "quantization state")))
    states(f"{(ledger.by_kind['head'] + packed['embedding']) / 1e9:.1f}")
    parts = ("vision_encoder", "projector", "cross_attention")
    states(*(f"{llama[component].parameters / 1e6:.1f}" for component in parts))
    # The encoder is no ViT-L. The quoted 600 MB fit LLaVA's ViT-L; 6 GB are 4.5 bits a weight.
    assert config(LLAMA).vision_config.hidden_size == 1280
    encoder = vk.anatomy(LLAVA)["vision_encoder"].parameters
    states(f"{encoder / 1e6:.1f}")
    assert round(2 * encoder / 1e8) == 6 and round(llama.total * 4.5 / 8 / 1e8) == 60


def test_tied_embeddings_are_one_matrix():
    assert "head" not in vk.memory.predict(QWEN3).by_kind
    assert config(QWEN3).tie_word_embeddings
    assert "head" in vk.memory.predict(LLAMA).by_kind


def test_numbers_about_bits_and_training(states):
    for plan in ("nf4", None):
        bits = 8 * vk.memory.predict(SMOL, plan).total / vk.anatomy(SMOL).total
        states(f"{bits:.1f}")
    weights = vk.memory.predict(QWEN).total
    adapted = vk.memory.predict(QWEN, training={"language_model": vk.LoRA(r=16)}).total
    states(f"{(adapted - weights) / 1e6:.0f}", f"{weights / 1e9:.1f}")
    full, half = vk.memory.predict(QWEN, "bf16", training="full"), vk.memory.predict(QWEN, "bf16")
    assert full.total / half.total == pytest.approx(4, abs=0.01)
    states(full.total // 10**9)


def test_without_checkpointing_activations_are_more_than_the_weights(states):
    """On a GPU. docs/package.md says that a CPU keeps about twice as many."""
    use = {"tokens": 512, "images": 1, "image_size": SIZE}
    use |= {"training": {"language_model": vk.LoRA(r=16)}}
    weights = vk.memory.predict(QWEN).total
    on_cpu = vk.memory.predict(QWEN, **use).by_kind["activation"]
    use["allocator"] = "cuda"
    step, again = (vk.memory.predict(QWEN, gradient_checkpointing=c, **use) for c in (False, True))
    assert step.bounded > weights and again.bounded < weights / 2
    assert 1.8 < on_cpu / step.by_kind["activation"] < 2.2
    states(f"{step.total / 1e9:.1f}", f"{again.total / 1e9:.1f}")


def test_claims_about_what_fits_a_card(states):
    """Qwen in NF4 just misses 8 GB, and int8 fits a T4; Llama fits a T4 in NF4, not in bf16."""
    card = vk.catalog.gpus.GPUS["RTX 4060"]
    states(card.mebibytes, f"{card.bytes / 1e9:.2f}", f"{100 * (2**30 / 10**9 - 1):.0f}")
    table = vk.fit([QWEN, LLAMA], gpus=["RTX 4060", "T4"], image_size=SIZE)
    fits = table.groupby(["model", "plan"])["fits"].sum()
    assert fits[QWEN, "language model nf4"] == fits[LLAMA, "language model nf4"] == 1
    assert fits[QWEN, "language model int8"] == 1
    assert fits[LLAMA, "bf16"] == 0
    missed = table[(table["model"] == QWEN) & table["plan"].eq("language model nf4")]
    assert 0.9 < (missed["usable"] / missed["needed"]).min() < 1  # just


def test_numbers_about_pictures(states):
    for name in (QWEN, LLAVA):
        states(vk.memory.visual_tokens(name, SIZE).tokens)
        without = vk.memory.predict(name, tokens=16)
        with_picture = vk.memory.predict(name, tokens=16, images=1, image_size=SIZE)
        states(f"{(with_picture.by_kind['kv cache'] - without.by_kind['kv cache']) / 1e6:.0f}")
    states(vk.memory.visual_tokens(LLAMA, SIZE).attended)
    states(len(config(LLAMA).text_config.cross_attention_layers))
    of_llava = config(LLAVA).get_text_config()
    heads, layers = of_llava.num_attention_heads, of_llava.num_hidden_layers
    states(layers, heads, of_llava.head_dim)
    qwen = config(QWEN).get_text_config()
    states(qwen.num_attention_heads, qwen.num_key_value_heads)


def test_numbers_about_tools(states):
    record = pd.read_csv(chapters.FOLDER.parent / "benchmarks" / "results" / "quantizers.csv")
    formats = record["checkpoint"].str.split("[ ,]", regex=True).str[0]
    quantizers = formats.replace(["NF4", "LLM.int8"], "bitsandbytes")
    states(len(record), quantizers[~formats.isin(["fp16", "bf16"])].nunique())
    rule = 100 * (record["rule"] / record["files"] - 1)
    accelerate = 100 * (1 - record["accelerate"] / record["held"])
    for errors in (rule[rule > 0], accelerate):
        states(f"{errors.min():.0f}", f"{errors.max():.0f}")
    fp8 = record.set_index("checkpoint").loc["FP8 in blocks"]
    states(f"{fp8['files'] / 1e6:.2f}", f"{fp8['held'] / 1e6:.2f}")


@pytest.mark.slow
def test_numbers_about_the_cache_of_a_hybrid(states):
    text, full = (config(n).get_text_config() for n in (HYBRID, "Qwen/Qwen3-VL-8B-Instruct"))
    attention = text.layer_types.count("full_attention")
    keys = vk.memory.predict(HYBRID, tokens=16).by_kind["kv cache"]
    each = 4 * attention * text.num_key_value_heads * text.head_dim
    states_of_linear = keys - 16 * each
    assert (attention, len(text.layer_types)) == (8, 32)
    states(f"{states_of_linear / 1e6:.1f}")
    of_full = 4 * full.num_hidden_layers * full.num_key_value_heads * full.head_dim
    sizes = states_of_linear + 16_384 * each, 16_384 * of_full
    states(*(f"{size / 1e6:.0f}" for size in sizes))
    assert sizes[1] / sizes[0] == pytest.approx(4, abs=0.2)


def test_numbers_about_a_photograph(states, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    shutil.copy(vk.catalog.folder_of(QWEN) / "config.json", tmp_path)
    for which in (QWEN, tmp_path):
        states(vk.memory.visual_tokens(which, (4032, 3024)).tokens)
    states(Qwen2VLImageProcessorPil().size["longest_edge"])  # in pixels, whatever its name


def test_how_many_passes_are_measured(states):
    """`test_memory_activations.py` compares each of them with its prediction, within 10%."""
    states(len(test_memory_activations.CASES), 10)


def test_numbers_in_the_solutions(notebook):
    def said(start):
        return chapters.cell(notebook, start).metadata["solution"]["text"]

    small = vk.Plan.parse("nf4-dq")
    ledgers = [vk.memory.predict(LLAMA, p) for p in (small, small.override("lm_head", "nf4-dq"))]
    before, after = (f"{ledger.total / 1e9:.2f}" for ledger in ledgers)
    wide = ledgers[0].table().loc["language_model"][["head", "embedding"]].sum()
    chapters.states(said("my_plan = "), before, after, f"{wide / 1e9:.1f}")
    text = config(LLAVA).get_text_config()
    each = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    chapters.states(said("def cache_bytes"), each, f"{576 * each / 1e6:.0f}")
    weights, one, many = (
        vk.memory.predict(QWEN, training=rank and {"language_model": vk.LoRA(r=rank)}).total
        for rank in (None, 16, 118)
    )
    a_rank = (one - weights) / 16
    chapters.states(said("my_rank = "), f"{(one - weights) / 1e6:.0f}", f"{a_rank / 1e6:.1f}", 118)
    chapters.states(said("my_rank = "), f"{weights / 1e6:.0f}", f"{(12e9 - weights) / a_rank:.1f}")
    assert many < 12e9 < many + a_rank
