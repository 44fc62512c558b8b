"""Folders that are written completely or not at all, and the folder of vlmkit's cache."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from vlmkit.errors import CheckpointError, brief
from vlmkit.units import MEGABYTE


def cache_folder():
    """The folder in which vlmkit keeps what it fetches: the value of the environment variable
    VLMKIT_CACHE, or else `vlmkit` in the folder that this system has for caches."""
    if given := os.environ.get("VLMKIT_CACHE"):
        return Path(given).expanduser()
    variable, usual = "XDG_CACHE_HOME", "~/.cache"
    if os.name == "nt":
        variable, usual = "LOCALAPPDATA", "~/AppData/Local"
    return Path(os.environ.get(variable) or usual).expanduser() / "vlmkit"


@contextlib.contextmanager
def whole_folder(path, *, overwrite=False, size=0, need=""):
    """A new folder beside `path` to write to. It gets the name `path` at the end of the block.

    overwrite: whether a folder at `path` that is not empty is replaced. It stays until the new one
        is complete, and comes back if the new one cannot take its place.
    size: bytes that must be free before anything is written. need: a sentence for the error.

    If anything fails (a full disk, an interrupt), `path` and the folders around it stay as before.
    Raises CheckpointError if `path` is taken or cannot be written.
    """
    path = Path(path).expanduser().resolve()
    _require_free(path, overwrite)
    made = [folder for folder in path.parents if not folder.exists()]
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(path.parent).free
        if room < size:
            raise OSError(f"{room / MEGABYTE:,.2f} MB are free there")
        beside.mkdir()
        yield beside
        _rename_over(beside, path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if not isinstance(error, Exception):  # an interrupt
            raise
        # safetensors and tokenizers have errors of their own for a full disk
        raise CheckpointError(
            f"{path} could not be written: {brief(error)}. {need}".rstrip()
            + " Nothing was left there that was not there before."
        ) from error


def _require_free(path, overwrite):
    if path.is_dir():
        if any(path.iterdir()) and not overwrite:
            raise CheckpointError(
                f"{path} is not empty. Choose another folder, or replace it: overwrite=True."
            )
    elif path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} is not a folder. Choose another name.")


def _rename_over(beside, path):
    """Give the folder `beside` the name `path`."""
    old = None
    if path.exists():
        old = path.with_name(f"{beside.name}.old")
        path.rename(old)
    try:
        beside.rename(path)
    except BaseException:
        if old:
            old.rename(path)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # so that the new name survives a power cut
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
