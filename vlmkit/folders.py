"""Folders and files that are written completely or not at all, and the folder of vlmkit's cache."""

import contextlib
import ctypes
import glob
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


def write_whole(path, write):
    """Write the file `path`, a pathlib.Path, by `write`, a function that is given a name beside it.

    A kill leaves the old file or the new one, never half of one. If `write` fails, its error is
    raised and nothing of the new file is left.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path, *, overwrite=False, size=0, need=""):
    """A new folder beside `path` to write to. It gets the name `path` at the end of the block.

    overwrite: whether a folder at `path` that is not empty is replaced. It stays until the new one
        is complete, and comes back if the new one cannot take its place. None: as False, for a
        caller that has no such option.
    size: bytes that must be free before anything is written. need: a sentence for the error.

    If anything fails (a full disk, an interrupt), `path` and the folders around it stay as before.
    A folder that is replaced is there at every moment, whenever the process is killed: on Linux the
    two change places in one step. Where a system has no such step, the old folder gets its name
    back from the next call of `recover`, which this function and `checkpoints.find` make.
    Raises CheckpointError if `path` is taken or cannot be written.
    """
    try:
        path = Path(path).expanduser().resolve()
        recover(path)
        require_free(path, overwrite)
        made = [folder for folder in path.parents if not folder.exists()]
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{str(path)[:200]!r} cannot be a folder: {brief(error)}. Choose another name."
        ) from error
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


def require_free(path, overwrite):
    """Raise CheckpointError if `whole_folder` would refuse `path`, a pathlib.Path: it is a file, or
    a folder that is not empty and not to be replaced."""
    if path.is_dir():
        if any(path.iterdir()) and not overwrite:
            or_replace = (
                "" if overwrite is None else ", or replace it: overwrite=True (--overwrite)"
            )
            raise CheckpointError(f"{path} is not empty. Choose another folder{or_replace}.")
        if Path.cwd().is_relative_to(path):  # whoever works in it would be left in a removed one
            raise CheckpointError(
                f"{path} is the current directory, or holds it, and a new folder would take its "
                "place. Choose another folder, or call this from outside."
            )
    elif path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} is not a folder. Choose another name.")


def recover(path):
    """Give the folder `path` its name back if a process was killed while it replaced the folder:
    after it had moved the old one away, and before the new one had the name."""
    path = Path(path)
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    moved = path.parent.glob(f".{glob.escape(path.name)}.*{OLD}")
    for old in sorted(moved, key=lambda folder: folder.stat().st_mtime, reverse=True):
        with contextlib.suppress(OSError):  # another process was quicker, or may write here
            old.rename(path)
        return


OLD = ".old"


def _rename_over(beside, path):
    """Give the folder `beside` the name `path`. What had this name is removed."""
    if not path.exists():
        beside.rename(path)
    elif _exchange(beside, path):
        shutil.rmtree(beside, ignore_errors=True)
    else:
        old = path.with_name(f"{beside.name}{OLD}")
        path.rename(old)
        try:
            beside.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # so that the new name survives a power cut
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _exchange(a, b):
    """Let two folders change places in one step, which no kill can interrupt. Returns whether they
    did: only Linux has this (renameat2 with RENAME_EXCHANGE), and not on every file system."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return bool(rename) and not rename(here, os.fsencode(a), here, os.fsencode(b), exchange)
