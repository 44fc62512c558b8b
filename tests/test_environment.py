"""vlmkit/environment/: what is missing is said in words, and nothing that is missing stops it."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from vlmkit import environment
from vlmkit.environment import FINE, MISSING, NOTE, OLDEST, TESTED, check

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def versions(monkeypatch):
    """A dict in which a test sets what version of a package is found; None is none."""
    import torch  # noqa: F401  (which asks for versions as well when it is first imported)

    pretended = dict(TESTED)

    def version(name):
        if pretended[name] is None:
            raise metadata.PackageNotFoundError(name)
        return pretended[name]

    monkeypatch.setattr(environment.metadata, "version", version)
    return pretended


def row(what):
    return next(row for row in check().rows if row.what == what)


def test_knows_the_packages_of_pyproject_and_the_versions_of_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(TESTED) == {Requirement(line).name for line in project["dependencies"]}
    bounds = {r.name: str(r.specifier) for r in map(Requirement, project["dependencies"])}
    assert bounds == {name: f">={version}" for name, version in OLDEST.items()}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {f"{name}=={version}" for name, version in TESTED.items()} <= set(pins)


def test_the_page_on_running_says_the_same_of_versions():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert {row[0] for row in rows} == {"transformers", "peft", "bitsandbytes", "torch"}
    for name, oldest, tested, newest in rows:
        assert Version(oldest) == Version(OLDEST[name])
        assert tested == TESTED[name]
        assert Version(oldest) <= Version(tested) <= Version(newest)


def test_tested_versions_are_fine_whatever_the_build(versions):
    versions["torch"] += "+cpu"
    assert check().ready
    assert {row(name).state for name in TESTED} == {FINE}
    assert "Everything" in check().summary


def test_the_oldest_that_was_tried_is_not_missing(versions):
    versions.update(OLDEST)
    assert check().ready


@pytest.mark.parametrize("found", [None, "4.57.1"])
def test_what_is_missing_or_too_old_is_named_with_the_remedy(versions, found):
    versions["transformers"] = found
    found = check()
    assert found.missing == ["transformers"] and not found.ready
    for text in (found.summary, str(found), found._repr_html_()):
        assert "transformers" in text and "make setup" in text
    assert "Everything" not in str(found)


def test_other_versions_are_noted_and_stop_nothing(versions):
    versions["datasets"] = "6.0.1.dev3"
    assert row("datasets").state == NOTE
    assert check().ready and "datasets" in check().summary


def test_little_memory_is_a_note(monkeypatch):
    import psutil

    few = psutil.virtual_memory()._replace(available=10**8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    assert row("free memory").state == NOTE and "little" in row("free memory").verdict


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # any import of it fails
    assert row("processor").state == MISSING
    assert "PyTorch cannot be used" in str(check())


def test_works_where_nothing_but_python_is_installed():
    # -S leaves out site-packages, as another Python under the same notebook would.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vlmkit.environment as e; "
    code += "c = e.check(); assert c.missing[0] == 'torch', c.missing; print(c)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert "missing" in done.stdout


def test_html_escapes_what_it_shows(monkeypatch):
    monkeypatch.setattr(sys, "executable", "<python>")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "<python>" not in check()._repr_html_()
