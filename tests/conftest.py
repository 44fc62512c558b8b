"""Fixtures: tiny checkpoints, made once a session. Tests that change a folder copy it first."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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


# --- of a chapter's tests, which have a fixture `notebook` and the path of a BENCHMARK ------------


@pytest.fixture
def said(notebook):
    """The chapter's text, in one line."""
    import chapters

    return " ".join(chapters.text(notebook).split())


@pytest.fixture(scope="module")
def benchmark(request):
    """{name: object} of the script that records the chapter's results."""
    return runpy.run_path(str(request.module.BENCHMARK))
