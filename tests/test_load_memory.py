"""What loading the 1 B-parameter checkpoint of benchmarks/loading.py takes, and the benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "loading.py"
ALLOWED = 300  # MB of memory beyond the model's own bytes
pytestmark = pytest.mark.slow


def run(*words):
    command = [sys.executable, BENCHMARK, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_peak_memory_of_a_large_load(tmp_path):
    """In processes of their own: a LLaVA of 970 M parameters in four files, 1.94 GB."""
    run("--measure", "make", "--model", tmp_path)
    for _ in range(3):
        found = json.loads(run("--measure", "recommended/vlmkit", "--model", tmp_path))
        assert 1100 < found["model"] < 1300
        assert 200 < found["peak"] < found["model"] + ALLOWED
    for file in tmp_path.iterdir():
        file.unlink()


def test_the_benchmark(llava, tmp_path):
    table = tmp_path / "table.md"
    text = run("--model", llava, "--repeats", "1", "--markdown", table)
    assert table.read_text() == text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4 + 1 + 4 + 1 + 4  # three tables with their heads
    assert rows[1].startswith("| bf16 | plain call | ") and "| 1.00 × |" in rows[1]
