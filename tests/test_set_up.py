"""scripts/set_up.sh: quick when there is nothing to do, and sound after whatever went wrong before.

A stand-in for Python records what it is asked to do, so that nothing is really installed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the script is for POSIX shells")

PYTHON = """#!/bin/sh
case "$1 $2" in
"-c import sys; print"*) echo "${FAKE_VERSION:-3.12}" ;;
"-c import sys; sys.exit"*) [ -z "$FAKE_VERSION" ] ;;
"-c import ensurepip"*) [ -z "$FAKE_WITHOUT_VENV" ] ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m vlmkit") echo "$3 $4" >>fetch.log && [ -z "$FAKE_OFFLINE" ] ;;
"-m pip") shift 2 && echo "pip $*" >>pip.log && [ -z "$FAKE_FAILURE" ] ;;
esac
"""


class Checkout:
    """A folder with the script, the files it reads, and the stand-in for Python."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "scripts").mkdir(parents=True)
        for name in ("scripts/set_up.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        self.python = folder / "fake-python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def set_up(self, **environment):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), **environment}
        return subprocess.run(
            ["sh", "scripts/set_up.sh"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    @property
    def installations(self):
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a folder")


def test_installs_the_package_under_the_constraints_and_then_no_more(checkout):
    assert checkout.set_up().returncode == 0
    assert checkout.set_up().stdout == ""
    assert checkout.installations == [
        "pip install --no-compile --constraint constraints.txt --editable .[course,dev,site]"
    ]


def test_cobble_is_fetched_once_and_the_course_runs_without_it(checkout):
    outcome = checkout.set_up(FAKE_OFFLINE="yes")
    assert outcome.returncode == 0
    assert outcome.stdout.endswith("To try again: .venv/bin/vlmkit fetch cobble\n")
    assert checkout.set_up().stdout == ""
    assert (checkout.folder / "fetch.log").read_text() == "fetch cobble\n"


def test_new_weights_of_cobble_are_put_together(checkout):
    checkout.set_up()
    weights = checkout.folder / "vlmkit" / "models" / "cobble" / "weights"
    weights.mkdir(parents=True)
    (weights / "vision_encoder.safetensors").write_text("new")
    checkout.set_up()
    assert (checkout.folder / "fetch.log").read_text() == "fetch cobble\n" * 2


def test_changed_requirements_are_installed_into_the_same_environment(checkout):
    checkout.set_up()
    mine = checkout.folder / ".venv" / "mine"
    mine.touch()
    with (checkout.folder / "constraints.txt").open("a") as constraints:
        constraints.write("torchvision==0.28.0\n")
    checkout.set_up()
    assert mine.exists()
    assert len(checkout.installations) == 2


def test_failed_installation_is_not_built_upon(checkout):
    assert checkout.set_up(FAKE_FAILURE="yes").returncode != 0
    half_unpacked = checkout.folder / ".venv" / "half-unpacked"
    half_unpacked.touch()
    again = checkout.set_up()
    assert again.returncode == 0 and "did not finish" in again.stdout
    assert not half_unpacked.exists()
    assert checkout.set_up().stdout == ""


def test_moved_folder_gets_a_new_environment(checkout, tmp_path):
    checkout.set_up()
    (checkout.folder / ".venv" / "old").touch()
    checkout.folder = checkout.folder.rename(tmp_path / "elsewhere")
    checkout.python = checkout.folder / "fake-python"
    assert "another folder" in checkout.set_up().stdout
    assert not (checkout.folder / ".venv" / "old").exists()
    assert len(checkout.installations) == 2


def test_environment_whose_python_is_gone_is_made_again(checkout):
    checkout.set_up()
    (checkout.folder / ".venv" / "bin" / "python").unlink()
    assert checkout.set_up().returncode == 0
    assert len(checkout.installations) == 2


def test_environment_that_someone_else_made_is_kept(checkout):
    mine = checkout.folder / ".venv" / "mine"
    mine.parent.mkdir()
    mine.touch()
    assert checkout.set_up().returncode == 0
    assert mine.exists()


def test_another_index_for_torch(checkout):
    checkout.set_up(TORCH_INDEX="file:///a/disk")
    assert "--extra-index-url file:///a/disk " in checkout.installations[0]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAKE_VERSION": "3.9"}, "fake-python is Python 3.9"),
        ({"FAKE_WITHOUT_VENV": "yes"}, "lacks the venv module"),
        ({"PYTHON": "no-such-python"}, "under the name no-such-python"),
    ],
)
def test_without_a_python_that_will_do(checkout, environment, message):
    outcome = checkout.set_up(**environment)
    assert outcome.returncode == 1
    assert "needs Python 3.11 or newer" in outcome.stderr
    assert message in outcome.stderr
    assert not (checkout.folder / ".venv").exists()
