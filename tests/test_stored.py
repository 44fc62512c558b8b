"""What lies in weight files, whoever quantized them: counted from headers, compared with tensors.

Each quantizer's layout of names, shapes and dtypes is that of its own source (see
vlmkit/headers.py). The numbers in the tensors do not matter, so they are zeros.
"""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlmkit as vk
from vlmkit.errors import CheckpointError
from vlmkit.headers import _part_of, gguf_files
from vlmkit.rows import STATE

I4, GROUP = 8, 32  # numbers in an int32; weights that share a scale
INT, BYTE, HALF, BF16, FP32, FP8 = (
    torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn,
)  # fmt: skip


def awq(o, i):
    zeros, scales = ((i // GROUP, o // I4), INT), ((i // GROUP, o), HALF)
    return {"qweight": ((i, o // I4), INT), "qzeros": zeros, "scales": scales}


def gptq(o, i, bits=4):
    return {
        "qweight": ((i * bits // 32, o), INT),
        "qzeros": ((i // GROUP, o * bits // 32), INT),
        "scales": ((i // GROUP, o), HALF),
        "g_idx": ((i,), INT),
    }


def fine_grained(o, i):
    return {"weight": ((o, i), FP8), "weight_scale_inv": ((-(-o // 128), -(-i // 128)), FP32)}


def packed(o, i):
    shape = ((2,), torch.int64)
    scale = ((o, i // GROUP), BF16)
    return {"weight_packed": ((o, i // I4), INT), "weight_scale": scale, "weight_shape": shape}


def nvfp4(o, i):
    one, scale = ((1,), FP32), ((o, i // 16), FP8)
    numbers = {"weight_packed": ((o, i // 2), BYTE), "weight_scale": scale}
    return {**numbers, "weight_global_scale": one, "input_global_scale": one}


def hqq(o, i):
    scales = ((o * i // GROUP, 1), HALF)
    fields = "nbits group_size shape axis packing offload_meta encoded_state_dict view_as_float"
    meta = dict.fromkeys(fields.split(), ((1,), INT))
    return {"W_q": ((o * i // 2 // GROUP, GROUP), BYTE), "scale": scales, "zero": scales, **meta}


ONE = ((1,), BF16)
METHODS = {  # name: (quant_method, format, parts of a weight of o × i, the first its numbers)
    "awq": ("awq", "AWQ int4", awq),
    "gptq": ("gptq", "GPTQ int4", gptq),
    "gptq 3 bits": ("gptq", "GPTQ int3", lambda o, i: gptq(o, i, 3)),
    "fp8 blocks": ("fp8", "fp8", fine_grained),
    "fp8 tensor": (
        "compressed-tensors", "fp8",
        lambda o, i: {"weight": ((o, i), FP8), "weight_scale": ONE, "input_scale": ONE},
    ),
    "w4a16": ("compressed-tensors", "packed int4", packed),
    "nvfp4": ("compressed-tensors", "nvfp4", nvfp4),
    "nvfp4 modelopt": (
        "modelopt", "nvfp4",
        lambda o, i: {
            "weight": ((o, i // 2), BYTE), "weight_scale": ((o, i // 16), FP8),
            "weight_scale_2": ((), FP32), "input_scale": ((), FP32),
        },
    ),
    "mxfp4": (
        "compressed-tensors", "mxfp4",
        lambda o, i: {"weight_packed": ((o, i // 2), BYTE), "weight_scale": ((o, i // 32), BYTE)},
    ),
    "w8a8": (
        "compressed-tensors", "scaled int8",
        lambda o, i: {"weight": ((o, i), torch.int8), "weight_scale": ((o, 1), BF16)},
    ),
    "torchao": (
        "torchao", "torchao int4",
        lambda o, i: {
            "_weight_qdata": ((o, i // I4), INT),
            "_weight_scale_and_zero": ((i // GROUP, o, 2), BF16),
        },
    ),
    "hqq": ("hqq", "HQQ int4", hqq),
}  # fmt: skip


def is_quantized(key):
    return key.startswith("language_model.model.layers") and key.endswith("proj.weight")


def quantized(folder, method):
    """`folder`, with the Linears of the language model's layers as `method` stores them.
    Returns the names of the tensors that hold numbers, and of those beside them."""
    quant_method, _, parts = METHODS[method]
    tensors, numbers, state = load_file(folder / "model.safetensors"), [], []
    for key in [*filter(is_quantized, tensors)]:
        shape = tensors.pop(key).shape
        made = {
            f"{key.removesuffix('weight')}{ending}": torch.zeros(size).to(dtype)
            for ending, (size, dtype) in parts(*shape).items()
        }
        numbers.append(next(iter(made)))
        state += [*made][1:]
        tensors |= made
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    said = {"quantization_config": {"quant_method": quant_method, "bits": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return numbers, state


def in_file(folder, keep=lambda key: True):
    tensors = load_file(folder / "model.safetensors")
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if keep(key))


PREFIXES = {
    "vision_encoder": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language_model": "language_model.",
}


@pytest.mark.parametrize("method", METHODS)
def test_bytes_by_component_and_format_are_those_of_the_tensors(llava, copy, method):
    folder, (quant_method, label, _) = copy(llava), METHODS[method]
    numbers, state = quantized(folder, method)
    ledger = vk.memory.predict(folder)
    assert ledger.method == quant_method and ledger.unknown == ()
    assert ledger.by_component == {
        component: in_file(folder, lambda key, start=prefix: key.startswith(start))
        for component, prefix in PREFIXES.items()
    }
    parts = {*numbers, *state}
    assert ledger.by_format[("language_model", label)] == in_file(folder, parts.__contains__)
    assert ledger.by_kind[STATE] == in_file(folder, {*state}.__contains__)
    assert {name for _, name in ledger.by_format} == {label, "bf16"}
    stored = vk.anatomy(folder).table()["stored"]
    assert stored["vision_encoder"] == "bf16" and label in stored["language_model"]
    with pytest.raises(CheckpointError, match=f"quantized by {quant_method}(.|\n)*does not load"):
        vk.load(folder)


@pytest.mark.parametrize(
    ("key", "weight", "part"),
    [
        (
            "a.q_proj.weight.quant_state.bitsandbytes__nf4",
            "a.q_proj.weight",
            "quant_state.bitsandbytes__nf4",
        ),
        ("a.q_proj.weight.nested_absmax", "a.q_proj.weight", "nested_absmax"),
        ("a.q_proj.SCB", "a.q_proj.weight", "SCB"),
        ("a.q_proj.weight_scale_inv", "a.q_proj.weight", "scale_inv"),
        ("a.experts.gate_up_proj_scale_inv", "a.experts.gate_up_proj", "scale_inv"),
        ("a.experts.down_proj_blocks", "a.experts.down_proj", "blocks"),
        ("a.q_proj.weight_zero_point", "a.q_proj.weight", "zero_point"),
        ("a.k_proj.k_scale", "a.k_proj.weight", "k_scale"),
        ("a.q_proj._weight_scale_and_zero", "a.q_proj.weight", "scale_and_zero"),
        ("a.q_proj._weight_act_quant_zero_point", "a.q_proj.weight", "act_quant_zero_point"),
        ("a.experts._gate_up_proj_qdata", "a.experts.gate_up_proj", "qdata"),
        ("a.q_proj.quant_scale", "a.q_proj.weight", "quant_scale"),
        ("a.q_proj.weight._scale", "a.q_proj.weight", "_scale"),
        ("a.q_proj.bias", "a.q_proj.bias", ""),
    ],
)
def test_which_weight_a_tensor_is_a_part_of(key, weight, part):
    assert _part_of(key) == (weight, part)


def test_bitsandbytes(llava, tmp_path):
    plan = vk.Plan(vision_encoder="int8", language_model="nf4-dq")
    folder = vk.save(vk.load(llava, plan, processor=False)[0], None, tmp_path / "saved")
    ledger, of = vk.memory.stored(folder), vk.anatomy(folder).component_of
    assert ledger.by_component == {
        name: in_file(folder, lambda key, name=name: of(key) == name) for name in PREFIXES
    }
    assert {stored for _, stored in ledger.by_format} == {"int8", "nf4-dq", "bf16"}
    assert "nf4-dq" in vk.anatomy(folder).table()["stored"]["language_model"]


def test_experts_that_are_stored_one_by_one(family, copy):
    folder = copy(family("qwen3_vl_moe"))
    tensors = load_file(folder / "model.safetensors")
    experts = [key for key in tensors if ".experts." in key]
    for key in experts:
        del tensors[key]
    made = {}
    for expert in range(2):
        stem = f"model.language_model.layers.1.mlp.experts.{expert}.gate_proj"
        made |= {f"{stem}.{end}": torch.zeros(*s).to(d) for end, (s, d) in awq(32, 96).items()}
    save_file(tensors | made, folder / "model.safetensors", {"format": "pt"})
    ledger = vk.memory.stored(folder)
    assert ledger.by_format["language_model", "AWQ int4"] == in_file(folder, made.__contains__)
    assert ledger.total == in_file(folder)


def test_what_no_rule_knows_is_unknown(llava, copy):
    folder = copy(llava)
    quantized(folder, "awq")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "novelty.qweight": torch.zeros(8, 4, dtype=INT),
        "novelty.logit_scale": torch.ones(3),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ledger = vk.memory.stored(folder)
    assert set(ledger.unknown) == {"novelty.qweight", "novelty.logit_scale"}
    assert ledger.by_component[None] == 8 * 4 * 4 + 3 * 4
    assert "novelty.qweight" in str(ledger)


def test_a_model_that_transformers_does_not_know_is_counted_by_its_own_names(llava, copy):
    folder = copy(llava)
    quantized(folder, "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "novel"}))
    ledger = vk.memory.stored(folder)
    assert ledger.total == in_file(folder)
    assert ledger.by_component["vision_encoder"] == in_file(
        folder, lambda key: key.startswith("vision_tower.")
    )
    assert any("novel" in note for note in ledger.notes)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(name, llava, copy):
    folder = copy(llava)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is a pipe"):
        vk.memory.stored(folder)


def test_a_prompt_needs_a_plan_and_gets_one(llava, copy):
    folder = copy(llava)
    quantized(folder, "awq")
    with pytest.raises(CheckpointError, match="plan"):
        vk.memory.predict(folder, tokens=8)
    assert vk.memory.predict(folder, "nf4", tokens=8).by_kind["kv cache"]


def test_the_command_line(llava, copy, capsys):
    from vlmkit.cli import main

    folder = copy(llava)
    quantized(folder, "fp8 blocks")
    assert main(["memory", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["total"] == in_file(folder) == sum(row["bytes"] for row in said["by_format"])
    assert main(["memory", str(folder)]) == 0
    assert "fp8" in capsys.readouterr().out


# --- GGUF ----------------------------------------------------------------------------------------

TEXT = {  # name: (rows, columns, type)
    "token_embd.weight": (64, 256, "Q6_K"),
    "blk.0.attn_q.weight": (256, 256, "Q4_K"),
    "blk.0.ffn_down.weight": (256, 512, "Q5_0"),
    "blk.0.attn_norm.weight": (1, 256, "F32"),
    "output_norm.weight": (1, 256, "F32"),
}
SIGHT = {
    "v.blk.0.attn_q.weight": (64, 64, "F16"),
    "v.deepstack.0.fc1.weight": (64, 64, "F16"),
    "mm.0.weight": (256, 64, "Q8_0"),
    "mm.a.fc.weight": (8, 64, "F16"),
    "novelty.weight": (4, 32, "BF16"),
}


def gguf(path, architecture, tensors):
    """Write a GGUF file, as llama.cpp's converter does. Returns {name: bytes of its data}."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer, sizes = GGUFWriter(path, architecture), {}
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("a.flag", True)
    for name, (rows, columns, kind) in tensors.items():
        kind = GGMLQuantizationType[kind]
        block, size = GGML_QUANT_SIZES[kind]
        data = np.zeros((rows, columns // block * size), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
        sizes[name] = data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sizes


@pytest.fixture
def gguf_folder(tmp_path):
    text = gguf(tmp_path / "model-Q4_K_M.gguf", "llama", TEXT)
    return tmp_path, text | gguf(tmp_path / "mmproj-F16.gguf", "clip", SIGHT)


def test_gguf_with_its_mmproj(gguf_folder):
    folder, sizes = gguf_folder
    for x in (folder, folder / "model-Q4_K_M.gguf", str(folder)):
        ledger = vk.memory.predict(x)
        assert {entry.name: entry.bytes for entry in ledger.entries} == sizes
    projector = sizes["v.deepstack.0.fc1.weight"] + sizes["mm.0.weight"]
    assert ledger.by_component == {
        "vision_encoder": sizes["v.blk.0.attn_q.weight"],
        "projector": projector,
        "language_model": sum(sizes[name] for name in TEXT),
        "other": sizes["mm.a.fc.weight"],
        None: sizes["novelty.weight"],
    }
    assert ledger.by_format["language_model", "Q4_K"] == 256 * 144
    anatomy = vk.anatomy(folder)
    assert anatomy["language_model"].parameters == sum(r * c for r, c, _ in TEXT.values())
    assert anatomy.unknown == ("novelty.weight",)
    assert anatomy.table()["stored"]["projector"] == "Q8_0, fp16"
    for x in (folder, folder / "model-Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match="does not load them(.|\n)*llama.cpp"):
            vk.load(x)


def test_gguf_files_that_are_not_clear(gguf_folder):
    folder, _ = gguf_folder
    assert len(gguf_files(folder)) == 2
    shutil.copy(folder / "model-Q4_K_M.gguf", folder / "model-Q8_0.gguf")
    with pytest.raises(CheckpointError, match="2 GGUF models"):
        vk.memory.stored(folder)
    assert len(gguf_files(folder / "model-Q8_0.gguf")) == 2
    shutil.copy(folder / "mmproj-F16.gguf", folder / "mmproj-F32.gguf")
    with pytest.raises(CheckpointError, match="2 GGUF mmproj"):
        vk.memory.stored(folder / "model-Q8_0.gguf")
    files = [folder / "model-Q8_0.gguf", folder / "mmproj-F32.gguf"]
    assert vk.memory.stored(files).total == vk.memory.stored(list(reversed(files))).total
    shutil.move(folder / "model-Q8_0.gguf", folder / "big-00001-of-00002.gguf")
    os.remove(folder / "mmproj-F32.gguf")
    with pytest.raises(CheckpointError, match="one of 2 files, and 1"):
        vk.memory.stored(folder / "big-00001-of-00002.gguf")


def test_a_pipe_that_is_called_gguf(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    for look in (vk.memory.stored, vk.memory.predict, vk.anatomy, vk.load):
        with pytest.raises(CheckpointError, match="is a pipe"):
            look(tmp_path)


def test_a_damaged_gguf(gguf_folder):
    folder, _ = gguf_folder
    file = folder / "model-Q4_K_M.gguf"
    whole = file.read_bytes()
    for damaged in (
        whole[:-4000],  # the weights were cut
        whole[:90],  # the header was cut
        b"GGML" + whole[4:],
        whole[:4] + b"\1" + whole[5:],  # version 1
        whole[:16] + b"\xff" * 8 + whole[24:],  # 2^64 - 1 pairs
        whole[:24] + b"\xff" * 8 + whole[32:],  # a key of as many bytes
    ):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            vk.memory.stored(file)
