"""The linter's verdict is what transformers does, and every trap of a skip list is found."""

import json
import re

import pytest
import torch
from architectures import config_of
from bitsandbytes import functional
from bitsandbytes.functional import has_avx512bf16
from families import FAMILIES, inputs
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import vlmkit as vk
from vlmkit.backend.quiet import quiet
from vlmkit.errors import CheckpointError, ConfigError
from vlmkit.layout import layout_of
from vlmkit.linting import Verdict
from vlmkit.linting.context import Context
from vlmkit.linting.rules import findings as found_by_rules
from vlmkit.linting.verdicts import read
from vlmkit.loading.audit import format_of

# bitsandbytes' own, which vlmkit.backend.cpu replaces by a better one when a load needs it
KERNEL = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")

LISTS = {
    "none": None,
    "empty": [],
    "head": ["lm_head"],
    "substrings": ["vision_tower", "multi_modal_projector", "visual", "lm_head"],
    "full names": ["model.vision_tower", "model.visual", "model.vision_model", "lm_head"],
    "expressions": [r".*layers\.1\.", ".*vis", "lm_head"],
    "suffixes": ["q_proj", "fc1", "mlp", "1"],
    "containers": ["model.language_model.layers.1", "model.language_model.layers.0.self_attn"],
    "everything": ["", "lm_head"],
}
WAYS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
    "neither": {},
    "int8 with fp16 weights": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
}


def bits(skip=None, way="nf4"):
    return BitsAndBytesConfig(**WAYS[way], llm_int8_skip_modules=skip)


def loaded(folder, config):
    with quiet():
        return AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16
        )


def codes(findings, severity=None):
    return [f.code for f in findings if severity in (None, f.severity)]


def require_true(findings, model):
    """That each parameter is in the format in `model`, which transformers has loaded."""
    owned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert {row.name for row in findings.verdicts} == owned
    for row in findings.verdicts:
        module = model.get_submodule(row.module)
        if row.tied and row.quantized:  # a quantized layer that was handed the embeddings' weight
            assert (
                type(module).__name__.startswith("Linear") and type(module) is not torch.nn.Linear
            )
            assert type(module.weight) is torch.nn.Parameter
            continue
        given = format_of(module, row.name.rpartition(".")[2])
        assert given == row.format, row
    held = vk.memory.measure(model)
    buffers = held.by_kind.get("buffer", 0)
    assert findings.total == held.total - buffers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = FAMILIES[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.mark.parametrize("skip", LISTS)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_the_verdict_is_what_transformers_does(family, skip, folders):
    config = bits(LISTS[skip])
    require_true(vk.lint(folders(family), config), loaded(folders(family), config))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "nf4"])
def test_in_every_format(way, folders):
    config = bits(["model.vision_tower", "lm_head"], way)
    require_true(vk.lint(folders("llava"), config), loaded(folders("llava"), config))


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gemma3", "blip2"])
def test_families_with_a_trait_of_their_own(family, folders):
    """Fused experts; a bare parameter for a projector; modules that the class keeps."""
    config = bits(LISTS["head"])
    require_true(vk.lint(folders(family), config), loaded(folders(family), config))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_list(family, way, folders):
    for skip in LISTS.values():
        config = bits(skip, way)
        require_true(vk.lint(folders(family), config), loaded(folders(family), config))


@pytest.mark.parametrize("model_type", ["florence2", "llava", "pix2struct"])
def test_a_tied_weight_is_counted_once(model_type):
    """Under whichever of its names it comes first."""
    config = config_of(model_type)
    own = [row for row in vk.lint(config, bits()).verdicts if not row.tied]
    assert sum(row.parameters for row in own) == vk.anatomy(config).total


# --- patterns ------------------------------------------------------------------------------------


def test_a_bare_name_keeps_nothing_and_the_remedy_does(folders):
    findings = vk.lint(folders("llava"), bits(["vision_tower", "lm_head"]))
    (error,) = findings.errors
    assert (error.code, error.component) == ("not-a-substring", "vision_encoder")
    assert error.modules and all(".vision_tower." in name for name in error.modules)
    quantized = findings.modules()
    assert error.bytes == quantized.loc[list(error.modules), "bytes"].sum() > 0
    assert "'model.vision_tower'" in error.remedy and "vision_encoder='bf16'" in error.remedy
    better = vk.lint(folders("llava"), bits(["model.vision_tower", "lm_head"]))
    assert better.ok
    assert better.components().loc["vision_encoder", "quantized"] == 0


@pytest.mark.parametrize(
    ("skip", "remedy"),
    [
        ("vision", ["model.vision_tower"]),
        ("vision_tower.*", ["model.vision_tower"]),
        ("layers.1", ["model.vision_tower.encoder.layers.1", "model.language_model.layers.1"]),
        (
            "mlp",
            [f"model.{tower}.layers.*.mlp" for tower in ("vision_tower.encoder", "language_model")],
        ),
        ("multi_modal_projector", ["model.multi_modal_projector"]),
        ("encoder.layers.0.mlp", ["model.vision_tower.encoder.layers.0.mlp"]),
    ],
)
def test_remedies_keep_what_was_meant(skip, remedy, folders):
    (finding,) = (f for f in vk.lint(folders("llava"), bits([skip])) if f.code == "not-a-substring")
    assert all(repr(entry) in finding.remedy for entry in remedy)
    kept = vk.lint(folders("llava"), bits(remedy)).modules()["kept by"]
    assert all(kept[name] for name in finding.modules)


@pytest.mark.parametrize(
    ("skip", "code", "severity", "says"),
    [
        (["lm_head", "vision_towel"], "matches-nothing", "warning", "mean 'model.vision_tower'"),
        (["lm_head", "zzz"], "matches-nothing", "warning", "does no harm"),
        (["lm_head", "zzz"], "matches-nothing", "warning", "'model.language_model'"),
        (["lm_head.weight"], "matches-nothing", "warning", "mean 'lm_head'"),
        (["language_model.lm_head"], "matches-nothing", "warning", "mean 'lm_head'"),  # older
        (["embed_tokens"], "nothing-to-keep", "note", "model.language_model.embed_tokens"),
        (["q_proj"], "several-components", "note", "2 in vision_encoder, 2 in language_model"),
        (["q_proj"], "language-model-kept", "note", "2 Linear layers"),
        (["q_proj"], "language-model-kept", "note", "'q_proj'"),
        (["vision_tower", "model.vision_tower"], "not-a-substring", "note", "Other entries"),
        ([], "head-quantized", "warning", "'lm_head'"),
        (["model.vision_tower"], "head-quantized", "warning", "'lm_head'"),
    ],
)
def test_what_is_said_of_an_entry(skip, code, severity, says, folders):
    (finding,) = (f for f in vk.lint(folders("llava"), bits(skip)) if f.code == code)
    assert finding.severity == severity
    assert says in f"{finding.message} {finding.remedy}"


def test_a_pattern_that_cannot_be_used_where_nothing_is_quantized(folders):
    config = {"quant_method": "compressed-tensors", "ignore": ["re:(.*"]}  # and no config_groups
    assert "unusable-pattern" in codes(vk.lint(folders("llava"), config), "error")


@pytest.mark.parametrize("entry", ["*vision*", "layers.[0", 3])
def test_entries_on_which_loading_fails(entry, folders):
    findings = vk.lint(folders("llava"), bits([entry, "lm_head"]))
    assert "unusable-pattern" in codes(findings, "error")
    with pytest.raises(Exception, match=r"repeat|unterminated|tuple of str"):
        loaded(folders("llava"), bits([entry, "lm_head"]))


@pytest.mark.parametrize(("skip", "way"), [([""], "nf4"), (["model", "lm_head"], "int8"),
                                           (None, "int8 with fp16 weights")])  # fmt: skip
def test_nothing_is_quantized(skip, way, folders):
    findings = vk.lint(folders("llava"), bits(skip, way))
    assert codes(findings, "error") == ["nothing-quantized"]
    assert findings.components()["quantized"].sum() == 0


# --- the head ------------------------------------------------------------------------------------


def forward(model):
    with torch.no_grad():
        return model(**inputs(model))


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_a_tied_head_dies_in_forward_as_foretold(way, qwen2_vl):
    assert "tied-weight" in codes(vk.lint(qwen2_vl, bits([], way)), "error")
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        forward(loaded(qwen2_vl, bits([], way)))
    for skip in (None, ["lm_head"]):
        assert "tied-weight" not in codes(vk.lint(qwen2_vl, bits(skip, way)))
        forward(loaded(qwen2_vl, bits(skip, way)))


@pytest.mark.parametrize("skip", [None, ["lm_head"]])
def test_a_head_that_is_kept_is_no_finding(skip, folders):
    assert "head-quantized" not in codes(vk.lint(folders("llava"), bits(skip)))


# --- components, experts, shapes -----------------------------------------------------------------


def test_components_that_were_perhaps_not_meant(folders):
    folder = folders("mllama")
    findings = vk.lint(folder, bits())
    found = {f.component: f for f in findings if f.code == "component-quantized"}
    assert set(found) == {"vision_encoder", "projector", "cross_attention"}
    table = findings.components()
    for component, finding in found.items():
        assert len(finding.modules) == table.loc[component, "quantized"]
    # what the remedies say, together, is what a plan does
    entries = ["lm_head", "model.vision_model", "model.multi_modal_projector",
               "model.language_model.layers.1.cross_attn"]  # fmt: skip
    for entry in entries:
        assert any(repr(entry) in finding.remedy for finding in found.values())
    config = layout_of(folder, "language_model=nf4").quantization_config()
    wanted = vk.lint(folder, config).modules()["format"]
    assert vk.lint(folder, bits(entries)).modules()["format"].equals(wanted)
    assert codes(vk.lint(folder, config), "error") == []


@pytest.mark.parametrize("skip", [None, ["visual", "vision_tower", "cross_attn", "lm_head"]])
@pytest.mark.parametrize("name", [vk.catalog.NAMES[i] for i in (0, 1, 6, 8)])
def test_the_plans_in_the_remedies_keep_what_they_say(name, skip):
    findings = vk.lint(name, bits(skip, "nf4-dq"))
    plans = [
        (f, re.search(r"vk\.Plan\(.*\)", f.remedy)[0]) for f in findings if "vk.Plan(" in f.remedy
    ]
    assert plans
    for finding, code in plans:
        quantized = layout_of(name, eval(code, {"vk": vk})).quantized
        assert quantized and set(quantized.values()) == {"nf4-dq"}
        assert not set(finding.modules) & set(quantized)


def test_fused_experts_stay(folders):
    findings = vk.lint(folders("qwen3_vl_moe"), bits(["lm_head"]))
    (experts,) = (f for f in findings if f.code == "experts-kept")
    model = loaded(folders("qwen3_vl_moe"), bits(["lm_head"]))
    sizes = [p.nbytes for n, p in model.named_parameters() if ".experts." in n]
    assert experts.bytes == sum(sizes) > 0
    assert f"{sum(sizes) / findings.total:.0%}" in experts.message


def test_shapes_that_a_cpu_cannot_do():
    """Those of facts: Qwen2.5-VL's 3420, SigLIP's 4304; a Llama 2 has none."""
    awkward = {
        name: {f.code: f for f in vk.lint(name, bits())}
        for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "google/paligemma-3b-mix-224")
    }
    qwen, paligemma = awkward.values()
    assert len(qwen["cpu-forward"].modules) == 32 * 3 and "cpu-dequantize" not in qwen
    assert len(paligemma["cpu-dequantize"].modules) == 27
    assert all(name.endswith("mlp.fc2") for name in paligemma["cpu-dequantize"].modules)
    for name, config in (
        ("llava-hf/llava-1.5-7b-hf", bits()),
        ("google/paligemma-3b-mix-224", bits(way="int8")),
    ):
        assert not {"cpu-forward", "cpu-dequantize"} & set(codes(vk.lint(name, config)))


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no such kernel")
def test_a_forward_pass_fails_where_it_is_foretold(folders, qwen2_vl):
    assert "cpu-forward" in codes(vk.lint(folders("qwen2_vl"), bits()))  # 96, 160
    with pytest.raises(RuntimeError):
        forward(loaded(folders("qwen2_vl"), bits()))
    assert "cpu-forward" not in codes(vk.lint(qwen2_vl, bits()))  # multiples of 64
    forward(loaded(qwen2_vl, bits()))


@pytest.mark.parametrize("width", [64, 72, 80, 96, 128, 160])
def test_the_shapes_are_those_that_bitsandbytes_misreads(width):
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this CPU has no such kernel")
    weight = torch.randn(32, width, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    arguments = (packed, state.absmax, 64, "nf4", list(weight.shape), torch.float32)
    found = KERNEL.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)
    right = vk.formats.dequantize(vk.formats.quantize(weight, "nf4"))
    layer = Verdict("a.weight", None, "linear", 0, (32, width), "nf4", "nf4", True)
    told = found_by_rules(Context(read(bits()), (layer,), {}, {}))
    misread = not torch.allclose(found, right, atol=0.01)
    assert misread == ("cpu-dequantize" in [finding.code for finding in told])


# --- configs that are given in other ways, and checkpoints that are quantized already -------------


def test_objects_dictionaries_and_files_say_the_same(folders, tmp_path):
    config = bits(["vision_tower"])
    alone, inside = tmp_path / "alone.json", tmp_path / "config.json"
    alone.write_text(json.dumps(config.to_dict()))
    inside.write_text(json.dumps({"model_type": "llava", "quantization_config": config.to_dict()}))
    said = [
        str(vk.lint(folders("llava"), given))
        for given in (config, config.to_dict(), alone, str(inside), tmp_path)
    ]
    assert len(set(said)) == 1
    assert config.llm_int8_skip_modules == ["vision_tower"]


def test_a_key_that_is_dropped_without_a_word(folders):
    raw = {**WAYS["nf4"], "llm_int8_skip_module": ["model.vision_tower"], "comment": "hello"}
    findings = vk.lint(folders("llava"), raw)
    assert codes(findings, "error") == ["unknown-key"]
    assert "'llm_int8_skip_modules'" in findings.errors[0].remedy
    assert "unknown-key" in codes(findings, "warning")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "quark"}, "quark"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}, "list of strings"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "only one"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "'nf5'"),
        ({}, "quant_method"),
        (4, "int"),
        ("nowhere.json", "nowhere.json"),
        ("FILE", "not valid JSON"),
        ("pebble", "none was given"),
        ("PEBBLE", "no quantization_config"),
    ],
)
def test_what_is_no_config(config, says, folders, tmp_path):
    if config == "FILE":
        config = tmp_path / "broken.json"
        config.write_text("{")
    if config in ("pebble", "PEBBLE"):
        config = None if config == "pebble" else vk.models.pebble.path()
    with pytest.raises(ConfigError, match=re.escape(says)):
        vk.lint("pebble", config)


def test_a_model_that_is_not_there():
    with pytest.raises(CheckpointError, match="nowhere"):
        vk.lint("nowhere", bits())


def test_a_loaded_model_is_judged_by_its_own_config(folders):
    model = loaded(folders("llava"), bits(["lm_head"]))
    own = vk.lint(model)
    assert own.title.startswith("LlavaForConditionalGeneration loaded in nf4")
    require_true(own, model)
    assert "not-a-substring" in codes(vk.lint(model, bits(["vision_tower"])), "error")


@pytest.fixture
def quantized(folders, tmp_path):
    model = loaded(folders("llava"), bits(["model.vision_tower", "lm_head"]))
    model.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def test_a_quantized_checkpoint(quantized):
    findings = vk.lint(quantized)
    assert findings.ok
    with quiet():
        require_true(findings, AutoModelForImageTextToText.from_pretrained(quantized))


def test_a_quantized_checkpoint_whose_list_no_longer_fits(quantized):
    """As of a release of transformers that had other names: the list of its config.json protects
    nothing now, and the weights are stored in 16 bits."""
    raw = json.loads((quantized / "config.json").read_text())
    raw["quantization_config"]["llm_int8_skip_modules"] = ["vision_tower", "lm_head"]
    (quantized / "config.json").write_text(json.dumps(raw))
    findings = vk.lint(quantized)
    assert codes(findings, "error") == ["stored-otherwise", "not-a-substring"]
    (stored, _) = findings.errors
    assert all(name.startswith("model.vision_tower.") for name in stored.modules)
    with quiet():
        model = AutoModelForImageTextToText.from_pretrained(quantized)
    with pytest.raises((AssertionError, RuntimeError)):
        forward(model)
    forward(vk.load(quantized, processor=False)[0])  # the remedy


def test_a_config_that_a_quantized_checkpoint_overrules(quantized):
    findings = vk.lint(quantized, bits(["lm_head"], "int8"))
    assert codes(findings, "error") == ["overruled"]
    assert "int8" in findings.errors[0].message and "in nf4" in findings.title
    own = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert vk.lint(quantized, own).ok


# --- how it is shown -----------------------------------------------------------------------------


def test_text_table_and_json(folders):
    findings = vk.lint(folders("llava"), bits(["vision_tower", "<b>"]))
    assert len(findings.table()) == len(findings) == len(list(findings))
    text, page = str(findings), findings._repr_html_()
    for finding in findings:
        assert finding.code in text and finding.code in page
        assert finding.message.split()[0] in text and finding.remedy.split()[0] in text
    assert max(map(len, text.splitlines()[1:])) <= 100
    assert "&lt;b&gt;" in page and "<b>'" not in page
    said = json.loads(json.dumps(findings.to_dict()))
    assert said["ok"] is False and said["bytes"] == findings.total
    assert [f["code"] for f in said["findings"]] == codes(findings)
    severities = [f["severity"] for f in said["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)


def test_nothing_to_say(folders):
    config = bits(["model.vision_tower", "model.multi_modal_projector", "lm_head"])
    config.bnb_4bit_compute_dtype = torch.bfloat16
    name = "llava-hf/llava-1.5-7b-hf"
    findings = vk.lint(name, config)
    assert len(findings) == 0 and findings.ok and "nothing to say" in str(findings)
    assert "nothing to say" in findings._repr_html_()
    assert findings.table().empty
