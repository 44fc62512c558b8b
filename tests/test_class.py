"""benchmarks/class.py measures the memory of a process with its children, and times a chapter."""

import runpy
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "class.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="read as Linux shows it")
MEGABYTE = 10**6


def test_memory_of_a_process_includes_its_child():
    code = "import subprocess, sys; own = bytearray(b'x' * 50_000_000); print(flush=True); "
    code += "sys.argv[1:] and subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "own = bytearray(b'x' * 30_000_000); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        process.stdout.readline()
        resident, own = runpy.run_path(str(SCRIPT))["_held"](psutil.Process(process.pid))
    finally:
        process.communicate(b"\n", timeout=30)
    assert 80 * MEGABYTE < own < 130 * MEGABYTE
    assert own < resident < own + 60 * MEGABYTE


@pytest.mark.slow
def test_a_chapter_on_one_core():
    begun = time.perf_counter()
    words = ("--no-lab", "--chapters", "00", "--cores", "1")
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = done.stdout.splitlines()[-1].split("|")
    assert row[1].strip() == "kernel of chapter 00" and int(row[2]) == 1
    assert 5 < int(row[3]) < time.perf_counter() - begun + 1  # the table has whole seconds
    assert 200 < int(row[5]) < int(row[4]) < 4000
