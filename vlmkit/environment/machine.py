"""Machine: what is here besides the packages. A Finding for each thing, and nothing is contacted.

A state of NOTE is worth a look; MISSING alone keeps the course from running. Nothing outside
Python's own library is imported at the top.
"""

import importlib
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from vlmkit.environment import FINE, GIGABYTE, MISSING, NOTE, Finding

WANTED_DISK = GIGABYTE
"""Free disk for what the chapters write: models of some MB, and training runs."""

YES = {"1", "on", "yes", "true"}  # as huggingface_hub reads its variables
BF16 = (8, 0)  # compute capability from which a GPU computes in bf16 itself


def look():
    """Findings on GPUs, disk, caches, the hub, optional extras and the notebooks' kernel."""
    return (*gpus(), *disks(), hub(), *extras(), torchvision(), kernel())


def gpus():
    """A Finding for each GPU that PyTorch can use, with its free memory."""
    try:
        import torch

        if not torch.cuda.is_available():
            return [_row("GPU", "none", "fine: no GPU is needed")]
        return [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    except Exception as error:
        return [_row("GPU", "unknown", f"cannot be read: {_brief(error)}", NOTE)]


def _gpu(torch, index):
    what = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
    except Exception as error:  # one that another program holds, or whose driver is broken
        return _row(what, "unknown", f"cannot be used: {_brief(error)}", NOTE)
    found = f"{name}, {free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free"
    if capability < BF16:
        return _row(what, found, "no bf16 of its own: plan the parts that stay in fp16", NOTE)
    return _row(what, found, "fine")


def disks():
    """Findings on the folder that this was called in, and on the caches."""
    rows = [_folder("this folder", Path.cwd(), "runs and saved models go elsewhere")]
    rows.append(_folder("cache of the hub", hub_cache(), "models from the hub cannot be kept"))
    own = os.environ.get("VLMKIT_CACHE")
    if own:
        path = Path(own).expanduser()
        rows.append(_folder("VLMKIT_CACHE", path, "quantized models are not kept"))
    return rows


def hub_cache():
    """The folder in which huggingface_hub keeps models, found as it finds it."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(given).expanduser() if given else _hub_home() / "hub"


def _hub_home():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(home).expanduser()


def _folder(what, path, otherwise):
    """Whether files can be written to `path`, which need not be there yet, and how many."""
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return _row(what, str(path), f"cannot be written to: {otherwise}", NOTE)
    try:
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        return _row(what, str(path), f"cannot be read: {_brief(error)}", NOTE)
    found = f"{path}, {free / GIGABYTE:.1f} GB free"
    if free < WANTED_DISK:
        return _row(what, found, f"little: {WANTED_DISK / GIGABYTE:.0f} GB is plenty", NOTE)
    return _row(what, found, "fine")


def hub():
    """Whether models from the hub may be fetched, by the variables alone: it is not tried."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").lower() in YES:
            verdict = "fine: pebble needs no hub; of its models, those that are in the cache"
            return _row("hub", f"offline, says {variable}", verdict)
    token = os.environ.get("HF_TOKEN") or (_hub_home() / "token").exists()
    found = "allowed" + (", with a token" if token else ", without a token")
    if os.environ.get("HF_ENDPOINT"):
        found += ", at HF_ENDPOINT"
    return _row("hub", found, "not tried, and not needed for pebble")


def extras():
    """A Finding for each optional set of packages that vlmkit names."""
    try:
        lines = metadata.requires("vlmkit") or []
    except metadata.PackageNotFoundError:
        verdict = "runs from its folder alone: python -m pip install --no-deps -e ."
        return [_row("vlmkit", "not installed", verdict, NOTE)]
    sets = {}
    for line in lines:
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", line)
        if extra:
            sets.setdefault(extra[1], []).append(re.match(r"[\w.-]+", line)[0])
    return [_extra(name, packages) for name, packages in sorted(sets.items())]


def _extra(name, packages):
    missing = [package for package in packages if not _installed(package)]
    what = f"extra: {name}"
    if not missing:
        return _row(what, "installed", "fine")
    verdict = f"optional: python -m pip install -c constraints.txt -e .[{name}]"
    return _row(what, f"without {', '.join(missing)}", verdict)


def torchvision():
    """Whether torchvision, if it is there, was built for this torch: transformers asks only
    whether it is there, and models then fail to import."""
    if not _installed("torchvision"):
        verdict = "fine: some processors from the hub need it, pebble's does not"
        return _row("torchvision", "none", verdict)
    found = metadata.version("torchvision")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        verdict = f"breaks the import of models ({_brief(error)}): remove it, or get the build "
        return _row("torchvision", found, verdict + "for this torch", MISSING)
    return _row("torchvision", found, "fine")


def kernel():
    """Whether the kernel that the chapters ask for, python3, is this very Python."""
    what = "notebook kernel"
    if not _installed("ipykernel"):
        verdict = "notebooks need it: python -m pip install -c constraints.txt -e .[course]"
        return _row(what, "no ipykernel", verdict, NOTE)
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception as error:
        return _row(what, "no python3", f"cannot be found: {_brief(error)}", NOTE)
    # A bare name is replaced by the Python that Jupyter itself runs in.
    here = Path(sys.executable).parent
    if os.path.dirname(program) and Path(os.path.abspath(program)).parent != here:
        verdict = "another Python: choose this one under Kernel, Change Kernel"
        return _row(what, f"python3 is {program}", verdict, NOTE)
    return _row(what, f"python3 is {sys.executable}", "fine")


def _installed(package):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _brief(error):
    return f"{type(error).__name__}: {error}".partition("\n")[0][:120]


def _row(what, found, verdict, state=FINE):
    return Finding(what, found, "", state, verdict)
