"""docs/from_unsloth.md: what it says is here is run, row by row, and so is its code.

A row of its tables whose column "here" holds an expression has a test below, which gets `run`: that
expression, read from the page. A row without such a test fails, and so does a test without a row.
"""

import ast
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, inputs
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

import vlmkit as vk
from vlmkit.anatomy import component_finder
from vlmkit.course.pictures import FIRST
from vlmkit.errors import CheckpointError, FinetuningError, PlanError
from vlmkit.evaluation.asking import prepared
from vlmkit.formats import quantize
from vlmkit.loading import plan_of
from vlmkit.loading.audit import format_of

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parent.parent / "docs" / "from_unsloth.md").read_text()
# As in unsloth/models/loader.py (FastModel, of which FastVisionModel is another name) and vision.py
FROM_PRETRAINED = """
    model_name max_seq_length dtype load_in_4bit load_in_8bit load_in_16bit full_finetuning token
    device_map rope_scaling fix_tokenizer trust_remote_code use_gradient_checkpointing
    resize_model_vocab revision return_logits fullgraph use_exact_model_name auto_model
    whisper_language whisper_task unsloth_force_compile offload_embedding float32_mixed_precision
    fast_inference gpu_memory_utilization float8_kv_cache random_state max_lora_rank
    disable_log_stats qat_scheme load_in_fp8 unsloth_tiled_mlp target_parameters text_only
"""
GET_PEFT_MODEL = """
    model r target_modules lora_alpha lora_dropout bias finetune_vision_layers
    finetune_language_layers finetune_attention_modules finetune_mlp_modules finetune_last_n_layers
    layers_to_transform layers_pattern use_gradient_checkpointing random_state max_seq_length
    use_rslora modules_to_save init_lora_weights loftq_config task_type temporary_location
    qat_scheme target_parameters ensure_weight_tying
"""


# --- the page -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of a table. `names` of its parameters; `here` without backticks; `why` what differs."""

    section: str
    label: str
    names: tuple
    here: str
    expression: bool
    why: str


def sections():
    """(heading, text below it) of each section, in order."""
    parts = re.split(r"^##+ (.+)$", PAGE, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def rows():
    for heading, text in sections():
        table = re.findall(r"^\| (.+) \|$", text, re.MULTILINE)
        if not table or "what differs, and why" not in table[0]:
            continue
        section = heading.replace("`", "").rpartition(".")[2]
        for line in table[1:]:
            cells = [cell.strip() for cell in line.split("|")]
            assert len(cells) == 4, line
            first, _, here, why = cells
            label = re.sub(r"=[^`]*`", "`", first).replace("`", "")
            names = tuple(re.findall(r"`(\w+)", first))
            yield Row(section, label, names, here.strip("`"), here.startswith("`"), why)


def blocks():
    """(heading, code) of each block of Python, in order."""
    for heading, text in sections():
        for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield heading, code


ROWS = {(row.section, row.label): row for row in rows()}
EQUIVALENTS = {key for key, row in ROWS.items() if row.expression}
CHECKED = set()


def row(section, label):
    """Makes a test that of a row, and hands it the row's expression: run(name=value, …)."""
    CHECKED.add((section, label))
    return pytest.mark.parametrize("run", [(section, label)], indirect=True, ids=[label])


@pytest.fixture
def run(request):
    assert request.param in EQUIVALENTS, f"the page has no such row: {request.param}"
    ran = []

    def evaluate(**names):
        ran.append(True)
        return eval(ROWS[request.param].here, {"vk": vk, "torch": torch, **names})

    yield evaluate
    assert ran, "the row's expression was not run"


def test_every_row_with_an_equivalent_has_a_test_and_the_others_say_why():
    assert EQUIVALENTS == CHECKED
    assert len(EQUIVALENTS) > 30
    assert {r.here for r in ROWS.values() if not r.expression} == {"none"}
    assert [r.label for r in ROWS.values() if len(r.why) < 8] == []
    assert [r.label for r in ROWS.values() if r.expression and len(r.names) != 1] == []


@pytest.mark.parametrize(
    "section, wanted", [("from_pretrained", FROM_PRETRAINED), ("get_peft_model", GET_PEFT_MODEL)]
)
def test_every_parameter_has_a_row(section, wanted):
    found = [name for r in ROWS.values() if r.section == section for name in r.names]
    assert sorted(found) == sorted(wanted.split())


def test_code_for_unsloth_uses_what_the_tables_have():
    calls = [
        node
        for _, code in blocks()
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    theirs = [c for c in calls if getattr(c.func.value, "id", "") == "FastVisionModel"]
    assert {c.func.attr for c in theirs} == {
        "from_pretrained", "get_peft_model", "for_inference", "for_training"
    }  # fmt: skip
    for call in theirs:
        named = {keyword.arg for keyword in call.keywords}
        known = {n for r in ROWS.values() if r.section == call.func.attr for n in r.names}
        assert named <= known


def test_links_and_anchors_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h, _ in sections()}
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    elsewhere = [link.partition("#") for link in links if not link.startswith("#")]
    for page, _, anchor in elsewhere:
        text = (Path(__file__).parent.parent / "docs" / page).resolve().read_text()
        assert anchor in re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")


# --- helpers --------------------------------------------------------------------------------------


def formats(model):
    """{component: formats of its Linear layers}, heads apart, by what the modules hold."""
    component_of = component_finder(model)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and not name.endswith("lm_head"):
            found.setdefault(component_of(name), set()).add(format_of(module, "weight"))
    return found


def trained(model):
    """{component: names of what is trained}."""
    component_of = component_finder(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(component_of(name), set()).add(name)
    return found


def adapted_layers(model):
    return {n for n, m in model.named_modules() if hasattr(m, "lora_A")}


def question(model, processor):
    picture = Image.open(FIRST.path).convert("RGB")
    return dict(prepared(model, processor, [[picture]], [FIRST.question], 8))


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def take_steps(model, batch, steps=2):
    """A few steps of training on the prompt itself."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()


def gradients(model, batch):
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def pebble():
    return vk.load("pebble")


@pytest.fixture
def qwen(family):
    """Tied, with biases beside its Linear layers, and a projector inside the vision module."""
    return vk.load(family("qwen2_vl"), processor=False)[0]


# --- from_pretrained ------------------------------------------------------------------------------


@row("from_pretrained", "model_name")
def test_name(run, llava):
    for name in ("pebble", llava):
        model, processor = run(name=name)
        assert isinstance(model, PreTrainedModel) and isinstance(processor, ProcessorMixin)
        vk.audit(model, "recommended")


@row("from_pretrained", "load_in_4bit")
def test_4_bits(run, llava, family):
    model, _ = run(name=llava)
    everywhere = dict.fromkeys(("vision_encoder", "projector", "language_model"), {"nf4-dq"})
    assert formats(model) == everywhere
    assert format_of(model.lm_head, "weight") == "bf16"
    assert "head" in set(vk.audit(model, "nf4-dq").left_alone()["kind"])


@row("from_pretrained", "load_in_8bit")
def test_8_bits(run, llava):
    everywhere = dict.fromkeys(("vision_encoder", "projector", "language_model"), {"int8"})
    assert formats(run(name=llava)[0]) == everywhere
    both = vk.Plan(vision_encoder="int8", language_model="nf4-dq")
    assert formats(vk.load(llava, both)[0]) == {
        "vision_encoder": {"int8"}, "projector": {"bf16"}, "language_model": {"nf4-dq"}
    }  # fmt: skip


@row("from_pretrained", "load_in_16bit")
def test_16_bits(run, llava):
    assert {p.dtype for p in run(name=llava)[0].parameters()} == {torch.bfloat16}


@row("from_pretrained", "dtype")
def test_dtype(run, llava):
    assert {p.dtype for p in run(name=llava)[0].parameters()} == {torch.float16}
    mixed = vk.Plan(vision_encoder="fp16", projector="fp32", language_model="nf4")
    assert formats(vk.load(llava, mixed)[0]) == {
        "vision_encoder": {"fp16"}, "projector": {"fp32"}, "language_model": {"nf4"}
    }  # fmt: skip
    floats = {p.dtype for p in vk.load(llava, "nf4")[0].parameters() if p.is_floating_point()}
    assert floats == {torch.bfloat16}


@row("from_pretrained", "max_seq_length")
def test_length(run):
    settings = run()
    assert (settings.max_length, settings.too_long) == (2048, "skip")


@row("from_pretrained", "full_finetuning")
def test_full_finetuning(run, family):
    model, _ = vk.load(family("qwen2_vl"), "bf16", processor=False)
    model = run(model=model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(FinetuningError, match="is quantized"):
        run(model=vk.load(family("qwen2_vl"), "nf4-dq", processor=False)[0])


@row("from_pretrained", "device_map")
def test_device(run, llava):
    assert {p.device.type for p in run(name=llava)[0].parameters()} == {"cpu"}
    with pytest.raises(PlanError, match="cannot be used here"):
        vk.load(llava, device="cuda:99")


@row("from_pretrained", "trust_remote_code")
def test_remote_code(run, llava, copy):
    folder = copy(llava)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "their_own"}
    config["auto_map"] = {"AutoConfig": "theirs.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text("raise SystemExit('their code ran')")
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        vk.load(folder)
    with pytest.raises(SystemExit, match="their code ran"):
        run(name=folder)


@row("from_pretrained", "revision")
def test_revision(run, llava, llava_clip, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    for number, (reference, folder) in enumerate({"main": llava, "v1.0": llava_clip}.items()):
        (cached / "refs" / reference).write_text(str(number) * 40)
        shutil.copytree(folder, cached / "snapshots" / (str(number) * 40))
    towers = [m.config.vision_config.model_type for m in (
        vk.load("owner/name")[0], run(name="owner/name")[0])]  # fmt: skip
    assert towers == ["siglip_vision_model", "clip_vision_model"]


@row("from_pretrained", "use_gradient_checkpointing")
def test_gradient_checkpointing(run, pebble):
    checkpointing_keeps_gradients(run, *pebble, adapters_first=True)


def checkpointing_keeps_gradients(run, model, processor, adapters_first):
    batch = question(model, processor)
    reference, _ = vk.load("pebble")
    seeded = []
    for one in (reference, model):
        if one is model and not adapters_first:
            run(model=one)
        torch.manual_seed(0)
        one = vk.finetuning.add_adapters(one, projector="full", language_model=vk.LoRA())
        seeded.append(one)
    if adapters_first:
        run(model=seeded[1])
    assert [one.is_activation_checkpointing for one in seeded] == [False, True]
    wanted, found = (gradients(one, batch) for one in seeded)
    assert wanted.keys() == found.keys() and len(wanted) > 80
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@row("from_pretrained", "use_exact_model_name")
def test_exact_model(run, llava):
    """Its weights are those of the folder: as they are, or quantized from them."""
    model, _ = run(name=llava)
    source = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        weight = source.get_parameter(name)
        if parameter.is_floating_point():
            assert torch.equal(parameter, weight), name
        else:
            assert torch.equal(parameter.flatten(), quantize(weight, "nf4").data), name


@row("from_pretrained", "return_logits")
def test_logits(run, pebble):
    model, processor = pebble
    batch = question(model, processor)
    found = run(model=model, batch=batch)
    assert found.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)


# --- get_peft_model -------------------------------------------------------------------------------


@row("get_peft_model", "model")
@pytest.mark.parametrize("plan", ["recommended", "int8", "bf16"])
def test_any_model(run, plan, family):
    model, _ = vk.load(family("qwen2_vl"), plan, processor=False)
    assert isinstance(run(model=model), PeftModel)
    plain = AutoModelForImageTextToText.from_pretrained(family("qwen2_vl"))
    assert isinstance(run(model=plain), PeftModel)


@row("get_peft_model", "r")
def test_rank(run, qwen):
    model = run(model=qwen)
    component_of = component_finder(model)
    ranks = {}
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            ranks.setdefault(component_of(name), set()).add(len(parameter))
    assert ranks == {"vision_encoder": {4}, "language_model": {16}}


def scales(model):
    return {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}


@row("get_peft_model", "lora_alpha")
def test_alpha(run, qwen):
    both = {"vision_encoder": vk.LoRA(r=4), "language_model": run()}
    model = vk.finetuning.add_adapters(qwen, **both)
    assert scales(model) == {1, 16 / 8}  # the first without alpha


@row("get_peft_model", "lora_dropout")
def test_dropout(run, qwen):
    both = {"vision_encoder": vk.LoRA(dropout=0.2), "language_model": run()}
    with pytest.raises(FinetuningError, match="one dropout"):
        vk.finetuning.add_adapters(qwen, **both)
    model = vk.finetuning.add_adapters(qwen, language_model=run())
    dropouts = [m.lora_dropout["default"] for m in model.modules() if hasattr(m, "lora_dropout")]
    assert dropouts and {(d.p, d.training) for d in dropouts} == {(0.1, True)}
    assert not any(d.training for d in dropouts if model.eval())


@row("get_peft_model", "bias")
def test_bias(run, qwen):
    biases = [n for n, _ in qwen.named_parameters() if "language_model" in n and "bias" in n]
    model = run(model=qwen)
    assert biases and model.peft_config["default"].bias == "none"
    assert all("lora_" in name for name in trained(model)["language_model"])


@row("get_peft_model", "finetune_vision_layers")
def test_vision_layers(run, qwen):
    model = run(model=qwen)
    assert set(trained(model)) == {"vision_encoder"}
    layers = adapted_layers(model)
    assert any("visual.blocks.1.mlp" in name for name in layers)
    assert not any("merger" in name for name in layers)


@row("get_peft_model", "finetune_language_layers")
@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
def test_language_layers(run, name, family):
    model, _ = vk.load(family(name), processor=False)
    assert name == "qwen2_vl" or vk.anatomy(model)["cross_attention"].parameters
    assert set(trained(run(model=model))) == {"language_model"}


@row("get_peft_model", "finetune_attention_modules")
def test_attention_modules(run, qwen):
    model = vk.finetuning.add_adapters(qwen, language_model=run())
    assert {n.rpartition(".")[2] for n in adapted_layers(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip


@row("get_peft_model", "finetune_mlp_modules")
def test_mlp_modules(run, qwen):
    model = vk.finetuning.add_adapters(qwen, language_model=run())
    assert {n.rpartition(".")[2] for n in adapted_layers(model)} == {
        "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


@row("get_peft_model", "target_modules")
def test_target_modules(run, llava_clip):
    model, _ = vk.load(llava_clip)
    names = run(model=model)
    assert len(names) == 4 and all("language_model.layers" in name for name in names)
    listed = get_peft_model(model, LoraConfig(target_modules=names))
    assert set(trained(listed)) == {"language_model"}
    short = LoraConfig(target_modules=["q_proj", "v_proj"])
    suffixes = get_peft_model(vk.load(llava_clip)[0], short)
    assert set(trained(suffixes)) == {"language_model", "vision_encoder"}


@row("get_peft_model", "modules_to_save")
def test_projector(run, qwen):
    projector = [p for n, p in qwen.named_parameters() if "merger" in n]
    model = run(model=qwen)
    assert set(trained(model)) == {"projector", "language_model"}
    now = [p for n, p in model.named_parameters() if "merger" in n]
    assert len(now) == len(projector) and all(a is b for a, b in zip(now, projector, strict=True))
    assert all(p.requires_grad for p in now)


@row("get_peft_model", "use_gradient_checkpointing")
def test_gradient_checkpointing_before_adapters(run, pebble):
    checkpointing_keeps_gradients(run, *pebble, adapters_first=False)


@row("get_peft_model", "use_rslora")
def test_rank_stabilised(run, qwen):
    model = vk.finetuning.add_adapters(qwen, language_model=run())
    assert scales(model) == {16 / math.sqrt(16)}


@row("get_peft_model", "random_state")
def test_seed(run, family):
    def drawn(seeded):
        model, _ = vk.load(family("qwen2_vl"), processor=False)
        if seeded:
            run()
        model = vk.finetuning.add_adapters(model, language_model=vk.LoRA())
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    one, two, other = drawn(True), drawn(True), drawn(False)
    assert torch.equal(one, two) and not torch.equal(one, other)


@row("get_peft_model", "init_lora_weights")
def test_beginning(run, qwen):
    batch = inputs(qwen)
    wanted = logits(qwen, batch)
    assert torch.equal(logits(run(model=qwen), batch), wanted)


@row("get_peft_model", "ensure_weight_tying")
def test_ties(run, family):
    model = run(model=vk.load(family("qwen2_vl"), "bf16", processor=False)[0])
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight and head.requires_grad


# --- afterwards -----------------------------------------------------------------------------------

AFTERWARDS = "What is called on the model afterwards"


@row(AFTERWARDS, "for_inference")
def test_inference(run, pebble):
    model, processor = pebble
    assert not model.training  # as it is loaded
    side = processor.tokenizer.padding_side
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(dropout=0.5))
    assert model.training
    assert vk.ask(model, processor, FIRST.path, FIRST.question) == FIRST.answer
    assert model.training and processor.tokenizer.padding_side == side
    run(model=model)
    assert not any(m.training for m in model.modules())
    assert model.generation_config.use_cache


@row(AFTERWARDS, "for_training")
def test_training(run, pebble):
    model, _ = pebble
    run(model=model)
    assert all(m.training for m in model.modules())


@row(AFTERWARDS, "UnslothVisionDataCollator")
def test_collator(run, pebble):
    _, processor = pebble
    rows = list(vk.tasks.dataset("multi_image", 2)) + list(vk.tasks.dataset("vqa", 1))
    batch = run(processor=processor)(rows)
    assert batch["pixel_values"].shape[0] == 2 + 2 + 1
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        assert processor.decode(ids[labels != -100]).split()[0].startswith(row["answer"])


@row(AFTERWARDS, "train_on_responses_only")
def test_loss_on_the_answer(run, pebble):
    row = vk.tasks.dataset("vqa", 1)[0]
    table = run(processor=pebble[1], row=row)
    assert "".join(table[table["in_loss"]]["token"]).strip().startswith(row["answer"])
    assert row["question"] in "".join(table[~table["in_loss"]]["token"])


@pytest.fixture
def tuned(pebble):
    """pebble after some steps with adapters, a batch, and its logits."""
    model, processor = pebble
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=4))
    batch = question(model, processor)
    before = logits(model, batch)
    take_steps(model, batch)
    wanted = logits(model, batch)
    assert (wanted - before).abs().max() > 0.1
    return model, batch, wanted


@row(AFTERWARDS, "save_pretrained_merged, adapters only")
def test_adapters_saved(run, tuned, tmp_path):
    model, batch, wanted = tuned
    run(model=model, path=tmp_path)
    again = PeftModel.from_pretrained(vk.load("pebble")[0], tmp_path)
    assert torch.equal(logits(again, batch), wanted)
    with pytest.raises(CheckpointError, match="PEFT adapters"):
        vk.save(model, None, tmp_path / "whole")


@row(AFTERWARDS, "save_pretrained_merged, 16 bits")
def test_merged_in_16_bits(run, tuned, tmp_path):
    model, batch, _ = tuned
    model.save_pretrained(tmp_path)
    merged = run(name="pebble", path=tmp_path, PeftModel=PeftModel)
    vk.audit(merged, "bf16")
    apart = PeftModel.from_pretrained(vk.load("pebble", "bf16")[0], tmp_path)
    error = (logits(merged, batch) - logits(apart, batch)).abs().max()
    assert 0 < error < 0.02 * logits(apart, batch).abs().max()  # the sum is rounded to bf16


@row(AFTERWARDS, "save_pretrained_merged, 4 bits")
def test_merged_in_4_bits(run, tuned, tmp_path):
    model, batch, wanted = tuned
    merged = run(model=model)
    assert plan_of(merged) == vk.Plan.recommended()
    vk.audit(merged, "recommended")
    found = logits(merged, batch)
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert 0.001 < error < 0.05  # rounded to 4 bits once more
    vk.save(merged, None, tmp_path / "merged")
    again, _ = vk.load(tmp_path / "merged", processor=False)
    assert torch.equal(logits(again, batch), found)


# --- the code, in order ---------------------------------------------------------------------------


def loaded_in_4_bits(space):
    assert formats(space["model"]) == {
        "vision_encoder": {"bf16"}, "projector": {"bf16"}, "language_model": {"nf4-dq"}
    }  # fmt: skip


def language_model_only(space):
    assert set(trained(space["model"])) == {"language_model"}
    assert all("lora_" in name for name in trained(space["model"])["language_model"])


def projector_too(space):
    model, batch = space["model"], question(space["model"], space["processor"])
    assert set(trained(model)) == {"projector", "language_model"}
    assert all("lora_" not in name for name in trained(model)["projector"])
    before = logits(model, batch)
    take_steps(model, batch)
    space["batch"], space["wanted"] = batch, logits(model, batch)
    assert not torch.equal(before, space["wanted"])
    vk.audit(model, space["plan"])


def came_back(space):
    model = space["model"]
    assert torch.equal(logits(model, space["batch"]), space["wanted"])
    assert set(trained(model)) == {"projector", "language_model"}
    vk.audit(model, space["plan"])
    other, _ = vk.load("pebble", space["plan"])
    with torch.no_grad():
        for norm in (p for p in other.parameters() if p.dim() == 1):
            norm.mul_(2)
    with pytest.raises(FinetuningError, match="this model is another"):
        vk.finetuning.load(other, "my-adapters")


def in_training(space):
    assert space["model"].training and space["model"].is_activation_checkpointing


def bytes_said(space):
    table = re.findall(r"^\| `(\w+)`: .* \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    found = [(name, f"{space[name].total / 10**9:.2f}") for name, _ in table]
    assert len(table) == 2 and found == table
    assert space["step"].total > space["kept"].total
    assert {"adapter", "gradient", "optimizer state", "activation"} <= set(space["step"].by_kind)


AFTER = {
    "Load in 4 bits, with the vision encoder in 16": loaded_in_4_bits,
    "LoRA on the language model only": language_model_only,
    "Train the projector": projector_too,
    "Save and come back": came_back,
    "Inference and training": in_training,
    "What vlmkit does that Unsloth does not": bytes_said,
}


def is_theirs(code):
    return re.search(r"FastVisionModel|save_pretrained_merged", code)


def test_the_code_of_the_page_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = [(heading, code) for heading, code in blocks() if not is_theirs(code)]
    assert [heading for heading, _ in ours] == list(AFTER)
    space = {}
    for heading, code in ours:
        exec(compile(code, heading, "exec"), space)
        AFTER[heading](space)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_plan_means_the_same_on(name, family):
    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model="nf4-dq")
    assert repr(plan).replace("'", '"') in PAGE
    found = {r.component: r.found for r in vk.preview(family(name), plan).rows}
    assert found["vision_encoder"] == found["projector"] == "bf16"
    assert found["language_model"].startswith("nf4-dq")


@pytest.mark.parametrize("given", ["bf16", "fp32"])
def test_how_much_of_the_projector_moves(given):
    pattern = (
        r"rate of (\S+),\s+([\d.]+)% of pebble's\s+projector weights had moved, in fp32\s+([\d.]+)%"
    )
    rate, in_bf16, in_fp32 = re.search(pattern, PAGE).groups()
    model, processor = vk.load("pebble", vk.Plan(projector=given, language_model="nf4"))
    batch = question(model, processor)
    model = vk.finetuning.add_adapters(model, projector="full")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [model.get_parameter(name) for name in before], lr=float(rate), weight_decay=0
    )
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    moved = sum(model.get_parameter(n).ne(b).sum().item() for n, b in before.items())
    share = 100 * moved / sum(b.numel() for b in before.values())
    assert abs(share - float(in_bf16 if given == "bf16" else in_fp32)) < 1
