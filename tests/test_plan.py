"""Plans, and what a plan does to a model."""

import copy
import pickle
import subprocess
import sys

import pytest

import vlmkit as vk
from vlmkit.anatomy import on_meta
from vlmkit.backend.mixed import MixedConfig
from vlmkit.checkpoints import read_config
from vlmkit.errors import PlanError
from vlmkit.layout import layout_of
from vlmkit.rows import EMBEDDING, HEAD, LINEAR

Plan = vk.Plan


@pytest.fixture(scope="module")
def model(llava):
    return on_meta(read_config(llava))


@pytest.fixture(scope="module")
def tied(llava_clip):
    return on_meta(read_config(llava_clip))


def test_unnamed_components_get_bf16():
    plan = Plan(language_model="nf4")
    assert [plan[c] for c in vk.COMPONENTS] == ["bf16", "bf16", "bf16", "nf4", "bf16"]


@pytest.mark.parametrize(
    "text, plan",
    [
        (None, Plan.recommended()),
        ("recommended", Plan(language_model="nf4")),
        ("int8", Plan.uniform("int8")),
        ("bf16", Plan()),
        ("projector=fp32, language_model=nf4", Plan(projector="fp32", language_model="nf4")),
        (Plan(projector="fp16"), Plan(projector="fp16")),
    ],
)  # fmt: skip
def test_parse(text, plan):
    assert Plan.parse(text) == plan


def test_compares_prints_copies_and_does_not_change():
    plan = Plan(language_model="nf4").override(r"layers\.0\.", "bf16")
    assert repr(plan) == "Plan(language_model='nf4').override('layers\\\\.0\\\\.', 'bf16')"
    assert eval(repr(plan), {"Plan": Plan}) == plan
    mixed = Plan.parse({"default": "nf4", "language_model": "bf16"})
    for other in (Plan.uniform("nf4"), mixed, mixed.override("x", "fp32")):
        assert eval(repr(other), {"Plan": Plan}) == other != plan
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan
    assert len({plan, copy.copy(plan), Plan()}) == 2
    assert plan != Plan(language_model="nf4")
    with pytest.raises(AttributeError):
        plan.overrides = ()
    with pytest.raises(TypeError):
        plan.named["projector"] = "nf4"
    assert "nf4" in str(plan) and "<table" in plan._repr_html_()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Plan(vision="bf16"), "'vision' is not a component. Did you mean 'vision_encoder'"),
        (lambda: Plan(projector="bf61"), "'bf61' is not a number format. Did you mean 'bf16'"),
        (lambda: Plan.parse("nf5"), "Did you mean 'nf4'"),
        (lambda: Plan.parse("projector=nf4,vision_encoder"), "vision_encoder.* component=format"),
        (lambda: Plan.parse("projector=nf4,projector=bf16"), "names projector twice"),
        (lambda: Plan.parse(4), "4 is not a plan"),
        (lambda: Plan.uniform("16"), "not a number format"),
        (lambda: Plan().override("(", "nf4"), "not a regular expression"),
        (lambda: Plan().override("x", "nf"), "not a number format"),
        (lambda: Plan()["vision"], "not a component"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_resolved_to_full_module_names(model):
    layout = layout_of(model, Plan.recommended())
    inside = [n for n in layout.linears if n.startswith("model.language_model.layers.")]
    assert layout.quantized == dict.fromkeys(inside, "nf4") and len(inside) == 14
    assert layout.skipped == ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    config = layout.quantization_config()
    assert config.llm_int8_skip_modules == layout.skipped
    assert config.quantization_method() == "nf4"
    assert str(config.bnb_4bit_compute_dtype) == "torch.bfloat16"


def test_what_is_no_linear_layer_stays_in_16_bits(model):
    for row in layout_of(model, Plan.uniform("nf4")).rows:
        assert row.asked == "nf4"
        assert row.format == ("nf4" if row.kind == LINEAR else "bf16"), row


def test_the_skip_list_replaces_the_automatic_one_even_when_it_is_empty(model):
    layout = layout_of(model, Plan.uniform("nf4").override("lm_head", "nf4"))
    assert layout.quantized["lm_head"] == "nf4"
    assert layout.quantization_config().llm_int8_skip_modules == []


def test_a_tied_head_is_never_quantized(tied):
    layout = layout_of(tied, Plan.uniform("nf4"))
    assert "lm_head" in layout.skipped and "lm_head" not in layout.quantized
    kinds = {row.kind for row in layout.rows}
    assert HEAD not in kinds and EMBEDDING in kinds
    with pytest.raises(PlanError, match="matches only lm_head, whose weight is tied"):
        layout_of(tied, Plan().override("lm_head", "nf4"))


def test_overrides(model):
    plan = Plan.recommended().override(r"language_model\.layers\.1\.", "bf16")
    plan = plan.override(r"vision_tower.*fc1$", "nf4")
    layout = layout_of(model, plan)
    quantized, skipped = layout.quantized, layout.skipped
    assert not any(".layers.1." in name for name in quantized if "language_model" in name)
    assert sum("fc1" in name for name in quantized) == 2 and len(quantized) == 7 + 2
    assert "model.vision_tower" not in skipped and "model.language_model.layers.1" in skipped


def test_layer_1_is_not_layer_11():
    from transformers import CONFIG_MAPPING

    big = on_meta(CONFIG_MAPPING["llava"]())
    layout = layout_of(big, Plan.recommended().override(r"language_model\.layers\.1\.", "bf16"))
    assert len(layout.quantized) == 31 * 7
    layout.quantization_config()  # which asks transformers what it will make of the list


@pytest.mark.parametrize(
    "plan, message",
    [
        (Plan(cross_attention="nf4"), "no cross_attention: the plan matches no module"),
        (Plan(other="fp32"), "asks for other in fp32, but LlavaForC.* has no other"),
        (Plan().override("nothing", "nf4"), "'nothing' matches no module of this model. Its"),
        (Plan().override("vision_towr", "nf4"), "no module .* Did you mean 'vision_tower'"),
        (Plan().override(r"embed_tokens", "nf4"), "none of the 1 modules .* embedding"),
        (
            Plan().override("layers", "nf4").override("fc1", "bf16"),
            "contradicts itself about model.vision_tower.*fc1: 'layers' asks for nf4 and 'fc1'",
        ),
    ],
)
def test_a_plan_that_does_nothing_or_contradicts_itself(model, plan, message):
    with pytest.raises(PlanError, match=message):
        layout_of(model, plan)


def test_uniform_says_nothing_about_components_that_are_not_there(model):
    assert layout_of(model, Plan.uniform("nf4")).quantized


def test_two_quantized_formats_are_two_of_transformers_configs(model):
    layout = layout_of(model, Plan(vision_encoder="int8", language_model="nf4-dq"))
    config = layout.quantization_config()
    assert isinstance(config, MixedConfig)
    eight, four = config.configs
    assert eight.load_in_8bit and four.load_in_4bit and four.bnb_4bit_use_double_quant
    rest = ["model.multi_modal_projector", "lm_head"]
    assert eight.llm_int8_skip_modules == [rest[0], "model.language_model", rest[1]]
    assert four.llm_int8_skip_modules == ["model.vision_tower", *rest]
    again = MixedConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_no_torch_for_making_a_plan():
    code = (
        "import sys, vlmkit as vk\n"
        "vk.Plan.parse('language_model=nf4').override('a', 'bf16')\n"
        "assert vk.formats.FORMATS['nf4'].nbytes((64, 64))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- files, mappings and BitsAndBytesConfigs ------------------------------------------------------

PLANS = [
    Plan(),
    Plan.recommended(),
    Plan.uniform("int8"),
    Plan.parse({"default": "nf4", "language_model": "bf16"}),
    Plan(projector="fp32", language_model="nf4-dq").override(r"layers\.0\.", "bf16"),
    Plan.uniform("nf4").override("é\n'\"#: ", "fp16").override(r"\.q_proj\.", "int8"),
]


@pytest.mark.parametrize("name", ["plan.yaml", "plan.yml", "plan.JSON"])
@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_a_plan_goes_through_a_file(plan, name, tmp_path):
    path = plan.save(tmp_path / name)
    assert Plan.parse(path) == Plan.parse(str(path)) == Plan.parse(plan.to_dict()) == plan
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_plan_in_a_file_loads_and_is_audited(tmp_path):
    plan = Plan(language_model="nf4").override(r"layers\.0\.", "bf16")
    path = str(plan.save(tmp_path / "plan.yaml"))
    model, _ = vk.load("pebble", path)
    assert vk.memory.predict("pebble", path).total == vk.memory.measure(model).total
    vk.audit(model, path)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no components"),
        ("- bf16", "no components"),
        ("[1, 2", "is not YAML"),
        ("language_model: nf5", "plan.yaml: .*nf4"),
        ("languag_model: nf4", "language_model"),
        ("language_model: 4", "4"),
        ("default: [nf4]", "nf4"),
        ("overrides: nf4", "list of"),
        ("overrides: [nf4]", "a pattern and a format"),
        ("overrides: [{pattern: x, format: nf4, more: 1}]", "a pattern and a format"),
        ("overrides: [{pattern: '(', format: nf4}]", "not a regular expression"),
        ("!!python/object/apply:os.system [true]", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("projector: fp32\nprojector: nf4", "is there twice"),
        ("projector: !!int abc", "is not YAML"),
        ("projector: !!timestamp abc", "is not YAML"),
    ],
)
def test_files_that_hold_no_plan(text, says, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(PlanError, match=says):
        Plan.parse(file)


def test_plans_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(PlanError, match=r"gone\.json cannot be read"):
        Plan.parse(str(tmp_path / "gone.json"))
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.parse(tmp_path / "a.yaml")
    (tmp_path / "b.json").write_bytes(b"\xff")
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.parse(tmp_path / "b.json")
    for path in (tmp_path / "a.yaml", tmp_path / "none" / "plan.yaml"):
        with pytest.raises(PlanError, match="cannot be written"):
            Plan().save(path)
    with pytest.raises(PlanError, match=r"ends in \.yaml"):
        Plan().save(tmp_path / "plan.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.yaml", "b.json"]


def bitsandbytes_config(skip=None, **given):
    import torch
    from transformers import BitsAndBytesConfig

    usual = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    usual["bnb_4bit_compute_dtype"] = torch.bfloat16
    return BitsAndBytesConfig(llm_int8_skip_modules=skip, **({**usual, **given}))


@pytest.mark.parametrize(
    "skip",
    [
        None,
        ["lm_head"],
        ["q_proj", "lm_head"],
        ["lm_head", "model.vision_tower", "model.multi_modal_projector.linear_1"],
        ["lm_head", ".*vision_tower", "model.language_model.layers.1"],
        ["lm_head", "fc1", "model.language_model.layers.*.mlp"],
    ],
)
def test_a_bitsandbytes_config_is_the_plan_that_quantizes_the_same(skip):
    import torch
    from transformers import AutoModelForImageTextToText

    config = bitsandbytes_config(skip, bnb_4bit_use_double_quant=True)
    folder = vk.models.pebble.path()
    theirs = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )
    config = bitsandbytes_config(skip, bnb_4bit_use_double_quant=True)
    ours, _ = vk.load("pebble", config)
    kinds = [{n: type(m) for n, m in model.named_modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert vk.memory.predict("pebble", config).total == vk.memory.measure(ours).total
    vk.audit(ours, config)


def test_what_a_bitsandbytes_config_says_otherwise():
    import torch
    from transformers import BitsAndBytesConfig

    assert Plan.parse(BitsAndBytesConfig(load_in_8bit=True)) == Plan.uniform("int8")
    with pytest.warns(UserWarning, match="computes in float16"):
        Plan.parse(bitsandbytes_config(bnb_4bit_compute_dtype=torch.float16))
    with pytest.warns(UserWarning, match="lm_head"):
        assert Plan.parse(bitsandbytes_config([])) == Plan.uniform("nf4")
    for config, says in (
        (BitsAndBytesConfig(), "quantizes nothing"),
        (bitsandbytes_config(bnb_4bit_quant_storage=torch.bfloat16), "bnb_4bit_quant_storage"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), "llm_int8_threshold"),
        (bitsandbytes_config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True), "fp4"),
        (bitsandbytes_config(["(", "lm_head"]), "not a regular expression"),
    ):
        with pytest.raises(PlanError, match=says):
            Plan.parse(config)
    with pytest.raises(PlanError, match="matches no module"):  # transformers ignores it silently
        vk.preview("pebble", bitsandbytes_config(["vision_tower", "lm_head"]))


@pytest.mark.parametrize(
    "text",
    [
        '{"projector": "fp32", "projector": "nf4"}',
        '{"overrides": [{"pattern": "a", "pattern": "b", "format": "nf4"}]}',
    ],
)
def test_a_key_that_is_twice_in_a_json_file(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="is there twice"):
        Plan.parse(tmp_path / "plan.json")
