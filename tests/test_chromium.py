"""scripts/chromium.py: which browser the test in a browser takes, and what it says without one."""

import os
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "chromium.py"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="makes programs as POSIX has them")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script, on a machine that has nothing on PATH and nothing of playwright's."""
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = runpy.run_path(str(SCRIPT))
    found["find"].__globals__["of_playwright"] = lambda: None
    return found


@pytest.fixture
def program(tmp_path):
    def make(name):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    return make


def test_the_one_on_path_is_found_and_chromium_comes_first(script, program):
    chrome = program("google-chrome")
    assert script["find"]() == chrome
    chromium = program("chromium")
    assert script["find"]() == chromium


def test_the_one_that_is_named_comes_before_all(script, program, monkeypatch, tmp_path):
    program("chromium")
    monkeypatch.setenv("CHROMIUM", program("mine"))
    assert script["find"]() == str(tmp_path / "bin" / "mine")
    monkeypatch.setenv("CHROMIUM", "not-there")
    assert script["find"]() is None, "what is named and missing is not replaced by another"


def test_playwrights_own_comes_last(script, program):
    script["find"].__globals__["of_playwright"] = lambda: "playwright's"
    assert script["find"]() == "playwright's"
    chromium = program("chromium")
    assert script["find"]() == chromium


def test_without_any_it_says_what_to_install(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["chromium.py"])
    with pytest.raises(SystemExit, match="apt install chromium.*playwright install chromium"):
        script["main"]()
