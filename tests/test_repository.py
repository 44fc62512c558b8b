"""pyproject.toml, constraints.txt, Makefile, README and the installed packages agree."""

import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import vlmkit

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
README = (ROOT / "README.md").read_text()


def requirements(*extras):
    """The requirements of the package, and of `extras`."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in EXTRAS[extra]]
    return [Requirement(line) for line in lines]


def pins():
    """constraints.txt as {name: version}."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt: name==version, a line each"
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@functools.cache
def pulled_in(*extras):
    """{name: version} of every package that is installed for vlmkit or its `extras`."""
    versions, queue = {}, [(r, ()) for r in requirements(*extras)]
    while queue:
        requirement, asked_by = queue.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in asked_by or [""]):
            continue
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in versions:
            continue
        found = importlib.metadata.distribution(name)
        versions[(name, *sorted(requirement.extras))] = Version(found.version)
        queue += [(Requirement(line), tuple(requirement.extras)) for line in found.requires or []]
    return {name: version for (name, *_), version in versions.items()}


def committed():
    """Paths of the committed files that exist, relative to the root."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def committed_texts():
    for path in committed():
        try:
            yield path, (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # weights and pictures
            continue


# --- versions ------------------------------------------------------------------------------------


def test_every_requirement_is_pinned_within_its_bounds():
    pinned = pins()
    for requirement in requirements("course", "dev", "site", "browser"):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} has no line in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement}, but pinned to {version}"


def test_installed_versions_are_the_pinned_ones():
    pinned = pins()
    differing = {
        name: f"installed {version}, pinned {pinned[name]}"
        for name, version in pulled_in("course", "dev", "site").items()
        # because 2.13.0+cpu is a build of 2.13.0
        if name in pinned and version.public != pinned[name].public
    }
    assert not differing, f"make setup installs the pinned versions: {differing}"


def test_torchvision_is_only_in_the_hub_extra():
    assert [Requirement(line).name for line in EXTRAS["hub"]] == ["torchvision"]
    assert "torchvision" not in pulled_in("course", "dev", "site")
    assert "torchvision" not in pins()


def test_conda_environment_agrees_with_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    conda = {name: rest for name, _, rest in (line.partition("=") for line in conda)}
    assert set(conda) == {"python", "pip", "pytorch"}
    version, _, build = conda["pytorch"].partition("=")
    assert Version(version) == pins()["torch"]
    assert build.startswith("cpu"), "a CUDA build does not fit Binder"
    assert Version(conda["python"]) in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert pip == {"pip": ["-c constraints.txt", "-e .[course]"]}
    assert environment["channels"][0] == "conda-forge"


def test_one_version_everywhere():
    assert CITATION["version"] == vlmkit.__version__
    assert "version" in PROJECT["dynamic"], "pyproject.toml reads the version from vlmkit"


# --- the package ---------------------------------------------------------------------------------


def test_importing_vlmkit_is_fast_and_imports_nothing_heavy():
    program = (
        "import sys, time; start = time.process_time(); import vlmkit; "
        "print(time.process_time() - start); "
        "print(*{'torch', 'transformers', 'numpy', 'pandas', 'PIL'} & set(sys.modules))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for _ in range(3)
    ]
    assert {heavy for _, heavy, *_ in runs} == {""}
    # Processor time, and the best of three, because other programs slow this machine down.
    assert min(float(seconds) for seconds, *_ in runs) < 0.1


def test_the_wheel_contains_every_file_of_the_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {Path(pattern).suffix for pattern in setuptools["package-data"]["vlmkit"]} | {".py"}
    package = [path for path in committed() if path.parts[0] == "vlmkit"]
    assert [str(path) for path in package if path.suffix not in shipped] == []
    without_init = {
        path.parent
        for path in package
        if path.suffix == ".py" and not (ROOT / path.parent / "__init__.py").exists()
    }
    assert not without_init, "setuptools ignores folders without __init__.py"


# --- what is committed ---------------------------------------------------------------------------


def test_no_file_has_a_path_of_one_machine_or_the_address_of_a_registry():
    personal = re.compile(r"(?<![\w.$}~-])/(?:home|root|Users|work)/\w|[A-Z]:\\Users\\")
    registry = re.compile(r"(?:index-url|find-links|registry|resolved)[\" =:]+ *\"?https?://")
    here = f"{ROOT}/" if len(ROOT.parts) > 2 else None
    found = [
        f"{path}:{number}: {line.strip()[:80]}"
        for path, text in committed_texts()
        for number, line in enumerate(text.splitlines(), 1)
        if personal.search(line) or registry.search(line) or (here and here in line)
    ]
    assert found == []


def test_only_weights_are_large():
    large = [path for path in committed() if (ROOT / path).stat().st_size > 3_000_000]
    assert {path.suffix for path in large} <= {".safetensors"}
    assert all((ROOT / path).stat().st_size < 10_000_000 for path in large)


def test_licenses():
    assert PROJECT["license"] == "Apache-2.0"
    apache = (ROOT / "LICENSE").read_text()
    assert "Apache License" in apache and "END OF TERMS AND CONDITIONS" in apache
    text = (ROOT / "LICENSE-TEXT.md").read_text()
    assert all(f"Section {number} --" in text for number in range(1, 9))
    assert CITATION["license"] == ["Apache-2.0", "CC-BY-4.0"]


def test_makefile_runs_files_that_exist():
    files = re.findall(r"(?:\bsh|\$\(python\)) (\S+\.(?:sh|py))", MAKEFILE)
    assert set(files) >= {"scripts/set_up.sh", "benchmarks/pebble.py"}
    assert [name for name in files if not (ROOT / name).is_file()] == []


# --- the README ----------------------------------------------------------------------------------


def test_pages_name_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert targets >= {"help", "lab", "test", "test-all", "benchmark-pebble", "clean"}
    paths = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    pages = README + "".join(path.read_text(encoding="utf-8") for path in paths)
    named = set(re.findall(r"(?:^|`|\n)(?:\w+=\S+ )?make ([a-z-]+)", pages))
    assert named >= {"lab", "test"}
    assert named <= targets


def test_readme_links_every_chapter():
    chapters = {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert chapters
    assert {chapter for chapter in chapters if f"]({chapter})" not in README} == set()
