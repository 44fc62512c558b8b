"""The catalog's models have the parameters that were published, without a network."""

import pytest

import vlmkit as vk
from vlmkit import catalog
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import huggingface_hub

    def refuse(*arguments, **keywords):
        raise AssertionError("the catalog must not ask the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize("name", catalog.NAMES)
def test_the_total_is_the_published_one(name):
    a = vk.anatomy(name)
    assert a.total == catalog.PARAMETERS[name]
    assert not a.unknown
    assert a["vision_encoder"].parameters and a["projector"].parameters


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
