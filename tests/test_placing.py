"""How a model is loaded besides its plan: devices, attention, limits of pictures."""

import shutil

import families
import pytest
import torch
from families import inputs, logits
from PIL import Image
from processors import PROCESSORS
from transformers import AutoProcessor

import vlmkit as vk
from vlmkit.errors import PlanError, SizeError
from vlmkit.evaluation.prompts import question_inputs
from vlmkit.families import newer_names, with_limits
from vlmkit.loading.placing import check_attention, check_placed
from vlmkit.loading.processors import set_limits
from vlmkit.memory.batch import picture_of

pytestmark = pytest.mark.usefixtures("one_thread")

PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
BOTH = vk.Plan(vision_encoder="int8", language_model="nf4-dq")


def load(folder, plan="bf16", **how):
    return vk.load(folder, plan, processor=False, **how)[0]


def answer(model):
    made = model.generate(**inputs(model), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return made[0, -4:].tolist()


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mllama", "idefics2"])
def test_every_attention_gives_the_same(name, family):
    models = {how: load(family(name), "fp32", attn_implementation=how) for how in ("eager", "sdpa")}
    for how, model in models.items():
        parts = [model.config, *(getattr(model.config, part) for part in model.config.sub_configs)]
        assert {part._attn_implementation for part in parts} == {how}
        vk.audit(model, "fp32")
    assert torch.allclose(*map(logits, models.values()), atol=1e-5)
    assert answer(models["eager"]) == answer(models["sdpa"])


def test_attention_of_one_part(family):
    model = load(family("llava"), attn_implementation={"vision_config": "eager"})
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "asked, says",
    [
        ("flash_attention_2", "doesn't seem to be installed"),
        ("flash", "not supported"),
        ("paged|eager", "such as 'sdpa'"),
        (True, "such as 'sdpa'"),
        ({}, "such as 'sdpa'"),
        ({"vision_encoder": "eager"}, "Did you mean 'vision_config'"),
        ({"text_config": "flash_attention_2"}, "doesn't seem to be installed"),
        ({"text_config": {"head_config": "eager"}}, "'head_config'"),
    ],
)
def test_attention_that_is_not_there_is_refused_before_weights(asked, says, family, monkeypatch):
    monkeypatch.setattr("vlmkit.loading.load_weights", None)
    with pytest.raises(PlanError, match=says):
        load(family("llava"), attn_implementation=asked)
    with pytest.raises(PlanError, match=says):
        vk.memory.predict(family("llava"), "bf16", attn_implementation=asked)


def test_attention_that_a_family_or_a_device_does_not_have(family):
    with pytest.raises(PlanError, match="flex_attention"):
        load(family("qwen2_vl"), attn_implementation="flex_attention")
    layout = vk.layout.layout_of(family("llava"), "bf16")
    layout.config._attn_implementation = "flash_attention_2"  # as if it were installed
    with pytest.raises(PlanError, match="does not run on a CPU"):
        check_attention(layout, torch.device("cpu"))
    check_attention(layout, torch.device("cuda"))
    layout = vk.layout.layout_of(family("llava"), "vision_encoder=fp32")
    layout.config._attn_implementation = "flash_attention_2"
    with pytest.raises(PlanError, match="does not run in fp32"):
        check_attention(layout, torch.device("cuda"))


def test_memory_counts_the_matrices_of_eager_attention(family):
    """What a prompt needs under eager attention, measured by PyTorch's own profiler."""
    from vlmkit.memory.batch import batch_of

    folder, prompt = family("llava"), {"tokens": 100, "images": 1, "batch_size": 3}
    peaks = {}
    for how in ("sdpa", "eager"):
        model = load(folder, attn_implementation=how)
        tensors = batch_of(model.config, folder, **prompt).inputs(torch.randn)
        tensors["pixel_values"] = tensors["pixel_values"].bfloat16()
        with torch.no_grad():
            peak = vk.memory.measure_peak(lambda m=model, t=tensors: m(**t, logits_to_keep=1))
        ledger = vk.memory.predict(folder, "bf16", attn_implementation=how, **prompt)
        added = ledger.total - vk.memory.predict(folder, "bf16").total
        added -= sum(tensor.nbytes for tensor in tensors.values())
        assert peak <= added <= 1.03 * peak
        assert vk.memory.predict(model, "bf16", **prompt).total == ledger.total
        peaks[how] = peak
    assert peaks["eager"] > 1.3 * peaks["sdpa"]


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["bf16", BOTH], ids=["bf16", "two formats"])
def test_maps_to_the_cpu_are_what_device_gives(plan, family):
    folder = family("llava")
    expected = answer(load(folder, plan, device="cpu"))
    maps = ["cpu", torch.device("cpu"), {"": "cpu"}, dict.fromkeys(PARTS, "cpu")]
    maps += [] if torch.cuda.is_available() else ["auto", "balanced", "sequential"]
    for device_map in maps:
        model = load(folder, plan, device_map=device_map)
        vk.audit(model, plan)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert answer(model) == expected


def test_a_tied_head_may_be_named(family):
    load(family("llava", tie=True), device_map=dict.fromkeys(PARTS, "cpu"))


@pytest.mark.parametrize(
    "device_map, says",
    [
        ("tpu9", "'tpu9' cannot be used.*one of auto"),
        ("disk", "cannot be used"),
        ("meta", "no weights"),
        (-1, "cannot be used"),
        (1.5, "cannot be used"),
        ({}, "empty"),
        ({"": "disk"}, "disk"),
        ({**dict.fromkeys(PARTS, "cpu"), "lm_head": "disk"}, "disk"),
        ({"": "meta"}, "no weights"),
        ({"": None}, "None"),
        ({"": "tpu9"}, "tpu9"),
        ({"model.vision_tour": "cpu", "": "cpu"}, "Did you mean 'model.vision_tower'"),
        ({"model.vision_tower.": "cpu", "": "cpu"}, "Did you mean 'model.vision_tower'"),
        ({3: "cpu", "": "cpu"}, "names 3"),
        (dict.fromkeys(PARTS[:2], "cpu"), "no device to .* model.language_model"),
    ],
)
def test_maps_that_are_refused_before_weights(device_map, says, family, monkeypatch):
    monkeypatch.setattr("vlmkit.loading.load_weights", None)
    with pytest.raises(PlanError, match=says):
        load(family("llava"), device_map=device_map)


def test_a_model_is_on_gpus_or_on_the_cpu(family, monkeypatch):
    """As with GPUs: a map over both kinds, and a strategy that found too little room."""
    monkeypatch.setattr("vlmkit.loading.placing.resolve_device", torch.device)
    with pytest.raises(PlanError, match="on cpu and on cuda"):
        load(family("llava"), device_map={"model.vision_tower": "cpu", "": "cuda:0"})
    model = torch.nn.Linear(1, 1)
    model.hf_device_map = {"a": 0, "b": 1}
    check_placed(model)
    for elsewhere in ("cpu", "disk"):
        model.hf_device_map = {"a": 0, "b": elsewhere}
        with pytest.raises(PlanError, match="on cpu and on cuda.*vk.fit"):
            check_placed(model)
    with pytest.raises(PlanError, match="one of them"):
        load(family("llava"), device="cpu", device_map="cpu")


def test_hooks_of_accelerate_change_no_answer(llava):
    """accelerate puts these hooks on the modules of a model that is spread over several GPUs."""
    from accelerate import dispatch_model

    model, processor = vk.load(llava, BOTH)
    picture = Image.new("RGB", (30, 20), "red")
    before = vk.ask(model, processor, picture, "What?", max_new_tokens=6)
    keys = {"skip_keys": model._skip_keys_device_placement}
    dispatch_model(model, dict.fromkeys(PARTS, "cpu"), "cpu", force_hooks=True, **keys)
    assert hasattr(model.model.vision_tower, "_hf_hook")
    assert vk.ask(model, processor, picture, "What?", max_new_tokens=6) == before
    vk.audit(model, BOTH)


def test_a_mapped_model_is_asked_and_trained(llava, tmp_path):
    model, processor = vk.load(llava, device_map=dict.fromkeys(PARTS, "cpu"))
    picture = Image.new("RGB", (30, 20), "red")
    plain, _ = vk.load(llava)
    said = [vk.ask(m, processor, picture, "What?", max_new_tokens=4) for m in (model, plain)]
    assert said[0] == said[1]
    model = vk.finetuning.add_adapters(model, language_model=vk.LoRA(r=2))
    rows = [{"images": [picture], "question": "What?", "answer": "red"}] * 2
    run = vk.finetuning.train(
        model, processor, rows, tmp_path / "run", max_steps=3, learning_rate=0.1
    )
    assert run.curve["loss"].iloc[-1] < run.curve["loss"].iloc[0]


# --- limits of pictures ---------------------------------------------------------------------------

SIZES = [(64, 64), (100, 70), (33, 100), (37, 6), (9, 9)]
OF_PIXELS = [
    {"max_pixels": 700},
    {"min_pixels": 1100, "max_pixels": 3000},
    {"min_pixels": 64},
    {"size": {"shortest_edge": 64, "longest_edge": 2500}},
]
LIMITED = {
    "qwen2_vl": OF_PIXELS,
    "qwen3_vl": OF_PIXELS[:1],
    "glm4v": OF_PIXELS,
    "idefics2": [{"do_image_splitting": True}, {"size": {"longest_edge": 48}}],
    "idefics3": [{"do_image_splitting": True, "size": {"longest_edge": 96}}],
}


def config_of(name):
    family = families._FAMILIES[name]
    return families.CONFIG_MAPPING[family.model_type](**family.config)


@pytest.mark.parametrize(
    "name, limits", [(name, limits) for name, several in LIMITED.items() for limits in several]
)
def test_predicted_tokens_are_the_processors(name, limits, tmp_path):
    config, processor = config_of(name), PROCESSORS[name]()
    processor.image_processor.save_pretrained(tmp_path / "before")
    set_limits(processor, config, limits)
    processor.image_processor.save_pretrained(tmp_path / "after")
    changed = False
    for size in SIZES:
        if name == "glm4v" and min(size) < 8:
            continue  # the processor itself refuses it
        picture = Image.new("RGB", size, (90, 120, 150))
        ids = question_inputs(processor, [[picture]], ["a"])["input_ids"]
        seen = picture_of(config, tmp_path / "before", size, limits=limits)[0]
        assert seen.features == (ids == families.IMAGE).sum(), size
        assert picture_of(config, tmp_path / "after", size)[0] == seen
        changed |= picture_of(config, tmp_path / "before", size)[0] != seen
    assert changed


@pytest.mark.parametrize("most", [1, 3, 6])
def test_tiles_of_internvl(most):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    config, size = config_of("internvl"), config_of("internvl").vision_config.image_size
    side = {"height": size[0], "width": size[1]}
    processor = type("Processor", (), {})()
    processor.image_processor = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True)
    set_limits(processor, config, {"max_patches": most})
    settings = newer_names(processor.image_processor.to_dict())
    for width, height in SIZES:
        made = processor.image_processor(Image.new("RGB", (width, height)), return_tensors="pt")
        settings["crop_to_patches"] = True
        seen = vk.families.family_of(config).picture(config, settings, width, height)
        assert seen.count == len(made["pixel_values"])


def test_limits_go_through_load_save_and_predict(other_family, tmp_path):
    folder = shutil.copytree(other_family, tmp_path / "split")
    limits = {"do_image_splitting": True, "size": {"longest_edge": 96}}
    model, processor = vk.load(folder, "bf16", **limits)
    vk.save(model, processor, tmp_path / "saved")
    again, kept = vk.load(tmp_path / "saved")
    picture = Image.new("RGB", (80, 60), "red")
    token = model.config.image_token_id
    for one in (processor, kept):
        ids = question_inputs(one, [[picture]], ["a"])["input_ids"]
        expected = vk.memory.visual_tokens(folder, (80, 60), **limits)
        assert (ids == token).sum() == expected.features > 4
    assert vk.memory.visual_tokens(tmp_path / "saved", (80, 60)) == expected
    use = {"images": 1, "image_size": (80, 60)}
    limited = vk.memory.predict(folder, "bf16", **use, **limits)
    assert limited.total == vk.memory.predict(tmp_path / "saved", "bf16", **use).total
    assert limited.total > vk.memory.predict(folder, "bf16", **use).total
    assert any("longest_edge" in note for note in limited.notes)
    untouched = AutoProcessor.from_pretrained(folder).image_processor
    assert not untouched.do_image_splitting


def test_limits_of_published_models():
    """field.md's photograph of 4032 x 3024 pixels; by the rule of Qwen2-VL, a token is 28 x 28."""
    name = "Qwen/Qwen2.5-VL-7B-Instruct"

    def count(**limits):
        return vk.memory.visual_tokens(name, (4032, 3024), **limits).tokens

    assert count(max_pixels=1280 * 28 * 28) == 41 * 30 == 1230
    assert count(max_pixels=256 * 28 * 28) == 18 * 13 == 234
    assert count(size={"longest_edge": 256 * 28 * 28}) == 234
    assert count(min_pixels=4 * 28 * 28) == count()


@pytest.mark.parametrize(
    "name, limits, says",
    [
        (
            "llava",
            {"max_pixels": 1000},
            "llava has no limit .* It has none.*resolution of the vision encoder",
        ),
        (
            "mllama",
            {"max_pixels": 1000},
            "mllama has no limit .* It has none.*config lists the tiles",
        ),
        ("idefics3", {"max_pixels": 1000}, "has size, do_image_splitting"),
        ("internvl", {"size": {"height": 2}}, "has min_patches, max_patches"),
        ("qwen2_vl", {"max_patches": 2}, "has min_pixels, max_pixels, size"),
        ("qwen2_vl", {"max_pixels": 0}, "whole number from 1"),
        ("qwen2_vl", {"max_pixels": 1e6}, "whole number from 1"),
        ("qwen2_vl", {"max_pixels": True}, "whole number from 1"),
        ("qwen2_vl", {"max_pixels": None}, "whole number from 1"),
        ("qwen2_vl", {"size": 5}, "dictionary"),
        ("qwen2_vl", {"size": {}}, "dictionary"),
        ("qwen2_vl", {"size": {"height": 5}}, "has shortest_edge, longest_edge"),
        ("qwen2_vl", {"size": {"longest_edge": 5}, "max_pixels": 9}, "one of them"),
        ("qwen2_vl", {"min_pixels": 9000, "max_pixels": 5000}, "9,000, is larger than .*5,000"),
        ("qwen2_vl", {"max_pixels": 1}, "larger than the largest, 1"),
        ("internvl", {"min_patches": 13}, "larger than the largest, 12"),
        ("idefics3", {"do_image_splitting": 1}, "True or False"),
        ("idefics3", {"size": {"longest_edge": 24 * 7}}, "more than 6 tiles"),
    ],
)
def test_limits_that_cannot_be(name, limits, says, family):
    with pytest.raises(SizeError, match=says):
        with_limits(config_of(name), vk.families.settings_of(config_of(name))[0], limits)
    with pytest.raises(SizeError, match=says):
        vk.memory.predict(family(name), "bf16", images=1, **limits)


def test_arguments_that_load_does_not_have(llava, monkeypatch):
    monkeypatch.setattr("vlmkit.loading.load_weights", None)
    for given, says in (
        ({"devise": "cpu"}, "Did you mean 'device'"),
        ({"max_pixel": 1}, "Did you mean 'max_pixels'"),
        ({"load_in_4bit": True}, "Formats are a plan's"),
    ):
        with pytest.raises(PlanError, match=says):
            vk.load(llava, **given)
    with pytest.raises(SizeError, match="has none"):
        vk.load(llava, max_pixels=1000)
    with pytest.raises(SizeError, match="processor=False"):
        vk.load(llava, max_pixels=1000, processor=False)


FILE = """
model: {model}
plan: bf16
load: {load}
train: {{projector: full}}
data: {{task: vqa, n: 4}}
settings: {{max_steps: 1, per_device_train_batch_size: 2}}
output: {output}
"""


def test_a_training_file_limits_pictures(other_family, tmp_path, capsys, monkeypatch):
    from vlmkit.cli import main
    from vlmkit.finetuning.settings import read

    def train(load, *more):
        text = FILE.format(model=other_family, load=load, output=tmp_path / "out")
        (tmp_path / "train.yaml").write_text(text)
        return main(["train", str(tmp_path / "train.yaml"), *more])

    assert train("{size: {longest_edge: 96}, do_image_splitting: true}") == 0
    assert train("{size: {longest_edge: 48}}", "--resume") != 0
    assert "pictures was" in capsys.readouterr().err
    for load, says in (("{device: cpu}", "a key of load"), ("{max_pixels: 9}", "has size")):
        assert train(load, "--resume") != 0
        assert says in capsys.readouterr().err
    assert read(tmp_path / "train.yaml").load == {"max_pixels": 9}
