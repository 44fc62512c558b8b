"""A cache of quantised checkpoints, for those who load the same model again and again.

It is off unless the environment variable VLMKIT_CACHE names a folder for it. Then `load` keeps each
model that it quantises there, as `save` writes it, and reads that the next time: no more than the
bytes of the quantised model, and no quantising.

An entry belongs to the content of a checkpoint, whatever its folder is called: to the SHA-256 of
its configs and weight files, with the format of every parameter, the kind of device, and the
versions of the packages that take part. It is used only if each of its own files has the SHA-256
that it had when the entry was complete, and it is audited like any load.

A file's SHA-256 takes longer to compute than the file takes to load. So it is noted beside the
entries, and the note holds as long as the file's number on the disk, its size and the times of its
last changes stay the same, as Git does it. (A program can set a file's time of modification back,
but not the time of its last change of any kind.)

Everything in the folder can be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import vlmkit
from vlmkit.checkpoints import brief, read_config, weight_files
from vlmkit.errors import CheckpointError, VlmkitError
from vlmkit.loading.saving import save

VARIABLE = "VLMKIT_CACHE"


def entry_for(folder, config, layout, device):
    """The cache's Entry for the checkpoint in `folder` under `layout`, whether it is there yet or
    not; None where nothing is to be kept: without a cache, if nothing is quantised now, and for
    models whose Python code comes with the checkpoint."""
    root = os.environ.get(VARIABLE)
    quantised_now = layout.quantized and not getattr(config, "quantization_config", None)
    if not root or not quantised_now or hasattr(config, "auto_map"):
        return None
    root = Path(root).expanduser()
    configs = [folder / "config.json", folder / "generation_config.json"]
    files = [*filter(Path.exists, configs), *weight_files(folder)]
    packages = ("transformers", "bitsandbytes", "torch", "safetensors")
    what = {
        "files": [(file.name, _digest_of(file, root)) for file in files],
        "plan": repr(layout.plan),
        "formats": [(row.name, row.format) for row in layout.rows],
        "device": device.type,
        "versions": [vlmkit.__version__, *(version(package) for package in packages)],
    }
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    return Entry(root, key, folder)


class Entry:
    """One quantised checkpoint: a folder of the cache, and beside it what its files have to be."""

    def __init__(self, root, key, source):
        self.root, self.source = root, source
        self.folder, self.manifest = root / key, root / f"{key}.json"

    def read(self, load):
        """What `load(folder, config)` makes of the entry, as if it had been read from its source.
        None if there is no entry, or if it is not as it was written: it is removed then."""
        if not self.manifest.exists():
            return None
        try:
            if json.loads(self.manifest.read_text(encoding="utf-8")) != self._digests():
                raise CheckpointError(f"{self.folder} was changed")
            model = load(self.folder, read_config(self.folder))
        except (OSError, ValueError, VlmkitError):
            self.manifest.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        model.name_or_path = model.config.name_or_path = str(self.source)
        return model

    def write(self, model):
        """Keep `model`. If that fails (a full disk), a warning says so, and nothing is left."""
        try:
            self.manifest.unlink(missing_ok=True)
            save(model, None, self.folder, overwrite=True)
            _write(self.manifest, json.dumps(self._digests()))
        except (OSError, VlmkitError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            warnings.warn(f"the model is not kept in {self.root}: {brief(error)}", stacklevel=3)

    def _digests(self):
        return {file.name: _digest_of(file, self.root) for file in self.folder.iterdir()}


def _digest_of(file, root):
    """SHA-256 of a file, computed only if the file may have changed since the last time."""

    def identity():
        stat = file.stat()
        return f"{stat.st_dev}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"

    before = identity()
    note = root / "digests" / before
    if note.exists():
        return note.read_text(encoding="utf-8")
    with open(file, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if identity() == before:
        with contextlib.suppress(OSError):  # then it is computed again the next time
            _write(note, digest)
    return digest


def _write(path, text):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
