"""The 1 B-parameter checkpoint of benchmarks/loading.py: what loading it takes, in processes of
their own, and that the benchmark's tables come out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "loading.py"
ALLOWED = 300  # MB of memory beyond the model's own bytes


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A LLaVA of 970 M parameters in four files, 1.94 GB."""
    folder = tmp_path_factory.mktemp("large")
    subprocess.run([*_command("make"), "--model", folder], check=True)
    yield folder
    for file in folder.iterdir():
        file.unlink()


def _command(measure):
    return [sys.executable, BENCHMARK, "--measure", measure]


@pytest.mark.slow
@pytest.mark.parametrize("run", [1, 2, 3])
def test_peak_memory_of_a_large_load(large, run):
    done = subprocess.run(
        [*_command("recommended/vlmkit"), "--model", large],
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    assert 1100 < found["model"] < 1300
    assert 200 < found["peak"] < found["model"] + ALLOWED


@pytest.mark.slow
def test_the_benchmark(llava, tmp_path):
    table = tmp_path / "table.md"
    command = [sys.executable, BENCHMARK, "--model", llava, "--repeats", "1", "--markdown", table]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = table.read_text()
    assert text == done.stdout
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 5 + 1 + 4 + 1 + 4  # three tables with their heads
    assert rows[1].startswith("| bf16 | plain call | ") and "| 1.00 × |" in rows[1]
