"""The cache of quantised checkpoints: as good as a load from the source, or not used at all."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlmkit as vk
from vlmkit.loading import cache, weights

MIXED = "vision_encoder=int8,language_model=nf4-dq"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache that is on, and empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    return folder


@pytest.fixture
def source(llava, copy):
    """A checkpoint that a test may damage."""
    return copy(llava)


@pytest.fixture
def read(monkeypatch):
    """The folders that weights were read from."""
    folders = []
    load_weights = weights.load_weights

    def noting(folder, *args):
        folders.append(folder)
        return load_weights(folder, *args)

    monkeypatch.setattr("vlmkit.loading.load_weights", noting)
    return folders


def load(source, plan="recommended"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = vk.load(source, plan, processor=False)
    return model


def entries(root):
    return [folder for folder in root.iterdir() if folder.is_dir() and folder.name != "digests"]


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize(
    "plan", ["recommended", "nf4-dq", "int8", MIXED, "vision_encoder=fp32,language_model=fp4"]
)
def test_the_second_load_reads_the_entry_and_gives_the_same_model(source, root, read, plan):
    first, second = load(source, plan), load(source, plan)
    (entry,) = entries(root)
    assert read == [source, entry]
    assert same(first, second)
    assert vk.audit(second, plan).total == vk.audit(first, plan).total
    assert vk.memory.measure(second).total == vk.memory.measure(first).total
    assert not second.training and second.name_or_path == str(source)
    assert second.config.name_or_path == str(source)
    assert second.generation_config.to_dict() == first.generation_config.to_dict()
    assert second.dtype == first.dtype and second.hf_quantizer.is_trainable
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)


def test_off_by_default_and_only_for_what_is_quantised(source, root, read, monkeypatch, tmp_path):
    load(source, "bf16")
    monkeypatch.setenv(cache.VARIABLE, "")
    saved = vk.save(load(source), None, tmp_path / "saved")
    monkeypatch.setenv(cache.VARIABLE, str(root))
    load(saved, None)
    assert not root.exists() and read == [source, source, saved]


def test_an_entry_belongs_to_content_and_plan(source, root, read, tmp_path):
    load(source)
    (entry,) = entries(root)
    moved = shutil.copytree(source, tmp_path / "elsewhere")
    assert load(moved).name_or_path == str(moved)
    load(moved, "nf4")
    load(moved, vk.Plan(language_model="nf4").override(r"layers\.0\.", "bf16"))
    assert read == [source, entry, moved, moved] and len(entries(root)) == 3


def test_a_changed_weight_is_noticed_whatever_the_clock_says(source, root, read):
    load(source)
    file = source / "model.safetensors"
    stat = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    load(source)
    assert read == [source, source] and len(entries(root)) == 2


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_changed_config_is_noticed(source, root, read, file):
    load(source)
    (source / file).write_text((source / file).read_text() + "\n")
    load(source)
    assert read == [source, source]


def _flip(entry):
    file = entry / "model.safetensors"
    stat = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _other_weights(entry):
    values = load_file(entry / "model.safetensors")
    save_file({k: v + 1 for k, v in values.items()}, entry / "model.safetensors")


DAMAGES = {
    "a flipped bit": _flip,
    "other weights": _other_weights,
    "cut short": lambda entry: os.truncate(entry / "model.safetensors", 1000),
    "a lost file": lambda entry: (entry / "config.json").unlink(),
    "a lost folder": shutil.rmtree,
    "a lost manifest": lambda entry: entry.with_suffix(".json").unlink(),
    "an empty manifest": lambda entry: entry.with_suffix(".json").write_text(""),
    "another manifest": lambda entry: entry.with_suffix(".json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_never_used_and_made_again(source, root, read, damage):
    first = load(source)
    (entry,) = entries(root)
    DAMAGES[damage](entry)
    assert same(load(source), first)
    assert same(load(source), first)
    assert read == [source, source, entry]


def test_an_entry_that_fails_the_audit_is_not_used(source, root, read, monkeypatch):
    """Were the right entry's files those of another plan, their digests could not tell."""
    load(source, "language_model=fp4")
    (other,) = entries(root)
    first = load(source)
    (entry,) = (e for e in entries(root) if e != other)
    shutil.rmtree(entry)
    shutil.copytree(other, entry)
    shutil.copy(other.with_suffix(".json"), entry.with_suffix(".json"))
    assert same(load(source), first)
    assert read == [source, source, entry, source]


def test_a_full_disk_leaves_nothing_and_the_load_succeeds(source, root, monkeypatch):
    def full(self, folder, *args, **kwargs):
        with open(os.path.join(folder, "model.safetensors"), "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.warns(UserWarning, match="not kept in .*No space left"):
        model, _ = vk.load(source, processor=False)
    vk.audit(model, "recommended")
    assert not entries(root) and not list(root.glob("*.json")) and not list(root.glob(".*"))


def test_a_folder_that_cannot_be_written(source, root):
    root.write_text("a file")
    with pytest.warns(UserWarning, match="not kept in"):
        model, _ = vk.load(source, processor=False)
    vk.audit(model, "recommended")
    assert root.read_text() == "a file"


def test_killed_while_it_writes(source, root, read):
    """A process that ends between two files leaves no entry that is taken for whole."""
    code = (
        "import os, vlmkit as vk\n"
        "import vlmkit.loading.cache as cache\n"
        "cache._write, write = lambda path, text: "
        "write(path, text) if path.parent.name == 'digests' else os._exit(9), cache._write\n"
        f"vk.load({str(source)!r}, processor=False)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (entry,) = entries(root)
    load(source)
    load(source)
    assert read == [source, entry]
