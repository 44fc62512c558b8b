"""Chapter 10: says what is so, of the recorded runs on GPUs and of what is predicted now."""

import json
from pathlib import Path

import chapters
import pandas as pd
import pytest
import tiny
from chapters import shown, sources, text

import vlmkit as vk

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
H200 = "nvidia-h200-2026-11-29"
LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"


@pytest.fixture(scope="module")
def notebook():
    return chapters.read("10_real_models.ipynb")


@pytest.fixture(scope="module")
def record():
    return json.loads((RESULTS / f"{H200}.json").read_text(encoding="utf-8"))


def cell(notebook, start):
    """The code cell that begins with `start`."""
    (found,) = (
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith(start)
    )
    return found


def test_keeps_to_the_measure_of_a_chapter(notebook):
    chapters.check_measure(notebook, middle=8)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_what_it_says_of_loads(notebook, record):
    rows = pd.DataFrame(record["loads"])
    assert (rows["predicted"] == rows["measured"]).all()
    off = (rows["allocated"] != rows["predicted_allocated"]).sum()
    assert off == 1 and "Fifteen of sixteen" in text(notebook)
    lost = (rows["reserved"] / rows["measured"] - 1).where(rows["plan"] == "nf4").dropna()
    assert [f"{share:.0%}" for share in lost[:2]] == ["15%", "1%"]
    seconds = rows[~rows["model"].str.contains("SmolVLM")].pivot(
        index="model", columns="plan", values="seconds"
    )
    times = seconds["int8"] / seconds.drop(columns="int8").mean(axis=1)
    assert 4.5 < times.min() < times.max() < 6.5 and "five to six times" in text(notebook)


def test_what_it_says_of_prompts(notebook, record):
    before = json.loads((RESULTS / f"{H200}-before.json").read_text(encoding="utf-8"))["passes"]
    off = [row["predicted_decode"] / row["decode"] for row in before if "nf4" in row["plan"]]
    assert 3 < max(off) < 3.2  # "three times too much"
    eights = [row for row in before if row["plan"] == "int8"]
    assert max(r["predicted_prefill"] / r["prefill"] for r in eights) == pytest.approx(
        1.5, abs=0.01
    )
    pairs = zip(before, record["passes"], strict=True)
    taken = [old["prefill"] / new["predicted_prefill"] for old, new in pairs]
    assert max(taken) == pytest.approx(2, abs=0.05)  # "up to twice what is predicted"
    last = {row["model"]: row for row in record["passes"] if row["plan"] == "nf4"}
    assert last[LLAMA]["images"] == 8 and round(last[LLAMA]["prefill"] / 1e9, 1) == 7.5
    assert round(last["llava-hf/llava-1.5-7b-hf"]["cache"] / 1e9) == 3
    seen = vk.memory.visual_tokens(LLAMA, (560, 560))
    assert f"{seen.attended:,}" in text(notebook) and f"{8 * seen.attended:,}" in text(notebook)


def test_what_it_says_of_training(notebook, record):
    without, switched = (row["peak"] / 1e9 for row in record["steps"])
    assert f"{without:.1f} GB at the peak" in text(notebook)
    assert f"adds {switched - without:.1f} GB" in text(notebook)
    peaks = pd.DataFrame(record["trainings"]).groupby(["checkpointing", "way"])["peak"].first()
    less = (peaks.xs("usual", level="way") - peaks.xs("ours", level="way")) / 1e9
    assert [round(gb) for gb in less] == [2, 4]
    rates = pd.DataFrame(record["trainings"]).groupby("way")["steps_a_second"]
    assert rates.max()["ours"] > rates.max()["usual"] and rates.min()["ours"] < rates.min()["usual"]


def test_a_switch_for_long_texts(notebook):
    rows = shown(cell(notebook, "llama = "))
    short, long = (tuple(map(float, rows[n])) for n in ("128", "2048"))
    assert short[1] > short[0] and long[1] < 0.6 * long[0]


def test_what_it_says_of_cards(notebook):
    assert "Qwen2.5-VL-7B just misses" in text(notebook)
    qwen = "Qwen/Qwen2.5-VL-7B-Instruct"
    fits = vk.fit(
        {"q": qwen, "l": "llava-hf/llava-1.5-7b-hf"},
        {"nf4": vk.Plan.recommended(), "dq": "nf4-dq"},
        ["8 GB"],
        image_size=(1024, 768),
    ).set_index(["model", "plan"])
    assert -1e9 < fits.loc[("q", "nf4"), "headroom"] < 0
    assert fits.loc[("q", "dq"), "fits"] and fits.loc[("l", "nf4"), "fits"]


def test_two_gpus_come_to_the_same_losses(notebook):
    ways = json.loads((RESULTS / f"two-{H200}.json").read_text(encoding="utf-8"))["ways"]
    for label in ("bf16", "nf4"):
        own = [found[0]["losses"] for way, found in ways.items() if label in way]
        assert len(own) == 3
        assert all(other == pytest.approx(own[0], rel=0.005) for other in own[1:])
    kept = {way: found[0]["kept"] for way, found in ways.items()}
    assert kept["two GPUs, bf16, parted"] < 0.51 * kept["one GPU, bf16"]
    peak = {way: max(process["peak"] for process in found) for way, found in ways.items()}
    assert peak["two GPUs, bf16, parted"] > peak["one GPU, bf16"]


def test_live_on_another_family(notebook, tmp_path, monkeypatch):
    """The cell under "The same, live", with what a reader's variable names."""
    monkeypatch.setenv("VLMKIT_MODEL", str(tiny.other_family(tmp_path)))
    names = {}
    exec("import torch\nimport vlmkit as vk", names)
    exec(cell(notebook, "name, plan = ").source, names)
    assert names["given"] == names["expected"] > 0


def test_without_a_record_it_says_how_to_make_one(notebook, tmp_path, monkeypatch):
    source = next(s for s in sources(notebook, "code") if s.startswith("import json"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="make benchmark-gpu records it"):
        exec(source, {})
