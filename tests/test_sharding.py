"""A model in shards: what each process reads, that it computes the same, and what it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import tiny
import torch
from families import FAMILIES
from transformers import AutoModelForImageTextToText

import vlmkit as vk
from vlmkit.backend import sharding
from vlmkit.errors import CheckpointError, FinetuningError, PlanError
from vlmkit.finetuning import trainer
from vlmkit.layout import layout_of
from vlmkit.loading import weights
from vlmkit.loading.placing import resolve_device

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = Path(__file__).parent
CASES = [("llava", {"shards": True}), ("mllama", {}), ("qwen2_vl", {"tie": True, "shards": True})]
PLANS = ["bf16", "recommended", "language_model=nf4-dq,vision_encoder=nf4"]
ROUNDING = {"fp32": {"rel": 2e-3}, "recommended": {"abs": 2e-3}}


def launched(out, *words, succeeds=True):
    """What `sharded.py` found, in two processes that share a model by FSDP."""
    out.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # glibc keeps what is freed. With this it gives it back, so that what is seen is what is held.
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [HERE.parent, HERE]))
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--main_process_port=0"]
    launch += ["--config_file", HERE / "data" / "fsdp.yaml", HERE / "sharded.py", words[0], out]
    done = subprocess.run(
        [*launch, *words[1:]], capture_output=True, text=True, env=environment, timeout=900
    )
    assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
    return torch.load(out / f"{words[0]}.pt", weights_only=False) if succeeds else None


@pytest.mark.slow
def test_shards_are_the_model(tmp_path):
    """The same bytes, also where FSDP has gathered them, logits, loss and gradients as in one
    process: of three families, from one file and from several, with a tied head, in bf16 and in
    4 bits, and quantized already."""
    words = []
    for name, options in CASES:
        folder = FAMILIES[name](tmp_path / name, **options)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shards" in options)
        words += [word for plan in PLANS for word in (str(folder), plan)]
    quantized = vk.save(vk.load(folder, PLANS[1], processor=False)[0], None, tmp_path / "quantized")
    words += [str(quantized), PLANS[1]]
    shared = launched(tmp_path / "out", "facts", *words)
    assert len(shared) == len(CASES) * len(PLANS) + 1
    for folder, plan in zip(words[::2], words[1::2], strict=True):
        ours, alone = shared[f"{Path(folder).name} {plan}"], sharded.facts(folder, plan)
        assert ours["held"].keys() == alone["held"].keys() and ours["tied"] == alone["tied"]
        for name, (shape, states, codes) in alone["held"].items():
            assert ours["held"][name][0] == shape, name
            assert all(map(torch.equal, ours["held"][name][1], states)), name
            gathered = ours["held"][name][2].flatten().view(codes.dtype)
            assert torch.equal(gathered, codes.flatten()), name
        assert ours["bytes"] < 0.75 * alone["bytes"]
        assert torch.allclose(ours["logits"], alone["logits"], atol=0.02)
        assert ours["loss"] == pytest.approx(alone["loss"], abs=0.01)
        assert ours["gradients"].keys() == alone["gradients"].keys() and alone["gradients"]
        for name, gradient in alone["gradients"].items():
            away = (ours["gradients"][name] - gradient).norm()
            assert away <= 0.03 * gradient.norm(), (folder, plan, name)
    assert any(facts["tied"] for facts in shared.values())


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fp32", "recommended"])
def test_a_killed_training_in_shards_goes_on(plan, tmp_path):
    out = tmp_path / "out"
    launched(out, "train", "pebble", plan, '{"die_after": 3}', succeeds=False)
    assert (out / "run" / "checkpoint-2").exists() and not (out / "adapters").exists()
    found = launched(out, "train", "pebble", plan, "{}")
    alone = sharded.train(tmp_path / "alone", "pebble", plan)
    assert found["continued_from"] == 2 and len(found["losses"]) == 4
    assert found["losses"] == found["unbroken"] and "Leave optim out" in found["refused"]
    assert found["losses"] == pytest.approx(alone["losses"], **ROUNDING[plan])
    assert found["before"] == alone["before"] and found["trained"] == alone["trained"]
    kept, processor = vk.load("pebble", plan)
    kept = vk.finetuning.load(kept, out / "adapters")
    rows = vk.tasks.dataset("vqa", 24, split="train").select(range(4))
    assert vk.evaluate(kept, processor, rows).answers["predicted"].tolist() == found["after"]


@pytest.mark.slow
def test_a_training_in_bf16_leaves_the_formats_of_the_plan(tmp_path):
    """FSDP2 gathers everything in bf16 in such a training, also what the plan has in fp32, and the
    trained projector is held in fp32. Afterwards the model answers in the formats of its plan, as
    in one process."""
    plans = ["bf16", "fp32", "vision_encoder=fp32,projector=fp32,language_model=nf4"]
    shared, alone = launched(tmp_path / "out", "in_bf16", *plans), sharded.in_bf16(tmp_path, *plans)
    for number, plan in enumerate(plans):
        found, expected = shared[plan], alone[plan]
        assert found["losses"] == pytest.approx(expected["losses"], rel=0.02), plan
        assert found["kept"] and expected["kept"], plan
        model, processor = vk.load("pebble", plan)
        model = vk.finetuning.load(model, tmp_path / "out" / f"adapters-{number}")
        logits = sharded.logits(model, processor)
        assert torch.allclose(found["logits"], logits, atol=1e-5), plan


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "scales"), [("bf16", 0), ("recommended", 1 / 16)])
def test_no_process_holds_the_model(plan, scales, tmp_path):
    """Host memory of a load, of 272 MB in bf16 and 80 MB in NF4: at most the shard, the largest
    weight (in fp32, while it is quantized), and the scales of 4 bits."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    folder = tiny.llava(tmp_path / "model", text=text)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60MB")
    sizes = [p.numel() for p in model.parameters()]
    del model
    whole = vk.preview(folder, plan).total
    found = launched(tmp_path / "out", "memory", folder, plan)
    for most, after, held in found:
        assert held < 0.5 * whole * (1 + 2 * scales) + 1e6
        assert after < held + 0.05 * whole
        assert most < held + 4 * max(sizes) + 0.05 * whole < 0.85 * whole


# --- in one process -------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The environment of a process of a launch with FSDP2, without the others."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(sharding, "device_here", lambda cpu: torch.device("cpu"))
    assert sharding.is_asked()


def test_what_cannot_be_in_shards_is_refused(asked, monkeypatch):
    with pytest.raises(PlanError, match="int8 cannot be in shards"):
        vk.load("pebble", "language_model=int8", device="cpu")
    with pytest.raises(PlanError, match="Leave device_map out"):
        vk.load("pebble", device_map="auto")
    monkeypatch.setattr(sharding, "device_here", lambda cpu: torch.device("cuda", 1))
    with pytest.raises(PlanError, match="not the device of this process"):
        vk.load("pebble", device="cpu")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert not sharding.is_asked()


def test_too_little_memory_names_the_way_out(monkeypatch, llava):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", full)
    with pytest.raises(PlanError, match="takes 0.0 GB.*accelerate launch --config_file fsdp.yaml"):
        vk.load(llava, "bf16")
    said = weights._too_large(layout_of(llava, "bf16"), "cuda:0", shards=True)
    assert "Launch more processes" in said


def test_codes_that_are_stored_as_floats_are_refused(monkeypatch, tmp_path):
    """As a user's own load with bnb_4bit_quant_storage=torch.bfloat16 makes them."""
    model, processor = vk.load("pebble", "recommended")
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=2))
    sharding.require_codes(model)
    for parameter in model.parameters():
        if hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.reshape(-1).view(torch.bfloat16)[:, None]
    make = trainer.Trainer.create_accelerator_and_postprocess

    def under_fsdp2(self):
        make(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(trainer.Trainer, "create_accelerator_and_postprocess", under_fsdp2)
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)
    rows = vk.tasks.dataset("vqa", 2, split="train")
    with pytest.raises(FinetuningError, match="stored as bfloat16"):
        vk.finetuning.train(model, processor, rows, tmp_path, max_steps=1)


def test_the_layers_of_a_model():
    model, _ = vk.load("pebble", "bf16", processor=False)
    assert sharding.layers_of(model) == ["LlamaDecoderLayer", "SiglipEncoderLayer"]


def test_what_a_model_in_shards_is_refused(monkeypatch, tmp_path):
    model, processor = vk.load("pebble", "bf16")
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    for refused in (lambda: vk.save(model, processor, tmp_path / "m"),
                    lambda: vk.finetuning.merge(model)):  # fmt: skip
        with pytest.raises(CheckpointError, match="one process"):
            refused()
    with pytest.raises(FinetuningError, match="DoRA reads the whole weight"):
        vk.finetuning.add_adapters(model, language_model=vk.LoRA(use_dora=True))


def test_each_process_of_a_launch_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, place in (("0", 0), ("1", 1), ("2", 0)):  # 2: its launcher shows it one GPU alone
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert resolve_device() == torch.device("cuda", place)
    monkeypatch.delenv("LOCAL_RANK")
    assert resolve_device() == torch.device("cuda", 0)


def test_a_step_with_too_little_memory_names_the_ways_out(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model, processor = vk.load("pebble", "bf16")
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=2))
    monkeypatch.setattr(trainer.Trainer, "training_step", full)
    rows = vk.tasks.dataset("vqa", 2, split="train")
    with pytest.raises(FinetuningError, match="gradient_checkpointing=True.*docs/cluster.md"):
        vk.finetuning.train(model, processor, rows, tmp_path, max_steps=1)

    def full_in_shards(*args, **kwargs):
        monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
        full()

    monkeypatch.setattr(trainer.Trainer, "training_step", full_in_shards)
    with pytest.raises(FinetuningError, match="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"):
        vk.finetuning.train(model, processor, rows, tmp_path, max_steps=1)
