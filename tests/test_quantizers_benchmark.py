"""benchmarks/quantizers.py: its record is what the script finds, and the README has its table."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
QUICK = ("bf16 in shards", "GPTQ int4, tied head")
LIBRARIES = {"compressed-tensors": "compressed_tensors", "torchao": "torchao", "HQQ": "hqq"}
"""What writes a checkpoint, and the name of its module: those that vlmkit does not install."""

with open(BENCHMARKS / "results" / "quantizers.csv", encoding="utf-8", newline="") as file:
    RECORD = {row["checkpoint"]: row for row in csv.DictReader(file)}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RECORD if name not in QUICK]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    modules = ("memory", "loading", "quantizers")
    for name in modules:  # those of that folder, not another module of the name
        monkeypatch.delitem(sys.modules, name, raising=False)
    import quantizers

    yield quantizers
    for name in modules:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_the_record_is_what_the_script_finds(name, script):
    recorded = RECORD[name]
    if recorded["written by"] in LIBRARIES:
        pytest.importorskip(LIBRARIES[recorded["written by"]])
    found = {key: str(value) for key, value in script.row_of(name).items()}
    if importlib.util.find_spec("hf_mem") is None:
        found["hf-mem"] = recorded["hf-mem"]
    assert found == recorded


def test_ten_checkpoints_of_six_quantizers_and_four_families(script):
    assert list(RECORD) == list(script.CHECKPOINTS) and len(RECORD) >= 10
    for field, most in (("written by", 6), ("family", 4)):
        assert len({row[field] for row in RECORD.values()}) >= most


def test_vlmkit_is_exact_and_the_readme_has_the_table(script):
    for row in RECORD.values():
        assert row["vlmkit stored"] == row["files"]
        assert row["vlmkit predict"] in ("", row["held"])
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in script.table(RECORD.values()) if line not in readme] == []
