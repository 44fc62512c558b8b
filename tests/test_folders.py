"""Folders that are replaced: whenever a process is killed, the name has a whole folder."""

import random
import signal
import subprocess
import sys
import time

import pytest

import vlmkit as vk
from vlmkit.checkpoints import find
from vlmkit.errors import CheckpointError
from vlmkit.folders import recover, whole_folder

REPLACE = """
import sys
from vlmkit import folders
if sys.argv[2] == "two renames":
    folders._exchange = lambda a, b: False
print("ready", flush=True)
for i in range(10**6):
    with folders.whole_folder(sys.argv[1], overwrite=True) as folder:
        for name in "ab":
            (folder / name).write_text(str(i))
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_at_any_moment_the_folder_is_there_and_whole(tmp_path, way):
    path, dice = tmp_path / "model", random.Random(0)
    path.mkdir()
    for name in "ab":
        (path / name).write_text("0")
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", REPLACE, path, way], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(dice.uniform(0.002, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if way == "exchange" and sys.platform == "linux":
            assert path.is_dir()
        recover(path)
        assert (path / "a").read_text() == (path / "b").read_text()


def test_a_model_whose_name_was_lost_loads_and_saves(llava, copy, tmp_path):
    folder = copy(llava)
    lost = folder.with_name(f".{folder.name}.0123456789abcdef.old")
    folder.rename(lost)
    assert find(folder).is_dir() and not lost.exists()
    folder.rename(lost)
    model, processor = vk.load(llava, "bf16")
    with pytest.raises(CheckpointError, match="not empty"):  # it is there again
        vk.save(model, processor, folder)
    vk.save(model, processor, folder, overwrite=True)
    vk.audit(vk.load(folder, "bf16")[0], "bf16")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".copy")]


@pytest.mark.parametrize("path", [None, 5, b"x", "a\0b", "x" * 5000, "~nobody-of-this-name/x"])
def test_a_name_that_no_folder_can_have(path):
    with pytest.raises(CheckpointError), whole_folder(path):
        pass
