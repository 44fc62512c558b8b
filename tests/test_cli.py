"""The command line: what it prints, what it returns, and how it says what is wrong."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import typer
from PIL import Image

import vlmkit as vk
from vlmkit import cli
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.course import pictures

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def run(*words):
    return cli.main([str(word) for word in words])


def process(*words, **kwargs):
    command = [sys.executable, "-m", "vlmkit", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=HERE, text=True, **pipes, **kwargs)


def test_the_first_answer(monkeypatch, llava, capsys):
    """Everything that the first run is to show, from the model that VLMKIT_MODEL names."""
    monkeypatch.setenv("VLMKIT_MODEL", str(llava))
    monkeypatch.chdir(HERE)
    assert run() == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0] == "picture    vlmkit/course/pictures/shapes.png (84 x 84 pixels)".replace(
        "/", os.sep
    )
    assert lines[1] == "question   What color is the circle?"
    assert lines[2] == f"model      {llava}"
    assert lines[3].startswith("answer     ")
    assert out.count("\nanswer ") == 1  # another model than pebble is asked alone
    assert "nf4 + bf16" in out and "measured on the loaded model: the same" in out
    for part in ("vision_encoder", "projector", "language_model", "total"):
        assert sum(line.startswith(part) for line in lines) == 2  # audited, and predicted
    named = (str(llava), "answer")
    assert max(len(line) for line in lines if not any(name in line for name in named)) <= 100


def test_a_first_answer_without_cobble_is_pebbles_and_says_what_to_run(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.delenv("VLMKIT_MODEL", raising=False)
    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path))
    assert run() == 0
    out, err = capsys.readouterr()
    answers = [line for line in out.splitlines() if line.startswith("answer ")]
    assert [line.split()[-1] for line in answers] == [pictures.FIRST.answer]
    assert len([line for line in out.splitlines() if "vlmkit fetch cobble" in line]) == 1
    assert err == "" and "measured on the loaded model: the same" in out


def test_a_first_answer_without_scikit_image_says_what_to_install(monkeypatch):
    monkeypatch.setattr(type(BUNDLED["cobble"]), "is_current", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -c constraints.txt scikit-image" in pictures.missing_for_photographs()
    with pytest.raises(vk.VlmkitError, match="scikit-image"):
        pictures.photograph()


@pytest.mark.skipif(not BUNDLED["cobble"].is_current, reason="run vlmkit fetch cobble")
def test_a_first_answer_is_about_a_drawing_and_a_photograph(monkeypatch, capsys):
    monkeypatch.delenv("VLMKIT_MODEL", raising=False)
    assert run() == 0
    out, err = capsys.readouterr()
    assert err == ""
    drawing, photograph = out.split("\npicture ")
    assert re.search(r"model +pebble\nanswer +green\n", drawing)
    assert re.search(r"model +cobble\nanswer +.*\bcat\b", photograph)
    for name, part in (("pebble", drawing), ("cobble", photograph)):
        total = vk.memory.predict(name, "recommended").total
        assert f"predicted {total:,} bytes; measured on the loaded model: the same" in part


def test_asking_about_pictures_of_ones_own(llava, red, capsys):
    chart = str(pictures.SAMPLES[2].path)
    assert run("ask", red, chart, "--model", llava, "--plan", "bf16", "Which is red?") == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"picture    {red} (30 x 20 pixels)\npicture    {chart} (84 x 84 pixels)\n"
    )
    assert "question   Which is red?\n" in out
    assert "bf16" in out and "nf4" not in out


def test_the_answer_alone(llava, red, capsys):
    assert run("ask", "--answer-only", "--model", llava, "--max-new-tokens", 5, red, "What?") == 0
    model, processor = vk.load(llava)
    answer = vk.ask(model, processor, red, "What?", max_new_tokens=5)
    assert capsys.readouterr().out == answer + "\n"


def test_a_drawn_answer_comes_again_with_its_seed(llava, red, capsys):
    words = ["ask", "--answer-only", "--model", llava, "--max-new-tokens", 5, red, "What?"]
    assert run(*words, "--do-sample", "--temperature", 9, "--top-k", 0, "--seed", 7) == 0
    model, processor = vk.load(llava)
    drawn = {"do_sample": True, "temperature": 9, "top_k": 0, "seed": 7}
    answer = vk.ask(model, processor, red, "What?", max_new_tokens=5, **drawn)
    assert capsys.readouterr().out == answer + "\n"


def test_anatomy(llava, capsys):
    assert run("anatomy", llava) == 0
    assert "LlavaForConditionalGeneration" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ask"], "at least one picture"),
        (["ask", "RED"], "at least one picture"),
        (["memory", "pebble", "--batch", "4"], "--batch-size"),
        (["memory", "pebble", "--checkpointing"], "--gradient-checkpointing"),
        (["fit", "--optimizer", "adamw_8bit"], "--optim"),
        (["ask", "nowhere.png", "What?"], "no file nowhere.png"),
        (["ask", "RED", "What", "color?"], "in quotes"),
        (["ask", "RED", "RED"], "write a question"),
        (["ask", "RED", " "], "empty"),
        (["ask", "RED", "What?", "--plan", "nf5"], "'nf4'"),
        (["ask", "RED", "What?", "--plan", "visionencoder=nf4"], "'vision_encoder'"),
        (["ask", "RED", "What?", "--model", "nowhere"], "'nowhere'"),
        (["ask", "RED", "What?", "--model", "LLAVA", "--max-new-tokens", "0"], "max_new_tokens"),
        (["ask", "RED", "What? " * 99, "--model", "LLAVA"], "tokens"),
        (["ask", "RED", "What?", "--seed", "1"], "--do-sample"),
        (["ask", "RED", "What?", "--do-sample", "--temperature", "0"], "temperature"),
        (["ask", "RED", "What?", "--model", "LLAVA", "--max-pixels", "9"], "has none"),
        (["ask", "RED", "What?", "--bogus"], "--bogus"),
        (["anatomy", "nowhere"], "'nowhere'"),
        (["anatomy", "pebble", "too"], "too"),
        (["frobnicate"], "frobnicate"),
        (["memory", "nowhere"], "'nowhere'"),
        (["memory", "pebble", "--plan", "nf5"], "'nf4'"),
        (["memory", "pebble", "--images", "some"], "--images"),
        (["memory", "pebble", "--image-size", "1024"], "WIDTHxHEIGHT"),
        (["memory", "pebble", "--budget", "8 apples"], "'8 apples'"),
        (["memory", "pebble", "--budget", "-8 GB"], "'-8 GB'"),
        (["memory", "pebble", "--budget", "4090"], "'RTX 4090'"),
        (["memory", "pebble", "--budget", "NVIDIA GeForce RTX 3090"], "'RTX 3090'"),
        (["memory", "pebble", "--plan", "4bit"], "'nf4'"),
        (["memory", "pebble", "--train", "qlora"], "QLoRA is"),
        (["fit", "Qwen/Qwen2.5-VL-7B", "--card", "T4"], "'Qwen/Qwen2.5-VL-7B-Instruct'"),
        (["fit", "pebble", "--card", "24"], "'48 GB'"),
        (["memory", "pebble", "--rank", "4"], "--train"),
        (["memory", "pebble", "--train", "full", "--rank", "4"], "--train"),
        (["memory", "pebble", "--train", "visionencoder=full"], "'vision_encoder'"),
        (["fit", "--model", "pebble", "--gpu", "RTX 4091"], "'RTX 4090'"),
        (["fit", "--model", "pebble", "--figure", "/nowhere/a.png"], "/nowhere/a.png"),
        (["fit", "--model", "pebble", "--figure", "a.words"], "words"),
        (["fit", "pebble"], "--card"),
        (["fit", "pebble", "--card", "T4", "--card", "L4"], "one card"),
        (["fit", "pebble", "--card", "RTX 4091"], "'RTX 4090'"),
        (["fit", "pebble", "--card", "T4", "--plan", "nf4", "--plan", "int8"], "several plans"),
        (["fit", "pebble", "--card", "T4", "--only", "lod"], "'load'"),
        (["fit", "--only", "load"], "one model"),
        (["lint"], "MODEL"),
        (["lint", "pebble"], "none was given"),
        (["lint", "pebble", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(words, says, red, llava, capsys):
    stand_for = {"RED": red, "LLAVA": str(llava)}
    assert run(*(stand_for.get(word, word) for word in words)) == 2
    out, err = capsys.readouterr()
    assert says in err and "Traceback" not in out + err
    assert err.count("\n") <= 3


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys\ntry: import runpy; runpy.run_module('vlmkit', run_name='__main__')\n"
    code += "finally: print(*sys.modules, sep='\\n')"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=HERE, capture_output=True, text=True
    )
    assert time.perf_counter() - start < 5
    assert "Usage: python -m vlmkit" in done.stdout
    heavy = {"torch", "transformers", "numpy", "PIL", "pandas", "matplotlib", "datasets"}
    assert not heavy & set(done.stdout.splitlines())


@pytest.mark.parametrize("command", ["ask", "anatomy", "memory", "fit", "lint", "doctor"])
def test_each_command_has_examples_in_its_help_and_they_parse(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    lines = text.partition("Examples:")[2].replace("\\\n", " ").splitlines()
    examples = [line.split("#")[0] for line in lines if line.strip().startswith("vlmkit ")]
    assert examples
    parser = typer.main.get_command(cli.app).commands[command]
    for example in examples:
        program, name, *words = shlex.split(example)
        assert (program, name) == ("vlmkit", command)
        parser.make_context(command, words)  # raises on what it does not know


def test_the_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vlmkit {vk.__version__}\n"


# --- memory, fit, lint ---------------------------------------------------------------------------

NAME = "Qwen/Qwen2-VL-2B-Instruct"
PLAN = "vision_encoder=int8,language_model=nf4"


def printed(capsys):
    """What was printed, as JSON: the whole of it."""
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_memory_as_text_and_as_json(capsys):
    words = ["memory", NAME, "--plan", PLAN, "--tokens", 32, "--train", "lora", "--rank", 4]
    training = {"language_model": vk.LoRA(r=4)}
    ledger = vk.memory.predict(NAME, PLAN, tokens=32, training=training)
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for kind, size in ledger.by_kind.items():
        (line,) = (line for line in out.splitlines() if re.match(rf"{kind}( \*)?  ", line))
        assert line.endswith(f" {size / 10**6:,.3f}"), line
    assert run(*words, "--json") == 0
    document = printed(capsys)
    assert document["total"] == ledger.total
    assert document["by_component"] == ledger.by_component
    assert document["by_kind"] == ledger.by_kind
    assert "fits" not in document


def test_limits_of_pixels_count(capsys):
    name = "Qwen/Qwen2-VL-2B-Instruct"
    words = ["memory", name, "--images", 1, "--image-size", "4032x3024", "--max-pixels", 200704]
    assert run(*words, "--json") == 0
    use = {"images": 1, "image_size": (4032, 3024), "max_pixels": 200704}
    assert printed(capsys)["total"] == vk.memory.predict(name, **use).total


@pytest.mark.parametrize(("budget", "status"), [("2 GB", 1), ("8GiB", 0), ("8000MB", 0)])
def test_a_budget_decides_the_exit_status(budget, status, capsys):
    assert run("memory", NAME, "--budget", budget) == status
    out = capsys.readouterr().out
    size = vk.memory.parse_size(budget)
    assert f"{int(size):,} bytes" in out and ("Does not fit" in out) == bool(status)
    assert run("memory", NAME, "--budget", budget, "--json") == status
    assert printed(capsys)["fits"] is not bool(status)


def test_a_card_as_budget_counts_a_gpu(capsys):
    """So `memory` and `fit` say the same about a card."""
    words = ["memory", "pebble", "--train", "lora", "--tokens", 16, "--images", 1, "--budget", "T4"]
    assert run(*words, "--json") == 0
    use = {"training": "lora", "tokens": 16, "images": 1}
    counted = vk.memory.predict("pebble", allocator="cuda", **use).total
    assert printed(capsys)["total"] == counted != vk.memory.predict("pebble", **use).total


def test_fit_as_text_as_json_and_drawn(tmp_path, capsys):
    words = [
        "fit",
        "--tokens",
        0,
        "--images",
        0,
        "--model",
        NAME,
        "--gpu",
        "T4",
        "--gpu",
        "3 GB",
        "--plan",
        "bf16",
    ]
    words += ["--plan", "nf4", "--reserve", "0.5 GB", "--figure", tmp_path / "fit.png"]
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert NAME in out and "T4" in out and "0.5 GB of each card" in out
    assert Image.open(tmp_path / "fit.png").width > 600
    assert run(*words, "--json") == 0
    rows = printed(capsys)
    assert [(row["plan"], row["gpu"], row["fits"]) for row in rows] == [
        ("bf16", "T4", True),
        ("bf16", "3 GB", False),
        ("nf4", "T4", True),
        ("nf4", "3 GB", True),
    ]
    assert rows[0]["needed"] == vk.memory.predict(NAME, "bf16", allocator="cuda").total
    assert rows[1]["usable"] == 2_500_000_000


def test_fit_of_one_model_on_one_card(capsys):
    words = ["fit", "pebble", "--card", "60 MB", "--reserve", "1 MB", "--plan", "bf16"]
    words += ["--images", 0, "--tokens", 900, "--batch-size", 2, "--only", "load"]
    words += ["--only", "prompt"]
    use = {"images": 0, "tokens": 900, "batch_size": 2, "reserved": "1 MB"}
    found = vk.memory.largest("pebble", "60 MB", "bf16", uses=["load", "prompt"], **use)
    assert run(*words) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert run(*words, "--json") == 0
    document = printed(capsys)
    assert [use["use"] for use in document["uses"]] == ["load", "prompt"]
    assert document["uses"][1]["needed"] == found["prompt"].needed
    assert document == json.loads(json.dumps(found.to_dict()))


def test_lint_says_by_its_exit_status_whether_there_is_an_error(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('{"load_in_4bit": true, "llm_int8_skip_modules": ["vision_tower"]}')
    assert run("lint", "pebble", config) == 1
    out = capsys.readouterr().out
    assert "error: not-a-substring" in out and "'model.vision_tower'" in out
    assert run("lint", "pebble", config, "--json") == 1
    assert printed(capsys)["findings"][0]["code"] == "not-a-substring"
    config.write_text('{"load_in_4bit": true}')
    assert run("lint", "pebble", config) == 0
    assert "component-quantized" in capsys.readouterr().out  # a warning, and no error


@pytest.mark.skipif(os.name == "nt", reason="signals work differently there")
def test_ctrl_c_is_quiet(red):
    """While the model is loaded. Here that takes a minute and imports nothing: if the signal comes
    inside an `exec` of text, as some imports have it, Python 3.11 ends a `python -m` by the signal
    itself, whatever the program returns. A shell shows 130 for both."""
    code = "import sys, time, vlmkit; from vlmkit.cli import main; "
    code += "vlmkit.load = lambda *_, **__: time.sleep(60); sys.exit(main(sys.argv[1:]))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [sys.executable, "-c", code, "ask", red, "What?"]
    running = subprocess.Popen(words, cwd=HERE, text=True, **pipes)
    assert running.stdout.readline().startswith("picture")  # buffered until the model is named
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err == ""


def test_a_reader_that_goes_away_is_no_error():
    running = process("anatomy")
    running.stdout.close()
    assert running.wait(timeout=60) == 0
    assert running.stderr.read() == ""
    running.stderr.close()


@pytest.mark.parametrize("sample", pictures.SAMPLES, ids=lambda sample: sample.name)
def test_bundled_pictures_are_the_draws_they_say(sample):
    """After a change of a recipe run `python -m vlmkit.course.pictures`."""
    row = sample.draw()
    assert (row["question"], row["answer"]) == (sample.question, sample.answer)
    assert np.array_equal(np.asarray(Image.open(sample.path)), np.asarray(row["images"][0]))
