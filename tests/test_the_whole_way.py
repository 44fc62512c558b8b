"""The whole way of a Qwen2.5-VL: rows in a file, NF4, adapters and a projector trained in full,
killed, resumed, merged, and loaded by plain transformers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from processors import PROCESSORS
from safetensors.torch import load_file

import vlmkit as vk
from vlmkit import cli

pytestmark = pytest.mark.usefixtures("one_thread")

COLORS = {"red": (220, 30, 30), "gold": (230, 190, 40), "blue": (40, 60, 230)}
PLAN = {"vision_encoder": "bf16", "projector": "fp32", "language_model": "nf4"}
TRAIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import vlmkit.loading
from processors import PROCESSORS
vlmkit.loading.load_processor = lambda *_: PROCESSORS["qwen2_5_vl"]()
from vlmkit import cli
sys.exit(cli.main(sys.argv[1:]))
"""
"""`vlmkit`, with a processor that is not read from files: Qwen's needs torchvision for videos."""


def rows_in(folder):
    """A file of conversations as TRL has them, with a picture each, and the questions alone."""
    folder.mkdir()
    rows, asked = [], []
    for number in range(24):
        name, color = list(COLORS.items())[number % 3]
        shade = tuple(min(255, part + number) for part in color)
        Image.new("RGB", (16, 16), shade).save(folder / f"{number}.png")
        question = [{"type": "image"}, {"type": "text", "text": "Color?"}]
        answer = [{"type": "text", "text": name}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rows.append({"messages": messages, "images": [f"{number}.png"]})
        asked.append((folder / f"{number}.png", name))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl", asked


def file_for(base, rows, output):
    path = output.with_suffix(".yaml")
    path.write_text(
        yaml.safe_dump({
            "model": str(base),
            "plan": PLAN,
            "train": {"projector": "full", "language_model": {"r": 8}},
            "data": {"source": str(rows)},
            "settings": {
                "max_steps": 30, "per_device_train_batch_size": 6, "save_steps": 10,
                "learning_rate": 1e-2,
            },
            "output": str(output),
        })
    )  # fmt: skip
    return str(path)


def killed_after_a_checkpoint(path, output):
    """Run `vlmkit train`, and kill it as soon as it has a checkpoint."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = output.with_suffix(".log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, "train", path], env=environment, stdout=log, stderr=log
    )
    while process.poll() is None and not (output / "run/checkpoint-10/training.json").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, output.with_suffix(".log").read_text()


def inputs_of(processor, asked):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Color?"}]}
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    for picture, _ in asked:
        yield processor(text=[prompt], images=[Image.open(picture)], return_tensors="pt")


def answers(model, processor, asked):
    """The answers, by the model's own `generate`."""
    found = []
    for inputs in inputs_of(processor, asked):
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        found.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :]))
    return found


@torch.no_grad()
def logits(model, processor, asked):
    """The logits after the prompts."""
    found = [model(**inputs).logits[0, -1] for inputs in inputs_of(processor, asked)]
    return torch.stack(found).float()


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_whole_way(family, tmp_path, monkeypatch, capsys, killed):
    """Exactly true: the checkpoint has the base's names, and answers bit for bit as vlmkit's merge
    into bf16 does. Beside that, the answers are those of the model that was trained in NF4, and
    the logits are those of the adapters on the bf16 base but for the rounding of the merge."""
    from transformers import AutoModelForImageTextToText

    base, processor = family("qwen2_5_vl"), PROCESSORS["qwen2_5_vl"]()
    monkeypatch.setattr("vlmkit.loading.load_processor", lambda *_: processor)
    rows, asked = rows_in(tmp_path / "data")
    output, out = tmp_path / "run", tmp_path / "merged"
    path = file_for(base, rows, output)
    adapters = output / "adapters"
    if killed:
        killed_after_a_checkpoint(path, output)
        assert not adapters.exists()
        assert cli.main(["train", path, "--resume"]) == 0
        assert re.search(r"resume +after step [12]0, from", capsys.readouterr().out)
        unbroken = tmp_path / "unbroken"
        assert cli.main(["train", file_for(base, rows, unbroken)]) == 0
        for file in ("adapter_model.safetensors", "trained_in_full.safetensors"):
            assert (adapters / file).read_bytes() == (unbroken / "adapters" / file).read_bytes()
    else:
        assert cli.main(["train", path]) == 0
    capsys.readouterr()
    assert cli.main(["merge", str(adapters), str(out)]) == 0
    assert "language_model   bf16       14 0.00" in capsys.readouterr().out

    asked = asked[-3:]
    trained = vk.finetuning.load(vk.load(base, PLAN)[0], adapters)
    plain = AutoModelForImageTextToText.from_pretrained(out)
    right = [f"{color}<eos>" for _, color in asked]
    assert answers(trained, processor, asked) == answers(plain, processor, asked) == right
    model = vk.load(base, "bf16")[0]
    untrained = logits(model, processor, asked)
    model = vk.finetuning.load(model, adapters)
    learnt = logits(model, processor, asked)
    found = logits(plain, processor, asked)
    assert torch.equal(logits(vk.finetuning.merge(model)[0], processor, asked), found)

    def apart(one, other):
        """The mean difference, as a share of what was learnt."""
        return ((one - other).abs().mean() / (learnt - untrained).abs().mean()).item()

    assert apart(found, learnt) < 0.01  # 2**-8 is a step of bf16
    assert apart(found, logits(trained, processor, asked)) < 0.1  # of NF4 beside bf16

    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys() and len(after) == 57
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"visual", "model"}
    assert all("merger" in name or "_proj.weight" in name for name in moved)
