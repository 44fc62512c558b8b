"""docs/cluster.md: accelerate reads its configs, its script is one, its table a record."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_multi_gpu_env

from vlmkit.backend import sharding

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
LAUNCH = ROOT / "docs" / "launch"
PROCESSES = ROOT / "benchmarks" / "results" / "two-processes-on-nvidia-h200-2026-12-01.json"
FILES = {  # processes, machines, whether one model is shared
    "one_gpu.yaml": (1, 1, False),
    "two_gpus.yaml": (2, 1, False),
    "two_gpus_fsdp.yaml": (2, 1, True),
    "two_nodes_fsdp.yaml": (8, 2, True),
}


def test_the_page_links_to_every_file():
    linked = set(re.findall(r"\(launch/([\w.]+)\)", PAGE))
    assert linked == {path.name for path in LAUNCH.iterdir()} == {*FILES, "train.slurm"}


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_a_config(name, monkeypatch):
    """As `accelerate launch` does: its loader, its checks, and what it tells the processes."""
    processes, machines, shared = FILES[name]
    config = load_config_from_file(str(LAUNCH / name))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert (config.distributed_type.value == "FSDP") == shared
    words = ["--config_file", str(LAUNCH / name), "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", "29501", "--machine_rank", "0", "train.py"]
    arguments, _, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(words)
    )
    assert arguments.use_fsdp == shared and arguments.num_processes == processes
    told = prepare_multi_gpu_env(arguments) if processes > 1 else {}
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for variable, value in told.items():
        if variable.startswith(("ACCELERATE_USE_FSDP", "FSDP_")):
            monkeypatch.setenv(variable, value)
    assert sharding.is_asked() == shared


def test_the_script_of_slurm():
    script = LAUNCH / "train.slurm"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    used = {v for v in re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", text) if v != "SBATCH"}
    assert used == set(re.findall(r"^\| `([A-Z_]+)` \|", PAGE, flags=re.MULTILINE))
    config = load_config_from_file(str(LAUNCH / "two_nodes_fsdp.yaml"))
    nodes, gpus = (int(re.search(rf"--{n}=(\d+)", text)[1]) for n in ("nodes", "gpus-per-node"))
    assert (nodes, nodes * gpus) == (config.num_machines, config.num_processes)
    cpus = int(re.search(r"--cpus-per-task=(\d+)", text)[1])
    assert int(re.search(r"OMP_NUM_THREADS=(\d+)", text)[1]) == cpus // gpus


def ways_of(name):
    assert f"benchmarks/results/{name}.json" in PAGE
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["ways"]


def test_the_table_is_the_record():
    ways = ways_of("two-nvidia-h200-2026-11-29")
    rows = {"one GPU": "one GPU, {}", "two GPUs, a copy each": "two GPUs, {}",
            "two GPUs share one model": "two GPUs, {}, parted"}  # fmt: skip
    for label, way in rows.items():
        told = f"| {label}"
        for kind in ("bf16", "nf4"):
            found = ways[way.format(kind)]
            seconds = max(one["seconds_a_step"] for one in found)
            peak = max(one["peak"] for one in found) / 1e9
            told += f" | {seconds:.2f} | {peak:.1f} GB"
        assert told + " |" in PAGE, told
    losses = [run["losses"] for kind in ("bf16", "nf4") for way in rows.values()
              for run in ways[way.format(kind)]]  # fmt: skip
    for same in (losses[: len(losses) // 2], losses[len(losses) // 2 :]):
        assert all(max(step) / min(step) < 1.005 for step in zip(*same, strict=True))
    kept = max(one["kept"] for one in ways["two GPUs, bf16, parted"]) / 1e9
    assert f"{kept:.1f} GB stayed" in PAGE


def test_the_table_of_two_processes_is_the_record():
    record = json.loads(PROCESSES.read_text(encoding="utf-8"))
    ways, losses = record["ways"], {}
    rows = {"one process without a limit, bf16": "one GPU, bf16",
            "two processes of 16 GB, bf16": "two GPUs of 16 GB share, bf16",
            "one process without a limit, NF4": "one GPU, nf4",
            "two processes of 16 GB, NF4": "two GPUs of 16 GB share, nf4"}  # fmt: skip
    for label, way in rows.items():
        found = [process for process in ways[way] if "losses" in process]
        most = {k: max(process[k] for process in found) for k in ("loaded", "peak", "reserved")}
        most = {name: f"{size / 1e9:.1f} GB" for name, size in most.items()}
        most["loaded"] += " each" * (len(found) > 1)
        losses[way], *others = (process["losses"] for process in found)
        assert all(other == losses[way] for other in others)
        cells = [label, *most.values(), " ".join(f"{loss:.3f}" for loss in losses[way])]
        assert " | ".join(cells) in PAGE, cells
    bf16, shared, nf4, shared_nf4 = losses.values()
    assert shared == pytest.approx(bf16, rel=0.0005)
    assert shared_nf4 == pytest.approx(nf4, rel=0.0004)
    before = ways["two GPUs of 16 GB share, nf4, before a fix"][0]["losses"]
    assert f"{before[0] / nf4[0] - 1:.1%} too high" in PAGE
    for label in ("bf16", "nf4"):
        *both, saved = ways[f"two GPUs of 16 GB share, {label}"]
        assert {process["loss_after"] for process in both} == {saved["loss_of_saved"]}
        assert f"{saved['loss_of_saved']:.4f}" in PAGE
        assert {process["continued_from"] for process in both} == {2 if label == "bf16" else 0}
        gaps = [process["reserved"] - process["peak"] for process in both]
        assert min(gaps) > 0.55e9 and max(gaps) < 1.15e9
    host = " and ".join(f"{p['host']:.0f}" for p in ways["two GPUs of 16 GB share, bf16"][:2])
    assert f"took {host} MB" in PAGE
    assert "docs/cluster.md" in ways["one GPU of 16 GB, bf16"][0]["refused"]
    failed = [way for name, way in ways.items() if "without" in name]
    assert len(failed) == 2 and all("out of memory" in way["failed"] for way in failed)
    plans = record["pebble after a training in bf16"]
    assert [plan["difference"] for name, plan in plans.items() if name != "note"] == [0, 0, 0]
    sweep = record["sweep of cobble"]
    assert sweep["cells"] == sweep["written"] == len(sweep["table"]) and sweep["equal tables"]
    one, two = sweep["seconds"].values()
    assert f"{two} s" in PAGE and str(one) in PAGE and f"{sweep['questions']} questions" in PAGE
