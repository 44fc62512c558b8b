"""Trainings from a file: what it says is done, and what it says wrong is named."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from test_training import TWO_CPUS, launched

import vlmkit as vk
from vlmkit import cli
from vlmkit.errors import FinetuningError, PlanError
from vlmkit.finetuning import Settings, settings

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).parent.parent / "docs" / "train.yaml"
SAID = {
    "train": {"projector": "full", "language_model": {"r": 4}},
    "data": {"task": "vqa", "n": 16},
    "settings": {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2},
    "evaluation": {"task": ["vqa", "ocr"], "n": 4},
}


@pytest.fixture
def file(tmp_path):
    """file(**changes) is a path of the YAML file of SAID with these keys changed."""

    def write(text=None, **changes):
        said = {**SAID, "output": str(tmp_path / "out"), **changes}
        (tmp_path / "train.yaml").write_text(text or yaml.safe_dump(said))
        return tmp_path / "train.yaml"

    return write


def test_the_example_shows_every_setting():
    config = settings.read(EXAMPLE)
    lora = vk.LoRA(r=16, lora_alpha=16)
    assert config.train == {"vision_encoder": None, "projector": "full", "language_model": lora}
    assert config.plan == vk.Plan(vision_encoder="bf16", projector="bf16", language_model="nf4")
    rates = {"projector": 1e-4, "language_model": 2e-4}
    assert Settings(**config.settings) == Settings(
        max_steps=100, learning_rate=rates, eval_steps=50, save_steps=50
    )
    text = EXAMPLE.read_text()
    for kind in (settings.Config, settings.TaskRows, settings.SourceRows, vk.LoRA, Settings):
        assert [n for n in kind.__dataclass_fields__ if f"{n}:" not in text] == []


def test_rows_of_tasks_and_of_files(file, tmp_path):
    data = settings.read(file()).data
    assert data.dataset("train")[3] == vk.tasks.dataset("vqa", 16, split="train")[3]
    row = vk.tasks.dataset("vqa", 1)[0]
    row["images"][0].save(tmp_path / "1.png")
    told = {"image": "1.png", "question": row["question"], "answer": row["answer"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(told) + "\n")
    data = settings.read(file(data={"source": str(tmp_path / "rows.jsonl"), "limit": 1})).data
    assert data.dataset("train")[0]["answer"] == row["answer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "pebble"}, "'modle' is not a key. Did you mean 'model'"),
        ({"output_dir": "x"}, "called 'output' here"),
        ({"train": {"projectr": "full"}}, "Did you mean 'projector'"),
        ({"train": {"projector": "ful"}}, "train: projector is frozen, full, lora, .*'ful'"),
        ({"train": {"projector": True}}, "train: projector is frozen.*True"),
        ({"train": {"projector": {"rank": 4}}}, "train: projector: 'rank' .* called 'r' here"),
        ({"train": {"projector": {"r": "4"}}}, "projector: r is int, not '4'"),
        ({"train": {"projector": "frozen"}}, "nothing is trained"),
        ({"train": "lora"}, "`train: {language_model: lora}`, and here .*'lora'"),
        ({"data": "rows.json"}, "`data: {source: train.jsonl}`, and here .*'rows.json'"),
        ({"train": None}, "train is missing"),
        ({"output": None}, "output is missing"),
        ({"settings": {"epochs": 3}}, "settings: 'epochs' .* called 'num_train_epochs' here"),
        ({"settings": {"max_steps": "3"}}, "settings: max_steps is int or None, not '3'"),
        ({"settings": {"gradient_checkpointing": 1}}, "gradient_checkpointing is bool, not 1"),
        (
            {"settings": {"eval_steps": 2}, "evaluation": None},
            "evaluating by steps needs questions",
        ),
        ({"data": {"n": 4}}, "data names either a task .* neither"),
        ({"data": {"task": "vqa", "source": "x"}}, "both"),
        ({"data": {"task": "vqa", "schema": "gqa"}}, "data: 'schema' is not a key for a task"),
        ({"data": {"source": "x", "seed": 1}}, "data: 'seed' is not a key for a source"),
        ({"data": {"task": "vqa", "m": 4}}, "data: 'm' is not a key for a task. .* task, n, seed"),
        ({"data": {"taks": "vqa"}}, "data: 'taks' is not a key for a task. Did you mean 'task'"),
        ({"data": ["vqa"]}, "data is dict"),
    ],
)
def test_what_is_wrong_is_named(changes, message, file):
    with pytest.raises(FinetuningError, match=f"train.yaml: .*{message}"):
        settings.read(file(**changes))


def test_what_is_no_config(file, tmp_path):
    with pytest.raises(PlanError, match="train.yaml: .*'nf4'"):
        settings.read(file(plan={"language_model": "nf5"}))
    with pytest.raises(
        FinetuningError, match="nowhere.yaml cannot be read: .*No such file.* current dir"
    ):
        settings.read(tmp_path / "nowhere.yaml")
    with pytest.raises(FinetuningError, match="a mapping of keys to values"):
        settings.read(file(text="- a list"))
    with pytest.raises(FinetuningError, match="is not YAML: .*line 2"):
        settings.read(file(text="model: [pebble\ntrain: }"))
    with pytest.raises(FinetuningError, match="'model' is there twice.*line 1"):
        settings.read(file(text="model: pebble\nmodel: other\n"))


def test_a_training_from_a_file(file, tmp_path, capsys):
    path, out = file(), tmp_path / "out"
    assert cli.main(["train", str(path)]) == 0
    said = capsys.readouterr().out
    assert len(pd.read_csv(out / "loss.csv")) == 4
    model, processor = vk.load("pebble")
    questions = vk.tasks.dataset(["vqa", "ocr"], 4)
    scores = vk.evaluate(model, processor, questions)
    summary = (out / "summary.md").read_text()
    assert summary in said and f"before     {scores!r}" in said
    assert "- projector: " in summary and "- 4 steps; loss " in summary
    model = vk.finetuning.load(model, out / "adapters")
    for task, row in vk.evaluate(model, processor, questions).by_task.iterrows():
        line = next(line for line in summary.splitlines() if line.startswith(f"| {task} |"))
        assert line.endswith(f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}] |")

    losses = pd.read_csv(out / "loss.csv")["loss"].tolist()
    assert cli.main(["train", str(path)]) == 2
    assert "is not empty. Give --resume" in capsys.readouterr().err
    (out / "loss.csv").unlink()
    assert cli.main(["train", str(path), "--resume"]) == 0  # nothing is left to do
    assert pd.read_csv(out / "loss.csv")["loss"].tolist() == losses


def test_mistakes_are_told_in_a_sentence(file, capsys):
    assert cli.main(["train", str(file(settings={"max_steps": "many"}))]) == 2
    assert "max_steps is int or None, not 'many'" in capsys.readouterr().err
    assert cli.main(["train"]) == 2


@pytest.mark.slow
def test_two_processes_train_from_a_file(file, tmp_path):
    def of(size):
        return {"max_steps": 2, "per_device_train_batch_size": size, "bf16": False}

    assert cli.main(["train", str(file(plan="fp32", settings=of(4)))]) == 0
    path = file(plan="fp32", settings=of(2), output=str(tmp_path / "two"))
    assert launched(TWO_CPUS, "-m", "vlmkit", "train", path).count("written to") == 1
    alone, two = (pd.read_csv(tmp_path / name / "loss.csv")["loss"] for name in ("out", "two"))
    assert two.tolist() == pytest.approx(alone.tolist(), rel=2e-3)


def test_the_configs_of_the_page_on_training_are_read(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    ours, fsdp = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "train.yaml").write_text(ours)
    said = settings.read(tmp_path / "train.yaml")
    assert said.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert said.settings["gradient_accumulation_steps"] == 16
    tried = yaml.safe_load((Path(__file__).parent / "data" / "fsdp.yaml").read_text())
    assert yaml.safe_load(fsdp)["fsdp_config"] == tried["fsdp_config"]
