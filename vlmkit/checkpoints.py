"""Checkpoints: from a name to a folder whose config and weights can be trusted to be there.

A name is "pebble", a folder, or a hub id (`owner/name`). Whatever it is, everything after
`find` works on a folder, so that a checkpoint from the hub and one on disk meet the same checks.
Where no weights are wanted, `vlmkit.catalog` answers for the models that it has.
"""

import json
import re
from pathlib import Path

from vlmkit import catalog
from vlmkit.errors import CheckpointError, brief, did_you_mean

PEBBLE = "pebble"
BUNDLED = Path(__file__).parent / "models" / "pebble" / "checkpoint"
OFFLINE = 'vk.load("pebble") works without a network.'
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Buffers that older releases of transformers saved and that models now compute for themselves.
NO_LONGER_SAVED = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")


def find(name, *, revision=None, weights=True, trust_remote_code=False):
    """The folder of the checkpoint that `name` means, as a pathlib.Path.

    A hub id is looked for in the local cache first; only what is not there is downloaded.
    weights: whether the weights are wanted too, or the config files are enough. If they are, and no
    revision is asked for, a model of `vlmkit.catalog` needs neither cache nor network.

    Raises CheckpointError, which names the id and offers pebble, if there is no such checkpoint.
    """
    text = str(name)
    if text == PEBBLE:
        if not BUNDLED.is_dir():
            raise CheckpointError(
                f"{PEBBLE!r} is bundled with vlmkit, but {BUNDLED} is not there: this installation "
                "is incomplete. Install vlmkit again, or make pebble: "
                "python -m vlmkit.models.pebble.train"
            )
        return BUNDLED
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(
            f"{text} is a file, and a checkpoint is a folder: give the folder that holds "
            "config.json, the weights and the processor's files."
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        short = {name.split("/")[-1]: name for name in (PEBBLE, *catalog.NAMES)}
        raise CheckpointError(
            f"There is no checkpoint {text!r}: it is not a folder here, and a hub id has the form "
            f"'owner/name'. {did_you_mean(text, short, 0.6, short)}{OFFLINE}"
        )
    if not weights and revision is None and catalog.folder_of(text):
        return catalog.folder_of(text)
    return _from_hub(text, revision, weights, trust_remote_code)


def _from_hub(name, revision, weights, trust_remote_code):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = ["*.json", "*.jinja", "*.txt", "*.model"]
    wanted += ["model*.safetensors"] * weights + ["*.py"] * trust_remote_code
    kwargs = {"revision": revision, "allow_patterns": wanted, "ignore_patterns": ["*/*"]}
    try:  # a cached copy is used as it is: no waiting for a network that may not be there
        folder = Path(snapshot_download(name, local_files_only=True, **kwargs))
        if (folder / "config.json").exists() and (not weights or weight_files(folder)):
            return folder
    except (OSError, CheckpointError):
        pass
    try:
        return Path(snapshot_download(name, **kwargs))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name} asks its users to accept a licence: accept it on the model's page of the hub, "
            f"then log in with `hf auth login`. {OFFLINE}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no checkpoint {name!r}: it is not a folder here, and the hub has no public "
            f"model of that id. {OFFLINE}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is not a folder here and not in the hub's cache, and the hub cannot be "
            f"reached. Check the network (or HF_HUB_OFFLINE), or use the bundled model: {OFFLINE}"
        ) from error
    except Exception as error:  # httpx, disk and proxy errors of many kinds
        raise CheckpointError(
            f"{name} could not be fetched from the hub: {brief(error)}. {OFFLINE}"
        ) from error


def read_config(folder, *, trust_remote_code=False):
    """The transformers config of the checkpoint in `folder`.

    Raises CheckpointError if there is none, if it cannot be read, or if it needs Python code of
    its own and `trust_remote_code` does not allow that.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = _read_json(folder, "config.json")
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        if "auto_map" not in raw:
            raise CheckpointError(
                f"{folder}: config.json says model_type {kind!r}, which this release of "
                "transformers does not know."
            )
        if not trust_remote_code:
            raise CheckpointError(
                f"{folder}: this model ({kind!r}) runs Python code that comes with the checkpoint. "
                "Read that code first, then allow it by name: trust_remote_code=True."
            )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config with wrong fields fails in the config class's own ways
        raise CheckpointError(f"{folder}: config.json cannot be used: {brief(error)}") from error


def _read_json(folder, file):
    try:
        raw = json.loads((folder / file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder} holds a PEFT adapter, not a checkpoint: load the model that the adapter "
                "was trained on, then the adapter: peft.PeftModel.from_pretrained(model, folder)."
            ) from error
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {file}. It holds {found}."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{folder}: {file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder}: {file} is not a JSON object.")
    return raw


def check_weights(folder):
    """Open every weight file in `folder` and read its header.

    Raises CheckpointError if there is no safetensors file, if one is missing or was cut short, or
    if there are only pickled weights, which can run code when they are opened and are refused.
    """
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is damaged or was cut short ({file.stat().st_size:,} bytes): "
                f"{brief(error)}. Copy or download it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {brief(error)}") from error


def weight_files(folder):
    """Paths of the safetensors files of the checkpoint in `folder`.

    Raises CheckpointError if there are none, or if one that the index names is missing.
    """
    if (folder / SAFETENSORS).exists():
        return [folder / SAFETENSORS]
    if (folder / INDEX).exists():
        shards = _read_json(folder, INDEX).get("weight_map", {})
        files = [folder / shard for shard in sorted(set(shards.values()))]
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
    raise CheckpointError(f"{folder} has a config but no weights: there is no {SAFETENSORS}.")
