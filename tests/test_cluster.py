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


def test_the_table_is_the_record():
    (name,) = re.findall(r"benchmarks/results/([\w.-]+)", PAGE)
    ways = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["ways"]
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
