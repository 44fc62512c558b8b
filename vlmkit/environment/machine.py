"""Machine: what is here and what is missing, a `Status` for each thing. Nothing is contacted.

Nothing outside Python's standard library is imported at the top: the doctor is needed most where
packages are missing. Each function returns a Status instead of raising.
"""

import importlib
import logging
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vlmkit.errors import brief
from vlmkit.units import GIGABYTE

PACKAGES = {  # name: (oldest version tried, version tested with)
    "torch": ("2.13", "2.13.0"),
    "transformers": ("5.21", "5.24.0"),
    "bitsandbytes": ("0.50", "0.50.2"),
    "accelerate": ("1.12", "1.15.0"),
    "peft": ("0.19", "0.21.2"),
    "datasets": ("4.0", "5.2.0"),
    "safetensors": ("0.8", "0.8.0"),
    "tqdm": ("4.67.1", "4.70.1"),
    "numpy": ("2.0.2", "2.4.6"),
    "pandas": ("2.2.3", "3.1.1"),
    "scipy": ("1.15.3", "1.17.1"),
    "rapidfuzz": ("3.13", "3.14.6"),
    "pillow": ("11.3", "13.0.0"),
    "matplotlib": ("3.10", "3.11.2"),
    "typer": ("0.20", "0.29.2"),
    "pyyaml": ("6.0.2", "6.0.3"),
    "gguf": ("0.18.0", "0.19.0"),
}
"""The packages that the course needs: the lower bounds of `pyproject.toml`, and the versions of
`constraints.txt`. A test compares the table with the two files. They cannot be read here: an
installed package comes without them, and its metadata may be missing or older than the code."""

MODULES = {"pillow": "PIL.Image", "pyyaml": "yaml"}  # packages whose modules have other names

OLDEST_PYTHON = (3, 11)
WANTED_MEMORY = 2 * GIGABYTE
"""Free memory for the bundled model. Most of it goes to Python with torch, not to pebble."""
WANTED_DISK = GIGABYTE
"""Free disk for what the chapters write: models of some MB, and training runs."""
BF16 = (8, 0)  # compute capability from which a GPU computes in bf16 itself
TRUE = {"1", "on", "yes", "true"}  # as huggingface_hub reads its variables

FINE, NOTE, MISSING = "fine", "note", "missing"
"""States: nothing to do; worth a look; the course cannot run."""


@dataclass(frozen=True)
class Status:
    """One thing that was looked at. tested: what the course was tested with, if that applies."""

    what: str
    found: str
    verdict: str = "fine"
    state: str = FINE
    tested: str = ""


def needs():
    """What every user of the course needs: Python, packages, a processor and memory."""
    return (python(), *map(package, PACKAGES), processor(), memory())


def rest():
    """The rest: GPUs, disk, caches, cobble, the hub, optional packages and the kernel."""
    return (*gpus(), *disks(), cobble(), hub(), *extras(), torchvision(), kernel())


# --- Python, packages, processor, memory ---------------------------------------------------------


def python():
    """Whether this Python is new enough."""
    found, oldest = (".".join(map(str, v)) for v in (sys.version_info[:3], OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        return Status("Python", found, f"too old: needs {oldest} or newer", MISSING, oldest)
    return Status("Python", found, tested=f"{oldest} and newer")


def package(name):
    """Whether a package of PACKAGES is installed and new enough, and can be imported. An installed
    package fails on import if one that it needs, such as pyarrow, is broken or of another build."""
    oldest, tested = PACKAGES[name]
    found = _version(name)
    if found is None:
        return Status(name, "none", "missing", MISSING, tested)
    if _release(found) < _release(oldest):
        return Status(name, found, f"too old: needs {oldest} or newer", MISSING, tested)
    if why := _why_no_import(MODULES.get(name, name)):
        verdict = f"cannot be imported ({why}): install it again"
        return Status(name, found, verdict, MISSING, tested)
    if _release(found) == _release(tested):
        return Status(name, found, tested=tested)
    verdict = "not the tested version: numbers may differ, the rest should work"
    return Status(name, found, verdict, NOTE, tested)


def _version(name):
    """The version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _why_no_import(module):
    """Why a module cannot be imported, or an empty string if it can. What libraries say on import
    is not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a broken package fails in any way
        return brief(error, 120)
    finally:
        logging.disable(before)
    return ""


def _release(version):
    """ "2.13.0+cpu" as (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def processor():
    """Whether PyTorch can be used, and on what."""
    what, tested, count = "processor", "CPU, 2 cores", cores()
    cpu = f"CPU, {count} core{'s' * (count != 1)}"
    try:
        import torch

        gpu = torch.cuda.is_available() and torch.cuda.get_device_properties(0)
    except Exception as error:  # a broken torch fails in many ways
        return Status(what, cpu, f"PyTorch cannot be used: {brief(error, 120)}", MISSING, tested)
    if gpu:
        found = f"{gpu.name}, {gpu.total_memory / GIGABYTE:.0f} GB"
        return Status(what, found, "fine: models load on the GPU", tested=tested)
    return Status(what, cpu, "fine: no GPU is needed", tested=tested)


def memory():
    """Whether there is enough free memory for the bundled model."""
    what, free, wanted = "free memory", free_memory(), f"{WANTED_MEMORY / GIGABYTE:.0f} GB"
    if free is None:
        return Status(what, "unknown", "cannot be read", NOTE)
    found = f"{free / GIGABYTE:.1f} GB"
    if free < WANTED_MEMORY:
        verdict = f"little: if the kernel dies, close other programs ({wanted} is plenty)"
        return Status(what, found, verdict, NOTE, wanted)
    return Status(what, found, tested=wanted)


# --- what this process may use: containers have limits of their own ------------------------------
# On a JupyterHub, in Docker and in Binder, a process sees all cores and all memory of its host, but
# is killed if it takes more than its control group allows. On Linux the smallest limit counts, of
# the process's own group and of the groups above (cgroup v2, Documentation/admin-guide in Linux).

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def cores():
    """The number of cores that this process may use, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for group in _groups():
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            count = min(count, max(1, int(quota) // int(period)))
    return count


def free_memory():
    """The bytes that this process can still take, or None if they cannot be read."""
    try:
        import psutil

        free = psutil.virtual_memory().available
    except Exception:  # psutil is not installed, or does not know this system
        return None
    for group in _groups():
        limit, used = _read(group / "memory.max"), _read(group / "memory.current")
        if limit.isdigit() and used.isdigit():
            # The kernel drops cached files before it kills a process.
            cached = re.search(r"^inactive_file (\d+)$", _read(group / "memory.stat"), re.M)
            free = min(free, int(limit) - int(used) + int(cached[1] if cached else 0))
    return max(free, 0)


def _groups():
    """The process's control group and the groups above; empty on systems without groups."""
    path = next((n[3:] for n in _read(OWN).splitlines() if n.startswith("0::")), "/")
    group = GROUPS / path.lstrip("/")
    return [group, *(above for above in group.parents if GROUPS in (above, *above.parents))]


def _read(file):
    """A file's text, or an empty string if there is no such file."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


# --- GPUs, disk, hub, optional packages, kernel --------------------------------------------------


def gpus():
    """A Status for each GPU that PyTorch can use, with its free memory."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:
        return [Status("GPU", "unknown", f"cannot be read: {brief(error, 120)}", NOTE)]
    none = Status("GPU", "none", "fine: no GPU is needed")
    return [_gpu(torch, index) for index in range(count)] or [none]


def _gpu(torch, index):
    what = f"GPU {index}"
    try:
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
    except Exception as error:  # another program holds the GPU, or its driver is broken
        return Status(what, "unknown", f"cannot be used: {brief(error, 120)}", NOTE)
    found = f"{name}, {free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free"
    if capability < BF16:
        return Status(what, found, "has no bf16: plan fp16 for what is not quantized", NOTE)
    return Status(what, found)


def disks():
    """Whether files can be written to the current folder and to the hub's cache."""
    return [
        _folder("this folder", Path.cwd(), "save runs and models elsewhere"),
        _folder("cache of the hub", hub_cache(), "models from the hub cannot be kept"),
    ]


def hub_cache():
    """The folder in which huggingface_hub keeps models, by its own rules."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(given).expanduser() if given else _hub_home() / "hub"


def _hub_home():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(home).expanduser()


def _folder(what, path, otherwise):
    """Whether files can be written to `path`, which may not exist yet, and how many bytes."""
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Status(what, str(path), f"cannot be written to: {otherwise}", NOTE)
    try:
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        return Status(what, str(path), f"cannot be read: {brief(error, 120)}", NOTE)
    found = f"{path}, {free / GIGABYTE:.1f} GB free"
    if free < WANTED_DISK:
        return Status(what, found, f"little: {WANTED_DISK / GIGABYTE:.0f} GB is plenty", NOTE)
    return Status(what, found)


def cobble():
    """Whether cobble was fetched."""
    from vlmkit.catalog.bundled import BUNDLED

    fetched = [bundled for bundled in BUNDLED.values() if bundled.fetched]
    place = str(fetched[0].folder.parent)
    if all(bundled.is_current for bundled in fetched):
        return Status("cobble", place)
    found = "none" if not fetched[0].folder.is_dir() else f"{place}, not of this vlmkit"
    return Status("cobble", found, "chapters with photographs need it: vlmkit fetch cobble", NOTE)


def hub():
    """Whether the settings allow downloads from the hub. No download is tried."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").lower() in TRUE:
            verdict = "fine: pebble needs no hub; other models must be in the cache"
            return Status("hub", f"offline, because of {variable}", verdict)
    token = os.environ.get("HF_TOKEN") or (_hub_home() / "token").exists()
    found = "allowed" + (", with a token" if token else ", without a token")
    if os.environ.get("HF_ENDPOINT"):
        found += ", at HF_ENDPOINT"
    return Status("hub", found, "not tried, and pebble does not need it")


def extras():
    """A Status for each set of optional packages that vlmkit names."""
    try:
        lines = metadata.requires("vlmkit") or []
    except metadata.PackageNotFoundError:
        verdict = "works in its own folder only: python -m pip install --no-deps -e ."
        return [Status("vlmkit", "not installed", verdict, NOTE)]
    missing = {}
    for line in lines:
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", line)
        if extra:
            name = re.match(r"[\w.-]+", line)[0]
            missing.setdefault(extra[1], []).extend([] if _version(name) else [name])
    if torchvision().state == MISSING:  # its own line says what to do
        missing.pop("hub", None)
    return [_extra(name, missing[name]) for name in sorted(missing)]


def _extra(name, missing):
    if not missing:
        return Status(f"extra: {name}", "installed")
    verdict = f"optional: python -m pip install -c constraints.txt -e .[{name}]"
    return Status(f"extra: {name}", f"without {', '.join(missing)}", verdict)


def torchvision():
    """Whether torchvision, if it is installed, was built for this torch. If it was not, the import
    of models fails, since transformers only looks whether torchvision is installed."""
    found = _version("torchvision")
    if found is None:
        verdict = "fine: some processors from the hub need it, pebble's does not"
        return Status("torchvision", "none", verdict)
    if why := _why_no_import("torchvision"):
        verdict = f"models cannot be imported ({why}): uninstall it, or install the "
        return Status("torchvision", found, verdict + "build for this torch", MISSING)
    return Status("torchvision", found)


def kernel():
    """Whether the kernel that the chapters ask for, python3, is this Python."""
    what = "notebook kernel"
    if _version("ipykernel") is None:
        verdict = "notebooks need it: python -m pip install -c constraints.txt -e .[course]"
        return Status(what, "no ipykernel", verdict, NOTE)
    try:
        from jupyter_client.kernelspec import KernelSpecManager

        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except Exception as error:
        return Status(what, "no python3", f"cannot be found: {brief(error, 120)}", NOTE)
    # Jupyter replaces a bare name by the Python that it runs in itself.
    here = Path(sys.executable).parent
    if os.path.dirname(program) and Path(os.path.abspath(program)).parent != here:
        verdict = "another Python: choose this one under Kernel, Change Kernel"
        return Status(what, f"python3 is {program}", verdict, NOTE)
    return Status(what, f"python3 is {sys.executable}")
