"""Training over the loading matrix: every family, with its own processor, trains what is asked."""

import importlib
import json
import sys

import pytest
import torch
from families import FAMILIES
from processors import PROCESSORS, tokenizer
from test_finetuning import lora_everywhere
from test_training import TWO_CPUS, launched
from transformers.cache_utils import Cache

import vlmkit as vk
from vlmkit.anatomy import component_finder
from vlmkit.finetuning import Collator

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*got no gradient"),  # `no_gradient` has it
]
QUICK = ("llava", "qwen2_vl", "mllama")  # plain; projector inside the tower; cross-attention
NOT_BUILT = {
    "smolvlm": ("SmolVLMProcessor", "num2words"),
    "mistral3": ("PixtralProcessor", "torchvision"),
}


@pytest.fixture(scope="module")
def rows():
    """Their question is short: what the tiny Gemma 3 answers reaches back 30 tokens."""
    return [row | {"question": "What?"} for row in vk.tasks.dataset("vqa", 8, split="train")]


def quick_or_slow(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", quick_or_slow(PROCESSORS))
def test_two_steps(name, family, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Cache, "update", None)  # no step keeps keys and values
    model, _ = vk.load(family(name), processor=False)
    ways = lora_everywhere(model)
    model = vk.finetuning.add_adapters(model, **ways)
    vk.audit(model, "recommended")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = vk.finetuning.train(
        model, PROCESSORS[name](), rows, tmp_path, max_steps=2, per_device_train_batch_size=4,
        learning_rate=1e-2, warmup_steps=0,
    )  # fmt: skip
    assert run.curve["loss"].notna().all() and len(run.curve) == 2
    vk.audit(model, "recommended")
    component_of = component_finder(model)
    changed = {n for n, p in model.named_parameters() if p.ne(before[n]).any()}
    assert {component_of(n) for n in changed} == set(ways)
    without = set(run.no_gradient["parameter"])
    if name in ("llava", "llava_next"):  # vision_feature_layer=-2: the last layer feeds nothing
        assert without and all("vision_tower.encoder.layers.1." in n for n in without)
        assert run.no_gradient["why"].str.contains("vision_feature_layer is -2").all()
    else:
        assert without == set()
    # an A learns from the second step on, when its B is no longer zero
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad} - without


def one_step(name, folder, output, **settings):
    """(loss, norm of the gradient) of a step of four samples, whose answers differ in length.

    transformers #47688: in four parts, some families had another loss than in one.
    """
    rows = vk.tasks.dataset("vqa", 4, split="train")
    told = zip(rows, ["no", "a long answer.", "no", "no"], strict=True)
    rows = [row | {"question": "What?", "answer": answer} for row, answer in told]
    model, _ = vk.load(folder, "fp32", processor=False)
    for module in model.modules():  # BLIP-2 drops numbers of each part anew
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and "dropout" in key:
                setattr(module, key, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = vk.finetuning.add_adapters(model, **lora_everywhere(model))
    run = vk.finetuning.train(
        model, PROCESSORS[name](), rows, output, max_steps=1, bf16=False, **settings
    )
    return run.curve["loss"].item(), run.curve["grad_norm"].item()


@pytest.mark.parametrize("name", quick_or_slow(PROCESSORS))
def test_a_step_in_parts_is_the_step_in_one(name, family, tmp_path):
    whole = one_step(name, family(name), tmp_path / "1", per_device_train_batch_size=4)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert one_step(name, family(name), tmp_path / "4", **parts) == pytest.approx(whole, rel=1e-4)


TWO = f"""
import json, os, sys, torch
sys.path[:0] = {sys.path!r}
torch.set_num_threads(1)
from pathlib import Path
from test_family_training import one_step
name, folder, output = sys.argv[1:]
parts = {{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}}
found = one_step(name, folder, output, **parts)
if os.environ["RANK"] == "0":
    print("found", json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])  # whose own loss counts, and does not
def test_a_step_on_two_processes_is_the_step_on_one(name, family, tmp_path):
    whole = one_step(name, family(name), tmp_path / "1", per_device_train_batch_size=4)
    (tmp_path / "two.py").write_text(TWO)
    told = launched(TWO_CPUS, tmp_path / "two.py", name, family(name), tmp_path / "2")
    found = next(line for line in told.splitlines() if line.startswith("found"))
    assert json.loads(found.removeprefix("found")) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_loss_sees_the_answer_alone(name, rows):
    processor = PROCESSORS[name]()
    batch = Collator(processor)(list(rows))
    end = "<eos>"
    for row, labels in zip(rows, batch["labels"], strict=True):
        told = processor.tokenizer.decode(labels[labels != -100])
        assert told.strip() == row["answer"] + end


def test_the_matrix_is_covered():
    assert {*PROCESSORS, *NOT_BUILT} == set(FAMILIES)


@pytest.mark.parametrize("name", NOT_BUILT)
def test_why_a_processor_is_not_built(name):
    """A package that vlmkit does not require; with it, this test is where to add the family."""
    kind, package = NOT_BUILT[name]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is here")
    folder = {"smolvlm": "smolvlm", "mistral3": "pixtral"}[name]
    with pytest.raises(ImportError, match=package):
        module = importlib.import_module(f"transformers.models.{folder}.processing_{folder}")
        getattr(module, kind)(None, tokenizer(), None)
