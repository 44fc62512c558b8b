"""Save and load again: the same bits, the same plan, and nothing half-written."""

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, differing, inputs, state

import vlmkit as vk
from vlmkit.checkpoints import read_config
from vlmkit.errors import AuditError, CheckpointError, PlanError
from vlmkit.layout import layout_of
from vlmkit.loading import plan_of
from vlmkit.loading.audit import format_of

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURE = Path(vk.__file__).parent / "course" / "pictures" / "shapes.png"
RECOMMENDED = vk.Plan.recommended()
TWO = vk.Plan(vision_encoder="int8", language_model="nf4-dq")
FOURS = vk.Plan(vision_encoder="fp4", projector="nf4", language_model="nf4-dq")
PLANS = {
    "recommended": RECOMMENDED,
    "int8": vk.Plan.uniform("int8"),
    "nf4-dq": vk.Plan.uniform("nf4-dq"),
    "two formats": TWO,
    "three of 4 bits": FOURS,
    "a layer kept": RECOMMENDED.override(r"layers\.1\.", "bf16"),
    "vision fp32": vk.Plan(vision_encoder="fp32", language_model="nf4"),
    "norms fp32": RECOMMENDED.override("norm", "fp32"),
    "bf16": vk.Plan(),
}
SHARP = {  # fused experts, cross-attention, nested projector, a class with rules, renamed weights
    ("qwen3_vl_moe", "two formats"),
    ("mllama", "two formats"),
    ("qwen2_vl", "a layer kept"),
    ("blip2", "norms fp32"),
    ("gemma3", "vision fp32"),
}


def load(folder, plan=None):
    return vk.load(folder, plan, processor=False)[0]


def formats_in(model):
    names = (name.rpartition(".") for name, _ in model.named_parameters())
    return {m: format_of(model.get_submodule(m), leaf) for m, _, leaf in names if leaf == "weight"}


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, plan",
    [
        pytest.param(name, plan, id=f"{name}, {plan}",
                     marks=() if name == "llava" or (name, plan) in SHARP else pytest.mark.slow)
        for name in FAMILIES
        for plan in PLANS
        if (name, plan) != ("gemma3", "three of 4 bits")  # no Linear layer in its projector
    ],
)  # fmt: skip
def test_comes_back_bit_for_bit(name, plan, family, tmp_path):
    asked = PLANS[plan]
    model = load(family(name, tie=True), asked)
    before, config = state(model), model.config.to_dict()
    vk.save(model, None, tmp_path / "saved")
    assert differing(before, state(model)) == [] and model.config.to_dict() == config
    again = load(tmp_path / "saved", "bf16" if plan == "bf16" else None)
    assert differing(before, state(again)) == []
    vk.audit(again, asked)
    implied = layout_of(again, plan_of(again)).rows
    assert [r.format for r in implied] == [r.format for r in layout_of(again, asked).rows]
    load(tmp_path / "saved", asked)  # what it holds may also be asked for
    out = [m.generate(**inputs(m), max_new_tokens=2, do_sample=False) for m in (model, again)]
    assert torch.equal(*out) and differing(before, state(again)) == []
    vk.save(again, None, tmp_path / "again")
    assert differing(before, state(load(tmp_path / "again", asked))) == []


def test_with_its_processor_and_from_several_files(llava, family, tmp_path):
    model, processor = vk.load(llava)
    assert vk.save(model, processor, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    again, theirs = vk.load(tmp_path / "a" / "b")
    assert type(theirs) is type(processor) and theirs.chat_template == processor.chat_template
    asked = (PICTURE, "What is it?")
    assert vk.ask(again, theirs, *asked) == vk.ask(model, processor, *asked)
    model = load(family("idefics3", shards=True))
    vk.save(model, None, tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert differing(state(model), state(load(tmp_path / "one"))) == []


def test_ledger_and_preview_of_a_quantized_checkpoint(family, tmp_path):
    vk.save(load(family("llava"), TWO), None, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert vk.memory.predict(tmp_path / "saved").by_kind == vk.memory.measure(again).by_kind
    assert vk.preview(tmp_path / "saved").rows == vk.audit(again, TWO).rows
    # another plan can be predicted, and not loaded
    bf16 = vk.memory.predict(family("llava"), "bf16").total
    assert vk.memory.predict(tmp_path / "saved", "bf16").total == bf16
    with pytest.raises(PlanError, match="is quantized already"):
        vk.preview(tmp_path / "saved", "bf16")
    # of a model on the hub, only the config files are read
    (tmp_path / "saved" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="read from its weight files, and they are not here"):
        vk.memory.predict(tmp_path / "saved")
    assert vk.memory.predict(tmp_path / "saved", "bf16").total == bf16


def test_asked_from_the_terminal(llava, tmp_path, capsys):
    from vlmkit.__main__ import main

    vk.save(*vk.load(llava, "int8"), tmp_path / "saved")
    assert not main(["ask", str(PICTURE), "What?", "--model", str(tmp_path / "saved")])
    said = capsys.readouterr().out
    assert "int8 + bf16" in said and "measured on the loaded model: the same" in said


# --- the same plan, without vlmkit ----------------------------------------------------------------

PLAIN = """
import json, sys
from transformers import AutoModelForImageTextToText

def kinds(folder):
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features"):
            state = getattr(module.weight, "quant_state", None)
            kind = str(module.weight.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
            found[name] = state.quant_type + "-dq" * state.nested if state else kind
    return found

folders = sys.argv[1:]
alone = [kinds(folder) for folder in folders]
assert "vlmkit" not in sys.modules
import vlmkit.backend.mixed
print(json.dumps([alone, kinds(folders[-1])]))
"""


def test_transformers_alone_loads_the_same(family, tmp_path):
    """In its own process; two formats load only after `import vlmkit.backend.mixed`."""
    ours, folders = [], []
    for plan in ("recommended", "int8", "three of 4 bits", "a layer kept", "two formats"):
        model = load(family("llava"), PLANS[plan])
        linears = {n for n, m in model.named_modules() if hasattr(m, "in_features")}
        ours.append({n: kind for n, kind in formats_in(model).items() if n in linears})
        folders.append(str(vk.save(model, None, tmp_path / plan)))
    run = subprocess.run([sys.executable, "-c", PLAIN, *folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    theirs, with_mixed = json.loads(run.stdout)
    assert theirs[:-1] == ours[:-1] and with_mixed == ours[-1]
    assert "vlmkit" in repr(model.config)
    assert "mismatched" in theirs[-1]  # an error, and never a model of packed bytes
    assert [len(set(kinds.values())) for kinds in ours] == [2, 2, 4, 2, 3]


def test_the_stored_config_lists_full_names(family, tmp_path):
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    vk.save(load(family("smolvlm")), None, tmp_path / "saved")
    stored = read_config(tmp_path / "saved").quantization_config
    assert stored["llm_int8_skip_modules"] == ["model.vision_model", "model.connector", "lm_head"]
    config = BitsAndBytesConfig.from_dict(stored)
    model = AutoModelForImageTextToText.from_pretrained(
        family("smolvlm"), quantization_config=config
    )
    vk.audit(model, "recommended")  # the stored config also works on the original weights


def test_short_names_become_full_ones(family, tmp_path):
    """A model that was loaded without vlmkit, by names that happen to work."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[".*vision_tower", "linear_1", "linear_2", "lm_head"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(family("llava"), quantization_config=config)
    assert plan_of(model) == RECOMMENDED
    vk.save(model, None, tmp_path / "saved")
    stored = read_config(tmp_path / "saved").quantization_config["llm_int8_skip_modules"]
    assert stored == ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    assert differing(state(model), state(load(tmp_path / "saved"))) == []


# --- the plan that a model or a checkpoint implies -----------------------------------------------


def test_plan_of_is_as_short_as_can_be(family):
    assert plan_of(load(family("llava"))) == RECOMMENDED
    layer = RECOMMENDED.override(r"^model\.language_model\.layers\.1\.", "bf16")
    assert plan_of(load(family("llava"), PLANS["a layer kept"])) == layer
    head = RECOMMENDED.override("lm_head", "nf4")
    assert plan_of(load(family("llava"), head)) == RECOMMENDED.override(r"^lm_head\.", "nf4")


def test_plans_for_a_quantized_checkpoint(family, tmp_path):
    """A plan can ask for other float formats, and not for other quantized ones."""
    vk.save(load(family("llava")), None, tmp_path / "saved")
    plan = vk.Plan(vision_encoder="fp32", language_model="nf4")
    vk.audit(load(tmp_path / "saved", plan), plan)
    for plan in ("bf16", "nf4-dq", "int8", "vision_encoder=nf4,language_model=nf4"):
        with pytest.raises(PlanError, match="is quantized already(.|\n)*holds .*, asked for "):
            load(tmp_path / "saved", plan)


def said_to_be(quantized, folder):
    """`folder`, whose config now says so of its weights."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    return folder


def test_other_quantizers(family, copy):
    folder = said_to_be({"quant_method": "gptq", "bits": 4}, copy(family("llava")))
    with pytest.raises(CheckpointError, match="quantized by gptq(.|\n)*does not load"):
        load(folder)


def test_the_headers_are_believed_and_not_the_config(family, copy):
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert plan_of(load(said_to_be(quantized, copy(family("llava"))))) == vk.Plan()


def test_a_quantized_file_that_was_cut_short(small, tmp_path):
    file = vk.save(small, None, tmp_path / "saved") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or was cut short"):
        load(tmp_path / "saved")


# --- what cannot be saved ---------------------------------------------------------------------


def test_a_repacked_model_is_refused(family, tmp_path):
    from bitsandbytes.functional import has_avx512bf16
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    if not has_avx512bf16():
        pytest.skip("no AVX512-BF16 here, and so no repacking")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForImageTextToText.from_pretrained(family("llava"), quantization_config=config)
    layer = model.model.vision_tower.encoder.layers[0].self_attn.q_proj
    layer(torch.zeros(1, 64, dtype=torch.bfloat16))
    with pytest.raises(AuditError, match="repacked by a forward pass on the CPU"):
        vk.save(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_adapters_are_refused(family, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(family("llava")), LoraConfig(target_modules=r".*q_proj"))
    with pytest.raises(CheckpointError, match="has PEFT adapters.*merge"):
        vk.save(adapted, None, tmp_path / "saved")


# --- nothing half-written ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(family):
    return load(family("llava"))


def left_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_disk_that_fills(small, tmp_path):
    """The system refuses what goes beyond 200 kB a file, in the middle of the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written.*File too large.*takes 0"):
            vk.save(small, None, tmp_path / "a" / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_in(tmp_path) == []
    vk.save(small, None, tmp_path / "a" / "b")


class Full:
    """A processor for which the disk is full, after the weights are written."""

    def save_pretrained(self, folder):
        assert (folder / "model.safetensors").exists()
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


class Interrupted:
    def save_pretrained(self, folder):
        raise KeyboardInterrupt


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_there_stays_when_a_save_fails(small, tmp_path, overwrite):
    target = tmp_path / "saved"
    if overwrite:
        vk.save(small, None, target)
    before = left_in(tmp_path)
    with pytest.raises(CheckpointError, match="No space left on device.*Nothing was left"):
        vk.save(small, Full(), target, overwrite=overwrite)
    with pytest.raises(KeyboardInterrupt):
        vk.save(small, Interrupted(), target, overwrite=overwrite)
    assert left_in(tmp_path) == before


def test_too_little_room_is_seen_before_anything_is_written(small, tmp_path, monkeypatch):
    room = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("vlmkit.folders.shutil.disk_usage", lambda folder: room)
    monkeypatch.setattr("vlmkit.loading.saving._write", None)
    with pytest.raises(CheckpointError, match="0.10 MB are free there.*takes 0.34"):
        vk.save(small, None, tmp_path / "saved")
    assert left_in(tmp_path) == []


def test_targets_that_are_taken(small, tmp_path):
    (tmp_path / "empty").mkdir()
    vk.save(small, None, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="not empty.*overwrite=True"):
        vk.save(small, None, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        vk.save(small, None, tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="could not be written"):
        vk.save(small, None, tmp_path / "file" / "below")
    (tmp_path / "empty" / "notes.txt").write_text("of before")
    vk.save(small, None, tmp_path / "empty", overwrite=True)
    assert not (tmp_path / "empty" / "notes.txt").exists()
    assert differing(state(small), state(load(tmp_path / "empty"))) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_the_old_one_comes_back_if_the_new_one_cannot_take_its_place(small, tmp_path, monkeypatch):
    target = tmp_path / "saved"
    vk.save(small, None, target)
    before = left_in(tmp_path)
    rename = Path.rename

    def fails(self, other):
        if self.name.startswith(".saved.") and not self.name.endswith(".old"):
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr("vlmkit.folders._exchange", lambda a, b: False)  # as on other systems
    with pytest.raises(CheckpointError, match="Permission denied"):
        vk.save(small, None, target, overwrite=True)
    assert left_in(tmp_path) == before
