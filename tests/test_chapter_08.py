"""Chapter 08: its claims about easy-VQA, about pebble, and about the recorded runs are true. nbval
runs the chapter itself.

After a change of pebble's weights, `make benchmark-lora-on-vqa` records again. The tests that then
fail say which claims of the chapter are no longer true.
"""

import ast

import numpy as np
import pandas as pd
import pytest
import torch
from chapters import cell

import vlmkit as vk
from vlmkit.tasks import real

BENCHMARK = "lora_on_vqa.py"
VISION, PROJECTOR, LANGUAGE = "vision_encoder", "projector", "language_model"


@pytest.fixture(scope="module")
def components(recorded):
    """The recorded runs, by what was trained."""
    return recorded.assign(bits=recorded["bits"].astype(str)).set_index("trained")


@pytest.fixture(scope="module")
def tokenizer():
    _, processor = vk.load("pebble", "fp32")
    return processor.tokenizer


def right(row):
    """True or False for each question, from the bits that are recorded."""
    return np.array(list(f"{int(row['bits'], 16):0{row['n']}b}")) == "1"


def test_the_record_is_complete(benchmark, components):
    assert set(components.index) == {benchmark["label"](ranks) for ranks in benchmark["RUNS"]}
    assert len(set(components["steps"])) == len(set(components["n"])) == 1
    for _, row in components.iterrows():
        assert right(row).sum() == row["right"] <= row["n"]


def test_claims_about_the_data(states):
    """Its two halves ask the same questions about other pictures."""
    asked = {}
    for split in ("train", "test"):
        pictures, rows = real.read_easy_vqa(split)
        asked[split] = [pair for of_one in rows for pair in of_one]
        states(len(pictures))
    texts = [{question for question, _ in pairs} for pairs in asked.values()]
    assert texts[0] == texts[1]
    states(len(texts[0]), len(asked["test"]))
    yes = np.mean([answer == "yes" for _, answer in asked["test"]])
    no = np.mean([answer == "no" for _, answer in asked["test"]])
    assert 0.7 < yes + no < 0.78 and yes > 1 / 3


def test_claims_about_pebble_before(notebook):
    """It hardly ever says yes to a question in easy-VQA's words, and does in its own."""
    said = cell(notebook, 'print("answers that are').outputs[0]["text"].split()
    assert int(said[-3]) <= 5 and said[-1] == "500"
    lines = cell(notebook, "import re").outputs
    counts = [line.split()[-4::2] for line in lines[0]["text"].splitlines()]
    (theirs, n), (ours, same) = [list(map(int, pair)) for pair in counts]
    assert n == same and theirs < n / 10 and ours > 0.85 * n
    assert vk.evaluation.mcnemar(0, ours - theirs) < 0.001


def test_claims_about_the_head(notebook, tokenizer):
    """Tokens that were never an answer have one row, those that were have a row of their own."""
    shown = cell(notebook, "head = model.lm_head").source
    tokens = ast.literal_eval(shown.split("tokens = ")[1].split("\n")[0])
    model, _ = vk.load("pebble", "fp32", processor=False)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    rows = torch.nn.functional.normalize(model.lm_head.weight.detach()[ids])
    alike = rows @ rows.T
    assert (alike[3:, 3:] > 0.99).all() and (alike[:3, 3:] < 0.9).all()
    assert (alike[:3, :3] - torch.eye(3) < 0.9).all()
    pieces = {id for word in ("brown", "rectangle") for id in tokenizer.encode(f" {word}")}
    assert set(ids[3:]) <= pieces and not set(ids[3:]) & answered(tokenizer)
    assert set(ids[:3]) <= answered(tokenizer)


def answered(tokenizer):
    """The tokens of some of the answers in pebble's own training."""
    used = set()
    for task, recipe in vk.tasks.RECIPES.items():
        for kind in recipe.kinds:
            for index in range(60):
                rng = vk.tasks.generator("spoken", task, kind, index)
                used |= set(tokenizer.encode(f" {recipe.example(kind, rng)[2]}"))
    return used


def test_claims_about_components(benchmark, components):
    """The language model comes further than each other component, by more than chance. The others
    come no further than the output head alone."""
    language, vision, projector, head = [
        right(components.loc[benchmark["label"](ranks)]) for ranks in benchmark["RUNS"]
    ]
    for other in (vision, projector, head):
        assert language.sum() > other.sum() and vk.evaluation.paired(other, language).differ
    assert max(vision.sum(), projector.sum()) < head.sum()
    sizes = components["parameters"]
    ratio = sizes[f"{VISION} 37 + head 16"] / sizes[f"{LANGUAGE} 16 + head 16"]
    assert 0.95 < ratio < 1.05


@pytest.mark.slow
def test_the_benchmark_counts_answers_as_evaluate_does(benchmark, tmp_path, monkeypatch):
    """With few questions and steps. What the file has already is not trained again."""
    output, main = tmp_path / "new" / "trial.csv", benchmark["main"]
    monkeypatch.setitem(main.__globals__, "RUNS", ({PROJECTOR: "full", "head": 4},))
    options = ["--steps", "2", "--n", "12", "--output", str(output)]
    main(options)
    first = output.read_text()
    (row,) = pd.read_csv(output, dtype={"bits": str}).to_dict("records")
    assert row["n"] == 12 and right(row).sum() == row["right"]
    assert row["parameters"] == 61_824 + 4 * (192 + 576)
    monkeypatch.setitem(main.__globals__, "load", None)  # would fail if it were called
    main(options)
    assert output.read_text() == first
