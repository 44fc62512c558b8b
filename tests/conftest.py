"""Fixtures: tiny checkpoints, made once a session. Tests that change a folder copy it first."""

import functools
import gc
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Some tests press Ctrl-C. A shell ignores it in what runs in the background, as these tests may.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """A training collects garbage, which goes through all that was ever imported: half the time of
    a small one. What is there before a test module is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A tiny LLaVA with a SigLIP tower and an untied head, as pebble has."""
    import tiny

    return tiny.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def llava_clip(tmp_path_factory):
    """A tiny LLaVA with a CLIP tower and a head tied to the embeddings."""
    import tiny

    return tiny.llava(tmp_path_factory.mktemp("llava_clip"), tower="clip", tie=True)


@pytest.fixture(scope="session")
def other_family(tmp_path_factory):
    """A tiny Idefics3 with a complete processor."""
    import tiny

    return tiny.other_family(tmp_path_factory.mktemp("other_family"))


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory):
    """A tiny Qwen2-VL: projector inside the vision module, tied head, no processor."""
    import tiny

    return tiny.qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """family(name, **options) is a tiny checkpoint of a family of `families.py`, made once."""
    import families

    made = {}

    def make(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = families.FAMILIES[name](tmp_path_factory.mktemp(name), **options)
        return made[key]

    return make


@pytest.fixture
def one_thread():
    """Tensors of some thousand numbers are done before a second thread has started: on a busy
    machine, waiting for it makes a forward pass of a tiny model a hundred times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def copy(tmp_path):
    """copy(folder) is a copy of a checkpoint that a test may damage."""

    def make(folder):
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return make


# --- for tests/test_chapter_NN.py; a chapter with recorded results names their BENCHMARK ----------


@pytest.fixture
def notebook(request):
    """The committed chapter that a test module is about, by the number in the module's name."""
    import chapters

    number = request.module.__name__.removeprefix("test_chapter_")
    (path,) = chapters.FOLDER.glob(f"{number}_*.ipynb")
    return chapters.read(path.name)


@pytest.fixture
def states(notebook):
    """states(*values) fails if the chapter's text lacks one of these numbers."""
    import chapters

    return functools.partial(chapters.states, chapters.text(notebook))


@pytest.fixture(scope="module")
def benchmark(request):
    """{name: object} of the script that records the chapter's results."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))  # as where the script is run
        return runpy.run_path(str(folder / request.module.BENCHMARK))


@pytest.fixture(scope="module")
def recorded(benchmark):
    """The table of recorded results, which has to be of the pebble that is committed.

    Fails after pebble's weights changed: run the benchmark again to record new results.
    """
    import pandas as pd

    table = pd.read_csv(benchmark["OUTPUT"])
    assert set(table["weights"]) == {benchmark["digest"]()}
    return table
