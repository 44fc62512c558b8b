"""docs/from_unsloth.md: every expression in a column "here" runs and does what its row says.

`row` makes a test the test of one row or of several; the fixture `run` evaluates the expression as
it is on the page. A row without a test fails, and so does a test without a row.
"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import inputs
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

import vlmkit as vk
from vlmkit.anatomy import component_finder
from vlmkit.course.pictures import FIRST
from vlmkit.errors import CheckpointError, FinetuningError
from vlmkit.evaluation.asking import prepared
from vlmkit.formats import quantize
from vlmkit.loading import plan_of
from vlmkit.loading.audit import format_of

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parent.parent / "docs" / "from_unsloth.md").read_text(encoding="utf-8")
PARTS = re.split(r"^##+ (.+)$", PAGE, flags=re.MULTILINE)
SECTIONS = list(zip(PARTS[1::2], PARTS[2::2], strict=True))


def expressions():
    """{(section, name of the row): expression} of all rows whose column "here" holds code."""
    found = {}
    for heading, text in SECTIONS:
        for line in re.findall(r"^\| (.+) \|$", text, re.MULTILINE):
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) == 4 and cells[2].startswith("`"):
                name = re.sub(r"=[^`]*`", "`", cells[0]).replace("`", "")
                section = heading.replace("`", "").rpartition(".")[2]
                found[(section, name)] = cells[2].strip("`")
    return found


EXPRESSIONS = expressions()
TESTED = set()


def row(section, *names):
    """Make a test the test of these rows; `run(name=value, ...)` evaluates the expression."""
    keys = [(section, name) for name in names]
    TESTED.update(keys)
    return pytest.mark.parametrize("run", keys, indirect=True, ids=names)


@pytest.fixture
def run(request):
    def evaluate(**names):
        return eval(EXPRESSIONS[request.param], {"vk": vk, "torch": torch, **names})

    evaluate.row = request.param[1]
    return evaluate


def test_every_expression_has_a_test():
    assert EXPRESSIONS.keys() == TESTED and len(TESTED) > 30


# --- helpers --------------------------------------------------------------------------------------


def formats(model):
    """{component: formats of its Linear layers}, without heads, by what the modules hold."""
    component_of = component_finder(model)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and not name.endswith("lm_head"):
            found.setdefault(component_of(name), set()).add(format_of(module, "weight"))
    return found


def trained(model):
    """{component: names of the parameters that are trained}."""
    component_of = component_finder(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(component_of(name), set()).add(name)
    return found


def adapted(model):
    """{full name: module} of the layers with an adapter."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def question(model, processor):
    picture = Image.open(FIRST.path).convert("RGB")
    return dict(prepared(model, processor, [[picture]], [FIRST.question], 8))


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def take_steps(model, batch, steps=2):
    """Train for a few steps on the prompt itself."""
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
    """A tiny model with tied embeddings, biases, and a projector inside the vision module."""
    return vk.load(family("qwen2_vl"), processor=False)[0]


# --- from_pretrained ------------------------------------------------------------------------------


@row("from_pretrained", "model_name")
def test_name(run, llava):
    model, processor = run(name=llava)
    assert isinstance(model, PreTrainedModel) and isinstance(processor, ProcessorMixin)
    vk.audit(model, "recommended")


FORMATS = {"load_in_4bit": "nf4-dq", "load_in_8bit": "int8", "load_in_16bit": "bf16"}
FORMATS["dtype"] = "fp16"


@row("from_pretrained", *FORMATS)
def test_format(run, llava):
    model, _ = run(name=llava)
    format = FORMATS[run.row]
    components = ("vision_encoder", "projector", "language_model")
    assert formats(model) == dict.fromkeys(components, {format})
    head = "fp16" if format == "fp16" else "bf16"
    assert format_of(model.lm_head, "weight") == head


@row("from_pretrained", "max_seq_length")
def test_length(run):
    settings = run()
    assert (settings.max_length, settings.too_long) == (2048, "skip")


@row("from_pretrained", "full_finetuning")
def test_full_finetuning(run, family, qwen):
    model, _ = vk.load(family("qwen2_vl"), "bf16", processor=False)
    assert all(p.requires_grad for p in run(model=model).parameters())
    with pytest.raises(FinetuningError, match="is quantized"):
        run(model=qwen)


@row("from_pretrained", "device_map")
def test_device(run, llava):
    assert {p.device.type for p in run(name=llava)[0].parameters()} == {"cpu"}


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
    models = vk.load("owner/name")[0], run(name="owner/name")[0]
    towers = [model.config.vision_config.model_type for model in models]
    assert towers == ["siglip_vision_model", "clip_vision_model"]


@row("from_pretrained", "use_exact_model_name")
def test_exact_model(run, llava):
    """The weights are those of the folder: unchanged, or quantized from them."""
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


def with_adapters(model):
    torch.manual_seed(0)
    return vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA())


@row("from_pretrained", "use_gradient_checkpointing")
def test_gradient_checkpointing(run, pebble):
    model = with_adapters(pebble[0])
    run(model=model)
    gradients_are_kept(model, pebble)


@row("get_peft_model", "use_gradient_checkpointing")
def test_gradient_checkpointing_before_adapters(run, pebble):
    run(model=pebble[0])
    gradients_are_kept(with_adapters(pebble[0]), pebble)


def gradients_are_kept(model, pebble):
    assert model.is_activation_checkpointing
    batch = question(*pebble)
    wanted = gradients(with_adapters(vk.load("pebble")[0]), batch)
    found = gradients(model, batch)
    assert wanted.keys() == found.keys() and len(wanted) > 80
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


# --- get_peft_model -------------------------------------------------------------------------------

COMPONENTS = {
    "model": {"language_model"},
    "bias": {"language_model"},
    "finetune_vision_layers": {"vision_encoder"},
    "finetune_language_layers": {"language_model"},
}


@row("get_peft_model", *COMPONENTS)
@pytest.mark.parametrize("name", ["qwen2_vl", "mllama"])
def test_only_the_named_component_gets_adapters(run, name, family):
    """Not the projector inside the vision module, not cross-attention, and not biases."""
    model = run(model=vk.load(family(name), processor=False)[0])
    assert isinstance(model, PeftModel) and model.peft_config["default"].bias == "none"
    assert trained(model).keys() == COMPONENTS[run.row]
    assert all("lora_" in name for names in trained(model).values() for name in names)


@row("get_peft_model", "init_lora_weights")
def test_adapters_begin_without_an_effect(run, qwen):
    batch = inputs(qwen)
    wanted = logits(qwen, batch)
    assert torch.equal(logits(run(model=qwen), batch), wanted)


@row("get_peft_model", "r")
def test_rank(run, qwen):
    model = run(model=qwen)
    component_of = component_finder(model)
    ranks = {(component_of(n), m.r["default"]) for n, m in adapted(model).items()}
    assert ranks == {("vision_encoder", 4), ("language_model", 16)}


@row("get_peft_model", "lora_alpha", "use_rslora")
def test_scale(run, qwen):
    layers = adapted(vk.finetuning.add_adapters(qwen, language_model=run())).values()
    wanted = {"lora_alpha": 16 / 8, "use_rslora": 16 / math.sqrt(16)}
    assert {layer.scaling["default"] for layer in layers} == {wanted[run.row]}


@row("get_peft_model", "lora_dropout")
def test_dropout(run, qwen):
    layers = adapted(vk.finetuning.add_adapters(qwen, language_model=run())).values()
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.1}


MODULES = {
    "finetune_attention_modules": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "finetune_mlp_modules": {"gate_proj", "up_proj", "down_proj"},
}


@row("get_peft_model", *MODULES)
def test_choice_of_modules(run, qwen):
    names = adapted(vk.finetuning.add_adapters(qwen, language_model=run()))
    assert {name.rpartition(".")[2] for name in names} == MODULES[run.row]


@row("get_peft_model", "target_modules")
def test_target_modules(run, llava_clip):
    model, _ = vk.load(llava_clip)
    names = run(model=model)
    assert len(names) == 4 and all("language_model.layers" in name for name in names)
    listed = get_peft_model(model, LoraConfig(target_modules=names))
    assert set(trained(listed)) == {"language_model"}


@row("get_peft_model", "modules_to_save")
def test_projector(run, qwen):
    """It is trained in place: no copy is made."""
    projector = [p for n, p in qwen.named_parameters() if "merger" in n]
    model = run(model=qwen)
    assert set(trained(model)) == {"projector", "language_model"}
    now = [p for n, p in model.named_parameters() if "merger" in n]
    assert all(a is b and b.requires_grad for a, b in zip(now, projector, strict=True))


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
    side = processor.tokenizer.padding_side
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA())
    assert vk.ask(model, processor, FIRST.path, FIRST.question) == FIRST.answer
    assert model.training and processor.tokenizer.padding_side == side  # as before the question
    run(model=model)
    assert not any(m.training for m in model.modules()) and model.generation_config.use_cache


@row(AFTERWARDS, "for_training")
def test_training(run, pebble):
    run(model=pebble[0])
    assert all(m.training for m in pebble[0].modules())


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


@row(AFTERWARDS, "save_pretrained_merged, 16 bits")
def test_merged_in_16_bits(run, tuned, tmp_path):
    model, batch, _ = tuned
    model.save_pretrained(tmp_path)
    merged = run(name="pebble", path=tmp_path, PeftModel=PeftModel)
    vk.audit(merged, "bf16")
    apart = PeftModel.from_pretrained(vk.load("pebble", "bf16")[0], tmp_path)
    error = (logits(merged, batch) - logits(apart, batch)).abs().max()
    assert 0 < error < 0.02 * logits(apart, batch).abs().max()  # because the sum is rounded to bf16


@row(AFTERWARDS, "save_pretrained_merged, 4 bits")
def test_merged_in_4_bits(run, tuned, tmp_path):
    model, batch, wanted = tuned
    merged = run(model=model)
    assert plan_of(merged) == vk.Plan.recommended()
    vk.audit(merged, "recommended")
    found = logits(merged, batch)
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert 0.001 < error < 0.05  # because the sum is rounded to 4 bits again
    vk.save(merged, None, tmp_path / "merged")
    again, _ = vk.load(tmp_path / "merged", processor=False)
    assert torch.equal(logits(again, batch), found)


# --- the code of the page, in order ---------------------------------------------------------------


def loaded_in_4_bits(space):
    assert formats(space["model"]) == {
        "vision_encoder": {"bf16"}, "projector": {"bf16"}, "language_model": {"nf4-dq"}
    }  # fmt: skip


def language_model_only(space):
    assert set(trained(space["model"])) == {"language_model"}


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


def in_training(space):
    assert space["model"].training and space["model"].is_activation_checkpointing


def bytes_of_the_table(space):
    table = re.findall(r"^\| `(\w+)`: .* \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(table) == 2
    assert [(name, f"{space[name].total / 10**9:.2f}") for name, _ in table] == table
    assert space["step"].total > space["kept"].total


AFTER = (
    loaded_in_4_bits, language_model_only, projector_too, came_back, in_training, bytes_of_the_table
)  # fmt: skip
UNSLOTH = re.compile(r"FastVisionModel|save_pretrained_merged")


def test_the_code_of_the_page_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    ours = [code for code in blocks if not UNSLOTH.search(code)]
    space = {}
    for code, check in zip(ours, AFTER, strict=True):
        exec(compile(code, check.__name__, "exec"), space)
        check(space)


@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_how_much_of_the_projector_moves(format):
    """In bf16 most weights are over 256 times as large as a step, so that it is rounded away."""
    model, processor = vk.load("pebble", vk.Plan(projector=format, language_model="nf4"))
    batch = question(model, processor)
    model = vk.finetuning.add_adapters(model, projector="full")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([model.get_parameter(n) for n in before], 2e-5, weight_decay=0)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    moved = sum(model.get_parameter(n).ne(b).sum().item() for n, b in before.items())
    share = 100 * moved / sum(b.numel() for b in before.values())
    stated = [float(n) for n in re.findall(r"([\d.]+)%", PAGE)]
    assert any(abs(share - number) < 1 for number in stated), f"{share:.1f}% is not on the page"
