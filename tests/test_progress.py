"""The bar that a long load shows: bytes, once, and only to somebody who may be looking."""

import builtins
import re
import sys

import pytest
from transformers.utils import logging

import vlmkit as vk
from vlmkit.anatomy import on_meta
from vlmkit.checkpoints import read_config
from vlmkit.loading import progress


@pytest.fixture
def at_once(monkeypatch):
    """A bar for every load, however quick."""
    monkeypatch.setattr(progress, "DELAY", 0)


@pytest.mark.parametrize("plan", ["bf16", "recommended", "vision_encoder=int8,language_model=nf4"])
def test_bytes_are_counted_to_the_last(llava, plan, at_once, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model, _ = vk.load(llava, plan, processor=False)
    shown = capfd.readouterr().err
    total = vk.audit(model, plan).total
    assert f"loading {llava}: 100%" in shown and "Loading weights" not in shown
    last = re.findall(r"([\d.]+)k/([\d.]+)k ", shown)[-1]
    assert last[0] == last[1] and float(last[0]) == pytest.approx(total / 1000, rel=0.01)


def test_somebody_may_be_looking_in_a_terminal_or_a_notebook(llava, at_once, monkeypatch, capfd):
    vk.load(llava, processor=False)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    vk.load(llava, processor=False)
    assert "100%" in capfd.readouterr().err


def test_nothing_is_shown_of_a_quick_load(llava, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    vk.load(llava, processor=False)
    assert "loading" not in capfd.readouterr().err


def test_the_hook_that_was_there_is_put_back(llava):
    layout = vk.Plan().resolve(on_meta(read_config(llava)))

    def hook(factory, args, kwargs):
        return factory(*args, **kwargs)

    before = logging.set_tqdm_hook(hook)
    try:
        with pytest.raises(RuntimeError), progress.show_progress(layout, "x", shown=True):
            raise RuntimeError
        assert logging.set_tqdm_hook(before) is hook
    finally:
        logging.set_tqdm_hook(before)
