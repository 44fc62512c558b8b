"""scripts/chromium.py: which browser the tests use, and what it says if there is none."""

import os
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "chromium.py"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="makes POSIX programs")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script on a machine without any browser."""
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


def test_it_finds_a_browser_on_path_and_prefers_chromium(script, program):
    chrome = program("google-chrome")
    assert script["find"]() == chrome
    chromium = program("chromium")
    assert script["find"]() == chromium


def test_the_variable_comes_first(script, program, monkeypatch, tmp_path):
    program("chromium")
    monkeypatch.setenv("CHROMIUM", program("mine"))
    assert script["find"]() == str(tmp_path / "bin" / "mine")
    monkeypatch.setenv("CHROMIUM", "not-there")
    assert script["find"]() is None, "another one must not replace what was asked for"


def test_playwrights_own_browser_comes_last(script, program):
    script["find"].__globals__["of_playwright"] = lambda: "playwright's"
    assert script["find"]() == "playwright's"
    chromium = program("chromium")
    assert script["find"]() == chromium


def test_without_a_browser_it_says_what_to_install(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["chromium.py"])
    with pytest.raises(SystemExit, match="apt install chromium.*playwright install chromium"):
        script["main"]()
