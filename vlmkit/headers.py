"""Headers: what the weight files of a checkpoint hold, whoever quantized it.

A safetensors or GGUF file begins with the name, the type and the shape of each of its tensors. That
is enough for the bytes of every component in every stored format, and no weight is read.

The layouts of names are those that the libraries write, as read from their sources: bitsandbytes,
AutoAWQ, GPTQModel, transformers' FP8 and MXFP4, compressed-tensors 0.20, ModelOpt, torchao 0.18,
HQQ 0.2.8, optimum-quanto, and GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import os
import re
import struct
from collections import Counter
from functools import lru_cache
from math import prod
from pathlib import Path

from vlmkit.architectures import GGUF, decide
from vlmkit.checkpoints import FLOATS, INDEX, SAFETENSORS, renamer, weight_headers
from vlmkit.errors import CheckpointError, brief
from vlmkit.rows import STATE, STORED, Row

_PARTS = tuple(
    (re.compile(pattern), weight)
    for pattern, weight in (
        (r"\.((?:nested_)?(?:absmax|quant_map)|quant_state\..*)$", ""),  # bitsandbytes, 4 bits
        (r"\.(SCB|weight_format)$", ".weight"),  # bitsandbytes, 8 bits
        (r"\.(qweight|qzeros|scales|g_idx)$", ".weight"),  # AWQ, GPTQ
        (
            r"\.(W_q|nbits|group_size|shape|scale|zero|axis|packing|unpack_view_dtype|view_as_float"
            r"|quant_scale|quant_zero|compute_dtype|offload_meta|encoded_state_dict"
            r"|stores_quant_config|channel_wise|optimize|round_zero)$",
            ".weight",
        ),  # HQQ
        (r"\.weight\.(_data|_scale|_shift)$", ".weight"),  # quanto
        # compressed-tensors, FP8, ModelOpt, and (after the name of fused experts) MXFP4
        (r"_(packed|shape|g_idx|zero_point|global_scale|scale_inv|scale_2|scales?|blocks)$", ""),
    )
)
"""(ending of a tensor's name, what stands there in the name of the weight that it is a part of)."""
_TORCHAO = re.compile(
    r"\._(\w+?)_(qdata|scale_and_zero|(?:act_)?per_tensor_scale|act_quant_(?:scale|zero_point)"
    r"|act_pre_scale|scale|zero_point)$"
)
_ACTIVATIONS = re.compile(
    r"\.((?:input|output|activation|[qkv])_(?:global_)?(?:scale|zero_point)\w*)$"
)
_MAIN = ("", "qweight", "packed", "blocks", "qdata", "W_q", "_data")
"""The parts that hold the numbers of a weight. The others are its quantization state."""
NO_LONGER_SAVED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")
"""Buffers that older releases of transformers saved. Models compute them now."""
_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_POWERS_OF_TWO = ("U8", "F8_E8M0")  # how scales of the MX formats are stored


def stored_rows(folder, model=None, bits=None):
    """A `vlmkit.rows.Row` for each tensor in the safetensors files of `folder`.

    Its `kind` is STORED, or STATE for what a quantizer keeps beside the numbers of a weight. Its
    `format` is that of the weight: vlmkit's name where vlmkit has the format ("bf16", "nf4-dq"), a
    name such as "AWQ int4" where another library does, and safetensors' dtype where the layout is
    not known. Its `component` is None where no rule knows the name.

    model: the checkpoint's, on the meta device, for its names. None: the names are taken as they
        are in the files. bits: of a packed weight, where the shapes do not say it.

    Raises CheckpointError as `vlmkit.checkpoints.weight_headers` does.
    """
    headers = weight_headers(folder)
    rename, shapes, model_type = str, {}, None
    if model is not None:
        rename, model_type = renamer(model), model.config.model_type
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def row(key, name, kind, label):
        dtype, shape = headers[key]
        size = -(-prod(shape) * _bits(dtype) // 8)
        return Row(key, decide(name, model_type)[0], kind, size, shape, format=label)

    for weight, keys in _weights(headers):
        if weight is None:
            yield row(keys[""], rename(keys[""]), STORED, _plain(headers[keys[""]][0]))
            continue
        held = {part: headers[key] for part, key in keys.items()}
        main = next(part for part in _MAIN if part in held)
        name = rename(weight)
        # Where transformers puts several weights together, the shape is that of all of them.
        shape = None if getattr(rename, "converted", False) else shapes.get(name)
        label = _format(held, main, shape, bits)
        for part, key in keys.items():
            yield row(key, name, STORED if part == main else STATE, label)


def unquantized(rows, method):
    """A tuple with a sentence if the `rows` of `stored_rows` hold nothing that is quantized, and
    config.json says that they are (by `method`). Otherwise an empty tuple."""
    if method is None or any(row.kind == STATE for row in rows):
        return ()
    return (
        f"config.json says that the weights are quantized by {method}, and in the weight files "
        "none is.",
    )


def _weights(headers):
    """(name of a weight, {part: name of its tensor}) for each weight that is in a quantizer's
    layout, and (None, {"": name}) for each other tensor."""
    weights = {}
    for key in headers:
        weight, part = _part_of(key)
        weights.setdefault(weight, {})[part] = key
    for weight, keys in weights.items():
        main = next((part for part in _MAIN if part in keys), None)
        if main is None or main == "" and headers[keys[main]][0] in FLOATS:
            for key in keys.values():  # `logit_scale` is no quantization state
                yield None, {"": key}
        else:
            yield weight, keys


def packed_weights(folder, model):
    """({full names in `model` of the weights that are in a quantizer's layout}, {full name of each
    other tensor: name of its format}) of the weight files in `folder`."""
    headers, rename = weight_headers(folder), renamer(model)
    packed, plain = set(), {}
    for weight, keys in _weights(headers):
        if weight is not None:
            packed.add(rename(weight))
        else:
            plain[rename(keys[""])] = _plain(headers[keys[""]][0])
    return packed, plain


def differences(folder, shapes, build):
    """{what is wrong, in words: names of weights} of the weight files in `folder`, as compared with
    a model. Empty if config.json and the weights belong together.

    shapes: {full name of a parameter: its shape}. build: a function that returns the model on the
        meta device. It is called only if names in the files have to be translated.

    Weights that a quantizer packed are compared by their names, the others by their shapes too.
    Raises CheckpointError as `vlmkit.checkpoints.weight_headers` does.
    """
    headers = weight_headers(folder)
    floats = [shape for dtype, shape in headers.values() if dtype in FLOATS]
    if len(floats) == len(headers) and Counter(floats) == Counter(shapes.values()):
        return {}  # the usual case
    model = build()
    rename, there, wrong, integers = renamer(model), set(), set(), set()
    for weight, keys in _weights(headers):
        key = weight or keys[""]
        name = rename(key)
        there.add(name)
        if name in shapes and list(keys) == [""] and not rename.converted:
            dtype, shape = headers[key]
            if dtype not in FLOATS:
                integers.add(f"{key} ({dtype})")
            elif shape != shapes[name]:
                wrong.add(name)
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    left = there - tied - model.state_dict().keys() if len(floats) == len(headers) else set()
    lacking = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    unread = (NO_LONGER_SAVED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    found = {
        "lacks weights that the model has": _but(lacking, shapes.keys() - there - tied),
        "holds weights that the model has no place for": _but(unread, left),
        "holds weights of another shape than the model's": sorted(wrong),
        "holds integers in place of weights": sorted(integers),
    }
    return {words: names for words, names in found.items() if names}


def _but(patterns, names):
    """The sorted `names` in which none of `patterns` is found."""
    return sorted(name for name in names if not any(re.search(p, name) for p in patterns))


def mismatch(folder, model):
    """A tuple with a sentence for each of `differences`. Empty where no weights are here."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    try:
        found = differences(folder, shapes, lambda: model)
    except CheckpointError:  # whoever wants the weights says what is wrong with them
        return ()
    return tuple(
        f"config.json and the weights do not belong together: the folder {words}: {some(names)}. "
        "vlmkit does not load such a checkpoint."
        for words, names in found.items()
    )


def some(names):
    """The first three of sorted `names`, and how many there are besides, in words."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _part_of(key):
    """(full name of the weight that the tensor `key` belongs to, which part of it it is)."""
    if found := _TORCHAO.search(key):
        return f"{key[: found.start()]}.{found[1]}", found[2]
    if found := _ACTIVATIONS.search(key):
        return f"{key[: found.start()]}.weight", found[1]
    for pattern, weight in _PARTS:
        if found := pattern.search(key):
            return key[: found.start()] + weight, found[1]
    return key, ""


def _bits(dtype):
    """Bits of a number in safetensors' `dtype`: 8 for "F8_E4M3" and "BOOL"."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _plain(dtype):
    return _NAMES.get(dtype, "fp8" if dtype.startswith("F8_E") else dtype)


def _format(held, main, shape, bits):
    """Name of the format of a weight that has the parts `held`: {part: (dtype, shape)}."""
    for part in held:
        if part.startswith("quant_state."):
            return part.rpartition("__")[2] + "-dq" * ("nested_absmax" in held)
    if "SCB" in held:
        return "int8"
    dtype, packed = held[main]
    scales = next((held[p] for p in ("scale", "scales", "scale_inv", "_scale") if p in held), None)
    if scales is None and len(held) == 1 and main == "":
        return _plain(dtype)  # integers that nothing scales, such as a buffer of positions
    kind = scales[0] if scales else None
    if dtype.startswith("F8_E"):
        mx = kind in _POWERS_OF_TWO and prod(packed) == 32 * prod(scales[1])
        return "mxfp8" if mx else "fp8"
    if shape:
        bits = round(prod(packed) * _bits(dtype) / prod(shape))
    elif main == "qweight" and scales:  # both have a column for each output
        columns = held.get("qzeros", held[main]) if "g_idx" in held else held[main]
        bits = 32 * columns[1][-1] // scales[1][-1]
    if dtype in ("U8", "I8", "F4") and kind == "F8_E4M3":
        return "nvfp4"
    if dtype in ("U8", "F4") and kind in _POWERS_OF_TWO and main in ("packed", "blocks", "qdata"):
        return f"mxfp{bits or 4}"
    if main == "":
        return f"scaled int{_bits(dtype)}"
    names = {"packed": "packed", "qdata": "torchao", "W_q": "HQQ", "_data": "quanto"}
    label = names.get(main, "AWQ")
    if main == "qweight" and ("g_idx" in held or scales and packed[-1] == scales[1][-1]):
        label = "GPTQ"
    return f"{label} int{bits or ''}"


# --- GGUF ----------------------------------------------------------------------------------------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_TEXT, _ARRAY = 8, 9
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def gguf_files(x):
    """The GGUF files that `x` means, as a list of pathlib.Path: an empty list if it means none.

    x: a folder without safetensors, a file (which brings its other shards, and the mmproj file
        beside it), or a list of files.

    Raises CheckpointError if a folder has several models, several mmproj files, or lacks a shard.
    """
    if isinstance(x, (list, tuple)):
        return [Path(file) for file in x]
    text = os.path.expanduser(str(x))
    if not isinstance(x, (str, Path)) or not os.path.exists(text):
        return []
    path = Path(text)
    if path.is_file() and path.suffix != ".gguf":
        return []
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob("*.gguf"))
    if not found or path == folder and any((folder / f).exists() for f in (SAFETENSORS, INDEX)):
        return []
    mmproj = [file for file in found if _gguf_header(file)[0].get(_ARCHITECTURE) == "clip"]
    models = {}
    for file in found:
        if file not in mmproj:
            models.setdefault(_SHARD.sub("", file.stem), []).append(file)
    if path in mmproj:
        return [path]
    if path != folder:
        models = {_SHARD.sub("", path.stem): models[_SHARD.sub("", path.stem)]}
    for several, what in ((list(models), "models"), ([f.stem for f in mmproj], "mmproj files")):
        if len(several) > 1:
            raise CheckpointError(
                f"{folder} has {len(several)} GGUF {what}: {', '.join(several[:4])}. Say which is "
                "meant: give the file of the model, or a list of two files, the model's and its "
                "mmproj. On the command line, keep one mmproj file in the folder."
            )
    files = [file for shards in models.values() for file in shards]
    shard = _SHARD.search(files[0].stem) if files else None
    if shard and len(files) != int(shard[2]):
        raise CheckpointError(
            f"{files[0]} is one of {int(shard[2])} files, and {len(files)} of them are here. Copy "
            "or download the others."
        )
    return [*files, *mmproj]


_ARCHITECTURE = "general.architecture"


def gguf_rows(files):
    """(rows, names): a Row as of `stored_rows` for each tensor of the GGUF `files`, and the
    `general.architecture` of each file, which is "clip" for a file of a vision encoder.

    The bytes of a tensor are those of its blocks, which hold their scales themselves, so no row is
    STATE. Its shape is in PyTorch's order. Raises CheckpointError if a file is damaged, cut short,
    or has a type of tensors that the package gguf does not know.
    """
    rows, names = [], []
    for file in files:
        metadata, tensors = _gguf_header(file)
        names.append(metadata.get(_ARCHITECTURE, "unknown"))
        for name, (label, shape, size) in tensors.items():
            component = decide(name, GGUF)[0]
            rows.append(Row(name, component, STORED, size, shape, format=_NAMES.get(label, label)))
    return rows, names


def _gguf_header(file):
    """({key: value} of the metadata without arrays, {name of a tensor: (type, shape, bytes)})."""
    try:
        stat = os.stat(file)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {brief(error)}") from error
    if not os.path.isfile(file):  # a pipe would be waited for
        raise CheckpointError(
            f"{file} is a pipe, a device or a folder, not a GGUF file. Remove it."
        )
    return _read_gguf(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(16)  # a vocabulary takes half a second, and each file is asked twice
def _read_gguf(file, _, length):
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        with open(file, "rb") as stream:

            def number(code):
                return struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))[0]

            def text():
                size = number("Q")
                if size > length:
                    raise ValueError(f"a text of {size:,} bytes in a file of {length:,}")
                return stream.read(size).decode("utf-8", "replace")

            def value(kind):
                if kind == _TEXT:
                    return text()
                if kind != _ARRAY:
                    return number(_SCALARS[kind])
                inner, count = number("I"), number("Q")
                if inner in _SCALARS:
                    stream.seek(min(count * struct.calcsize(_SCALARS[inner]), length), 1)
                else:
                    for _ in range(count):  # a damaged count ends with the file
                        value(inner)
                return None

            if stream.read(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            version = number("I")
            if version not in (2, 3):
                raise ValueError(f"version {version} of GGUF (vlmkit reads 2 and 3)")
            count, pairs = number("Q"), number("Q")
            metadata = {text(): value(number("I")) for _ in range(pairs)}
            tensors, end = {}, 0
            for _ in range(count):
                name = text()
                shape = [number("Q") for _ in range(min(number("I"), 8))][::-1]
                kind = GGMLQuantizationType(number("I"))
                block, size = GGML_QUANT_SIZES[kind]
                size = prod(shape) // block * size
                end = max(end, number("Q") + size)
                tensors[name] = kind.name, tuple(shape), size
            alignment = metadata.get("general.alignment") or 32
            if -(-stream.tell() // alignment) * alignment + end > length:
                raise ValueError(f"its tensors need more than its {length:,} bytes")
    except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged, was cut short, or cannot be read: {brief(error)}. Copy or "
            "download it again."
        ) from error
    return metadata, tensors
