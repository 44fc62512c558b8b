"""Checkpoints: from a name to a folder, and what its files hold.

A name is that of a model of the course ("pebble", "cobble"), a folder, or a hub id (`owner/name`).
`find` turns it into a folder. Everything else here works on a folder, so a checkpoint from the hub
and one on disk pass the same checks.
"""

import json
import re
import stat
from pathlib import Path

from vlmkit import catalog
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.errors import CheckpointError, brief, did_you_mean, failed_import
from vlmkit.folders import recover

OFFLINE = (
    "Without a network, pebble works, and so do anatomy and predictions of memory for the models "
    "of vk.catalog.NAMES."
)
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = "adapters"  # a folder in a checkpoint's folder, as peft writes it
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # safetensors' names and ours
FLOATS = {*_FLOATS, "F64"}  # what a weight that is not quantized is stored in
BESIDE = re.compile(r"\.((nested_)?(absmax|quant_map)|quant_state\..*|SCB|weight_format)$")
"""The names that bitsandbytes gives to what it stores beside a quantized weight."""
_COUNT = re.compile(r"(num|n)_(\w+_)?layers?|\w*(encoder|decoder)_layers|depths?|num_labels")
MOST_LAYERS = 10_000  # no model has a tenth of them, and a config class may make a list of them
_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")


def find(name, *, revision=None, weights=True, trust_remote_code=False):
    """The folder of the checkpoint that `name` means, as a pathlib.Path.

    A hub id is looked up in the local cache first. Only what is missing there is downloaded.
    weights: whether the weights are wanted too. Without weights and without a revision, a model of
        `vlmkit.catalog` needs neither cache nor network, and cobble need not be fetched.

    Raises CheckpointError if there is no such checkpoint.
    """
    if not isinstance(name, (str, Path)):
        raise CheckpointError(
            f"a checkpoint has a name, and a {type(name).__name__} is none. Give the name of a "
            f"model of the course, a folder, or a hub id. {OFFLINE}"
        )
    text = str(name)
    if text in BUNDLED:
        return BUNDLED[text].find(weights)
    try:
        folder = Path(text).expanduser()
        recover(folder)
        is_folder, is_file = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long; no such user; a zero byte
        raise CheckpointError(
            f"{_short(text)} cannot be the name of a checkpoint: {brief(error)}. {OFFLINE}"
        ) from error
    if text and is_folder:
        return folder
    if is_file and folder.suffix == ".gguf":
        raise CheckpointError(f"{text} is a GGUF file. {what_loads('gguf')}")
    if is_file:
        raise CheckpointError(
            f"{text} is a file, and a checkpoint is a folder. Give the folder that holds "
            "config.json, the weights and the processor's files."
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        short = {name.split("/")[-1]: name for name in (*BUNDLED, *catalog.NAMES)}
        raise CheckpointError(
            f"There is no checkpoint {_short(text)}. It is not a folder here, and a hub id has the "
            f"form 'owner/name'. {did_you_mean(text, short, 0.6, short)}{OFFLINE}"
        )
    if not weights and revision is None and catalog.folder_of(text):
        return catalog.folder_of(text)
    return _from_hub(text, revision, weights, trust_remote_code)


def adapters_of(name, *, revision=None):
    """The folder with the adapters of the checkpoint that `name` means, as peft wrote it, or None
    if it has none. Those of cobble need not be fetched. Raises CheckpointError as `find` does."""
    if str(name) in BUNDLED:
        return BUNDLED[str(name)].adapters
    folder = find(name, revision=revision, weights=False) / ADAPTERS
    return folder if (folder / "adapter_config.json").is_file() else None


def _short(text):
    return repr(text if len(text) <= 100 else f"{text[:100]} …")


def _from_hub(name, revision, weights, trust_remote_code):
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.txt", "*.model"]
    wanted += ["model*.safetensors"] * weights + ["*.py"] * trust_remote_code
    kwargs = {"revision": revision, "allow_patterns": wanted, "ignore_patterns": ["*/*"]}
    try:  # first without the network, which may be slow or missing
        folder = Path(snapshot_download(name, local_files_only=True, **kwargs))
        if (folder / "config.json").exists() and (not weights or weight_files(folder)):
            return folder
    except (OSError, ValueError):  # not in the cache; no name that the hub can have
        pass
    try:
        return Path(snapshot_download(name, **kwargs))
    except Exception as error:  # the hub's, httpx's, a proxy's and the disk's
        raise CheckpointError(_why_not_fetched(name, revision, error)) from error


def _why_not_fetched(name, revision, error):
    from huggingface_hub import errors

    reasons = {
        errors.GatedRepoError: f"{name} asks its users to accept a license. Accept it on the "
        "model's page of the hub, then log in with `hf auth login`.",
        errors.RevisionNotFoundError: f"{name} has no revision {revision!r} on the hub. Leave "
        "revision out to get the newest.",
        errors.RepositoryNotFoundError: f"There is no checkpoint {name!r}. It is not a folder "
        "here, and the hub has no public model of that id.",
        errors.LocalEntryNotFoundError: f"{name} is not a folder here and not in the hub's cache, "
        "and the hub cannot be reached. Check the network (or HF_HUB_OFFLINE).",
        Exception: f"{name} could not be fetched from the hub: {brief(error)}.",
    }
    why = next(text for kind, text in reasons.items() if isinstance(error, kind))
    near = "" if name in catalog.NAMES else did_you_mean(name, catalog.NAMES, 0.75)
    return f"{why} {near}{OFFLINE}"


def read_config(folder, *, trust_remote_code=False):
    """The transformers config of the checkpoint in `folder`.

    Raises CheckpointError if there is no config, if it cannot be read, or if the model needs Python
    code of its own and `trust_remote_code` does not allow that.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    require_plain_files(folder)
    raw = _read_json(folder, "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str | None):
        raise CheckpointError(
            f"{folder}: config.json says model_type {_short(repr(kind))}, and a model_type is a "
            "text such as 'llava'. Copy or download the checkpoint again."
        )
    _require_counts(folder, raw)
    if kind not in CONFIG_MAPPING:
        if "auto_map" not in raw:
            raise CheckpointError(
                f"{folder}: config.json says model_type {kind!r}, which this release of "
                "transformers does not know. A newer one may: pip install -U transformers"
            )
        if not trust_remote_code:
            raise CheckpointError(
                f"{folder}: this model ({kind!r}) runs Python code that comes with the checkpoint. "
                "Read that code first, then allow it by name: trust_remote_code=True."
            )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # every config class fails in its own way on a wrong field
        why = failed_import(error) or f"config.json cannot be used: {brief(error)}"
        raise CheckpointError(f"{folder}: {why}") from error


def require_plain_files(folder):
    """Raise CheckpointError if a file of `folder` is a pipe or a device, which a library that reads
    it would wait for, without an end."""
    for path in sorted(Path(folder).iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing: whoever needs the file says that it is missing
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(
                f"{path} is a pipe, a socket or a device, not a file. Remove it, or copy or "
                "download the checkpoint again."
            )


def require_generation_config(folder):
    """Raise CheckpointError if generation_config.json is there and damaged: transformers would pass
    over it in silence, and with it the tokens that end an answer."""
    if (folder / "generation_config.json").exists():
        _read_json(folder, "generation_config.json")


def _require_counts(folder, raw):
    """Raise CheckpointError if the config `raw` has more layers than the weight files have tensors.
    To build such a model, even without weights, can take all memory."""
    try:
        most = min(len(weight_headers(folder)), MOST_LAYERS)
        has = f"the weight files hold {most:,} tensors"
    except CheckpointError:  # no weights here, and whoever needs them says so
        most, has = MOST_LAYERS, "no model has so many"
    todo = [raw]
    while todo:  # no recursion: a config can be nested as deeply as a damaged file likes
        for key, value in todo.pop().items():
            if isinstance(value, dict):
                todo.append(value)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and number > most and _COUNT.fullmatch(str(key)):
                    raise CheckpointError(
                        f"{folder}: config.json says {key} {number:,}, and {has}. Its config.json "
                        "and its weights do not belong together. Copy or download the checkpoint "
                        "again."
                    )


def _read_json(folder, file):
    try:
        raw = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        notes = folder / "vlmkit.json"  # of vk.finetuning.save, also where no adapters are
        if notes.exists() or (folder / "adapter_config.json").exists():
            way = "vk.finetuning.load" if notes.exists() else "peft.PeftModel.from_pretrained"
            raise CheckpointError(
                f"{folder} holds what was trained on a model (a PEFT adapter, or parameters), and "
                "is not a checkpoint. Load the model that it was trained on, and then the folder: "
                f"{way}(model, folder)."
            ) from error
        _refuse_gguf(folder, error)
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {file}. It holds {found}. Give the folder "
            "that holds config.json, the weights and the processor's files."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: {file} is not valid JSON: {brief(error)}. Copy or download it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder}: {file} cannot be read: {brief(error)}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder}: {file} is not a JSON object.")
    return raw


def quantization_method(config):
    """What the weights of a checkpoint are quantized by, "bitsandbytes" for example, according to
    its config. None where they are not quantized."""
    said = getattr(config, "quantization_config", None)
    if not said:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    method = said.get("quant_method", "bitsandbytes")  # old files do not say it
    return str(getattr(method, "value", method))


_LOADERS = {
    "awq": "transformers with gptqmodel (pip install gptqmodel), and vLLM",
    "gptq": "transformers with gptqmodel and optimum (pip install gptqmodel optimum), and vLLM",
    "auto-round": "transformers with auto-round (pip install auto-round), and vLLM",
    "fp8": "transformers (in bf16 on a machine that does not compute in FP8), and vLLM",
    "fbgemm_fp8": "transformers on a GPU, and vLLM",
    "compressed-tensors": "transformers with compressed-tensors (pip install compressed-tensors), "
    "and vLLM",
    "torchao": "transformers with torchao (pip install torchao), and vLLM",
    "hqq": "transformers with hqq (pip install hqq)",
    "quanto": "transformers with optimum-quanto (pip install optimum-quanto)",
    "mxfp4": "transformers with kernels (pip install kernels) on a GPU, and vLLM",
    "modelopt": "vLLM and TensorRT-LLM",
    "nvfp4": "vLLM and TensorRT-LLM",
    "gguf": "llama.cpp, Ollama and LM Studio",
}
"""What loads weights that vlmkit does not load, by transformers' name of the method. What
transformers needs is from its checks (transformers 5.24, quantizers/). The other programs are
common knowledge. Nothing of it was tried."""


def what_loads(method):
    """A sentence on what loads a checkpoint that is quantized by `method`, or "" where vlmkit does:
    where nothing is quantized (None), and for bitsandbytes."""
    if method in (None, "bitsandbytes", "vlmkit"):
        return ""
    who = _LOADERS.get(method, "the library that made them")
    what = "GGUF files" if method == "gguf" else f"weights quantized by {method}"
    return (
        f"vlmkit counts the bytes of {what} (vk.memory.stored) and does not load them. "
        f"Other programs load them (vlmkit has not tried them): {who}."
    )


def weight_files(folder):
    """Paths of the safetensors files of the checkpoint in `folder`.

    Raises CheckpointError if there are none, if one that the index names is missing, or if there
    are only pickled weights, which can run code when they are opened.
    """
    if (folder / SAFETENSORS).exists():
        return [folder / SAFETENSORS]
    if (folder / INDEX).exists():
        shards = _read_json(folder, INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else [None]
        strange = [n for n in names if not isinstance(n, str) or n != Path(n).name or len(n) > 255]
        if strange:
            raise CheckpointError(
                f"{folder}: the weight_map of {INDEX} has to give the name of a file in this "
                f"folder for each tensor, and it has {_short(str(strange[0] or shards))}. Copy or "
                "download it again."
            )
        files = [folder / name for name in sorted(set(names))]
        lost = [file.name for file in files if not file.exists()]
        if lost or not files:
            raise CheckpointError(
                f"{folder}: {INDEX} names {len(files)} weight files, of which {len(lost)} are "
                f"missing ({', '.join(lost[:3])}). Copy or download them again."
            )
        return files
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights only as pickle ({', '.join(pickles[:3])}). A pickle can run "
            "any code when it is opened, so vlmkit reads safetensors only. If you trust it, "
            "convert it with model.save_pretrained(folder)."
        )
    _refuse_gguf(folder)
    raise CheckpointError(
        f"{folder} has a config but no weights: there is no {SAFETENSORS}. Copy or download it."
    )


def _refuse_gguf(folder, error=None):
    """Raise CheckpointError if there are GGUF files in `folder`, which has nothing else to load."""
    if files := sorted(file.name for file in folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} has its weights as GGUF ({', '.join(files[:3])}). {what_loads('gguf')}"
        ) from error


def weight_headers(folder):
    """{name of a tensor: (its dtype, as safetensors spells it, and its shape, a tuple)} of the
    checkpoint in `folder`, from the headers of its files.

    Raises CheckpointError as `weight_files` does, and if a file is damaged or cut short.
    """
    from safetensors import SafetensorError, safe_open

    headers = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 (it has no other way)
                    tensor = weights.get_slice(key)
                    headers[key] = tensor.get_dtype(), tuple(tensor.get_shape())
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is damaged or was cut short ({file.stat().st_size:,} bytes): "
                f"{brief(error)}. Copy or download it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {brief(error)}") from error
    return headers


def stored_formats(folder, model):
    """{full name of a parameter: name of the format that it is stored in}.

    config.json only says what was requested. The weight files say what was stored, so their headers
    are read. A quantized weight is recognized by the scales beside it.

    model: the checkpoint's, on the meta device. Raises CheckpointError as `weight_headers` does.
    """
    dtypes = {key: dtype for key, (dtype, _) in weight_headers(folder).items()}
    rename = renamer(model)
    floats, quantized = {}, {}
    for key, dtype in dtypes.items():
        if four_bits := _STATE.search(key):
            key = key[: four_bits.start()]
            quantized[rename(key)] = four_bits[1] + "-dq" * (f"{key}.nested_absmax" in dtypes)
        elif key.endswith(".SCB"):
            quantized[rename(f"{key.removesuffix('.SCB')}.weight")] = "int8"
        elif dtype in _FLOATS:
            floats.setdefault(rename(key), _FLOATS[dtype])
    formats = floats | quantized
    return {n: formats[n] for n, _ in model.named_parameters() if n in formats}


def renamer(model):
    """A function from a name in a checkpoint to the name in `model`. Its `converted` says whether
    transformers also makes another shape of the last tensor that it was asked about.

    They differ for many families, and transformers renames on loading. Since 5.21, and for as long
    as transformers has no public function for it, this calls the functions that it uses itself. A
    mistake would be found: the audit compares what was loaded with what is read by these names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    names = model.state_dict()

    def rename(key):
        new, converted = rename_source_key(
            key, renamings, converters, model.base_model_prefix, names
        )
        rename.converted = converted is not None
        return key if new not in names and key in names else new

    return rename
