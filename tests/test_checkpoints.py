"""Checkpoints that are missing, damaged or refused: each says what is wrong and what to do."""

import json
import shutil

import pytest
import torch

import vlmkit as vk
from vlmkit.errors import AnatomyError, CheckpointError


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="it has no config.json.*notes.txt"):
        vk.load(tmp_path)
    with pytest.raises(CheckpointError, match="is a file, and a checkpoint is a folder"):
        vk.load(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="no checkpoint '/nowhere/at/all'"):
        vk.load("/nowhere/at/all")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a PEFT adapter.*peft.PeftModel"):
        vk.load(tmp_path)


def test_an_installation_without_pebble(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmkit.catalog.bundled.MODELS", tmp_path / "gone")
    with pytest.raises(CheckpointError, match="'pebble' is bundled .* incomplete"):
        vk.load("pebble")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "nonesuch"}', "{}"])
def test_a_config_that_cannot_be_used(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        vk.load(tmp_path)


def edited(folder, change):
    """`folder`, with its config changed by a function of the dictionary."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_long_messages_of_libraries_are_cut(llava, copy):
    # transformers' message lists every model_type that it knows
    folder = edited(copy(llava), lambda c: c["text_config"].update(model_type="nonesuch"))
    with pytest.raises(CheckpointError, match="nonesuch.* …") as caught:
        vk.load(folder)
    assert len(str(caught.value)) < 500


def test_weights_that_cannot_be_read(llava, copy):
    folder = copy(llava)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        vk.load(folder)


def test_a_text_model(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(AnatomyError, match="not a vision-language model"):
        vk.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 1000, 0.5, -1])
def test_cut_short(llava, copy, keep):
    file = copy(llava) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="damaged or was cut short"):
        vk.load(file.parent)


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("leaf", ["down_proj.weight", "layer_norm1.bias", "linear_1.weight"])
def test_missing_weights(llava, copy, leaf):
    folder = copy(llava)
    rewrite(folder, lambda w: w.pop(next(name for name in w if name.endswith(leaf))))
    for plan in ("recommended", "bf16"):
        with pytest.raises(CheckpointError, match=f"lacks weights that the model has: .*{leaf}"):
            vk.load(folder, plan)


def test_unexpected_weights_and_shapes(llava, copy):
    folder = copy(llava)
    rewrite(folder, lambda w: w.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="no place for: model.extra.weight"):
        vk.load(folder)


@pytest.mark.parametrize("leaf", ["lm_head.weight", "down_proj.weight"])
def test_weights_of_another_shape(llava, copy, leaf):
    folder = copy(llava)
    rewrite(folder, lambda w: w.update({n: torch.ones(2, 2) for n in w if n.endswith(leaf)}))
    for plan in ("recommended", "bf16"):
        with pytest.raises(CheckpointError, match=leaf):
            vk.load(folder, plan)


def test_only_pickle(llava, copy):
    folder = copy(llava)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights: there is no model.safetensors"):
        vk.load(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pickle .pytorch_model.bin"):
        vk.load(folder)


def test_a_missing_shard(llava, copy):
    model, _ = vk.load(llava, "bf16", processor=False)
    folder = copy(llava)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="400KB")
    vk.load(folder)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="1 are missing .model-00002"):
        vk.load(folder)


def test_processor_files(llava, copy):
    folder = copy(llava)
    for file, message in (("processor_config.json", "lacks a processor config"),
                          ("tokenizer.json", "processor cannot be loaded|lacks")):  # fmt: skip
        whole = (folder / file).read_text()
        (folder / file).write_text("{")
        with pytest.raises(CheckpointError, match="processor cannot be loaded"):
            vk.load(folder)
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=message):
            vk.load(folder)
        (folder / file).write_text(whole)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(CheckpointError, match="lacks a tokenizer"):
        vk.load(folder)


def test_a_processor_that_needs_torchvision(qwen2_vl, copy):
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is installed here")
    import tiny

    folder = copy(qwen2_vl)
    tiny.tokenizer().save_pretrained(folder)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        kind = "Video" if "video" in file else "Image"
        entry = {f"{kind.lower()}_processor_type": f"Qwen2VL{kind}Processor"}
        entry["processor_class"] = "Qwen2VLProcessor"
        (folder / file).write_text(json.dumps(entry))
    with pytest.raises(CheckpointError, match=r"needs torchvision.*pip install torchvision"):
        vk.load(folder)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty hub cache, and no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_id_without_a_network(offline):
    with pytest.raises(CheckpointError, match="owner/name-7b .*cannot be reached.*pebble"):
        vk.load("owner/name-7b")


def test_remote_code_only_by_name(llava, copy):
    code = {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"}
    folder = edited(copy(llava), lambda c: c.update(model_type="their_own", auto_map=code))
    (folder / "theirs.py").write_text("raise SystemExit('their code ran')")
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        vk.load(folder)
    with pytest.raises(SystemExit, match="their code ran"):
        vk.load(folder, trust_remote_code=True)


def cached(folder, cache, name, files=None):
    """Put the checkpoint in `folder` into a hub cache, as a download of `name` would have."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    for file in snapshot.iterdir():
        if files and file.name not in files:
            file.unlink()


def test_a_hub_id_in_the_cache_needs_no_network(llava, offline):
    cached(llava, offline, "owner/name")
    model, processor = vk.load("owner/name")
    assert vk.anatomy("owner/name").total == model.num_parameters()
    assert processor is not None


def test_a_hub_id_that_is_half_in_the_cache(llava, offline):
    cached(llava, offline, "owner/name", files=["config.json"])
    assert vk.memory.predict("owner/name").total == vk.memory.predict(llava).total
    with pytest.raises(CheckpointError, match="owner/name|no model.safetensors"):
        vk.load("owner/name")


LIES = {
    "no text_config": (lambda c: c.pop("text_config"), "lacks weights"),
    "a layer too many": (lambda c: c["text_config"].update(num_hidden_layers=3), "lacks weights"),
    "a layer too few": (lambda c: c["text_config"].update(num_hidden_layers=1), "has no place for"),
    "wider": (lambda c: c["text_config"].update(intermediate_size=384), "another shape"),
    "vocabulary": (lambda c: c["text_config"].update(vocab_size=10**6), "another shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_config_that_lies_is_said_wherever_it_is_read(lie, llava, copy):
    """Without this, the numbers are those of a model that the folder does not hold."""
    change, says = LIES[lie]
    folder = edited(copy(llava), change)
    for look in (vk.memory.predict, vk.anatomy, vk.memory.stored):
        assert any(says in note and "belong together" in note for note in look(folder).notes)
        assert says in " ".join(str(look(folder)).split())
    with pytest.raises(CheckpointError, match=says):
        vk.load(folder)


def test_a_config_that_says_quantized_and_weights_that_are_not(llava, copy):
    said = {"quant_method": "awq", "bits": 4}
    folder = edited(copy(llava), lambda c: c.update(quantization_config=said))
    for look in (vk.memory.predict, vk.anatomy, vk.memory.stored):
        assert any("in the weight files none is" in note for note in look(folder).notes)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mllama", "smolvlm", "qwen3_vl_moe"])
def test_a_config_that_is_true_gets_no_note(name, family, tmp_path):
    """Nor does a folder of which only config.json is here, or a quantized one."""
    folder = family(name)
    assert vk.memory.predict(folder).notes == vk.anatomy(folder).notes == ()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "config.json", alone)
    assert vk.memory.predict(alone).notes == vk.anatomy(alone).notes == ()
    model = vk.load(folder, "nf4", processor=False)[0]
    saved = vk.save(model, None, tmp_path / "saved")
    assert vk.memory.predict(saved).notes == vk.anatomy(saved).notes == ()
