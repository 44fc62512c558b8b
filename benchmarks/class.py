"""What each student of a class needs of a shared machine: memory and time of whole chapters.

    python benchmarks/class.py                              # chapters 00, 04, 08: ten minutes
    python benchmarks/class.py --chapters 00 --cores 1
    python benchmarks/class.py --markdown table.md          # write the tables there too

nbconvert runs a chapter from top to bottom in its own kernel, on a limited number of cores. Ten
times a second the benchmark reads the resident memory of the kernel and of all its children:
RssFile, which is mostly the code of packages, so that students of one machine share it, and
RssAnon, which each student has alone. JupyterLab is started once without a kernel, loads its page
and a chapter, and is measured in the same way. On Linux only.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import psutil

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CHAPTERS = ("00", "04", "08")
MEGABYTE = 10**6
TOKEN = "measured"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what a chapter needs of a machine.")
    parser.add_argument("--chapters", nargs="+", default=CHAPTERS, metavar="NN")
    parser.add_argument("--cores", nargs="+", type=int, metavar="N", help="(1, and all)")
    parser.add_argument("--no-lab", action="store_true", help="leave JupyterLab out")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args(argv)
    if sys.platform != "linux":
        parser.error("the memory of a process can only be read on Linux")
    there = sorted(os.sched_getaffinity(0))
    cores = args.cores or sorted({1, len(there)})
    if max(cores) > len(there):
        parser.error(f"--cores {max(cores)}, but this machine has {len(there)}")
    lines = [
        f"{platform.system()}, {len(there)} cores, Python {platform.python_version()}, "
        f"torch {version('torch')}, JupyterLab {version('jupyterlab')}.",
        "",
        "| process | cores | seconds | peak MB | of which its own |",
        "|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        if not args.no_lab:
            lines.append(_row("JupyterLab, no kernel", "", lab(Path(folder))))
        for chapter in args.chapters:
            for n in cores:
                measured = run(chapter, there[:n], Path(folder))
                lines.append(_row(f"kernel of chapter {chapter}", n, measured))
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(process, cores, measured):
    seconds, peak, own = measured
    seconds = "" if seconds is None else f"{seconds:.0f}"
    return f"| {process} | {cores} | {seconds} | {peak / MEGABYTE:.0f} | {own / MEGABYTE:.0f} |"


def run(chapter, cores, folder):
    """(seconds, most bytes resident, most bytes of its own) of a chapter on some cores."""
    (path,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute"]
    command += ["--ExecutePreprocessor.timeout=1800", "--output-dir", str(folder), str(path)]
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=_environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    resident = own = 0
    while process.poll() is None:
        kernel = _kernel_of(process.pid)
        if kernel is not None:
            now = _held(kernel)
            resident, own = max(resident, now[0]), max(own, now[1])
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"chapter {chapter} failed:\n{process.stderr.read()[-2000:]}")
    return time.perf_counter() - begun, resident, own


def lab(folder):
    """(None, bytes resident, bytes of its own) of JupyterLab that has shown a chapter."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", f"--IdentityProvider.token={TOKEN}"]
    command += [f"--ServerApp.root_dir={NOTEBOOKS}"]
    process = subprocess.Popen(
        command,
        env=_environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _get(port, "lab", seconds=60)
        name = next(NOTEBOOKS.glob("00_*.ipynb")).name
        assert json.loads(_get(port, f"api/contents/{name}"))["type"] == "notebook"
        time.sleep(2)
        return None, *_held(psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(timeout=30)


def _get(port, path, seconds=10):
    """What the server answers, once it does."""
    end = time.monotonic() + seconds
    while True:
        try:
            address = f"http://127.0.0.1:{port}/{path}?token={TOKEN}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                return answer.read()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _environment(folder):
    """Jupyter's own files go into `folder`, and the chapters run on pebble."""
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    own["JUPYTER_RUNTIME_DIR"] = str(folder / "runtime")
    rest = {k: v for k, v in os.environ.items() if k not in ("VLMKIT_MODEL", "MPLBACKEND")}
    return rest | own | {"HF_HUB_OFFLINE": "1"}


def _kernel_of(pid):
    try:
        for child in psutil.Process(pid).children():
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                return child
    except psutil.Error:  # gone in the meantime
        pass
    return None


def _held(process):
    """(bytes resident, bytes of its own) of a process and all that it started."""
    resident = own = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            status = Path("/proc", str(each.pid), "status").read_text(encoding="utf-8")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            resident += 1024 * int(fields["VmRSS"].split()[0])
            own += 1024 * int(fields["RssAnon"].split()[0])
    except (psutil.Error, OSError, KeyError):
        pass
    return resident, own


if __name__ == "__main__":
    main()
