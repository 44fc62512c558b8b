"""Continuing a training: from which checkpoint, whether it is the same one, and to what end."""

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from test_training import WITHOUT_DROPOUT, adapted, train, trained

import vlmkit as vk
from vlmkit import cli
from vlmkit.errors import FinetuningError, VlmkitError
from vlmkit.finetuning import continuing, reports, trainer
from vlmkit.finetuning.continuing import LIST, found_in, last_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]
QUICK = {"training": WITHOUT_DROPOUT, "per_device_train_batch_size": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def rows():
    return [dict(row) for row in vk.tasks.dataset("vqa", 6, split="train")]


@pytest.fixture(scope="module")
def done(rows, tmp_path_factory):
    """(the folder, the Run) of a training of 4 steps of 2 rows: its last step is in the middle of
    an epoch, and its checkpoints are checkpoint-2 and checkpoint-4."""
    folder = tmp_path_factory.mktemp("done")
    return folder, train(folder, rows, **QUICK)


@pytest.fixture
def folder(done, tmp_path):
    """A copy of the folder of `done` that a test may change."""
    return shutil.copytree(done[0], tmp_path / "run")


def same(one, other):
    one, other = trained(one.model), trained(other.model)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- where it goes on -----------------------------------------------------------------------------


def test_a_finished_training_trains_nothing(rows, done, folder, capsys):
    """There were 8, 9, 10, 11 steps in four calls."""
    _, wanted = done
    assert wanted.continued_from == 0
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for _ in range(2):
        again = train(folder, rows, **QUICK)
        assert again.curve["step"].tolist() == [1, 2, 3, 4] and again.continued_from == 4
        assert again.curve["loss"].tolist() == wanted.curve["loss"].tolist()
        assert again.no_gradient is None and same(again, wanted)
        assert "is finished: it has all 4 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files


def test_the_same_model_again(rows, tmp_path):
    model, processor = adapted(**WITHOUT_DROPOUT)
    settings = {"max_steps": 2, "per_device_train_batch_size": 2}
    first = vk.finetuning.train(model, processor, rows, tmp_path / "run", **settings)
    after = trained(model)
    again = vk.finetuning.train(model, processor, rows, tmp_path / "run", **settings)
    assert again.continued_from == 2 and first.continued_from == 0
    assert all(torch.equal(after[n], p) for n, p in trained(model).items())
    # and a second training that begins where the first one ended
    second = vk.finetuning.train(model, processor, rows, tmp_path / "second", **settings)
    assert second.continued_from == 0 and len(second.curve) == 2


@pytest.mark.parametrize("longer", [{"max_steps": 5}, {"max_steps": None, "num_train_epochs": 2}])
def test_a_longer_training_goes_on(longer, rows, folder, capsys):
    run = train(folder, rows, **(QUICK | longer))
    total = longer["max_steps"] or 6
    assert run.continued_from == 4 and run.curve["step"].tolist() == list(range(1, total + 1))
    assert f"goes on after step 4 of {total}, from checkpoint-4" in capsys.readouterr().err
    assert train(folder, rows, **(QUICK | longer)).continued_from == total
    with pytest.raises(FinetuningError, match=f"training of {total} steps by now, and this.* 4"):
        train(folder, rows, **QUICK)


def test_what_may_differ(rows, folder):
    changed = {"save_steps": 1, "dataloader_num_workers": 1}
    assert train(folder, rows, **(QUICK | changed)).continued_from == 4


def train_patiently(folder, rows):
    """Train until two evaluations in a row were no better."""
    model, processor = adapted(**WITHOUT_DROPOUT)
    return vk.finetuning.train(
        model, processor, rows, folder, eval_dataset=rows, max_steps=20, eval_steps=1,
        per_device_train_batch_size=2, early_stopping_patience=2,
    )  # fmt: skip


def test_a_training_that_stopped_early_is_finished(rows, tmp_path, monkeypatch):
    scores = iter([0.5, 0.4, 0.3])
    kind = type("Scores", (), {"interval": (0, 1), "by_task": {"accuracy": pd.Series(dtype=float)}})
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_: type("One", (kind,), {"accuracy": next(scores)})()
    )

    first = train_patiently(tmp_path, rows)
    again = train_patiently(tmp_path, rows)
    assert first.curve["step"].tolist() == again.curve["step"].tolist() == [1, 2, 3]
    assert again.continued_from == 3 and same(first, again)  # the best, of step 1


def test_patience_is_counted_across_a_kill(rows, tmp_path, monkeypatch):
    kind = type("Scores", (), {"interval": (0, 1), "by_task": {"accuracy": pd.Series(dtype=float)}})
    scores = [0.5, 0.4, 0.3, 0.2]
    count = []

    def evaluate(*_):
        count.append(1)
        return type("One", (kind,), {"accuracy": scores[len(count) - 1]})()

    monkeypatch.setattr(trainer, "evaluate", evaluate)

    train_patiently(tmp_path, rows)
    shutil.rmtree(tmp_path / "checkpoint-3")
    for left in tmp_path.glob("checkpoint-*"):
        assert left.name in ("checkpoint-1", "checkpoint-2")
    if last_checkpoint(tmp_path).name == "checkpoint-2":
        count[:] = [1, 1]
        assert train_patiently(tmp_path, rows).curve["step"].tolist() == [1, 2, 3]


def test_checkpoints_are_written_without_being_asked_for(rows, tmp_path, monkeypatch):
    """A training that was killed at step 130 of 200 began at 0 again."""
    asked = []
    monkeypatch.setattr(
        trainer.Trainer, "train", lambda self, **_: asked.append(self.args) or 1 / 0
    )
    model = adapted(**WITHOUT_DROPOUT)
    for steps, every in ((200, 50), (10, 50), (5000, 250)):
        with pytest.raises(VlmkitError, match="division by zero"):
            vk.finetuning.train(*model, rows, tmp_path / str(steps), max_steps=steps)
        assert (asked[-1].save_strategy, asked[-1].save_steps) == ("steps", every)


def test_evaluations_are_kept_across_a_kill(rows, tmp_path):
    asked = QUICK | {"eval_dataset": rows[:2], "eval_steps": 2}
    whole = train(tmp_path, rows, **asked)
    assert whole.evaluations["step"].tolist() == [2, 4] and whole.evaluations["loss"].notna().all()
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = train(tmp_path, rows, **asked)
    assert again.continued_from == 2 and again.evaluations.equals(whole.evaluations)
    assert train(tmp_path, rows, **asked).evaluations.equals(whole.evaluations)  # finished


RECORDS = """
from types import SimpleNamespace
calls, config = [], {}
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
def init(**given): calls.append(("init", given["name"], given["resume"]))
def log(values): calls.append(("log", values))
def finish(): calls.append(("finish",))
"""


def test_reports_go_on_where_a_training_does(rows, tmp_path, monkeypatch):
    """transformers' own callback, and in place of trackio a module that records what it is told."""
    (tmp_path / "trackio.py").write_text(RECORDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    asked = QUICK | {"report_to": ["trackio"], "eval_dataset": rows[:2]}
    run = train(tmp_path / "run", rows, **(asked | {"max_steps": 2}))
    run = train(tmp_path / "run", rows, **(asked | {"max_steps": 3}))
    assert run.continued_from == 2
    calls = sys.modules.pop("trackio").calls
    opened = [call for call in calls if call[0] == "init"]
    assert len(opened) == 2 and len(set(opened)) == 1  # the same run, resumed
    assert opened[0][1].startswith("run-") and opened[0][2] == "allow"
    logged = [call[1] for call in calls if call[0] == "log"]
    steps = [v["train/global_step"] for v in logged if "train/loss" in v]
    assert steps == [1, 2, 3] and len([v for v in logged if "eval/loss" in v]) == 2
    assert train(tmp_path / "run", rows, **(QUICK | {"max_steps": 3})).continued_from == 3


@pytest.mark.slow
def test_tensorboard_has_one_folder_and_hides_what_a_kill_left(rows, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = QUICK | {"report_to": "tensorboard"}
    train(tmp_path, rows, **asked)
    shutil.rmtree(tmp_path / "checkpoint-4")
    run = train(tmp_path, rows, **asked)
    assert run.continued_from == 2
    found = events.EventAccumulator(str(tmp_path / reports.FOLDER)).Reload().Scalars("train/loss")
    assert [event.step for event in found] == [1, 2, 3, 4]
    assert {path.parent.name for path in tmp_path.rglob("events.*")} == {reports.FOLDER}


# --- damage ---------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


PARTS = [
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "adapter_model.safetensors",
    "adapter_config.json",
    "trained_in_full.safetensors",
    "vlmkit.json",
    "training.json",
]


def test_every_part_is_tried(done):
    there = {path.name for path in (done[0] / "checkpoint-4").iterdir()}
    assert {*PARTS} <= there <= {*PARTS, "README.md", "training_args.bin"}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "damage", [cut, flip, lambda path: path.unlink(), lambda p: p.write_text("")]
)
def test_a_damaged_checkpoint_is_passed_over(damage, name, folder):
    damage(folder / "checkpoint-4" / name)
    last, passed = found_in(folder)
    assert last.name == "checkpoint-2"
    assert {path.name: name in wrong for path, wrong in passed.items()} == {"checkpoint-4": True}


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", '{"files": 3}', '{"files": {}}'])
def test_a_list_that_is_none(content, folder):
    (folder / "checkpoint-4" / LIST).write_text(content)
    assert last_checkpoint(folder).name == "checkpoint-2"


def test_it_goes_on_from_the_one_before_and_ends_the_same(rows, folder, done, capsys):
    cut(folder / "checkpoint-4" / "optimizer.pt")
    cut(folder / "settings.json")  # for people alone
    run = train(folder, rows, **QUICK)
    said = capsys.readouterr().err
    assert "checkpoint-4 is passed over: optimizer.pt is damaged. The training goes on from" in said
    assert run.continued_from == 2 and same(run, done[1])
    assert last_checkpoint(folder).name == "checkpoint-4"  # whole again


def test_where_all_are_damaged_it_begins_again(rows, folder, done, capsys):
    for path in folder.glob("checkpoint-*"):
        cut(path / "trainer_state.json")
    run = train(folder, rows, **QUICK)
    assert run.continued_from == 0 and same(run, done[1])
    assert capsys.readouterr().err.count("at the start, since there is none before it") == 2


def test_folders_that_cannot_be(rows, tmp_path):
    (tmp_path / "file").write_text("")
    model, says = adapted(**WITHOUT_DROPOUT), "cannot be the folder of a training: .*Name a folder"
    below = [tmp_path / name for name in ("file", "file/run", "a\0b", "x" * 5000)]
    for path in (*below, "", None, 5, b"x", "/proc/x", "~nobody-of-this-name/x"):
        with pytest.raises(FinetuningError, match=says):
            vk.finetuning.train(*model, rows, path)


def test_other_names_are_no_checkpoints(folder):
    for name in ("checkpoint-²", "checkpoint-", "checkpoint-x"):
        (folder / name).mkdir()
    (folder / "checkpoint-8").write_text("")
    last, passed = found_in(folder)
    assert last.name == "checkpoint-4" and [path.name for path in passed] == ["checkpoint-8"]


# --- another training -----------------------------------------------------------------------------


def other_rows(rows, what):
    rows = [dict(row) for row in rows]
    if what == "answer":
        rows[5]["answer"] = "blue"
    elif what == "question":
        rows[0]["question"] += " "
    elif what == "picture":
        rows[3]["images"] = [rows[3]["images"][0].rotate(90)]
    elif what == "number":
        rows.pop()
    elif what == "order":
        rows.reverse()
    return rows


@pytest.mark.parametrize("what", ["answer", "question", "picture", "number", "order"])
def test_other_rows_are_refused(what, rows, folder):
    """It gave the other training's curve, as a success, with one more step."""
    with pytest.raises(FinetuningError, match=r"another training \(rows was 6 rows .*, is \d rows"):
        train(folder, other_rows(rows, what), **QUICK)


def test_equal_rows_are_the_same_rows(rows, folder):
    assert train(folder, other_rows(rows, None), **QUICK).continued_from == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": "bf16"}, "plan was .*language_model: bf16 and nf4.*, is .*language_model: bf16"),
        (
            {"training": {"language_model": vk.LoRA(r=4)}},
            "adapters was .*projector: full.*, is lang",
        ),
        ({"training": WITHOUT_DROPOUT | {"language_model": vk.LoRA(r=8)}}, "r=4, .* r=8, "),
        (
            {"training": WITHOUT_DROPOUT | {"language_model": vk.LoRA(r=4, use_dora=True)}},
            "DoRA r=4",
        ),
        (
            {
                "training": WITHOUT_DROPOUT
                | {"language_model": vk.LoRA(4, target_modules=["q_proj"])}
            },
            "adapters was",
        ),
        ({"training": WITHOUT_DROPOUT | {"language_model": vk.LoRA(r=4, lora_alpha=8)}}, "scale 2"),
        (
            {"training": WITHOUT_DROPOUT | {"language_model": vk.LoRA(r=4, lora_dropout=0.1)}},
            "dropout 0.1",
        ),
        (
            {"training": WITHOUT_DROPOUT | {"language_model": vk.LoRA(r=4, target_modules="mlp")}},
            r"r=4.*\(84 parts|adapters was",
        ),
        ({"per_device_train_batch_size": 1}, r"\(per_device_train_batch_size was 2, is 1\)"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"learning_rate": 1e-3}, r"learning_rate was 0.0002, is 0.001"),
    ],
)
def test_another_plan_or_other_adapters_or_settings_are_refused(changes, said, rows, folder):
    with pytest.raises(FinetuningError, match=said):
        train(folder, rows, **(QUICK | changes))


def test_more_processes_are_another_training(rows, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # twice the batch
    with pytest.raises(FinetuningError, match=r"\(processes was 1, is 2\)"):
        train(folder, rows, **QUICK)


@pytest.mark.parametrize(
    "part", ["layers.0.input_layernorm", "embed_tokens", "multi_modal_projector"]
)
def test_another_base_is_refused(part, rows, folder, monkeypatch):
    load = vk.load

    def other(*given):
        model, processor = load(*given)
        name = next(n for n, _ in model.named_parameters() if part in n)
        with torch.no_grad():
            model.get_parameter(name).mul_(1.01)
        return model, processor

    monkeypatch.setattr(vk, "load", other)
    wanted = "start was" if part == "multi_modal_projector" else "base was"
    with pytest.raises(FinetuningError, match=wanted):
        train(folder, rows, **QUICK)


def test_rows_of_a_dataset_and_of_files_are_described_by_what_is_in_them(rows, tmp_path):
    def described(name, rows):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "rows.jsonl", "w") as file:
            for number, row in enumerate(rows):
                row["images"][0].save(tmp_path / name / f"{number}.png")
                row = {
                    "image": f"{number}.png",
                    "question": row["question"],
                    "answer": row["answer"],
                }
                file.write(json.dumps(row) + "\n")
        source = tmp_path / name / "rows.jsonl"
        return continuing._rows(vk.tasks.from_dataset(source, decode=False))

    first = described("a", rows)
    assert described("b", rows) == first  # the same files in another folder
    for what in ("answer", "question", "picture", "number", "order"):
        assert described(what, other_rows(rows, what)) != first


def test_rows_that_are_many_are_described_by_some(monkeypatch):
    monkeypatch.setattr(continuing, "MOST_TEXTS", 100)
    rows = [{"question": "?", "answer": str(n)} for n in range(1000)]
    described = continuing._rows(rows)
    assert described == continuing._rows(list(rows))
    assert continuing._rows(rows[:-1]) != described != continuing._rows([*rows, rows[0]])
    for place in (0, 999):  # the first and the last are always among them
        changed = [*rows[:place], rows[0] | {"answer": "x"}, *rows[place + 1 :]]
        assert continuing._rows(changed) != described
    places = continuing._spread(1000, 100)
    assert len(places) == 100 and places[0] == 0 and places[-1] == 999
    assert continuing._spread(3, 100) == range(3)


# --- the same call again --------------------------------------------------------------------------

FILE = {
    "plan": "bf16",
    "train": {"projector": "full", "language_model": {"r": 4, "lora_dropout": 0.1}},
    "data": {"task": "vqa", "n": 8},
    "settings": {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 2},
}


def from_file(folder, **changes):
    """A file for `vlmkit train`, whose output is `folder`."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**FILE, "output": str(folder), **changes}))
    return str(path)


def files(folder):
    adapters = folder / "adapters"
    return {p.name: p.read_bytes() for p in [*adapters.glob("*.safetensors"), folder / "loss.csv"]}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of `FILE`'s training, done in this process."""
    folder = tmp_path_factory.mktemp("file") / "first"
    assert cli.main(["train", from_file(folder)]) == 0
    return folder


KILLED = """
import os, sys, torch
from vlmkit import cli
from vlmkit.finetuning import trainer
torch.set_num_threads(1)
class Kills(trainer.Progress):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os._exit(9)
trainer.Progress = Kills
sys.exit(cli.main(["train", sys.argv[1]]))
"""


def test_the_same_file_killed_and_resumed_ends_bit_for_bit_the_same(first, tmp_path, capsys):
    """Begun in another process. The losses were 0.14838 and 0.15129 at step 6: the adapters' start
    was not seeded."""
    folder = tmp_path / "killed"
    path = from_file(folder)
    done = subprocess.run([sys.executable, "-c", KILLED, path])
    assert done.returncode == 9 and last_checkpoint(folder / "run").name == "checkpoint-2"
    assert cli.main(["train", path, "--resume"]) == 0
    said = capsys.readouterr()
    assert re.search(r"resume +after step 2, from .*checkpoint-2", said.out)
    assert "2 of the steps were done before" in said.out
    assert files(folder) == files(first)
    assert cli.main(["train", path, "--resume"]) == 0
    said = capsys.readouterr()
    assert "is finished: it has all 3 steps, so nothing is trained" in said.err
    assert files(folder) == files(first)


def test_another_seed_ends_otherwise_and_resume_says_that_there_is_nothing(first, tmp_path, capsys):
    path = from_file(tmp_path / "other", settings=FILE["settings"] | {"seed": 1})
    assert cli.main(["train", path, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "cannot be continued: it has no checkpoint yet. The training begins" in said
    assert files(tmp_path / "other") != files(first)


def test_a_training_that_begins_with_saved_adapters(first, tmp_path, capsys):
    saved = str(first / "adapters")
    path = from_file(tmp_path / "second", train=None, adapters=saved)
    assert cli.main(["train", path]) == 0
    second = pd_losses(tmp_path / "second")
    assert len(second) == 3 and second != pd_losses(first)
    model = vk.finetuning.load(vk.load("pebble", "bf16")[0], saved, trainable=True)
    run = vk.finetuning.train(
        model, vk.load("pebble")[1], vk.tasks.dataset("vqa", 8, split="train"),
        tmp_path / "third", **FILE["settings"],
    )  # fmt: skip
    assert run.curve["loss"].tolist() == second
    # neither does a training that began afresh go on with them, nor the other way round
    shutil.copytree(first, tmp_path / "first")
    for wrong in (
        from_file(tmp_path / "first", train=None, adapters=saved),
        from_file(tmp_path / "second"),
    ):
        capsys.readouterr()
        assert cli.main(["train", wrong, "--resume"]) == 2
        assert "start was weights" in capsys.readouterr().err
    both = from_file(tmp_path / "both", adapters=saved)
    assert cli.main(["train", both]) == 2
    assert "give one of them" in " ".join(capsys.readouterr().err.split())


def pd_losses(folder):
    (state,) = folder.glob("run/checkpoint-3/trainer_state.json")
    return [
        entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry
    ]


# --- files that say nonsense ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("settings: {seed: !!int abc}", "is not YAML: invalid literal"),
        ("settings: {learning_rate: !!float abc}", "is not YAML: could not convert"),
        ("settings: {seed: 2019-05-01}", "seed is int, not '2019-05-01'"),
        ("settings: {seed: !!timestamp 2019-15-01}", "is not YAML: "),
        ("settings: {max_steps: .nan}", "max_steps is int or None, not nan"),
        ("settings: {weight_decay: .nan}", "weight_decay is a number from 0"),
        ("settings: {num_train_epochs: .inf}", "num_train_epochs is a number above 0"),
        ("settings: {learning_rate: -.inf}", "a learning_rate is a number between 0 and 10"),
        ("settings: {dataloader_num_workers: -1}", "dataloader_num_workers is a whole number"),
        ("settings: {seed: !!python/object/apply:os.getcwd []}", "could not determine a construct"),
        ("settings: {? [1, 2] : 3}", "is not YAML|not a setting"),
        (f"settings: {'[' * 5000}", "is not YAML"),
        (f"settings: {{seed: {'9' * 5000}}}", "is not YAML|seed is a whole number"),
        ("train: {projector: {r: 1000000000000000000}}", "projector: r is a whole number from 1"),
        ("train: {language_model: {target_modules: [], use_dora: true}}", "a list of names, not"),
        ("settings: {report_to: mlflow}", "report_to names mlflow, which cannot be used"),
        ("settings: {report_to: [wandv]}", "Did you mean 'wandb'"),
        ("settings: {eval_strategy: epoch}", "evaluating by epoch needs questions"),
        ("train: {projector: {lora_alpha: .nan}}", "projector: lora_alpha is a number above 0"),
        ("data: {task: vqa, n: -1}", "data: n is a whole number from 1"),
        ("data: {task: vqa, seed: -1}", "data: seed is a whole number from 0"),
        ("data: {source: x, limit: 0}", "data: limit is a whole number from 1"),
        ("output: {a: b}", "output is str or None"),
    ],
)
def test_a_file_with_nonsense_is_a_sentence_before_a_weight_is_read(
    line, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(vk, "load", lambda *_, **__: pytest.fail("weights are read"))
    key = line.partition(":")[0]
    known = {"train": "{projector: full}", "data": "{task: vqa}", "output": str(tmp_path / "out")}
    lines = [f"{name}: {value}" for name, value in known.items() if name != key] + [line]
    (tmp_path / "train.yaml").write_text("\n".join(lines))
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 2
    told = capsys.readouterr().err
    assert re.search(said, " ".join(told.split())) and len(told) < 1500
    assert "Traceback" not in told


def test_a_date_is_a_name(tmp_path):
    text = "train: {projector: full}\ndata: {task: vqa}\noutput: 2026-05-01\n"
    (tmp_path / "train.yaml").write_text(text)
    assert vk.finetuning.settings.read(tmp_path / "train.yaml").output == "2026-05-01"


@pytest.mark.parametrize("kind", ["file", "below"])
def test_an_output_that_cannot_be(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vk, "load", lambda *_, **__: pytest.fail("weights are read"))
    (tmp_path / "taken").write_text("")
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump(
            {**FILE, "output": str(tmp_path / ("taken" if kind == "file" else "taken/x"))}
        )
    )
    assert cli.main(["train", str(tmp_path / "train.yaml")]) == 2
    assert "cannot be the folder of a training" in " ".join(capsys.readouterr().err.split())
