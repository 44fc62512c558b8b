"""vlmkit/environment/: what a machine can run, said in each state that a machine may be in."""

import json
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest

from vlmkit import cli, environment
from vlmkit.environment import FINE, MISSING, NOTE, doctor, limits, machine

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_ENDPOINT",
    "HF_TOKEN",
    "VLMKIT_CACHE",
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))


@pytest.fixture
def installed(monkeypatch):
    """A dict in which a test sets the version of a package; None is none."""
    pretended, really = {}, metadata.version

    def version(name):
        if pretended.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return pretended.get(name) or really(name)

    monkeypatch.setattr(metadata, "version", version)
    return pretended


# --- limits of containers -------------------------------------------------------------------------


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """write(group, file, text) sets a limit of a pretended group; the process is in /hub/me."""
    root = tmp_path / "cgroup"
    (root / "hub" / "me").mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("0::/hub/me\n", encoding="utf-8")
    monkeypatch.setattr(limits, "GROUPS", root)
    monkeypatch.setattr(limits, "OWN", own)

    def write(group, file, text):
        (root / group / file).write_text(text + "\n", encoding="utf-8")

    return write


def test_without_limits_it_is_the_machines(groups):
    import psutil

    groups("hub/me", "memory.max", "max")
    groups("hub/me", "memory.current", "5")
    groups("hub/me", "cpu.max", "max 100000")
    assert limits.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert limits.cores() == len(os.sched_getaffinity(0))


def test_a_limit_of_a_group_above_counts_less_what_is_used_and_cannot_be_dropped(groups):
    groups("hub/me", "memory.max", "max")
    groups("hub/me", "memory.current", "1000")
    groups("hub", "memory.max", "3000000")
    groups("hub", "memory.current", "2500000")
    assert limits.free_memory() == 500_000
    groups("hub", "memory.stat", "anon 1\ninactive_file 400000\nactive_file 7")
    assert limits.free_memory() == 900_000
    groups("hub", "memory.current", "9000000")
    assert limits.free_memory() == 0


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1)])
def test_cores_by_quota(groups, quota, cores):
    groups("hub", "cpu.max", quota)
    assert limits.cores() == cores


def test_little_memory_in_a_container_is_noted(groups):
    groups("hub", "memory.max", "1000000000")
    groups("hub", "memory.current", "200000000")
    row = environment.check().rows[-1]
    assert (row.what, row.found, row.state) == ("free memory", "0.8 GB", NOTE)


# --- the machine ----------------------------------------------------------------------------------


def cuda(capability, free=20 * 10**9):
    def get(index):
        return free, 24 * 10**9

    return types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        mem_get_info=get,
        get_device_name=lambda index: "a card",
        get_device_capability=lambda index: capability,
    )


@pytest.mark.parametrize(
    ("capability", "state", "says"), [((8, 9), FINE, "fine"), ((7, 5), NOTE, "fp16")]
)
def test_a_gpu_and_its_free_memory(monkeypatch, capability, state, says):
    import torch

    monkeypatch.setattr(torch, "cuda", cuda(capability))
    (row,) = machine.gpus()
    assert row.found == "a card, 20.0 of 24.0 GB free"
    assert row.state == state and says in row.verdict


def test_a_gpu_that_cannot_be_used_stops_nothing(monkeypatch):
    import torch

    broken = cuda((8, 0))
    broken.mem_get_info = lambda index: 1 / 0
    monkeypatch.setattr(torch, "cuda", broken)
    (row,) = machine.gpus()
    assert row.state == NOTE and "ZeroDivisionError" in row.verdict


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path / "not" / "there" / "yet"))
    here, hub, own = machine.disks()
    assert {here.state, hub.state, own.state} == {FINE}
    assert str(tmp_path / "huggingface" / "hub") in hub.found
    assert not (tmp_path / "huggingface").exists() and not (tmp_path / "not").exists()


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    row = machine.disks()[1]
    assert row.state == NOTE and "cannot be written to" in row.verdict


def test_little_disk(monkeypatch):
    monkeypatch.setattr(machine, "WANTED_DISK", 10**18)
    assert {row.state for row in machine.disks()} == {NOTE}


def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, tmp_path):
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for variables in (
        {"HF_HOME": ""},
        {"HF_HOME": "", "XDG_CACHE_HOME": str(tmp_path / "xdg")},
        {"HF_HUB_CACHE": str(tmp_path / "direct")},
    ):
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value) if value else patch.delenv(variable)
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            assert str(machine.hub_cache()) == done.stdout.strip()


def test_the_hub_is_told_from_variables_alone(monkeypatch, tmp_path):
    assert "without a token" in machine.hub().found
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text("hf_secret", encoding="utf-8")
    assert ", with a token" in machine.hub().found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline" in machine.hub().found
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "offline" not in machine.hub().found and "secret" not in str(machine.hub())


def test_extras_are_those_of_the_package(installed):
    installed["jupyterlab"] = None
    rows = {row.what: row for row in machine.extras()}
    assert {"extra: course", "extra: dev", "extra: hub"} <= set(rows)
    assert rows["extra: course"].found == "without jupyterlab"
    assert "[course]" in rows["extra: course"].verdict
    assert {row.state for row in rows.values()} == {FINE}  # optional is not missing


def test_a_package_that_is_not_installed_itself(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    (row,) = machine.extras()
    assert row.state == NOTE and "pip install" in row.verdict


def test_a_torchvision_that_was_built_for_another_torch_stops_the_course(installed, monkeypatch):
    installed["torchvision"] = "0.1"
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it fails
    assert machine.torchvision().state == MISSING
    found = doctor.diagnose()
    assert found.missing == ["torchvision"] and not found.ready and not found.models
    assert "cannot run here: look at torchvision" in str(found)


def test_the_kernel_of_the_notebooks(installed, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager

    assert machine.kernel().state == FINE

    def kernel(self, name):
        return types.SimpleNamespace(argv=["/opt/other/bin/python", "-m", "ipykernel_launcher"])

    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", kernel)
    assert machine.kernel().state == NOTE and "Change Kernel" in machine.kernel().verdict
    installed["ipykernel"] = None
    assert machine.kernel().found == "no ipykernel"


# --- which models fit, and the whole --------------------------------------------------------------


def test_models_are_held_against_the_memory_that_is_free(monkeypatch):
    small, large = "HuggingFaceTB/SmolVLM-256M-Instruct", "llava-hf/llava-1.5-7b-hf"
    monkeypatch.setattr(limits, "free_memory", lambda: 8 * 10**9)
    found = doctor.diagnose((small, large))
    fits = {(row["model"], row["plan"]): row["fits"] for row in found.models}
    assert fits[small, "bf16"] and fits[large, "language model nf4"] and not fits[large, "bf16"]
    assert "8.0 GB that are free on the CPU" in str(found)
    assert str(found).count("does not fit") == sum(not fit for fit in fits.values())


def test_on_a_gpu_it_is_the_one_with_most_free_memory(monkeypatch):
    import torch

    cards = cuda((8, 0))
    cards.device_count = lambda: 2
    cards.mem_get_info = lambda index: ((2 + index) * 10**9, 24 * 10**9)
    monkeypatch.setattr(torch, "cuda", cards)
    assert doctor._room() == ("GPU 1", 3 * 10**9)


def test_unknown_memory_is_said(monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda: None)
    found = doctor.diagnose()
    assert found.ready and "psutil" in found.why_none and "psutil" in str(found)


def test_the_command_as_text_and_as_json(capsys):
    assert cli.main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    for word in ("transformers", "free memory", "GPU", "cache of the hub", "notebook kernel"):
        assert word in out
    assert cli.main(["doctor", "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ready"] and document["missing"] == [] and document["why_none"] == "not asked"
    assert {row["what"] for row in document["machine"]} >= {"GPU", "hub", "torchvision"}


def test_what_is_missing_is_exit_status_1(installed, capsys):
    installed["peft"] = None
    assert cli.main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["missing"] == ["peft"] and document["models"] == []
    assert doctor.main([]) == 1
    assert "Missing or too old: peft" in capsys.readouterr().out


@pytest.mark.slow
def test_the_catalog_fits_or_not(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"pebble", "Qwen/Qwen2.5-VL-7B-Instruct"} <= {row["model"] for row in document["models"]}
    assert next(row for row in document["models"] if row["model"] == "pebble")["fits"]


def bare(*words):
    """A Python that sees its own library and this folder, and no installed package."""
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = {list(words)!r}; "
    code += f"runpy.run_module({words[0]!r}, run_name='__main__')"
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True)


def test_without_any_package_the_doctor_still_answers():
    done = bare("vlmkit.environment")
    assert done.returncode == 1 and done.stderr == ""
    assert "Missing or too old: torch" in done.stdout and "no ipykernel" in done.stdout
    assert json.loads(bare("vlmkit.environment", "--json").stdout)["ready"] is False


def test_without_typer_the_command_line_says_where_the_doctor_is():
    done = bare("vlmkit", "doctor")
    assert done.returncode == 2
    assert "typer" in done.stderr and "python -m vlmkit.environment" in done.stderr
    assert "Traceback" not in done.stderr
