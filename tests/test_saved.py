"""Adapters on disk: whole or refused, read by plain peft too, and merged by the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, inputs
from safetensors.torch import load_file, save_file

import vlmkit as vk
from vlmkit.cli import main
from vlmkit.errors import CheckpointError, FinetuningError

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


WAYS = {
    "projector": {"projector": "full", "language_model": vk.LoRA(r=4)},
    "encoder": {"vision_encoder": "full", "language_model": vk.LoRA(r=4)},
    "language model": {"vision_encoder": vk.LoRA(r=4), "language_model": "full"},
    "both": {"vision_encoder": "full", "projector": "full", "language_model": vk.LoRA(r=4)},
}
BARE = {"llava_next": "image_newline", "llava_onevision": "image_newline", "blip2": "query_tokens"}
QUICK = [  # a list of modules, a tied head beside a trained module and in it, a bare parameter
    ("qwen3_vl", "projector"),
    ("qwen2_vl", "language model"),
    ("blip2", "language model"),
    ("llava_next", "projector"),
]


def plain_transformers(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)


@torch.no_grad()
def scores(model):
    return model.eval()(**inputs(model)).logits.float()


@pytest.mark.parametrize(
    "name, way",
    [
        pytest.param(name, way, marks=() if (name, way) in QUICK else pytest.mark.slow)
        for name in FAMILIES
        for way in WAYS
    ],
)
def test_plain_peft_has_the_same_bits_or_says_what_it_lacks(
    name, way, family, tmp_path, recwarn, one_thread
):
    from peft import PeftModel

    base = family(name)
    model = trained(base, **WAYS[way])
    folder = vk.finetuning.save(model, tmp_path / "saved")
    wanted = scores(model)
    recwarn.clear()
    model = vk.finetuning.load(vk.load(base, "bf16", processor=False)[0], folder)
    assert torch.equal(scores(model), wanted)
    assert not any("peft leaves out" in str(warned.message) for warned in recwarn)
    plain = PeftModel.from_pretrained(plain_transformers(base), folder)
    told = [str(warned.message) for warned in recwarn if "peft leaves out" in str(warned.message)]
    bare = BARE.get(name) if way in ("projector", "both") else None
    assert torch.equal(scores(plain), wanted) == (bare is None)
    assert len(told) == bool(bare) and all(bare in message for message in told)
    assert (f"- model.{bare}" in (folder / "README.md").read_text()) == (bare == "image_newline")
    if not bare:  # and both merge to the same bits
        ours = scores(vk.finetuning.merge(model)[0])
        assert torch.equal(scores(plain.merge_and_unload()), ours)


def names_in(folder):
    """Names of a checkpoint's tensors, without what bitsandbytes writes beside a weight."""
    files = sorted(Path(folder).glob("*.safetensors"))
    names = {name for file in files for name in load_file(file)}
    return {name for name in names if not vk.checkpoints.BESIDE.search(name)}


def renamed(folder, **beginnings):
    """The checkpoint in `folder`, with names that begin as another transformers writes them."""
    file, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        first, _, rest = name.partition(".")
        tensors[f"{beginnings.get(first, first)}.{rest}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("plan", ["bf16", "recommended"])
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("qwen2_vl", "gemma3") else pytest.param(n, marks=pytest.mark.slow)
        for n in FAMILIES
    ],
)
def test_names_of_a_merge_are_those_of_the_base(name, plan, family, copy, tmp_path, one_thread):
    base = family(name)
    if name == "qwen2_vl" and plan == "bf16":  # names that transformers had since 4.52
        base = renamed(copy(base), model="model.language_model", visual="model.visual")
    model, _ = vk.load(base, plan, processor=False)
    vk.save(model, None, tmp_path / "saved")
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=4))
    vk.save(vk.finetuning.merge(model)[0], None, tmp_path / "merged")
    assert names_in(tmp_path / "merged") == names_in(tmp_path / "saved") == names_in(base)


@pytest.mark.parametrize("dora", [False, True])
def test_a_merge_is_rounded_once_and_its_report_is_right(dora, family, one_thread):
    """The formulas of LoRA and DoRA, written out. peft's safe_merge would round twice."""
    from peft import LoraConfig, get_peft_model

    model = vk.load(family("llava"), "bf16", processor=False)[0]
    modules = [m for t in vk.finetuning.targets(model, "lora") for m in t.modules]
    model = get_peft_model(model, LoraConfig(target_modules=modules, use_dora=dora))
    torch.manual_seed(0)
    wanted, before = {}, {}
    with torch.no_grad():
        for name in modules:
            layer = model.base_model.model.get_submodule(name)
            a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
            b += 0.02 * torch.randn(b.shape)
            before[name] = layer.base_layer.weight.float()
            wanted[name] = before[name] + b @ a  # lora_alpha = r = 8
            if dora:
                length = layer.lora_magnitude_vector["default"].weight
                wanted[name] = length[:, None] * wanted[name] / wanted[name].norm(dim=1)[:, None]
    merged, report = vk.finetuning.merge(model)
    missed = changed = 0.0
    for name, weight in wanted.items():
        found = merged.get_submodule(name).weight
        assert dora or torch.equal(found, weight.bfloat16())
        missed += (found.float() - weight).square().sum().item()
        changed += (weight - before[name]).square().sum().item()
    assert report["lost"].tolist() == pytest.approx([(missed / changed) ** 0.5], rel=1e-3)
    assert 0.001 < report["lost"][0] < 0.05


def test_a_damaged_adapter_is_not_merged(family, one_thread):
    model = trained(family("llava"), language_model=vk.LoRA(r=4))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    with pytest.raises(FinetuningError, match=r"q_proj\.lora_B\S* is not finite"):
        vk.finetuning.merge(model)


def test_rounding_of_what_was_trained_in_full_is_said(tmp_path, processor):
    """After one small step most of what fp32 holds is below a step of bf16."""
    base = vk.load("pebble", vk.Plan(projector="fp32", language_model="bf16"))[0]
    model = vk.finetuning.add_adapters(base, projector="full")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 2e-5
    folder = vk.finetuning.save(model, tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"Rounding loses (0\.[5-9]|[1-9])"):
        vk.finetuning.load(vk.load("pebble", "bf16")[0], folder)


def test_the_base_has_a_name_that_holds_elsewhere(family, tmp_path, monkeypatch, one_thread):
    """Neither a folder in the hub's cache nor one that depends on where a command was called."""

    def noted(folder):
        notes, config = (folder / file for file in ("vlmkit.json", PARTS[0]))
        return (
            json.loads(notes.read_text())["base"],
            json.loads(config.read_text())["base_model_name_or_path"],
        )

    def saved(base, name):
        model = trained(base, language_model=vk.LoRA(r=1))
        return vk.finetuning.save(model, tmp_path / name)

    pebble = str(vk.checkpoints.find("pebble"))
    assert noted(saved("pebble", "a")) == ("pebble", pebble)
    snapshot = tmp_path / "hub/models--owner--name/snapshots" / ("0" * 40)
    shutil.copytree(family("llava"), snapshot)
    assert noted(saved(snapshot, "b")) == ("owner/name", "owner/name")
    monkeypatch.chdir(snapshot.parent)
    assert noted(saved("0" * 40, "c")) == ("owner/name", "owner/name")
    shutil.copytree(family("llava"), tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    assert noted(saved("own", "d")) == (str(tmp_path / "own"), str(tmp_path / "own"))


def test_the_readme_says_what_plain_peft_leaves_out(both, tmp_path):
    assert "what was trained in full" in (both[0] / "README.md").read_text()
    model = trained("pebble", projector="full")
    folder = vk.finetuning.save(model, tmp_path / "projector")
    assert "peft cannot load" in (folder / "README.md").read_text()
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", PARTS[2], "vlmkit.json"]
    vk.finetuning.load(vk.load("pebble", "bf16")[0], folder)
    for trained_part in (folder, both[0]):
        with pytest.raises(CheckpointError, match=r"not a checkpoint.*vk\.finetuning\.load\("):
            vk.load(trained_part)


def test_the_output_folder_of_a_training_names_its_adapters(tmp_path):
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "vlmkit.json").touch()
    with pytest.raises(FinetuningError, match="Give .*adapters"):
        vk.finetuning.load(vk.load("pebble", "bf16")[0], tmp_path)


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


def test_what_a_merge_must_not_replace(both, tmp_path, capsys, monkeypatch):
    """The adapters' own folder and what is around it; and nothing is read before that is clear."""
    run = tmp_path / "run"
    folder = shutil.copytree(both[0], run / "adapters")
    monkeypatch.setattr(vk, "load", lambda *_, **__: pytest.fail("weights are read"))
    for out in (folder, run, tmp_path):
        assert main(["merge", str(folder), str(out), "--overwrite"]) == 2
        assert "is or contains ADAPTERS" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "taken").write_text("")
    assert main(["merge", str(folder), str(tmp_path / "taken"), "--overwrite"]) == 2
    assert "is not a folder" in capsys.readouterr().err
    notes = json.loads((folder / "vlmkit.json").read_text())
    (folder / "vlmkit.json").write_text(json.dumps(notes | {"base": "/gone/away"}))
    assert main(["merge", str(folder), str(tmp_path / "out")]) == 2
    assert "trained on /gone/away, which is not to be found" in capsys.readouterr().err


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
