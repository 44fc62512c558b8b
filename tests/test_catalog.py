"""The catalog's models have the parameters that were published, without a network."""

import pytest
from transformers import AutoConfig

import vlmkit as vk
from vlmkit import catalog
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.errors import AnatomyError, CheckpointError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **keywords):
        raise AssertionError("the catalog must not ask the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


UNPUBLISHED = {
    "google/gemma-4-E2B-it": 5_104_297_504,
    "Qwen/Qwen3.5-0.8B": 852_985_920,
    "Qwen/Qwen3.5-9B": 9_409_813_744,
    "Salesforce/blip2-opt-2.7b": 3_744_679_936,
    "microsoft/Florence-2-base": 231_414_016,
}
"""Parameters of the models for which no published number was found, as transformers makes them."""


@pytest.mark.parametrize("name", catalog.NAMES)
def test_the_total_is_the_published_one(name):
    a = vk.anatomy(name)
    assert a.total == (catalog.PARAMETERS[name] or UNPUBLISHED[name])
    assert not a.unknown
    assert a["vision_encoder"].parameters and a["projector"].parameters


def test_thirty_models_of_fourteen_families_or_more():
    assert len(catalog.NAMES) >= 30
    types = {AutoConfig.from_pretrained(catalog.folder_of(n)).model_type for n in catalog.NAMES}
    assert len(types) >= 14
    assert all(row["sources"] and row["confidence"] for row in catalog.MODELS.values())


@pytest.mark.parametrize(
    "name, context, theta, epsilon",
    [
        ("llava-hf/llava-1.5-7b-hf", 4096, 10_000, 1e-5),
        ("HuggingFaceTB/SmolVLM-256M-Instruct", 8192, 100_000, 1e-5),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 16_384, 273_768, 1e-5),
        ("Qwen/Qwen2-VL-7B-Instruct", 32_768, 1_000_000, 1e-6),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 128_000, 1_000_000, 1e-6),
        ("Qwen/Qwen3-VL-4B-Instruct", 262_144, 5_000_000, 1e-6),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", 131_072, 500_000, 1e-5),
    ],
)
def test_context_rope_and_norm_are_what_was_published(name, context, theta, epsilon):
    """Not transformers' defaults, with which prompts that fit were refused."""
    text = AutoConfig.from_pretrained(catalog.folder_of(name)).get_text_config()
    assert text.max_position_embeddings == context
    assert text.rope_parameters["rope_theta"] == theta
    assert text.rms_norm_eps == epsilon


def test_what_transformers_cannot_run_as_published():
    """GLM-4.1V's share of rotated dimensions gets lost in transformers 5.24. If this fails, it is
    mended there: take the sentence out of models.csv."""
    with pytest.raises(AnatomyError, match="split_with_sizes"):
        vk.memory.predict("zai-org/GLM-4.1V-9B-Thinking", tokens=10)


def test_what_11b_is_made_of():
    a = vk.anatomy("meta-llama/Llama-3.2-11B-Vision-Instruct")
    assert [a[c].parameters for c in vk.COMPONENTS] == [
        863_567_379,
        31_461_376,
        335_546_384,
        9_439_645_696,
        0,
    ]


def test_a_name_works_where_a_hub_id_does():
    name = "HuggingFaceTB/SmolVLM-256M-Instruct"
    ledger = vk.memory.predict(name, "bf16")
    assert ledger.total >= 2 * catalog.PARAMETERS[name]
    assert vk.memory.predict(name).total < ledger.total


def test_a_name_without_its_owner_is_recognised():
    with pytest.raises(CheckpointError, match="Did you mean 'Qwen/Qwen2.5-VL-7B-Instruct'"):
        vk.anatomy("Qwen2.5-VL-7B-Instruct")


def test_every_folder_is_listed_and_every_name_has_its_folder():
    root = catalog.folder_of(catalog.NAMES[0]).parents[1]
    folders = {str(file.parent.relative_to(root)) for file in root.glob("*/*/config.json")}
    cobble = {f"cobble/{name}" for name, model in BUNDLED.items() if model.fetched}
    assert folders == {*catalog.NAMES, *cobble}
    assert catalog.folder_of("nobody/nothing") is None
