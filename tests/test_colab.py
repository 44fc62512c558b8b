"""scripts/colab.py installs what a full environment lacks, and changes nothing else.

The tests use the real pip with small packages that they make.
"""

import json
import re
import runpy
import subprocess
import sys
import types
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
colab = types.SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "colab.py")))


def test_it_needs_what_the_package_needs():
    assert any(line.startswith("transformers") for line in colab.needed())
    decision = colab.decide(colab.needed(), colab.installed())
    assert decision.wanted == [] and len(decision.fine) == len(colab.needed())


def test_each_package_is_fine_missing_or_too_old():
    needs = ["a>=2", "b>=2", "C_d>=2", "torch>=9", "e>=2"]
    here = {"a": "2.1", "b": "1.9", "torch": "8.0+cu999", "e": "3.0.dev1"}
    decision = colab.decide(needs, here)
    assert decision.fine == ["a>=2", "e>=2"]
    assert decision.missing == ["C_d>=2"]
    assert decision.too_old == ["b>=2"] and decision.too_old_but_kept == ["torch>=9"]
    assert decision.wanted == ["C_d>=2", "b>=2"]


def test_constraints_never_allow_a_downgrade():
    here = {"a": "2.1", "b": "1.9+local", "torch": "8.0+cu999"}
    decision = colab.decide(["b>=2", "torch>=9"], here)
    strict = colab.constraints(here, decision)
    assert strict == ["a==2.1", "b>=1.9", "torch==8.0+cu999"]
    loose = colab.constraints(here, decision, may_become_newer=True)
    assert loose == ["a>=2.1", "b>=1.9", "torch==8.0+cu999"]


# --- with pip -------------------------------------------------------------------------------------


def wheel(folder, name, version, *needs):
    """Write an empty package that pip can install."""
    info = f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    files = {
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def environment(tmp_path):
    """An environment, a folder of packages, and functions that install into the environment."""
    shelf, home = tmp_path / "shelf", tmp_path / "environment"
    shelf.mkdir()
    venv.create(home, with_pip=False)
    python = next(path for path in home.glob("*/python*") if path.stem == "python")
    pip = (sys.executable, "-m", "pip", "--isolated", "--python", str(python))
    options = ("--no-index", "--find-links", str(shelf), "--quiet", "--no-cache-dir")

    def versions():
        listed = subprocess.check_output([*pip, "list", "--format=json"], text=True)
        return {package["name"]: package["version"] for package in json.loads(listed)}

    def install(*wanted):
        subprocess.run([*pip, "install", *options, *wanted], check=True)

    def colab_install(*requirements):
        return colab.install(list(requirements), versions(), pip=pip, options=options)

    return types.SimpleNamespace(
        shelf=shelf, versions=versions, install=install, colab_install=colab_install
    )


def test_installs_only_what_is_missing_in_versions_that_fit_the_rest(environment):
    wheel(environment.shelf, "numbers", "3.0")
    wheel(environment.shelf, "numbers", "4.0")
    wheel(environment.shelf, "tables", "1.0", "numbers>=3")
    wheel(environment.shelf, "tables", "2.0", "numbers>=4")
    environment.install("numbers==3.0")
    environment.colab_install("numbers>=2", "tables>=1")
    assert environment.versions() == {"numbers": "3.0", "tables": "1.0"}


@pytest.mark.slow
def test_upgrades_what_is_too_old_and_what_that_needs(environment, capsys):
    for version, need in (("1.0", "hub==1.0"), ("2.0", "hub==2.0")):
        wheel(environment.shelf, "models", version, need)
        wheel(environment.shelf, "hub", version)
        wheel(environment.shelf, "torch", version)
    environment.install("models==1.0", "torch==1.0")
    environment.colab_install("models>=2", "torch>=2")
    assert environment.versions() == {"models": "2.0", "hub": "2.0", "torch": "1.0"}
    assert "torch 1.0 stays" in capsys.readouterr().out


def test_downgrades_nothing(environment):
    """By itself, pip would install an older version to satisfy another package."""
    wheel(environment.shelf, "hub", "1.0")
    wheel(environment.shelf, "hub", "2.0")
    wheel(environment.shelf, "adapters", "1.0", "hub<2")
    environment.install("hub==2.0")
    with pytest.raises(RuntimeError, match="adapters>=1.*Nothing was changed"):
        environment.colab_install("hub>=1", "adapters>=1")
    assert environment.versions() == {"hub": "2.0"}


# --- the address ----------------------------------------------------------------------------------


def test_the_address_of_the_repository_is_the_same_everywhere():
    notebook = json.loads((ROOT / "scripts" / "colab.ipynb").read_text(encoding="utf-8"))
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code = "".join(first["source"])
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    cloned = re.findall(r"github\.com/([\w.-]+/[\w-]+)", code + page + colab.__doc__)
    assert len(cloned) >= 3 and {*cloned} == {colab.REPOSITORY}
    assert colab.REPOSITORY in page.split("placeholder")[0]
    assert "%run" in code and "scripts/colab.py" in code


def test_its_notebook_parses_and_loads_the_model():
    notebook = json.loads((ROOT / "scripts" / "colab.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    for cell in cells[1:]:
        compile(cell, "cell", "exec")
    assert "vk.load" in cells[-1] and "vk.ask" in cells[-1]
