"""Chapter 03. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import chapters
import pandas as pd
import pytest
import torch
from chapters import cell

import vlmkit as vk


@pytest.fixture
def scope(notebook):
    """The reader's variables after the section that builds NF4 by hand."""
    scope = {"torch": torch, "vk": vk, "pd": pd}
    for start in ("offset = ", "pebble, _ = "):
        exec(cell(notebook, start).source, scope)
    return scope


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """With fewer questions, and with a smaller file in the timing of loads."""
    chapters.replace(notebook, ("n=300", "n=6"), ('"hidden_size": 1152', '"hidden_size": 384'))
    assert "model.connector" in chapters.run(notebook, other_family, monkeypatch)


def test_claims_about_nf4(scope, states):
    offset = 1 - (1 / 32 + 1 / 30) / 2
    steps = (torch.linspace(offset, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8))
    up, down = (torch.special.ndtri(step) for step in steps)
    levels = torch.cat([up, -down, torch.zeros(1)]).sort().values
    levels = (levels / levels.max()).float()
    assert scope["offset"] == round(offset, 7)
    states((levels != scope["levels"]).sum().item())
    assert 0.5e-7 < (levels - scope["levels"]).abs().max() < 5e-7
    used = scope["used"]
    times = used.max() / used.iloc[[0, -1]].mean()
    states(f"{times:.0f}")


def test_double_quantization_equals_bitsandbytes_on_other_numbers_too(notebook, scope):
    scope["absmax"] = torch.rand(2**14, generator=torch.manual_seed(1)) ** 4
    code = cell(notebook, "values = ").source
    exec(code.rpartition("\n")[0], scope)  # all but the last comparison
