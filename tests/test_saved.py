"""Adapters on disk: whole or refused, read by plain peft too, and merged by the command line."""

import json
import shutil

import pytest
import torch

import vlmkit as vk
from vlmkit.cli import main
from vlmkit.errors import FinetuningError

PARTS = ["adapter_config.json", "adapter_model.safetensors", "trained_in_full.safetensors"]


def trained(base, **ways):
    """`base` with adapters and trained parameters that a short training might have left."""
    model = vk.finetuning.add_adapters(vk.load(base, "bf16", processor=False)[0], **ways)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape).to(parameter)
    return model.eval()


def logits(model, processor):
    from PIL import Image

    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(
        text=text, images=[Image.new("RGB", (84, 84), (200, 40, 90))], return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits.float()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of adapters and a projector trained in full, the logits of the trained model)."""
    model = trained("pebble", projector="full", language_model=vk.LoRA(r=4))
    folder = vk.finetuning.save(model, tmp_path_factory.mktemp("saved") / "both")
    return folder, logits(model, vk.load("pebble")[1])


@pytest.fixture(scope="module")
def processor():
    return vk.load("pebble")[1]


def test_vlmkit_and_plain_peft_load_the_same_model(both, processor):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder, wanted = both
    base = vk.load("pebble", "bf16", processor=False)[0]
    untrained = logits(base, processor)
    assert (untrained - wanted).abs().max() > 0.1
    assert torch.equal(logits(vk.finetuning.load(base, folder), processor), wanted)
    base = AutoModelForImageTextToText.from_pretrained(
        vk.checkpoints.find("pebble"), dtype=torch.bfloat16
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(logits(model, processor), wanted)
    merged = model.merge_and_unload()
    assert (logits(merged, processor) - wanted).abs().max() < (untrained - wanted).abs().max() / 5
    assert not any("modules_to_save" in name for name, _ in merged.named_parameters())


def test_the_readme_says_what_plain_peft_leaves_out(both, tmp_path):
    assert "what was trained in full" in (both[0] / "README.md").read_text()
    model = trained("pebble", projector="full")
    folder = vk.finetuning.save(model, tmp_path / "projector")
    assert "peft cannot load" in (folder / "README.md").read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", PARTS[2], "vlmkit.json"]
    vk.finetuning.load(vk.load("pebble", "bf16")[0], folder)


@pytest.mark.parametrize("file", PARTS)
@pytest.mark.parametrize("damage", ["missing", "changed", "cut"])
def test_a_folder_that_is_not_whole_is_refused(both, processor, tmp_path, file, damage):
    folder = shutil.copytree(both[0], tmp_path / "copy")
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage != "missing":
        data = data[:-9] if damage == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        (folder / file).write_bytes(data)
    base = vk.load("pebble", "bf16", processor=False)[0]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(FinetuningError, match=file):
        vk.finetuning.load(base, folder)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


@pytest.mark.parametrize("file", [None, *PARTS])
def test_notes_of_before_that_list_no_files(both, processor, tmp_path, file):
    folder = shutil.copytree(both[0], tmp_path / "copy")
    notes = json.loads((folder / "vlmkit.json").read_text())
    del notes["files"]
    (folder / "vlmkit.json").write_text(json.dumps(notes))
    base = vk.load("pebble", "bf16", processor=False)[0]
    if file is None:
        assert torch.equal(logits(vk.finetuning.load(base, folder), processor), both[1])
        return
    (folder / file).unlink()
    with pytest.raises(FinetuningError, match=file):
        vk.finetuning.load(base, folder)


@pytest.mark.parametrize(
    "notes", ["", "{", "[]", "null", "{}", '{"files": []}', "[" * 100_000, '{"files": {"x": 1}}']
)
def test_notes_that_cannot_be_read(both, tmp_path, notes):
    folder = shutil.copytree(both[0], tmp_path / "copy")
    (folder / "vlmkit.json").write_text(notes)
    with pytest.raises(FinetuningError, match=r"vlmkit\.json"):
        vk.finetuning.load(vk.load("pebble", "bf16", processor=False)[0], folder)


def test_merged_into_bf16(both, processor, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText

    folder, wanted = both
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 0
    assert "language_model   bf16" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    untrained = logits(vk.load("pebble", "bf16")[0], processor)
    found = logits(model, processor)
    assert (found - wanted).abs().mean() < (untrained - wanted).abs().mean() / 10
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 2  # it is taken
    assert main(["merge", str(folder), str(tmp_path / "out"), "--overwrite"]) == 0


def test_merged_into_the_quantized_base(both, tmp_path, capsys):
    assert main(["merge", str(both[0]), str(tmp_path / "out"), "--plan", "recommended"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "nf4" in line)
    assert 0.01 < float(row.split()[-1]) < 1.5
    vk.audit(vk.load(tmp_path / "out")[0], "recommended")


def test_what_cannot_be_merged(both, llava, tmp_path, capsys):
    folder = shutil.copytree(both[0], tmp_path / "copy")
    assert main(["merge", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert main(["merge", str(folder), str(tmp_path / "out"), "--base", str(llava)]) == 2
    assert main(["merge", str(folder), str(tmp_path / "out"), "--plan", "nf4"]) == 2
    notes = json.loads((folder / "vlmkit.json").read_text())
    (folder / "vlmkit.json").write_text(json.dumps(notes | {"base": ""}))
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 2
    assert "Give --base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
