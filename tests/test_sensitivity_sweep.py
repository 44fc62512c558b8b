"""Sweeps: the numbers are those of the plain way; the result file; several processes."""

import json
import subprocess
import sys
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch

import vlmkit as vk
from vlmkit.errors import PlanError, SensitivityError, TaskError
from vlmkit.evaluation import room_for_answers
from vlmkit.sensitivity import Baseline, by_kind, quantized, random_weights, select, sweep
from vlmkit.sensitivity.baseline import could_become
from vlmkit.sensitivity.teacher_forcing import (
    VisualFeatures,
    logits_by_steps,
    logits_of_answers,
    rows_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SCOPES = ["vision_encoder", "projector", "language_model", "language_model:4", "attention"]


@pytest.fixture(scope="module")
def pebble():
    return vk.load("pebble", "bf16")


@pytest.fixture(scope="module")
def questions():
    return vk.tasks.dataset("all", n=48, seed=7)


@pytest.fixture(scope="module")
def table(pebble, questions):
    return sweep(*pebble, questions, ["int2", "int3-row"], SCOPES, progress=False)


def same(one, other):
    return one.to_json() == other.to_json()


# --- the numbers ----------------------------------------------------------------------------------


def test_a_cell_is_what_the_plain_way_gives(pebble, questions, table):
    """The checkpoint loaded again, quantized for good, and evaluated."""
    before = vk.evaluate(*pebble, questions).answers["correct"]
    for row in table[table["format"] == "int2"].itertuples():
        model, processor = vk.load("pebble", "bf16")
        quantized(model, row.scope, row.format).__enter__()
        scores = vk.evaluate(model, processor, questions)
        after = scores.answers["correct"]
        assert row.accuracy == scores.accuracy and row.n == 48
        assert (row.regressions, row.fixes) == ((before & ~after).sum(), (~before & after).sum())
        assert row.difference == pytest.approx(after.mean() - before.mean())
        assert row.low <= row.difference <= row.high and 0 <= row.p <= 1
        for kind in row.kinds:
            rows = scores.answers.query("task == @kind['task'] and kind == @kind['kind']")
            assert (kind["accuracy"], kind["n"]) == (rows["correct"].mean(), len(rows))


def test_divergence_is_that_of_the_decoded_answers(pebble, questions, table):
    """Against generating with the unquantized model's tokens, one at a time."""
    model, processor = pebble
    room = room_for_answers(processor, questions)
    base = Baseline(model, processor, questions, batch_size=64, max_new_tokens=room)
    row = table.iloc[0]
    with quantized(model, row.scope, row.format):
        kl = np.zeros(len(questions))
        for batch in base.batches:
            logits = logits_by_steps(model, processor, batch.inputs, batch.tokens)
            for place, number in enumerate(batch.rows):
                own = batch.own[place]
                start = int(batch.own[:place].sum())
                p = batch.logits[start : start + int(own.sum())].float().softmax(-1)
                q = logits[place][own].softmax(-1)
                kl[number] = float((p * (p.log() - q.log())).sum(-1).mean())
    assert row.kl == pytest.approx(kl.mean(), rel=0.01) and row.kl > 0
    with quantized(model, "projector", "int8"):
        fine = base.compare()
        alone = base.compare(answers=False)
    assert fine.kl.mean() < 0.01 * row.kl
    assert (alone.kl == fine.kl).all() and alone.correct is None and alone.asked == 0


def test_two_threads_give_the_same_numbers(pebble, questions, table):
    torch.set_num_threads(2)
    again = sweep(*pebble, questions, ["int2", "int3-row"], SCOPES[1:3], progress=False)
    rows = table[table["scope"].isin(SCOPES[1:3])].reset_index(drop=True)
    assert same(again, rows)


def test_an_unchanged_model_loses_nothing(pebble, questions):
    model, processor = pebble
    base = Baseline(model, processor, questions, batch_size=16, max_new_tokens=20)
    outcome = base.compare()
    assert (outcome.correct == base.scores.answers["correct"]).all()
    assert outcome.kl.max() == 0 and outcome.asked < 12
    assert base.one_pass and 0 <= base.noise < 1
    expected = vk.evaluate(model, processor, questions, batch_size=16, max_new_tokens=20)
    assert (base.scores.answers["predicted"] == expected.answers["predicted"]).all()


@pytest.mark.parametrize("fixture", ["other_family", "llava_clip"])
def test_a_cell_of_another_family(fixture, request):
    """Random weights, whose own answers count as the right ones, with padding in the batch."""
    model, processor = vk.load(str(request.getfixturevalue(fixture)), "bf16")
    rows = list(vk.tasks.dataset("vqa", n=8, seed=1))
    asked = vk.evaluate(model, processor, rows, max_new_tokens=4)
    rows = [
        dict(row, answer=answer)
        for row, answer in zip(rows, asked.answers["predicted"], strict=True)
    ]
    scopes = ["vision_encoder", "projector", "language_model", "language_model:1"]
    table = sweep(
        model, processor, rows, ["int2", "int4"], scopes, max_new_tokens=4, progress=False
    )
    for row in table.itertuples():
        with quantized(model, row.scope, row.format):
            scores = vk.evaluate(model, processor, rows, max_new_tokens=4)
        assert row.accuracy == scores.accuracy and row.kl > 0
        assert row.fixes == 0 and row.regressions == 8 - scores.answers["correct"].sum()
    if fixture == "other_family":  # the other one always says the same word
        assert table["regressions"].sum() > 0


def test_activations_are_asked_as_evaluate_asks(pebble, questions):
    some = questions.select(range(24))
    formats = ["int4-act-token", "int6-act-tensor"]
    table = sweep(*pebble, some, formats, ["vision_encoder"], progress=False)
    for row in table.itertuples():
        with quantized(pebble[0], row.scope, row.format):
            assert row.accuracy == vk.evaluate(*pebble, some).accuracy
        assert row.bytes_saved == 0 and row.bits == 16 and row.kl > 0


def test_the_model_comes_back_as_it_was(pebble, questions):
    model, _ = pebble
    before = families.state(model)
    training = model.training
    with pytest.raises(KeyboardInterrupt):
        sweep(*pebble, questions, ["int2"], ["projector"], progress=Interrupting())
    assert not families.differing(before, families.state(model))
    assert model.training == training
    assert not any("get_image_features" in vars(module) for module in model.modules())


class Interrupting:
    """Stands for a progress bar that is asked whether to show itself: by then, all is under way."""

    def __bool__(self):
        raise KeyboardInterrupt


def test_kinds_add_up(table):
    long = by_kind(table)
    for row in table.itertuples():
        part = long[(long["scope"] == row.scope) & (long["format"] == row.format)]
        assert part["n"].sum() == row.n and part["regressions"].sum() == row.regressions
        assert (part["kl"] * part["n"]).sum() / row.n == pytest.approx(row.kl)
    assert {"task", "kind", "low", "high"} <= set(long.columns)


def test_several_data_seeds_make_one_more_column(pebble, tmp_path):
    seeds = {seed: vk.tasks.dataset("vqa", n=12, seed=seed) for seed in (1, 2)}
    path = tmp_path / "cells.jsonl"
    table = sweep(*pebble, seeds, ["int2"], ["projector"], path=path, progress=False)
    assert list(table["data"]) == [1, 2]
    assert {file.name for file in tmp_path.iterdir()} == {"cells-1.jsonl", "cells-2.jsonl"}


def test_random_weights_and_lists_are_scopes_of_a_sweep(pebble, questions):
    some = questions.select(range(12))
    scopes = [random_weights(like="projector", of="language_model"), ["projector", "lm_head"]]
    table = sweep(*pebble, some, ["int3"], scopes, progress=False)
    assert list(table["scope"]) == [
        "language_model, as many as projector, seed 0",
        "projector + lm_head",
    ]
    assert table["parameters"].iloc[0] < table["parameters"].iloc[1]


# --- one pass, and what is computed once ----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["llava", "mllama", "qwen2_vl", "qwen2_5_vl", "idefics3", "gemma3", "paligemma"]
)
def test_one_pass_gives_the_logits_of_decoding(family, name):
    """In fp32, where the two differ in rounding alone. A family whose answers see what follows
    them has to be told from the others."""
    if name not in families.FAMILIES:
        pytest.skip(f"there is no tiny {name}")
    model = vk.load(str(family(name, dtype=torch.float32)), "fp32", processor=False)[0]
    inputs = as_float(families.inputs(model))
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    answers = torch.tensor([[20, 33, 47, 11]])
    steps = logits_by_steps(model, processor, inputs, answers)
    one = logits_of_answers(model, inputs, answers)
    assert one.shape == steps.shape
    error = float((one - steps).abs().max() / steps.abs().max())
    assert error < 1e-4 or name == "paligemma" and error > 1e-3


def as_float(inputs):
    return {
        key: value.float() if value.is_floating_point() else value for key, value in inputs.items()
    }


@pytest.mark.parametrize("name", families.FAMILIES)
def test_visual_features_that_are_used_again_change_nothing(family, name):
    """In every family: the logits with kept features are those of a plain pass, to the bit."""
    model = vk.load(str(family(name)), "bf16", processor=False)[0]
    inputs, answers = families.inputs(model), torch.tensor([[20, 33, 47]])
    features = VisualFeatures(model)
    with features.used(keep=True):
        plain = logits_of_answers(model, inputs, answers)
    scopes = ["language_model"] + ["cross_attention"] * (name == "mllama")
    for scope in scopes:
        with quantized(model, scope, "int2"):
            expected = logits_of_answers(model, inputs, answers)
            assert not torch.equal(expected, plain)
            with features.used():
                for _ in range(2):
                    assert torch.equal(logits_of_answers(model, inputs, answers), expected)
    assert torch.equal(logits_of_answers(model, inputs, answers), plain)
    assert bool(features.kept) == (name != "mllama")  # which has no method for its features
    assert not any("get_image_features" in vars(module) for module in model.modules())


def test_the_vision_encoder_runs_only_if_it_must(pebble, questions):
    model, processor = pebble
    base = Baseline(model, processor, questions, batch_size=64, max_new_tokens=4)
    seen = []
    layer = select(model, "vision_encoder").weights[0].layer
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    runs = {}
    for scope in ("language_model", "projector", "embed_tokens"):
        seen.clear()
        with quantized(model, scope, "int8") as context:
            outcome = base.compare(context.selection.weights)
        runs[scope] = len(seen) - bool(outcome.asked)
    handle.remove()
    assert runs["language_model"] <= 0 < min(runs["projector"], runs["embed_tokens"])
    nothing = VisualFeatures(model, room=0)
    with nothing.used(keep=True):
        logits_of_answers(model, base.batches[0].inputs, base.batches[0].tokens)
    assert not nothing.kept


def test_rows_of_a_batch_take_their_images_along():
    inputs = {
        "input_ids": torch.arange(12).reshape(3, 4),
        "pixel_values": torch.arange(6)[:, None],
    }
    found = rows_of(inputs, [2, 0])
    assert found["input_ids"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert found["pixel_values"].flatten().tolist() == [4, 5, 0, 1]
    assert rows_of({**inputs, "image_sizes": torch.tensor([[4, 4], [4, 2]])}, [0]) is None
    assert rows_of({**inputs, "pixel_values": torch.zeros(7, 2)}, [0]) is None


@pytest.mark.parametrize(
    "start, expected, can",
    [
        ("", "red", True),
        ("Re", "red", True),
        ("Red.", "red", True),
        ("a red  cir", "a red circle", True),
        ("blue", "red", False),
        ("redd", "red", False),
        ("caf\ufffd", "caf\u00e9", True),
        ("\ufffde", "\ufffdee", True),
        ("3", "30", True),
    ],
)
def test_whether_a_beginning_can_become_the_answer(start, expected, can):
    assert could_become(start, expected) is can


# --- bad input ------------------------------------------------------------------------------------


def test_a_model_that_gets_all_wrong_is_refused(pebble):
    rows = [dict(row, answer="unheard of") for row in vk.tasks.dataset("vqa", n=6, seed=1)]
    with pytest.raises(SensitivityError, match=r"none of the 6 questions right.*'unheard of'"):
        sweep(*pebble, rows, ["int4"], ["projector"], progress=False)


def test_too_few_questions_for_the_interval_are_refused(pebble, questions):
    with pytest.raises(SensitivityError, match=r"48 questions are too few .* that takes 3,842"):
        sweep(*pebble, questions, ["int4"], ["projector"], width=0.02, progress=False)
    with pytest.raises(SensitivityError, match="share such as"):
        sweep(*pebble, questions, ["int4"], ["projector"], width=2, progress=False)


@pytest.mark.parametrize(
    "formats, scopes, error, says",
    [
        ("int4", ["projector"], SensitivityError, "formats is a list"),
        (["int4"], [], SensitivityError, "scopes is a list"),
        (["int4", "itn4"], ["projector"], PlanError, "(?i)did you mean 'int4'"),
        (["int4", "int4-g64"], ["projector"], SensitivityError, "asked for twice"),
        (["int4"], ["projector", "cross_attention"], SensitivityError, "which has vision_encoder"),
    ],
)
def test_what_is_wrong_is_said_before_a_question_is_asked(
    pebble, questions, formats, scopes, error, says
):
    with pytest.raises(error, match=says):
        sweep(pebble[0], pebble[1], questions, formats, scopes, progress=False)


def test_a_quantized_model_and_a_dataset_without_answers(pebble, questions):
    with pytest.raises(SensitivityError, match="quantized already"):
        sweep(*vk.load("pebble", "recommended"), questions, ["int4"], ["projector"])
    with pytest.raises(TaskError, match="no column answer"):
        sweep(*pebble, questions.remove_columns("answer"), ["int4"], ["projector"])


# --- the file -------------------------------------------------------------------------------------


@pytest.fixture
def few(questions):
    return questions.select(range(12))


def test_a_killed_sweep_continues(pebble, few, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "cells.jsonl"
    scopes, formats = ["projector", "language_model"], ["int2", "int3"]
    whole = sweep(*pebble, few, formats, scopes, path=path, progress=False)
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) == 5 and "fingerprint" in json.loads(lines[0])
    counted = count_cells(monkeypatch)
    for cut in (lines[0][:20], "\n".join(lines[:3]), text[: len(text) - 200], text):
        path.write_text(cut)
        counted.clear()
        assert same(sweep(*pebble, few, formats, scopes, path=path, progress=False), whole)
        assert len(counted) == 4 - max(0, sum(is_whole(line) for line in cut.split("\n")) - 1)
        assert sorted(path.read_text().splitlines()) == sorted(lines)
    more = sweep(*pebble, few, [*formats, "int4"], scopes, path=path, progress=False)
    assert len(more) == 6 and len(path.read_text().splitlines()) == 7


def is_whole(line):
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def count_cells(monkeypatch):
    counted = []
    compare = Baseline.compare

    def counting(self, *args, **kwargs):
        counted.append(args)
        return compare(self, *args, **kwargs)

    monkeypatch.setattr(Baseline, "compare", counting)
    return counted


def test_a_file_of_another_sweep_is_refused(pebble, few, tmp_path):
    path = tmp_path / "cells.jsonl"
    model, processor = pebble
    run = {"formats": ["int2"], "scopes": ["projector"], "path": path, "progress": False}
    sweep(model, processor, few, **run)
    text = path.read_text()
    with pytest.raises(SensitivityError, match=r"differs in its dataset"):
        sweep(model, processor, few.select(range(11)), **run)
    with pytest.raises(SensitivityError, match=r"differs in its max_new_tokens \(there .*here 9\)"):
        sweep(model, processor, few, max_new_tokens=9, **run)
    with (
        quantized(model, "lm_head", "int8"),
        pytest.raises(SensitivityError, match="differs in its model"),
    ):
        sweep(model, processor, few, **run)
    assert path.read_text() == text
    path.write_text("scope,format\n")
    with pytest.raises(SensitivityError, match="not the result file of a sweep"):
        sweep(model, processor, few, **run)
    assert path.read_text() == "scope,format\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("folder", None),
        ("file/below", None),
        ("a\0b", None),
        ("x" * 5000, None),
        ("/dev/full", None),  # has no end
        (5, None),
        ("nested", "[" * 10**5),
        ("numbers", '{"fingerprint": 5}\n'),
        ("cells", '{"fingerprint": {}}\n{"scope": 3}\n'),
        ("binary", b"\xff\xfe\x00"),
    ],
)
def test_what_cannot_be_the_file_of_a_sweep(name, content, pebble, few, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    path = tmp_path / name if isinstance(name, str) else name
    if content:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SensitivityError, match="result file of a sweep"):
        sweep(*pebble, few, ["int2"], ["projector"], path=path, progress=False)


# --- several processes ----------------------------------------------------------------------------

LAUNCHED = """
import sys
import torch
torch.set_num_threads(1)
import vlmkit as vk
from vlmkit.sensitivity import sweeping

measured, made = sweeping.measured, []
sweeping.measured = lambda *words: made.append(1) or measured(*words)
questions = vk.tasks.dataset("all", n=12, seed=3)
model, processor = vk.load("pebble", "bf16")
for _ in range(2):
    table = vk.sensitivity.sweep(
        model, processor, questions, ["int2", "int3"], ["projector", "language_model"],
        path=sys.argv[1], progress=False,
    )
import os
rank = os.environ.get("RANK", "alone")
table.to_json(sys.argv[1] + rank)
open(sys.argv[1] + rank + ".made", "w").write(str(len(made)))
"""


@pytest.mark.slow
def test_two_processes_share_the_cells(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    # On CPUs `accelerate launch` starts several processes by this flag alone (or through MPI).
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--main_process_port=0"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    subprocess.run([*launch, script, both], check=True, timeout=300)
    subprocess.run([sys.executable, script, alone], check=True, timeout=300)
    results = [tmp_path / name for name in ("both0", "both1", "alonealone")]
    assert len({path.read_text() for path in results}) == 1
    lines, others = (sorted(path.read_text().splitlines()) for path in (both, alone))
    assert lines == others and len(lines) == 5  # each cell once
    made = [int(path.with_name(f"{path.name}.made").read_text()) for path in results]
    assert made == [2, 2, 4]  # divided between the processes, and in the second call none again
