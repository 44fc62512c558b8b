"""Skip lists of all methods: the rule that vlmkit follows is what a load, or transformers' own
conversion on the meta device, does. A test of a method whose library is not installed is skipped;
`vlmkit.linting.methods` says which were run."""

import ast
import csv
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from test_linting import LISTS, bits, codes
from test_stored import quantized
from transformers import AutoModelForImageTextToText, FineGrainedFP8Config, NVFP4Config
from transformers.quantizers.auto import AutoHfQuantizer

import vlmkit as vk
from vlmkit.anatomy import on_meta
from vlmkit.backend.quiet import quiet
from vlmkit.errors import ConfigError
from vlmkit.linting.methods import CONVERSION, LOAD, METHODS, SOURCE, classes_of
from vlmkit.linting.verdicts import read, verdicts_by_rule

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
GROUPS = {"config_groups": {"all": {"targets": ["Linear"], "weights": WEIGHTS}}}
FAMILY = ["llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_vl", "mllama"))]
OLD_NAMES = {"old names": ["vision_tower", "visual", "vision_model", "multi_modal_projector"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = ("llava", "qwen2_vl", "mllama")
    return {name: FAMILIES[name](tmp_path_factory.mktemp(name)) for name in names}


def quantized_by_rule(folder, config):
    """Full names of the modules that `lint` says are quantized."""
    findings = vk.lint(folder, config)
    return {row.module for row in findings.verdicts if row.quantized}


def loaded(folder, config):
    with quiet():
        return AutoModelForImageTextToText.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16
        )


def converted(folder, config):
    """The model on the meta device after transformers' own conversion."""
    with quiet():
        model = on_meta(vk.checkpoints.read_config(folder), torch.bfloat16)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.preprocess_model(model, dtype=torch.bfloat16, device_map=None)
    return model


def of_classes(model, *names):
    return {n for n, m in model.named_modules() if set(names) & set(classes_of(m))}


# --- the rule, and what the library does ----------------------------------------------------------


class Converted(torch.nn.Module):
    """In place of NVFP4Linear, whose kernel is not installed."""


@pytest.mark.parametrize("family", FAMILY)
def test_fp8_and_nvfp4_convert_what_the_rule_says(family, folders, monkeypatch):
    monkeypatch.setattr("transformers.integrations.nvfp4.NVFP4Linear", lambda *_: Converted())
    for made, found in ((FineGrainedFP8Config, "FP8Linear"), (NVFP4Config, "Converted")):
        for entries in (LISTS | OLD_NAMES).values():
            config = made(modules_to_not_convert=entries)
            said = quantized_by_rule(folders[family], config)
            assert said == of_classes(converted(folders[family], config), found), entries


@pytest.mark.parametrize("family", FAMILY)
def test_bitsandbytes_by_its_rule_is_bitsandbytes_by_its_quantizer(family, folders):
    model = on_meta(vk.checkpoints.read_config(folders[family]), torch.bfloat16)
    for entries in (LISTS | OLD_NAMES).values():
        own = {r.module for r in vk.lint(folders[family], bits(entries)).verdicts if r.quantized}
        said = {r.module for r in verdicts_by_rule(model, read(bits(entries))) if r.quantized}
        assert said == own, entries


@pytest.mark.parametrize("embeddings", [False, True])
def test_torchao_loads_what_the_rule_says(embeddings, folders):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    lists = {**LISTS, **OLD_NAMES, "of weights": ["q_proj.weight", "fc1.weight"]}
    for name, entries in lists.items():
        config = TorchAoConfig(
            quantization.Int8WeightOnlyConfig(),
            modules_to_not_convert=entries,
            include_input_output_embeddings=embeddings,
        )
        model = loaded(folders["llava"], config)
        found = {
            n
            for n, m in model.named_modules()
            if type(getattr(m, "weight", None)).__name__ == "Int8Tensor"
        }
        assert quantized_by_rule(folders["llava"], config) == found, name


def test_quanto_loads_what_the_rule_says(folders):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    for family in ("llava", "qwen2_vl"):
        for entries in (LISTS | OLD_NAMES).values():
            config = QuantoConfig(weights="int8", modules_to_not_convert=entries)
            said = quantized_by_rule(folders[family], config)
            assert said == of_classes(loaded(folders[family], config), "QLinear"), entries


def test_hqq_converts_what_the_rule_says_and_cannot_load(folders):
    pytest.importorskip("hqq")
    from transformers import HqqConfig

    for entries in (["lm_head"], [], ["vision_tower.encoder.mlp.fc1"], ["model.vision_tower"]):
        config = HqqConfig(nbits=4, group_size=8, skip_modules=entries)
        model = converted(folders["llava"], config)
        found = {n for n, m in model.named_modules() if hasattr(m, "quant_config")}
        assert quantized_by_rule(folders["llava"], config) == found, entries
    assert "cannot-load" in codes(vk.lint(folders["llava"], config), "error")
    with pytest.raises(NotImplementedError, match="not available yet"):
        loaded(folders["llava"], config)


IGNORED = {
    "start": ["re:vision_tower.*", "re:.*lm_head"],
    "middle": ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "lm_head"],
    "a container": ["model.vision_tower"],
    "a layer": ["model.multi_modal_projector.linear_1"],
    "a class": ["Linear"],
    "another class": ["CLIPVisionModel", "LlamaAttention"],
    "nothing": [],
}


def test_compressed_tensors_loads_what_the_rule_says(folders, tmp_path):
    """A checkpoint is made for each list, as llm-compressor makes them, and loaded."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    for name, entries in IGNORED.items():
        raw = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": entries}
        raw |= GROUPS | {"quantization_status": "compressed"}
        said = quantized_by_rule(folders["llava"], raw)
        with quiet():
            model = AutoModelForImageTextToText.from_pretrained(folders["llava"])
            config = quantization.QuantizationConfig.model_validate(
                raw | {"quantization_status": "initialized"}
            )
            quantization.apply_quantization_config(model, config)
            for module in model.modules():
                if hasattr(module, "weight_scale"):
                    module.weight_scale.data.fill_(0.01)
            compressor = ModelCompressor.from_pretrained_model(model)
            compressor.compress_model(model) if compressor else None
            model.save_pretrained(tmp_path / name)
            file = tmp_path / name / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": raw}))
            again = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        found = {n for n, m in again.named_modules() if hasattr(m, "quantization_scheme")}
        assert said == found, name
        assert quantized_by_rule(tmp_path / name, None) == found


def test_what_was_checked_is_said():
    assert {method.checked for method in METHODS.values()} == {LOAD, CONVERSION, SOURCE}
    for method in METHODS.values():
        assert method.source in method.how and ("checked" in method.how) == (
            method.checked != SOURCE
        )
    said = str(vk.lint("pebble", {"quant_method": "awq", "bits": 4}))
    assert "only read in transformers 5.24" in said.replace("\n", " ")


@pytest.mark.parametrize("method", ["awq", "fp8 blocks", "w4a16", "w8a8"])
def test_a_list_that_the_stored_weights_contradict(method, llava, copy):
    """As with AutoAWQ's lists: it looked for substrings, and transformers does not."""
    folder = copy(llava)
    quantized(folder, method)  # the layers of the language model
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    own = raw["quantization_config"] | (GROUPS if method.startswith("w") else {})
    method = METHODS[own["quant_method"]]
    mark = "re:" if method.syntax == "re" else ""
    fine = [f"{mark}model.vision_tower.*", f"{mark}model.multi_modal_projector.*", "lm_head"]

    def look(entries):
        file.write_text(json.dumps(raw | {"quantization_config": own | {method.key: entries}}))
        findings = vk.lint(folder)
        return [found for found in findings.errors if found.code == "stored-otherwise"], findings

    assert look(fine)[0] == []
    (found,), _ = look(["vision", "lm_head"])
    assert {name.split(".")[1] for name in found.modules} == {
        "vision_tower",
        "multi_modal_projector",
    }
    (found,), _ = look([*fine, f"{mark}model.language_model.layers.0.*"])
    assert all(".layers.0." in name for name in found.modules) and len(found.modules) == 7
    remedy = ast.literal_eval("[" + found.remedy.partition("[")[2].rstrip("."))
    assert look(remedy)[0] == []


# --- one list to paste ----------------------------------------------------------------------------

CONFIGS = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "compressed-tensors": GROUPS,
    "hqq": {"quant_config": {"weight_quant_params": {"nbits": 4}}},
    "torchao": {"quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
}


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.key])
def test_the_repaired_list_keeps_all_but_the_language_model(method, family, folders):
    key = METHODS[method].key
    raw = {"quant_method": method, **CONFIGS.get(method, {})}
    for entries in (["vision_tower", "lm_heads"], ["re:visual.*"], ["nothing"]):
        findings = vk.lint(folders[family], {**raw, key: entries})
        if method == "nvfp4" and not findings.repaired:
            continue  # the layers with a bias are not converted at all
        better = vk.lint(folders[family], {**raw, key: findings.repaired})
        assert set(codes(better, "error")) <= {"cannot-load"}
        assert {f.code for f in better.warnings} <= {"cpu-forward", "cpu-dequantize"}
        table = better.components()["quantized"]
        assert table.drop("language_model").sum() == 0 < table["language_model"]
        heads = [row for row in better.verdicts if row.kind == "head"]
        assert heads and not any(row.quantized for row in heads)
        assert better.repaired is None
        assert all(repr(entry) in str(findings).replace("\n", " ") for entry in findings.repaired)


def test_the_repaired_list_is_for_the_method():
    raw = {"quant_method": "compressed-tensors", "ignore": ["re:vision_tower.*"], **GROUPS}
    name = "llava-hf/llava-1.5-7b-hf"
    assert vk.lint(name, raw).repaired == [
        r"re:model\.vision_tower(\.|$)",
        r"re:model\.multi_modal_projector(\.|$)",
        "lm_head",
    ]
    findings = vk.lint(name, bits(["vision_tower"]))
    full = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    assert findings.repaired == findings.to_dict()["repaired"] == full
    assert vk.lint(name, bits(full)).repaired is None


# --- one list, different methods ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "entry", "kept"),
    [
        ("awq", "visual", 0),  # AutoAWQ itself looks for substrings
        ("fp8", "visual", 162),  # the old name is brought up to date first
        ("torchao", ".*visual", 162),
        ("torchao", "qkv", 0),  # the name that is compared ends with .weight
        ("awq", "qkv", 32),
        ("compressed-tensors", "model.visual", 0),  # a container keeps nothing below it
        ("compressed-tensors", "re:model.visual", 162),
        ("hqq", "visual.blocks.attn.qkv", 32),
    ],
)
def test_a_list_means_what_its_method_makes_of_it(method, entry, kept):
    raw = {"quant_method": method, **CONFIGS.get(method, {}), METHODS[method].key: [entry]}
    findings = vk.lint("Qwen/Qwen2.5-VL-7B-Instruct", raw)
    assert sum(entry in row.kept_by for row in findings.verdicts) == kept


def test_gptq_names_what_it_quantizes():
    raw = {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["mlp.down_proj"]]}
    name = "Qwen/Qwen2.5-VL-7B-Instruct"
    findings = vk.lint(name, raw)
    assert findings.ok and findings.repaired is None
    assert findings.components()["quantized"].to_list() == [0, 0, 28]
    raw["dynamic"] = {"-:.*visual.*": {}}
    assert codes(vk.lint(name, raw), "error") == ["unread-list"]


def test_bytes_are_packed_weights_without_scales():
    raw = {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["model.visual"]}
    findings = vk.lint("Qwen/Qwen2.5-VL-7B-Instruct", raw)
    rows = [row for row in findings.verdicts if row.quantized]
    assert {row.format for row in rows} == {"awq-int4"}
    assert all(row.bytes * 2 == row.parameters for row in rows)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "quark"}, "quark.*bitsandbytes, awq"),
        ({"quant_method": "awq", "modules_to_not_convert": "visual"}, "list of strings"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "FqnToConfig"}}}, "Fqn"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:(a+)+!"]}, None),
    ],
)
def test_configs_that_are_wrong(config, says):
    if says:
        with pytest.raises(ConfigError, match=says):
            vk.lint("pebble", config)
    else:
        assert vk.lint("pebble", config).verdicts


def test_expressions_that_cannot_be_read():
    raw = {
        "quant_method": "compressed-tensors",
        "ignore": ["re:*vision*", "re:.*visual.*"],
        **GROUPS,
    }
    assert "unusable-pattern" in codes(vk.lint("pebble", raw), "error")
    for entry in ("re:.*visual.*", ".*vision.*"):  # of llm-compressor, given to bitsandbytes
        assert vk.lint("pebble", bits([entry, "lm_head"])).verdicts


# --- the museum -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def museum():
    with open(BENCHMARKS / "results" / "skip_lists.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["list"], row["model"]): row for row in rows}


LISTED = json.loads((BENCHMARKS / "skip_lists.json").read_text("utf-8"))


def test_the_museum_has_every_list_and_model(museum):
    assert len(museum) == len(LISTED) * len(vk.catalog.NAMES)
    assert {name for name, _ in museum} == {entry["name"] for entry in LISTED}
    assert all(entry["source"] and entry["list"] and entry["method"] in METHODS for entry in LISTED)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("llava-hf/llava-1.5-7b-hf", 144),
        ("google/paligemma-3b-mix-224", 162),
        ("Qwen/Qwen3-VL-2B-Instruct", 96),
    ],
)
def test_unsloths_list_protects_no_encoder_under_plain_transformers(model, layers, museum):
    row = museum["Unsloth, 16 names", model]
    assert (row["vision_encoder"], row["vision_encoder_kept"]) == (str(layers), "0")


@pytest.mark.parametrize(
    "model", ["HuggingFaceTB/SmolVLM-256M-Instruct", pytest.param("all", marks=pytest.mark.slow)]
)
def test_the_record_is_what_the_installed_transformers_does(model, museum, monkeypatch):
    if not importlib.metadata.version("transformers").startswith("5.24"):
        pytest.skip("the record is of transformers 5.24")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import skip_lists

    for name in vk.catalog.NAMES if model == "all" else [model]:
        for row in skip_lists.rows_of(name, LISTED):
            assert {k: str(v) for k, v in row.items()} == museum[row["list"], name]
    sys.modules.pop("skip_lists")
