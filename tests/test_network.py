"""No network is needed, and only the working folder and one cache folder are written to.

tests/data/offline keeps a Python, and everything that it starts, off the network. The variables
that tell Hugging Face's libraries to stay offline are not set, because the question here is whether
they would have called anybody.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "data" / "offline"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="it sets POSIX variables")

JOBS = """
import vlmkit as vk
from vlmkit import cli

assert cli.main([]) == 0
assert cli.main(["doctor", "--quick"]) == 0
assert cli.main(["memory", "Qwen/Qwen2.5-VL-7B-Instruct"]) == 0

model, processor = vk.load("pebble", plan="bf16")
model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=4))
rows = vk.tasks.dataset("vqa", n=4, seed=1)
vk.finetuning.train(model, processor, rows, "runs/first", max_steps=1)
vk.finetuning.save(model, "my-adapters")

import matplotlib

matplotlib.use("agg")
table = vk.fit(["HuggingFaceTB/SmolVLM-256M-Instruct"], gpus=["8 GB"], tokens=0, images=0)
vk.figures.what_fits(table).figure.savefig("fits.png")
"""


class Machine:
    """An empty home, an empty folder for temporary files, and one to work in."""

    def __init__(self, folder):
        self.home, self.temporary, self.work = (folder / n for n in ("home", "temporary", "work"))
        for path in (self.home, self.temporary, self.work):
            path.mkdir()
        self.log = folder / "calls.log"

    def run(self, *words):
        """Run Python with `words`, off the network."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(OFFLINE),
            "OFFLINE_LOG": str(self.log),
            "OMP_WAIT_POLICY": "passive",
        }
        return subprocess.run(
            [sys.executable, *words], cwd=self.work, env=environment, capture_output=True, text=True
        )

    @property
    def calls(self):
        """Which addresses were called, and by which code."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def written(self, folder):
        """The top folders of `folder` that hold files, for .local those one level below."""
        files = [path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()]
        return {"/".join(parts[: 2 if parts[0] == ".local" else 1]) for parts in files}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "import socket; socket.getaddrinfo('example.org', 443)",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))",
        "import httpx; httpx.get('https://192.0.2.1', timeout=1)",
    ],
)
def test_a_call_is_stopped_and_noted(machine, code):
    assert machine.run("-c", code).returncode != 0
    assert machine.calls


def test_this_machine_can_be_called(machine):
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); "
    code += "socket.create_connection(('localhost', s.getsockname()[1]))"
    done = machine.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert machine.calls == ""


def test_everyday_jobs_call_nobody_and_write_only_here(machine):
    """An answer, the doctor, a prediction, a training, a figure (which lists fonts in .cache)."""
    done = machine.run("-c", JOBS)
    assert done.returncode == 0, done.stderr
    assert machine.calls == ""
    assert machine.written(machine.work) == {"runs", "my-adapters", "fits.png"}
    assert machine.written(machine.home) == {".cache"}
    assert machine.written(machine.temporary) == set()


@pytest.mark.slow
def test_a_chapter_calls_nobody_and_writes_only_where_jupyter_does(machine):
    shutil.copy(ROOT / "notebooks" / "00_start_here.ipynb", machine.work)
    command = ("-m", "nbconvert", "--to", "notebook", "--execute", "--output", "ran")
    done = machine.run(*command, "00_start_here.ipynb")
    assert done.returncode == 0, done.stderr
    assert machine.calls == ""
    assert machine.written(machine.work) == {"00_start_here.ipynb", "ran.ipynb"}
    # IPython's history and Jupyter's notes on running kernels, as docs/running.md says.
    assert machine.written(machine.home) <= {".cache", ".ipython", ".local/share"}
    assert machine.written(machine.temporary) == set()
