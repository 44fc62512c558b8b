"""docs/from_unsloth.md: every expression in a column "here" runs and does what its row says.

`row` makes a test the test of one row or of several; the fixture `run` evaluates the expression as
it is on the page. A row without a test fails, and so does a test without a row.
"""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

import vlmkit as vk
from vlmkit.anatomy import component_finder
from vlmkit.course.pictures import FIRST
from vlmkit.evaluation.asking import prepared

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


@pytest.fixture
def pebble():
    return vk.load("pebble")


@pytest.fixture
def qwen(family):
    """A tiny model with tied embeddings, biases, and a projector inside the vision module."""
    return vk.load(family("qwen2_vl"), "bf16", processor=False)[0]


# --- from_pretrained ------------------------------------------------------------------------------

PLANS = dict.fromkeys(("model_name", "device_map", "trust_remote_code"), "recommended")
PLANS |= {"use_exact_model_name": "recommended", "dtype": "fp16"}
PLANS |= {"load_in_4bit": "nf4-dq", "load_in_8bit": "int8", "load_in_16bit": "bf16"}


@row("from_pretrained", *PLANS)
def test_loads_under_the_plan(run, llava):
    model, processor = run(name=llava)
    assert isinstance(model, PreTrainedModel) and isinstance(processor, ProcessorMixin)
    vk.audit(model, PLANS[run.row])
    assert run.row != "device_map" or {p.device.type for p in model.parameters()} == {"cpu"}


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


@row("from_pretrained", "max_seq_length")
def test_length(run):
    settings = run()
    assert (settings.max_length, settings.too_long) == (2048, "skip")


@row("from_pretrained", "return_logits")
def test_logits(run, pebble):
    model, processor = pebble
    batch = question(model, processor)
    found = run(model=model, batch=batch)
    assert found.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)


@pytest.mark.parametrize("adapters_first", [True, False])
@row("from_pretrained", "use_gradient_checkpointing")
def test_checkpointing_is_on_before_and_after_adapters(run, pebble, adapters_first):
    model = pebble[0]
    if adapters_first:
        model = vk.finetuning.add_adapters(model, language_model=vk.LoRA())
    run(model=model)
    if not adapters_first:
        model = vk.finetuning.add_adapters(model, language_model=vk.LoRA())
    assert model.is_activation_checkpointing


# --- get_peft_model -------------------------------------------------------------------------------

TRAINED = dict.fromkeys(
    ("model", "bias", "finetune_language_layers", "init_lora_weights", "ensure_weight_tying"),
    {"language_model"},
)
TRAINED["finetune_vision_layers"] = {"vision_encoder"}
TRAINED["r"] = {"vision_encoder", "language_model"}
TRAINED["modules_to_save"] = {"projector", "language_model"}


@row("get_peft_model", *TRAINED)
def test_only_named_components_are_trained(run, qwen):
    """Not the projector inside the vision module, and not biases beside adapters."""
    tied = qwen.get_input_embeddings().weight
    model = run(model=qwen)
    assert trained(model).keys() == TRAINED[run.row]
    if run.row == "ensure_weight_tying":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is tied
    else:
        names = set().union(*trained(model).values()) - trained(model).get("projector", set())
        assert all("lora_" in name for name in names)
    if run.row == "r":
        assert {layer.r["default"] for layer in adapted(model).values()} == {4, 16}


@row("from_pretrained", "full_finetuning")
def test_full_finetuning(run, qwen):
    assert all(p.requires_grad for p in run(model=qwen).parameters())


LAYERS = {
    "lora_alpha": {16 / 8},
    "use_rslora": {16 / math.sqrt(16)},
    "lora_dropout": {0.1},
    "finetune_attention_modules": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "finetune_mlp_modules": {"gate_proj", "up_proj", "down_proj"},
}


@row("get_peft_model", *LAYERS)
def test_settings_of_adapters(run, qwen):
    layers = adapted(vk.finetuning.add_adapters(qwen, language_model=run()))
    if run.row == "lora_dropout":
        found = {layer.lora_dropout["default"].p for layer in layers.values()}
    elif run.row.startswith("finetune_"):
        found = {name.rpartition(".")[2] for name in layers}
    else:
        found = {layer.scaling["default"] for layer in layers.values()}
    assert found == LAYERS[run.row]


@row("get_peft_model", "target_modules")
def test_target_modules(run, llava_clip):
    model, _ = vk.load(llava_clip)
    names = run(model=model)
    assert len(names) == 4 and all("language_model.layers" in name for name in names)
    listed = get_peft_model(model, LoraConfig(target_modules=names))
    assert set(trained(listed)) == {"language_model"}


@row("get_peft_model", "use_gradient_checkpointing")
def test_checkpointing(run, pebble):
    run(model=pebble[0])
    assert pebble[0].is_activation_checkpointing


@row("get_peft_model", "random_state")
def test_seed(run, family):
    def drawn():
        torch.seed()
        model = run(model=vk.load(family("qwen2_vl"), processor=False)[0])
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(drawn(), drawn())


# --- afterwards -----------------------------------------------------------------------------------

AFTERWARDS = "What is called on the model afterwards"


@row(AFTERWARDS, "for_inference", "for_training")
def test_modes(run, pebble):
    model, processor = pebble
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA())
    side = processor.tokenizer.padding_side
    assert vk.ask(model, processor, FIRST.path, FIRST.question) == FIRST.answer
    assert model.training and processor.tokenizer.padding_side == side  # as before the question
    run(model=model)
    assert {m.training for m in model.modules()} == {run.row == "for_training"}


@row(AFTERWARDS, "UnslothVisionDataCollator")
def test_collator(run, pebble):
    rows = list(vk.tasks.dataset("multi_image", 2)) + list(vk.tasks.dataset("vqa", 1))
    batch = run(processor=pebble[1])(rows)
    assert batch["pixel_values"].shape[0] == 2 + 2 + 1 and len(batch["labels"]) == 3


@row(AFTERWARDS, "train_on_responses_only")
def test_loss_on_the_answer(run, pebble):
    row = vk.tasks.dataset("vqa", 1)[0]
    table = run(processor=pebble[1], row=row)
    assert "".join(table[table["in_loss"]]["token"]).strip().startswith(row["answer"])
    assert row["question"] in "".join(table[~table["in_loss"]]["token"])


SAVED = [f"save_pretrained_merged, {which}" for which in ("adapters only", "16 bits", "4 bits")]


@row(AFTERWARDS, *SAVED)
def test_saved_and_merged(run, pebble, tmp_path):
    """Adapters come back exactly; a merge rounds the sum, so that logits change a little."""
    model, processor = pebble
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=4))
    batch = question(model, processor)
    take_steps(model, batch)
    wanted = logits(model, batch)
    model.save_pretrained(tmp_path)
    names = {"model": model, "path": tmp_path, "name": "pebble", "PeftModel": PeftModel}
    found = run(**names)
    if "adapters" in run.row:
        again = PeftModel.from_pretrained(vk.load("pebble")[0], tmp_path)
        assert torch.equal(logits(again, batch), wanted)
        return
    if "16" in run.row:
        vk.audit(found, "bf16")
        apart = PeftModel.from_pretrained(vk.load("pebble", "bf16")[0], tmp_path)
        wanted = logits(apart, batch)
    else:
        vk.audit(found, "recommended")
    error = (logits(found, batch) - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < 0.05


# --- the code of the page, in order ---------------------------------------------------------------


def loaded_in_4_bits(space):
    vk.audit(space["model"], vk.Plan(language_model="nf4-dq"))


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
