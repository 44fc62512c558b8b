"""Fixtures: tiny checkpoints, made once a session. Tests that change a folder copy it first."""

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


@pytest.fixture
def copy(tmp_path):
    """copy(folder) is a copy of a checkpoint that a test may damage."""

    def make(folder):
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return make
