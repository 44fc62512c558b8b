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
    """The better of the recorded runs with new rows alone, by what was trained."""
    alone = recorded[recorded["old"] == 0].sort_values("right")
    return alone.drop_duplicates("trained", keep="last").set_index("trained")


@pytest.fixture(scope="module")
def tokenizer():
    _, processor = vk.load("pebble", "fp32")
    return processor.tokenizer


def right(row):
    """True or False for each question, from the bits that are recorded."""
    return np.array(list(f"{int(row['bits'], 16):0{row['n']}b}")) == "1"


def test_the_record_is_complete(benchmark, recorded):
    runs = {
        (benchmark["label"](ranks), ranks.get("old", 0), rate)
        for ranks in benchmark["RUNS"]
        for rate in benchmark["RATES"]
    }
    usual = recorded[(recorded["steps"] == benchmark["STEPS"]) & (recorded["batch"] == 32)]
    assert {tuple(row) for row in usual[["trained", "old", "rate"]].to_numpy()} == runs
    assert len(recorded) == len(usual) + 4 and set(recorded["n"]) == {9673}
    assert set(recorded["weights"]) == {benchmark["digest"]()}
    for _, row in recorded.iterrows():
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


def test_claims_about_components(components):
    """The language model had to learn, with more rank the better. What has no adapter there gets to
    about half. Vision encoder and projector add a little to the head alone."""
    share = components["right"] / components["n"]
    ranks = [share[f"{LANGUAGE} {r}"] for r in (2, 8, 32, 128)]
    assert ranks == sorted(ranks)
    others = [name for name in components.index if LANGUAGE not in name]
    assert len(others) == 5 and share[others].max() < 0.51 < ranks[0]
    sizes = components["parameters"]
    assert 29 < sizes[f"{VISION} 148 + head 16"] / sizes[f"{LANGUAGE} 2"] < 31
    both = f"{PROJECTOR} full + {LANGUAGE} 128"
    chains = [("head 16", other) for other in others if other != "head 16"]
    chains += [(f"{VISION} 148 + head 16", f"{LANGUAGE} 2"), (f"{LANGUAGE} 128", both)]
    chains += [(f"{LANGUAGE} 32", f"{PROJECTOR} full + {LANGUAGE} 32")]
    for worse, better in chains:
        pair = [right(components.loc[name]) for name in (worse, better)]
        assert pair[0].sum() < pair[1].sum() and vk.evaluation.paired(*pair).differ, (worse, better)
    gains = [share[both] - ranks[3], share[f"{PROJECTOR} full + head 16"] - share["head 16"]]
    assert gains[0] < gains[1] < 0.07
    low, _ = vk.evaluation.wilson(int(components["right"][both]), 9673)
    assert low > 0.95


def test_the_trainings_on_a_cpu(recorded):
    """The same call comes to less than on a GPU. A thousand smaller steps cost less and come to
    more, most of all with a smaller rate for the projector and rates that fall in a straight line.
    A higher rate and fewer steps come to far less."""
    on_cpu = recorded[recorded["device"] == "cpu"].to_dict("records")
    same, smaller, higher, small, best = on_cpu
    on_gpu = recorded[(recorded["device"] == "cuda") & (recorded["old"] == 0)]
    on_gpu = on_gpu[(on_gpu["trained"] == same["trained"]) & (on_gpu["rate"] == same["rate"])]
    assert {row["n"] for row in on_cpu} == {9673} and same["right"] < on_gpu["right"].item()
    for row in (smaller, small, best):
        assert row["steps"] == 1000 and row["batch"] <= same["batch"] / 2
        assert row["seconds"] < same["seconds"] and row["right"] > same["right"]
    assert small["batch"] < best["batch"] == smaller["batch"] == higher["batch"]
    assert best["schedule"] == "linear" and best["projector_rate"] < best["rate"]
    assert best["right"] == max(row["right"] for row in on_cpu)
    assert vk.evaluation.wilson(best["right"], 9673)[0] > 0.95 and best["seconds"] < 300
    assert higher["steps"] < smaller["steps"] and higher["rate"] > smaller["rate"]
    assert higher["right"] < same["right"] - 0.05 * 9673


def test_claims_about_forgetting(recorded):
    """New rows alone cost most old answers; one old row in four keeps most, for some new ones."""
    recorded = recorded[recorded["device"] == "cuda"]
    share = recorded.assign(old_share=recorded["old_right"] / recorded["old_n"])
    both = share[share["trained"] == f"{PROJECTOR} full + {LANGUAGE} 128"]
    for _, rate in both.groupby("rate"):
        (alone,), (mixed,) = (some.to_dict("records") for _, some in rate.groupby("old"))
        assert alone["old_share"] < 0.2 and mixed["old_share"] > 0.9
        assert mixed["right"] < alone["right"]
        assert vk.evaluation.paired(right(mixed), right(alone)).differ
    low_rank = share[share["trained"] == f"{LANGUAGE} 2"]
    assert low_rank["old_share"].between(0.45, 0.55).all()


def test_claims_about_the_short_training(notebook):
    """Most answers are right after it, of each kind far more than before or by a coin."""
    counts = [
        list(map(int, line.split("right")[0].replace("of", " ").split()[1:]))
        for line in cell(notebook, "kinds = after").outputs[0]["text"].splitlines()
    ]
    for hits, n in counts:
        assert vk.evaluation.wilson(hits, n)[0] > 0.5
    assert sum(n for _, n in counts) == 500 and sum(hits for hits, _ in counts) > 0.7 * 500


@pytest.mark.slow
def test_the_benchmark_counts_answers_as_evaluate_does(benchmark, tmp_path, monkeypatch):
    """With few questions and steps. What the file has already is not trained again."""
    output, main = tmp_path / "new" / "trial.csv", benchmark["main"]
    monkeypatch.setitem(main.__globals__, "RUNS", ({PROJECTOR: "full", "head": 4},))
    options = ["--steps", "2", "--n", "12", "--rate", "1e-3", "--output", str(output)]
    options += ["--device", "cpu"]
    main(options)
    first = output.read_text()
    (row,) = pd.read_csv(output, dtype={"bits": str}).to_dict("records")
    assert row["n"] == 12 and right(row).sum() == row["right"]
    assert row["parameters"] == 61_824 + 4 * (192 + 576) and row["old_n"] == 500
    monkeypatch.setitem(main.__globals__, "load", None)  # would fail if it were called
    main(options)
    assert output.read_text() == first
