"""Killed at random moments: a training ends as if it had not been, and a saved folder is whole.

The quick siblings are in test_continuing.py (a kill at a chosen step) and test_folders.py (kills
while a folder is replaced)."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import tiny
import yaml
from safetensors.torch import load_file

import vlmkit as vk

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CHAINS, KILLS = 8, 5  # so many trainings, each killed so many times


def started(*words, code=None):
    command = ["-c", code] if code else ["-m", "vlmkit"]
    return subprocess.Popen(
        [sys.executable, *command, *map(str, words)], env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def resumed(folder):
    return started("train", folder.with_suffix(".yaml"), "--resume")


def described(folder, model):
    """Write a training file whose output is `folder`, beside it. Dropout and the order of the rows
    need the random state of the checkpoints."""
    said = {
        "model": str(model),
        "plan": "bf16",
        "train": {"projector": "full", "language_model": {"r": 2, "lora_dropout": 0.2}},
        "data": {"task": "vqa", "n": 10},
        "evaluation": {"task": "vqa", "n": 2},
        "settings": {
            "max_steps": 24, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "save_steps": 2, "eval_steps": 8,
        },
        "output": str(folder),
    }  # fmt: skip
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(said))


def result(folder):
    """What a finished training has written: adapters, losses, evaluations."""
    names = ("adapters/*.safetensors", "loss.csv", "evaluations.csv")
    found = {p.name: p.read_bytes() for name in names for p in folder.glob(name)}
    (state,) = (folder / "run" / "checkpoint-24").glob("trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_accuracy")
    return found | {"history": [{key: one.get(key) for key in kept} for one in history]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(the model, what a training of it writes, the seconds that it takes)."""
    place = tmp_path_factory.mktemp("undisturbed")
    model = tiny.llava(place / "model")
    described(place / "run", model)
    begun = time.monotonic()
    process = resumed(place / "run")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    seconds, wanted = time.monotonic() - begun, result(place / "run")
    assert len(wanted["loss.csv"].splitlines()) == 25 and len(wanted) == 5
    return model, wanted, seconds


@pytest.mark.parametrize("seed", range(CHAINS))
def test_a_training_killed_at_random_moments_ends_as_if_it_had_not_been(
    seed, undisturbed, tmp_path
):
    """Every second kill waits for a checkpoint, since a process imports for longer than it trains,
    and comes while it is written or soon after."""
    model, wanted, seconds = undisturbed
    dice, folder, steps = random.Random(seed), tmp_path / "run", []
    described(folder, model)
    while len(steps) < KILLS:
        process = resumed(folder)
        if len(steps) % 2 == seed % 2:
            step = min(24, last_step(folder) + 2 * dice.randint(1, 4))
            while process.poll() is None and last_step(folder) < step:
                time.sleep(0.002)
            moment = dice.uniform(0, 0.2)
        else:
            moment = dice.uniform(0, seconds)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            steps.append(last_step(folder))
        if process.returncode == 0 or last_step(folder) == 24:
            finishes(folder, wanted)
            shutil.rmtree(folder)
    finishes(folder, wanted)
    print(f"killed after steps {steps}")


def last_step(folder):
    """The step of the last checkpoint, whole or not."""
    return max([int(p.name.partition("-")[2]) for p in folder.glob("run/checkpoint-*")], default=0)


def finishes(folder, wanted):
    process = resumed(folder)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert result(folder) == wanted


# --- folders --------------------------------------------------------------------------------------

REPLACES = """
import sys, torch
import vlmkit as vk
from vlmkit import cli
what, model, out, adapters = sys.argv[1:]
base, processor = vk.load(model, "bf16")
adapted = vk.finetuning.load(base, adapters, trainable=True)
plain, _ = vk.load(model, "bf16")
print("ready", flush=True)
for i in range(10**6):
    with torch.no_grad():
        for one in (adapted, plain):
            next(p for n, p in one.named_parameters() if "linear_1.bias" in n).fill_(i)
    if what == "save":
        vk.save(plain, processor, out, overwrite=True)
    elif what == "finetuning.save":
        vk.finetuning.save(adapted, out, overwrite=True)
    else:
        vk.finetuning.save(adapted, f"{out}-adapters", overwrite=True)
        assert not cli.main(["merge", f"{out}-adapters", out, "--overwrite"])
    print("written", flush=True)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a model's folder, a folder of adapters and a projector trained in full)."""
    place = tmp_path_factory.mktemp("trained")
    model = tiny.llava(place / "model")
    ways = {"projector": "full", "language_model": vk.LoRA(r=2)}
    adapted = vk.finetuning.add_adapters(vk.load(model, "bf16")[0], **ways)
    return model, vk.finetuning.save(adapted, place / "adapters")


@pytest.mark.parametrize("what", ["save", "finetuning.save", "merge"])
def test_a_folder_that_is_replaced_is_whole_whenever_the_process_is_killed(what, trained, tmp_path):
    model, adapters = trained
    dice, out = random.Random(what), tmp_path / "out"
    for _ in range(5):
        process = started(what, model, out, adapters, code=REPLACES)
        for line in process.stdout:
            if line == "written\n":
                break
        time.sleep(dice.uniform(0, 0.5))
        process.kill()
        process.communicate()
        # the name has a whole folder before anything can have mended it
        assert out.is_dir()
        base, _ = vk.load(model if what == "finetuning.save" else out, "bf16")
        if what == "finetuning.save":
            vk.finetuning.load(base, out)
        else:
            vk.audit(base, "bf16")
        (weights,) = out.glob(
            "trained_in_full.safetensors" if "fine" in what else "model.safetensors"
        )
        (bias,) = (t for n, t in load_file(weights).items() if "linear_1.bias" in n)
        assert len(bias.unique()) == 1
