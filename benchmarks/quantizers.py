"""What four ways say about the bytes of thirteen checkpoints, and what the bytes are.

    pip install compressed-tensors torchao hqq hf-mem       # each row and column needs its own
    python benchmarks/quantizers.py                         # a minute on one core
    python benchmarks/quantizers.py --output trial.csv

The checkpoints are made for the occasion: small models of six families, with odd shapes, random
weights and the files that eight quantizers write. transformers, bitsandbytes, compressed-tensors,
torchao, HQQ and gguf write theirs themselves. AWQ, GPTQ and FP8 cannot be written without a GPU or
another library, so their layouts are written here, with zeros for the packed numbers.

There are two truths, and a tool may be about one of them only:

- files: the bytes of the tensors in the weight files, read tensor by tensor;
- held: the bytes of all tensors that `from_pretrained` leaves behind, each storage once. Empty
  where the library does not run on a CPU here.

The ways:

- vlmkit: `vk.memory.stored` for the files. For a load, `vk.memory.predict` under the plan that the
  checkpoint has, which answers for what vlmkit can load.
- accelerate: the "Total Size" of `accelerate estimate-memory` for the smallest number format of the
  checkpoint. It is about a load, and made for checkpoints that are not quantized yet.
- hf-mem: `hf_mem.run`, whose requests to the hub are answered from the folder. It reads the headers
  of the files, as `vk.memory.stored` does.
- rule: parameters × the bytes of the dtype that config.json names. It is about both.

The result is results/quantizers.csv. An empty field is no answer, or a truth that is not known.
"""

import argparse
import contextlib
import copy
import csv
import gc
import json
import sys
import tempfile
import warnings
from math import ceil
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # the configs of small models
from memory import _accelerate  # noqa: E402

OUTPUT = HERE / "results" / "quantizers.csv"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Bytes of checkpoints, as four ways see them.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args(argv)
    rows = [row_of(name) for name in CHECKPOINTS]
    with open(arguments.output, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("\n".join(table(rows)))


def row_of(name):
    """The row of the checkpoint `name`, which is made in a temporary folder."""
    from vlmkit.backend.quiet import quiet

    family, bits, make, fields = CHECKPOINTS[name]
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(folder)
        made_by = make(folder, family, **fields)
        return {
            "checkpoint": name,
            "family": family,
            "written by": made_by,
            "files": _in_files(folder),
            "held": _answer(_held, folder),
            "vlmkit stored": _answer(_vlmkit_stored, folder),
            "vlmkit predict": _answer(_vlmkit_predict, folder),
            "accelerate": _answer(_accelerate, folder, bits),
            "hf-mem": _answer(_hf_mem, folder),
            "rule": _answer(_rule, folder),
        }


def _answer(way, *arguments):
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return way(*arguments)
        except Exception as error:  # a tool that has no answer says so in its own way
            print(f"{way.__name__}: {type(error).__name__}: {str(error)[:200]}")
            return ""


# --- the truths -----------------------------------------------------------------------------------


def _in_files(folder):
    from gguf import GGUFReader
    from safetensors.torch import load_file

    size = 0
    for file in folder.glob("*.safetensors"):
        size += sum(t.numel() * t.element_size() for t in load_file(file).values())
    for file in folder.glob("*.gguf"):
        size += sum(tensor.data.nbytes for tensor in GGUFReader(file).tensors)
    return size


def _held(folder):
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    load(folder)  # what libraries make once, and keep
    before = _storages()
    model, found = load(folder, output_loading_info=True)
    after = _storages()
    del model
    if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
        raise ValueError(f"transformers does not read {len(wrong)} tensors, such as {wrong[0]}")
    return sum(size for pointer, size in after.items() if pointer not in before)


def _storages():
    """{address: bytes} of the storages of all tensors in this process."""
    import torch

    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    plain = (t for t in tensors if not hasattr(t, "__tensor_flatten__") and t.device.type == "cpu")
    return {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, plain)}


# --- the ways -------------------------------------------------------------------------------------


def _vlmkit_stored(folder):
    import vlmkit as vk

    return vk.memory.stored(folder).total


def _vlmkit_predict(folder):
    import vlmkit as vk
    from vlmkit.memory.stored import loadable

    if not loadable(folder):
        return ""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain = {"float16": "fp16", "bfloat16": "bf16"}[config["dtype"]]
    plan = None if "quantization_config" in config else plain
    return vk.memory.predict(folder, plan).total


def _hf_mem(folder):
    """Bytes of `hf_mem.run`. The hub that it asks is this folder."""
    import httpx2
    from hf_mem import run

    def hub(request):
        if "/tree/" in request.url.path:
            files = [{"path": file.name, "type": "file"} for file in folder.iterdir()]
            return httpx2.Response(200, json=files)
        whole = (folder / request.url.path.rpartition("/")[2]).read_bytes()
        first, last = request.headers.get("Range", "bytes=0-")[6:].split("-")
        return httpx2.Response(206, content=whole[int(first) : int(last or len(whole)) + 1])

    def client(**_):
        return plain(transport=httpx2.MockTransport(hub))

    plain = httpx2.AsyncClient
    with mock.patch.object(httpx2, "AsyncClient", client):
        memory = run("owner/model").memory
    return sum(memory.values()) if isinstance(memory, dict) else memory


def _rule(folder):
    from transformers import AutoConfig

    from vlmkit.anatomy import on_meta

    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    return on_meta(config).num_parameters() * config.dtype.itemsize


# --- checkpoints ----------------------------------------------------------------------------------


def _plain(folder, family, *, dtype="bfloat16", tie=None, shard="1GB", **text):
    """Save a small model of `family`, its text_config changed by `text`."""
    import torch
    from families import _FAMILIES
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    made = _FAMILIES[family]
    fields = copy.deepcopy(made.config)
    tie = made.tied if tie is None else tie
    fields["text_config"] |= {"num_hidden_layers": 6, "vocab_size": 1501, **text}
    fields["text_config"]["tie_word_embeddings"] = fields["tie_word_embeddings"] = tie
    config = CONFIG_MAPPING[made.model_type](**fields)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return "transformers"


def _loaded(folder, family, by, config, **fields):
    """Save a small model that transformers quantizes while it loads."""
    from transformers import AutoModelForImageTextToText

    with tempfile.TemporaryDirectory() as plain:
        _plain(plain, family, **fields)
        AutoModelForImageTextToText.from_pretrained(
            plain, quantization_config=config()
        ).save_pretrained(folder)
    return by


def _bitsandbytes(**options):
    def config():
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return config


def _torchao():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)


def _compressed(folder, family, *, weights, format, **fields):
    """Quantize with compressed-tensors, as llm-compressor does."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForImageTextToText

    ignore = ["re:.*vision.*", "re:.*visual.*", "re:.*multi_modal_projector.*", "lm_head"]
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"quant_method": "compressed-tensors", "format": format, "ignore": ignore}
    said |= {"config_groups": groups, "quantization_status": "initialized"}
    with tempfile.TemporaryDirectory() as plain:
        _plain(plain, family, **fields)
        model = AutoModelForImageTextToText.from_pretrained(plain)
    apply_quantization_config(model, QuantizationConfig.model_validate(said))
    for module in model.modules():
        for name in ("weight_scale", "weight_global_scale"):
            if hasattr(module, name):
                getattr(module, name).data.fill_(1)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    model.save_pretrained(folder)
    _says(folder, {**said, "quantization_status": "compressed"})
    return "compressed-tensors"


def _by_hand(folder, family, *, said, parts, **fields):
    """Replace the Linear layers of the language model by what `parts` makes of out × in weights."""
    import torch
    from safetensors.torch import load_file, save_file

    _plain(folder, family, **fields)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for key in [*filter(_is_text_layer, tensors)]:
            shape = tensors.pop(key).shape
            tensors |= {
                key.removesuffix("weight") + ending: torch.zeros(size).to(getattr(torch, dtype))
                for ending, (size, dtype) in parts(*shape).items()
            }
        save_file(tensors, file, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    _says(folder, said)
    return "this script"


def _is_text_layer(key):
    return ".layers." in key and "vis" not in key and key.endswith("proj.weight")


def _says(folder, said):
    file = folder / "config.json"
    said = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": said}
    file.write_text(json.dumps(said), encoding="utf-8")


def awq(rows, columns, group=32):
    """Parts of a weight as AutoAWQ packs them: eight numbers of 4 bits in an int32."""
    groups = columns // group
    return {
        "qweight": ((columns, rows // 8), "int32"),
        "qzeros": ((groups, rows // 8), "int32"),
        "scales": ((groups, rows), "float16"),
    }


def gptq(rows, columns, group=128):
    """Parts of a weight as GPTQModel packs them. The last group may be shorter."""
    groups = ceil(columns / group)
    return {
        "qweight": ((columns // 8, rows), "int32"),
        "qzeros": ((groups, rows // 8), "int32"),
        "scales": ((groups, rows), "float16"),
        "g_idx": ((columns,), "int32"),
    }


def fp8(rows, columns):
    """Parts of a weight as transformers reads them: a scale for each block of 128 × 128."""
    scales = (ceil(rows / 128), ceil(columns / 128))
    return {"weight": ((rows, columns), "float8_e4m3fn"), "weight_scale_inv": (scales, "float32")}


def _hqq(folder, family, **fields):
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from safetensors.torch import load_file, save_file

    _plain(folder, family, **fields)
    tensors, how = load_file(folder / "model.safetensors"), BaseQuantizeConfig(4, 32)
    for key in [*filter(_is_text_layer, tensors)]:
        weight = tensors.pop(key)
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight.data = weight
        layer = HQQLinear(linear, how, compute_dtype=weight.dtype, device="cpu")
        state = layer.state_dict()
        tensors |= {f"{key.removesuffix('weight')}{n}": t.contiguous() for n, t in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _says(folder, {"quant_method": "hqq", "quant_config": how, "skip_modules": ["lm_head"]})
    return "HQQ"


def _gguf(folder, family, *, kinds=("Q4_0", "Q6_K", "F16"), width=256, layers=6, words=1501):
    """A llama of llama.cpp's converter and the mmproj file beside it: numbers of three types."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    layer, table, sight = kinds
    shapes = {"token_embd.weight": (words, width, table), "output_norm.weight": (1, width, "F32")}
    for i in range(layers):
        for name, rows in {"attn_q": width, "attn_k": 64, "attn_v": 64, "ffn_up": 640}.items():
            shapes[f"blk.{i}.{name}.weight"] = (rows, width, layer)
        shapes[f"blk.{i}.ffn_down.weight"] = (width, 640, "Q5_0")
        shapes[f"blk.{i}.attn_norm.weight"] = (1, width, "F32")
    seen = {f"v.blk.{i}.ffn_up.weight": (100, 64, sight) for i in range(2)}
    seen |= {"v.patch_embd.weight": (64, 432, "F32"), "mm.0.weight": (width, 64, "Q8_0")}
    for file, what, tensors in (("model", "llama", shapes), ("mmproj-model", "clip", seen)):
        writer = GGUFWriter(folder / f"{file}.gguf", what)
        for name, (rows, columns, kind) in tensors.items():
            kind = GGMLQuantizationType[kind]
            block, size = GGML_QUANT_SIZES[kind]
            data = np.zeros((rows, columns // block * size), np.uint8)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return "gguf"


_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
_NVFP4 |= {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_WHOLE = ["lm_head", "model.visual"]  # what stays as it is
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def _said(method, **more):
    return {"quant_method": method, "modules_to_not_convert": _WHOLE, **more}


def _by(make, **fixed):
    return lambda folder, family, **fields: make(folder, family, **fixed, **fields)


CHECKPOINTS = {
    "fp16, not quantized": ("llava", 16, _plain, {"dtype": "float16"}),
    "bf16 in shards": ("mllama", 16, _plain, {"shard": "300KB"}),
    "NF4, vision encoder too": (
        "llava", 4, _by(_loaded, by="bitsandbytes", config=_bitsandbytes(**_NF4)), {},
    ),
    "NF4 doubly quantized, large vocabulary": (
        "smolvlm", 4,
        _by(
            _loaded,
            by="bitsandbytes",
            config=_bitsandbytes(
                **_NF4,
                bnb_4bit_use_double_quant=True,
                llm_int8_skip_modules=["model.vision_model", "model.connector", "lm_head"],
            ),
        ),
        {"vocab_size": 20_011},
    ),
    "LLM.int8": (
        "paligemma", 8, _by(_loaded, by="bitsandbytes", config=_bitsandbytes(load_in_8bit=True)),
        {},
    ),
    "AWQ int4": (
        "qwen2_5_vl", 4,
        _by(_by_hand, parts=awq, said=_said("awq", bits=4, group_size=32, version="gemm")), {},
    ),
    "GPTQ int4, tied head": (
        "qwen2_5_vl", 4, _by(_by_hand, parts=gptq, said=_said("gptq", bits=4, group_size=128)),
        {"tie": True},
    ),
    "FP8 in blocks": (
        "qwen3_vl", 8, _by(_by_hand, parts=fp8, said=_said("fp8", weight_block_size=[128, 128])),
        {},
    ),
    "compressed-tensors W4A16": (
        "qwen2_5_vl", 4, _by(_compressed, weights=_INT4, format="pack-quantized"), {},
    ),
    "compressed-tensors NVFP4": (
        "llava", 4, _by(_compressed, weights=_NVFP4, format="nvfp4-pack-quantized"), {},
    ),
    "torchao int8": ("llava", 8, _by(_loaded, by="torchao", config=_torchao), {}),
    "HQQ int4": ("smolvlm", 4, _hqq, {}),
    "GGUF with mmproj": ("llama and clip", 4, _gguf, {}),
}  # fmt: skip
"""Name of a checkpoint: its family, the bits of its smallest format, and what makes it."""


# --- tables ---------------------------------------------------------------------------------------


def table(rows):
    """Lines of a table in Markdown: the truths in bytes, and the errors of the ways in percent."""
    titles = ["checkpoint", "family", "files", "vlmkit", "hf-mem", "rule"]
    titles += ["held", "vlmkit", "accelerate", "rule"]
    yield f"| {' | '.join(titles)} |"
    yield "|---|---|" + "---:|" * (len(titles) - 2)
    for row in rows:
        files = [_error(row[way], row["files"]) for way in ("vlmkit stored", "hf-mem", "rule")]
        held = [_error(row[way], row["held"]) for way in ("vlmkit predict", "accelerate", "rule")]
        sizes = [f"{int(row[truth]):,}" if row[truth] != "" else "" for truth in ("files", "held")]
        cells = [row["checkpoint"], row["family"], sizes[0], *files, sizes[1], *held]
        yield f"| {' | '.join(cells)} |"


def _error(answer, truth):
    if truth == "":
        return ""
    if answer == "":
        return "no answer"
    answer, truth = float(answer), float(truth)
    return "0 bytes" if answer == truth else f"{100 * answer / truth - 100:+.1f}%"


if __name__ == "__main__":
    main()
