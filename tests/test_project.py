"""`vlmkit new`: a project that runs as it is, whole or not there at all."""

import os
import re

import nbformat
import pytest
import yaml
from PIL import Image

import vlmkit as vk
from vlmkit import cli
from vlmkit.course import project
from vlmkit.errors import CheckpointError
from vlmkit.finetuning.collating import check_rows
from vlmkit.finetuning.indistinct import indistinct_answers
from vlmkit.finetuning.settings import read


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A project, which is the current directory."""
    monkeypatch.delenv("VLMKIT_MODEL", raising=False)
    assert cli.main(["new", str(tmp_path / "my-task")]) == 0
    monkeypatch.chdir(tmp_path / "my-task")
    return tmp_path / "my-task"


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_rows_and_the_training_file_are_fit_for_a_training(made):
    config = read("train.yaml")
    learned, asked = config.data.dataset("train"), config.evaluation.dataset("evaluation")
    assert (len(learned), len(asked)) == (10, 20)
    assert check_rows(learned) == check_rows(asked) == 0
    assert len(list((made / "pictures").iterdir())) == 10
    rows = [*vk.tasks.from_dataset("train.jsonl"), *vk.tasks.from_dataset("held_out.jsonl")]
    pictures = {row["images"][0].tobytes() for row in rows}
    assert len(pictures) == 30, "a picture is there twice"
    answers = [row["answer"] for row in rows]
    assert set(answers[:10]) == set(answers[10:]) == {"0", "3", "4"}
    model, processor = vk.load(config.model, config.plan)
    assert indistinct_answers(model, processor, answers) == {}
    assert vk.evaluate(model, processor, rows).accuracy == 0, "pebble can do it already"
    assert config.plan == vk.Plan.recommended() and "language_model" in config.train


def test_the_notebook_is_valid_and_has_not_run(made):
    notebook = nbformat.read(made / "task.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 5
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"


def test_the_readme_names_every_file(made):
    named = set(re.findall(r"`([\w./]+)`", (made / "README.md").read_text("utf-8")))
    there = {path.name + "/" * path.is_dir() for path in made.iterdir()} - {"README.md"}
    assert there <= named


def test_the_same_bytes_each_time(made, tmp_path):
    assert files(project.write(tmp_path / "again")) == files(made)


def test_the_model_is_the_one_that_is_named(made, llava, tmp_path, monkeypatch):
    def model_of(name, *words):
        assert cli.main(["new", name, *words]) == 0
        return yaml.safe_load((made / name / "train.yaml").read_text("utf-8")), read(
            made / name / "train.yaml"
        )

    (made / "cobble-int8").mkdir()  # a name of the course comes first, as in vk.load
    assert model_of("a", "--model", "cobble-int8")[1].model == "cobble-int8"
    odd = tmp_path / "a: model # of 'mine', é"
    os.symlink(llava, odd)
    raw, config = model_of("b", "--model", os.path.relpath(odd))
    assert config.model == raw["model"] == str(odd.resolve())
    monkeypatch.setenv("VLMKIT_MODEL", "cobble")
    assert model_of("c")[1].model == "cobble"
    (made / "e").mkdir()  # an empty folder is free
    assert model_of("e")[1].settings == read("train.yaml").settings


@pytest.mark.parametrize("place", ["full", "file", "file/below", ".", "..", "", "a\0b", "x" * 300])
def test_a_place_that_is_taken_or_impossible(place, made, capsys):
    (made / "full").mkdir()
    (made / "full" / "kept").write_text("kept")
    (made / "file").write_text("kept")
    before = files(made.parent)
    assert cli.main(["new", place]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlmkit: ") and "defect" not in error and "overwrite" not in error
    assert files(made.parent) == before and {p.name for p in made.parent.iterdir()} == {made.name}


def test_an_empty_current_directory_is_not_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in (".", "", str(tmp_path)):
        assert cli.main(["new", place]) == 2
    assert "current directory" in capsys.readouterr().err
    assert os.path.samefile(".", tmp_path) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder that nobody can write in")
def test_a_parent_that_cannot_be_written(capsys):
    assert cli.main(["new", "/proc/my-task"]) == 2
    assert "/proc/my-task could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pebbel", "", "no such folder", "x" * 5000])
def test_a_model_that_does_not_exist(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLMKIT_MODEL", name)
    with pytest.raises(CheckpointError):
        project.write(tmp_path / "new", name)
    assert cli.main(["new", str(tmp_path / "new"), "--model", name]) == (2 if name else 0)
    assert (tmp_path / "new").exists() == (not name)


def test_what_fails_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    drawn = project._drawn

    def fails(folder, part, pictures, number):
        if part == "held_out" and number == 7:
            raise KeyboardInterrupt
        return drawn(folder, part, pictures, number)

    monkeypatch.setattr(project, "_drawn", fails)
    with pytest.raises(KeyboardInterrupt):
        project.write(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


# --- the whole run --------------------------------------------------------------------------------


def ran(folder):
    """What the five cells of the notebook print, each as one text, in a fresh kernel."""
    from nbclient import NotebookClient

    notebook = nbformat.read(folder / "task.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert all(any("image/png" in o.get("data", ()) for o in cells[n]) for n in (0, 1, 2))
    return ["".join(o.text for o in outputs if o.get("name") == "stdout") for outputs in cells]


@pytest.mark.slow
def test_the_notebook_runs_and_pebble_learns(made):
    _, _, wall, old, merged = ran(made)
    before, after = (float(n) for n in re.findall(r"Scores: ([\d.]+)%", wall))
    assert before == 0 and after >= 60  # chance is 40%: two of the five shapes have 4 corners
    before, after = (int(n) for n in re.findall(r"(\d+)% (?:right before|after)", old))
    assert before >= 90 and after >= 60
    trained, also = (float(n) for n in re.findall(r"Scores: ([\d.]+)%", merged))
    assert abs(trained - also) <= 20
    assert {"adapters", "merged"} <= {path.name for path in made.iterdir()}
    ran(made)  # a second time, on what the first one wrote


@pytest.mark.slow
def test_the_notebook_runs_on_another_model_and_on_other_rows(made, llava, monkeypatch):
    """On a folder that VLMKIT_MODEL names, whose answers are all wrong, with pictures of another
    shape, and with a training that is evaluated on the way."""
    monkeypatch.setenv("VLMKIT_MODEL", str(llava))
    path = made / "train.yaml"
    text = path.read_text("utf-8").replace("max_steps: 60", "max_steps: 2\n  eval_steps: 1")
    path.write_text(text, encoding="utf-8")
    for image in (made / "pictures").iterdir():
        Image.new("RGB", (300, 40), "red").save(image)
    texts = ran(made)
    assert str(llava) in texts[1]


@pytest.mark.slow
def test_the_training_file_runs_on_the_command_line(made, capsys):
    assert cli.main(["train", "train.yaml"]) == 0
    assert cli.main(["merge", "runs/first/adapters", "merged"]) == 0
    assert "| plain | 0.0%" in (made / "runs/first/summary.md").read_text("utf-8")
    model, processor = vk.load("merged", "bf16")
    scores = vk.evaluate(model, processor, vk.tasks.from_dataset("held_out.jsonl"))
    assert scores.accuracy >= 0.6
