"""benchmarks/gpu.py runs from end to end without a GPU, on a tiny model."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from families import _FAMILIES
from transformers import CONFIG_MAPPING

import vlmkit as vk
from vlmkit.catalog import folder_of

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in (
        "gpu_setups",
        "finetuning",
    ):  # import those of that folder, not another module of the name
        monkeypatch.delitem(sys.modules, name, raising=False)
    return runpy.run_path(str(BENCHMARKS / "gpu.py"))


def config(name):
    """The tiny config of a family, large enough for a tokenizer of bytes and some pictures."""
    family = _FAMILIES[name]
    fields = copy.deepcopy(family.config)
    fields["text_config"] |= {"max_position_embeddings": 1024, "vocab_size": 300}
    return CONFIG_MAPPING[family.model_type](**fields)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_script_on_a_cpu(benchmark, tmp_path):
    configs = {name: config(name) for name in ["mllama"]}
    output = tmp_path / "results" / "tiny.json"
    benchmark["run"](configs, "cpu", output, tmp_path, trained=["mllama"], pictures=(2,), steps=4)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert "failures" not in found
    assert {(r["model"], r["plan"]) for r in found["loads"]} == {
        (name, plan) for name in configs for plan in benchmark["FORMATS"]
    }
    for row in found["loads"]:
        assert row["predicted"] == row["measured"] and row["allocated"] is None
        assert row["predicted_allocated"] > row["predicted"]
    for row in found["passes"]:
        assert row["predicted_cache"] == row["cache"] < row["prefill"]
    assert [(row["checkpointing"], row["hook"]) for row in found["steps"]] == [
        (False, False), (True, False), (True, True)
    ]  # fmt: skip
    assert all(row["gradients_apart"] < 1e-6 for row in found["steps"])
    assert found["steps"][1]["step"] < found["steps"][2]["step"]
    ways = [row["way"] for row in found["trainings"]]
    assert ways == 2 * ["ours", "usual", "usual", "ours"]
    assert len({row["trained"] for row in found["trainings"]}) == 1
    losses = [row["loss"] for row in found["trainings"]]
    assert max(losses) - min(losses) < 0.05
    for row in found["quantizer"]:
        assert row["codes_that_differ"] == row["codes_that_differ_from_vlmkits"] == 0
        assert row["products_from_exact"] == pytest.approx(row["weights_from_exact"], rel=0.1)
    text = benchmark["report"](found)
    assert "| mllama, nf4, 2, 1 | cache |" in text and "+0.000%" in text


def test_a_failure_is_recorded_and_the_rest_continues(benchmark, tmp_path, monkeypatch):
    results = benchmark["Results"](tmp_path / "results.json")
    with results.attempt("what cannot be"):
        raise RuntimeError("out of memory")
    results.add("loads", model="next")
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["failures"] == [{"what": "what cannot be", "error": "RuntimeError: out of memory"}]
    assert found["loads"] == [{"model": "next"}]


def test_without_a_gpu_it_says_so(benchmark, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark["main"](["--device", "cuda"])
    assert stopped.value.code == 2 and "no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark["main"](["--device", "cpu", "--models", "GPT-7"])
    assert "SmolVLM" in capsys.readouterr().err


@pytest.mark.slow
def test_the_peaks_of_recorded_trainings(benchmark):
    """`vk.finetuning.train` on an H200, 61 steps, within 1%."""
    record = BENCHMARKS / "results" / "nvidia-h200-2026-11-30.json"
    rows = json.loads(record.read_text(encoding="utf-8"))["trainings"]
    ours = {row["checkpointing"]: row for row in rows if row["way"] == "ours"}
    for checkpointing, row in ours.items():
        found = benchmark["predicted_training"](
            folder_of(row["model"]), vk.Plan.recommended(), checkpointing, 64
        )
        assert found == pytest.approx(row["peak"], rel=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_way_of_several_gpus_on_a_cpu(benchmark, monkeypatch, tmp_path):
    """One process of it, and the check of its adapters. The rest needs two GPUs."""
    monkeypatch.delitem(sys.modules, "loading", raising=False)
    several = runpy.run_path(str(BENCHMARKS / "several_gpus.py"))
    for way in several["WAYS"].values():
        said = yaml.safe_load((several["LAUNCH"] / f"{way.config}.yaml").read_text())
        assert said["num_processes"] == several["PROCESSES"][way.config]
    sys.modules["gpu_setups"].make(config("mllama"), tmp_path / "model", "cpu")
    way, output = several["WAYS"]["one GPU, nf4"], tmp_path / "out"
    assert several["train"](tmp_path / "model", way, output, 4) == 0
    assert several["check"](tmp_path / "model", way, output, 4) == 0
    (found, check) = (json.loads(Path(f"{output}.{e}").read_text()) for e in ("0", "check"))
    assert len(found["losses"]) == 4 and found["continued_from"] == 0
    assert check["loss_of_saved"] == pytest.approx(found["loss_after"], abs=1e-3)
