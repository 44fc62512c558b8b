"""vlmkit/environment/: what this machine can run is said in words, and nothing that is missing
stops it from being said."""

import json
import os
import re
import subprocess
import sys
import tomllib
import types
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from vlmkit import cli, environment
from vlmkit.environment import FINE, MISSING, NOTE, PACKAGES, check, diagnose, machine
from vlmkit.environment.__main__ import main
from vlmkit.errors import failed_import

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = [
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"),
    *("TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"),
]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))


@pytest.fixture
def installed(monkeypatch):
    """A dict in which a test sets the version of a package; None means that it is missing. The
    packages of the course are there in the versions that it was tested with."""
    import torch  # noqa: F401  (torch asks for versions as well when it is first imported)

    versions, really = {name: tested for name, (_, tested) in PACKAGES.items()}, metadata.version

    def version(name):
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or really(name)

    monkeypatch.setattr(metadata, "version", version)
    return versions


def row(what):
    return next(row for row in check().rows if row.what == what)


# --- packages -------------------------------------------------------------------------------------


def test_the_table_is_that_of_pyproject_and_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {r.name: str(r.specifier) for r in map(Requirement, project["dependencies"])}
    assert bounds == {name: f">={oldest}" for name, (oldest, _) in PACKAGES.items()}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {f"{name}=={tested}" for name, (_, tested) in PACKAGES.items()} <= set(pins)


def test_the_page_on_running_says_the_same_of_versions():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert {row[0] for row in rows} == {"transformers", "peft", "bitsandbytes", "torch"}
    for name, oldest, tested, newest in rows:
        assert (Version(oldest), tested) == (Version(PACKAGES[name][0]), PACKAGES[name][1])
        assert Version(oldest) <= Version(tested) <= Version(newest)


def test_tested_versions_are_fine_whatever_the_build_and_the_oldest_will_do(installed):
    installed["torch"] += "+cpu"
    assert {row(name).state for name in PACKAGES} == {FINE}
    assert check().ready and "Everything" in check().summary
    installed.update({name: oldest for name, (oldest, _) in PACKAGES.items()})
    assert check().ready


@pytest.mark.parametrize("found", [None, "4.57.1"])
def test_what_is_missing_or_too_old_is_named_with_the_remedy(installed, found):
    installed["transformers"] = found
    found = check()
    assert found.missing == ["transformers"] and not found.ready
    for text in (found.summary, str(found), found._repr_html_()):
        assert "transformers" in text and "make setup" in text
    assert "Everything" not in str(found)


def test_other_versions_are_noted_and_stop_nothing(installed):
    installed["datasets"] = "6.0.1.dev3"
    assert row("datasets").state == NOTE
    assert check().ready and "datasets" in check().summary


def test_a_torch_that_cannot_be_imported_is_reported_and_html_is_escaped(monkeypatch):
    monkeypatch.setattr(sys, "executable", "<python>")
    monkeypatch.setitem(sys.modules, "torch", None)  # any import of it fails
    assert row("processor").state == MISSING
    assert "PyTorch cannot be used" in str(check())
    assert "<python>" not in check()._repr_html_()


# --- limits of containers -------------------------------------------------------------------------


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """write(group, file, text) sets a limit of a pretended group; the process is in /hub/me."""
    root, own = tmp_path / "cgroup", tmp_path / "own"
    (root / "hub" / "me").mkdir(parents=True)
    own.write_text("0::/hub/me\n", encoding="utf-8")
    monkeypatch.setattr(machine, "GROUPS", root)
    monkeypatch.setattr(machine, "OWN", own)

    def write(group, file, text):
        (root / group / file).write_text(text + "\n", encoding="utf-8")

    return write


def test_without_limits_it_is_the_machines(groups):
    import psutil

    groups("hub/me", "memory.max", "max")
    groups("hub/me", "memory.current", "5")
    groups("hub/me", "cpu.max", "max 100000")
    assert machine.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert machine.cores() == len(os.sched_getaffinity(0))


def test_a_limit_of_a_group_above_counts_less_what_is_used_and_cannot_be_dropped(groups):
    groups("hub/me", "memory.max", "max")
    groups("hub/me", "memory.current", "1000")
    groups("hub", "memory.max", "3000000")
    groups("hub", "memory.current", "2500000")
    assert machine.free_memory() == 500_000
    groups("hub", "memory.stat", "anon 1\ninactive_file 400000\nactive_file 7")
    assert machine.free_memory() == 900_000
    groups("hub", "memory.current", "9000000")
    assert machine.free_memory() == 0
    assert (row("free memory").found, row("free memory").state) == ("0.0 GB", NOTE)


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1)])
def test_cores_by_quota(groups, quota, cores):
    groups("hub", "cpu.max", quota)
    assert machine.cores() == cores


# --- the rest of the machine ----------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """cuda(capability, …) pretends that there are cards, with so much free memory in each."""
    import torch

    def pretend(capability, *free):
        cards = types.SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: len(free),
            mem_get_info=lambda index: (free[index], 24 * 10**9),
            get_device_name=lambda index: "a card",
            get_device_capability=lambda index: capability,
        )
        monkeypatch.setattr(torch, "cuda", cards)
        return cards

    return pretend


@pytest.mark.parametrize(
    ("capability", "state", "says"), [((8, 9), FINE, "fine"), ((7, 5), NOTE, "fp16")]
)
def test_a_gpu_and_its_free_memory(cuda, capability, state, says):
    cuda(capability, 20 * 10**9)
    (found,) = machine.gpus()
    assert found.found == "a card, 20.0 of 24.0 GB free"
    assert found.state == state and says in found.verdict


def test_a_gpu_that_cannot_be_used_stops_nothing(cuda):
    cuda((8, 0), 1).mem_get_info = lambda index: 1 / 0
    (found,) = machine.gpus()
    assert found.state == NOTE and "ZeroDivisionError" in found.verdict


def test_folders(monkeypatch, tmp_path):
    here, hub = machine.disks()
    assert {here.state, hub.state} == {FINE}
    assert str(tmp_path / "huggingface" / "hub") in hub.found
    assert not (tmp_path / "huggingface").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    hub = machine.disks()[1]
    assert hub.state == NOTE and "cannot be written to" in hub.verdict
    monkeypatch.setattr(machine, "WANTED_DISK", 10**18)
    assert {found.state for found in machine.disks()} == {NOTE}


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HF_HUB_CACHE", None])
def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("HF_HOME")
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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


def test_extras_are_those_of_the_package(installed, monkeypatch):
    installed["jupyterlab"] = None
    rows = {row.what: row for row in machine.extras()}
    assert {"extra: course", "extra: dev", "extra: hub"} <= set(rows)
    assert rows["extra: course"].found == "without jupyterlab"
    assert "[course]" in rows["extra: course"].verdict
    assert {row.state for row in rows.values()} == {FINE}  # optional is not missing

    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    (row,) = machine.extras()
    assert row.state == NOTE and "pip install" in row.verdict


def test_a_torchvision_that_was_built_for_another_torch_stops_the_course(installed, monkeypatch):
    installed["torchvision"] = "0.1"
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it fails
    found = diagnose()
    assert found.missing == ["torchvision"] and not found.ready and not found.models
    assert "look at torchvision" in str(found) and "make setup" not in str(found)


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
    monkeypatch.setattr(machine, "free_memory", lambda: 8 * 10**9)
    found = diagnose((small, large))
    fits = {(row["model"], row["plan"]): row["fits"] for row in found.models}
    assert fits[small, "bf16"] and fits[large, "language model nf4"] and not fits[large, "bf16"]
    for text in (str(found), found._repr_html_()):
        assert "8.0 GB that are free on the CPU" in text
        assert text.count("does not fit") == sum(not fit for fit in fits.values())


def test_a_model_without_a_number_says_which_kind_of_reason():
    row = {"needed": None, "fits": False}
    assert environment._needed(row | {"why": "too long: 9,000 tokens"}) == "too long"
    assert environment._needed(row | {"why": "unknown: no rule"}) == "unknown"


def test_on_a_gpu_it_is_the_one_with_most_free_memory(cuda):
    cuda((8, 0), 2 * 10**9, 3 * 10**9)
    assert environment._room() == ("GPU 1", 3 * 10**9)


def test_unknown_memory_is_said(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    found = diagnose()
    assert found.ready and "psutil" in found.why_none and "psutil" in str(found)


def test_the_command_as_text_and_as_json(capsys):
    assert cli.main(["doctor", "--quick"]) == 0
    out = capsys.readouterr().out
    for word in ("transformers", "free memory", "GPU", "cache of the hub", "notebook kernel"):
        assert word in out
    assert cli.main(["doctor", "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ready"] and document["missing"] == [] and document["why_none"] == "not asked"
    assert {row["what"] for row in document["environment"]} >= {"Python", "torch", "free memory"}
    assert {row["what"] for row in document["machine"]} >= {"GPU", "hub", "torchvision"}


def test_what_is_missing_is_exit_status_1(installed, capsys):
    installed["peft"] = None
    assert cli.main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["missing"] == ["peft"] and document["models"] == []
    assert main([]) == 1
    assert "Missing, too old or broken: peft" in capsys.readouterr().out


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
    assert "Missing, too old or broken: torch" in done.stdout and "no ipykernel" in done.stdout
    assert json.loads(bare("vlmkit.environment", "--json").stdout)["ready"] is False


def test_without_typer_the_command_line_says_where_the_doctor_is():
    done = bare("vlmkit", "doctor")
    assert done.returncode == 2
    assert "typer" in done.stderr and "python -m vlmkit.environment" in done.stderr
    assert "Traceback" not in done.stderr


def broken(module, folder):
    """Environment variables with which `module` comes from `folder`, where it raises."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text("raise RuntimeError('undefined symbol: _Z3abc')")
    metadata = folder / f"{module}-99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 99.0\n")
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths}


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("torchvision", "memory pebble"),
        pytest.param("pyarrow", "memory pebble", marks=pytest.mark.slow),
        pytest.param("bitsandbytes", "memory pebble", marks=pytest.mark.slow),
        pytest.param("bitsandbytes", "ask shapes.png What?", marks=pytest.mark.slow),
        pytest.param("pyarrow", "train train.yaml", marks=pytest.mark.slow),
    ],
)
def test_a_command_names_the_package_that_fails_on_import(module, command, tmp_path):
    """It said that config.json cannot be used."""
    (tmp_path / "train.yaml").write_text("{train: {projector: full}, data: {task: vqa}, output: o}")
    Image.new("RGB", (84, 84)).save(tmp_path / "shapes.png")
    command = [sys.executable, "-m", "vlmkit", *command.split()]
    variables = broken(module, tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    said = result.stderr
    assert result.returncode == 2 and "Traceback" not in said
    assert f"package {module} is installed, and fails while it is imported" in said
    assert "_Z3abc" in said and "config.json cannot" not in said


def test_a_package_that_is_missing_is_named_with_the_one_that_needs_it(tmp_path, monkeypatch):
    """It said: this is a defect of vlmkit, please report it."""
    (tmp_path / "needs_another.py").write_text("import not_here_either")
    monkeypatch.syspath_prepend(tmp_path)
    for name, needed in (("needs_another", True), ("not_here", False)):
        with pytest.raises(ModuleNotFoundError) as caught:
            __import__(name)
        said = failed_import(caught.value)
        assert "pip install not_here" in said and ("needs_another" in said) == needed
    with pytest.raises(ModuleNotFoundError) as caught:
        __import__("json.not_here")  # json is installed: something else is wrong
    assert failed_import(caught.value) is None


@pytest.mark.parametrize(
    ("module", "row"),
    [("bitsandbytes", "bitsandbytes"), ("pyarrow", "datasets"), ("torchvision", "torchvision")],
)
def test_what_is_installed_and_fails_on_import_is_not_fine(module, row, tmp_path):
    """Another process, in which the module comes from a folder where it raises."""
    result = subprocess.run(
        [sys.executable, "-m", "vlmkit.environment", "--quick", "--json"],
        capture_output=True,
        text=True,
        env=broken(module, tmp_path),
    )
    found = json.loads(result.stdout)
    rows = {line["what"]: line for line in found["environment"] + found["machine"]}
    assert result.returncode == 1 and not found["ready"] and row in found["missing"]
    assert "undefined symbol" in rows[row]["verdict"] and rows[row]["state"] == "missing"
    if module == "torchvision":
        assert "extra: hub" not in rows  # it would call torchvision installed
