"""Bad input of every kind: a VlmkitError that says what to do, in a few seconds, or it works.

Each case is a function of a fresh folder. The limit is on the clock of the process, so that a busy
machine does not fail it, but a loop or a large allocation does.
"""

import functools
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vlmkit as vk
from vlmkit import cli
from vlmkit.errors import UnexpectedError, VlmkitError

SLOW = pytest.mark.slow
CASES = {}


def case(name, function):
    assert name not in CASES
    CASES[name] = function


@functools.cache
def template():
    """A tiny checkpoint, made once."""
    import tempfile

    import tiny

    return tiny.llava(Path(tempfile.mkdtemp()))


def a_copy(tmp):
    return Path(shutil.copytree(template(), tmp / "model"))


def load(folder, plan="bf16", **more):
    return vk.load(folder, plan, **more)


# --- config.json ----------------------------------------------------------------------------------


def with_config(change, call=load):
    def run(tmp):
        folder = a_copy(tmp)
        config = json.loads((folder / "config.json").read_text())
        config = change(config) or config
        (folder / "config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
        return call(folder)

    return run


def put(*path, value):
    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


LAYERS = ("text_config", "num_hidden_layers")
CONFIGS = {
    "a billion layers": put(*LAYERS, value=10**9),
    "2,000 layers": put(*LAYERS, value=2000),
    "a billion vision layers": put("vision_config", "num_hidden_layers", value=10**9),
    "3 layers of 2": put(*LAYERS, value=3),
    "1 layer of 2": put(*LAYERS, value=1),
    "0 layers": put(*LAYERS, value=0),
    "-1 layers": put(*LAYERS, value=-1),
    "layers as text": put(*LAYERS, value="2"),
    "layers as a list": put(*LAYERS, value=[2]),
    "layers null": put(*LAYERS, value=None),
    "layers 1.5": put(*LAYERS, value=1.5),
    "a billion labels": put("num_labels", value=10**9),
    "wide": put("text_config", "hidden_size", value=2**20),
    "vocabulary of a billion": put("text_config", "vocab_size", value=10**9),
    "hidden size of 10**30": put("text_config", "hidden_size", value=10**30),
    "heads 0": put("text_config", "num_attention_heads", value=0),
    "heads 7": put("text_config", "num_attention_heads", value=7),
    "no text_config": lambda c: c.pop("text_config") and None,
    "no vision_config": lambda c: c.pop("vision_config") and None,
    "text_config a list": put("text_config", value=[]),
    "text_config null": put("text_config", value=None),
    "text_config a text": put("text_config", value="llama"),
    "text_config of another type": put("text_config", "model_type", value="mamba"),
    "text_config of no type": put("text_config", "model_type", value=["llama"]),
    "model_type a list": put("model_type", value=["llava"]),
    "model_type a dict": put("model_type", value={"a": 1}),
    "model_type a number": put("model_type", value=5),
    "model_type null": put("model_type", value=None),
    "model_type long": put("model_type", value="x" * 100_000),
    "model_type of a text model": put("model_type", value="llama"),
    "image_size huge": put("vision_config", "image_size", value=10**9),
    "image_size text": put("vision_config", "image_size", value="big"),
    "patch_size 0": put("vision_config", "patch_size", value=0),
    "dtype unknown": put("dtype", value="bfloat17"),
    "dtype a number": put("dtype", value=5),
    "rope unknown": put("text_config", "rope_parameters", value={"rope_type": "none such"}),
    "activation unknown": put("text_config", "hidden_act", value="none such"),
    "quantization_config a text": put("quantization_config", value="nf4"),
    "quantization_config a list": put("quantization_config", value=[1]),
    "quantization_config empty": put("quantization_config", value={"quant_method": None}),
    "quantization_config awq": put("quantization_config", value={"quant_method": "awq"}),
    "quantization_config that lies": put(
        "quantization_config", value={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "auto_map": lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "a.B"}),
    "deeply nested": lambda c: '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested 900 deep": lambda c: put("x", value=json.loads("[" * 400 + "]" * 400))(c),
    "empty": lambda c: " ",
    "cut": lambda c: json.dumps(c)[:-9],
    "a list": lambda c: "[]",
    "null": lambda c: "null",
    "NaN": lambda c: '{"model_type": NaN}',
    "a huge number": lambda c: '{"model_type": ' + "9" * 5000 + "}",
    "not utf-8": lambda c: "\udcff",
}
for name, change in CONFIGS.items():
    if name == "not utf-8":
        continue
    case(f"config: {name}: load", with_config(change))
for name in ("a billion layers", "no text_config", "model_type a list", "deeply nested", "wide"):
    case(f"config: {name}: memory", with_config(CONFIGS[name], vk.memory.predict))
    case(f"config: {name}: anatomy", with_config(CONFIGS[name], vk.anatomy))

# --- other files ----------------------------------------------------------------------------------


def with_file(name, content, call=load):
    def run(tmp):
        folder = a_copy(tmp)
        file = folder / name
        if file.exists():
            file.unlink()
        if content is None:
            os.mkfifo(file)
        elif content is FOLDER:
            file.mkdir()
        elif content is not MISSING:
            file.write_bytes(content)
        return call(folder)

    return run


FOLDER, MISSING = object(), object()
CONTENTS = {
    "a pipe": None, "a folder": FOLDER, "missing": MISSING, "empty": b"", "text": b"hello",
    "null": b"null", "a list": b"[1]", "an empty object": b"{}", "not utf-8": b"\xff\xfe{",
    "deeply nested": b"[" * 200_000,
}  # fmt: skip
for file in (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
):  # fmt: skip
    for name, content in CONTENTS.items():
        case(f"{file}: {name}", with_file(file, content))


def with_index(text):
    def run(tmp):
        folder = a_copy(tmp)
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)
        return load(folder)

    return run


for name, value in {
    "list": [], "null": None, "text": "x", "number": 5, "empty": {}, "long": {"a": "x" * 5000},
    "of numbers": {"a": 5}, "of lists": {"a": ["x"]}, "above": {"a": "../part.safetensors"},
    "absolute": {"a": "/etc/passwd"}, "missing": {"a": "b.safetensors"}, "zero": {"a": "a\0b"},
    "folder": {"a": "."},
}.items():  # fmt: skip
    case(f"index: weight_map {name}", with_index(json.dumps({"weight_map": value})))
for name, text in {"no map": "{}", "list": "[]", "cut": '{"weight', "nested": "[" * 10**5}.items():
    case(f"index: {name}", with_index(text))


def with_weights(change):
    def run(tmp):
        from safetensors.torch import load_file, save_file

        folder = a_copy(tmp)
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})
        return load(folder)

    return run


def renamed(tensors, **types):
    import torch

    return {
        n: t.view(torch.int16) if t.element_size() == 2 else t.int() for n, t in tensors.items()
    }


case("weights: integers", with_weights(renamed))
case("weights: none", with_weights(lambda t: {}))
case("weights: other names", with_weights(lambda t: {f"x.{n}": v for n, v in t.items()}))
case("weights: long names", with_weights(lambda t: {n + "x" * 5000: v for n, v in t.items()}))
case("weights: half of them", with_weights(lambda t: dict(list(t.items())[::2])))
case("weights: flat", with_weights(lambda t: {n: v.flatten() for n, v in t.items()}))
case("weights: bytes", with_weights(lambda t: {n: v.byte() for n, v in t.items()}))

# --- names, plans, devices ------------------------------------------------------------------------

for name in (
    None, 5, b"pebble", [], {}, "", " ", ".", "/", "x" * 5000, "a/" + "b" * 5000, "a\0b", "~nobody",
    "../..", "a/b/c/d", "/etc/passwd", "pebbles", "\ud800", "-/-", "☃", float("nan"),
):  # fmt: skip
    shown = repr(name)[:20]
    case(f"name: {shown}", lambda tmp, name=name: load(name))
    case(f"name: {shown}: memory", lambda tmp, name=name: vk.memory.predict(name))
for plan in (
    5,
    b"nf4",
    [],
    "nf5",
    "a=b",
    "language_model=",
    "=",
    "language_model=nf4," * 2,
    "x" * 9999,
):
    case(f"plan: {repr(plan)[:30]}", lambda tmp, plan=plan: vk.preview("pebble", plan))
for pattern, format in (
    (None, "bf16"), (b"x", "bf16"), (5, "bf16"), ("x", None), ("x", []), ("x", b"nf4"),
    ("(", "nf4"),
    ("(" * 10**5, "bf16"), ("a{99999999999}", "bf16"), (r"(\w+\.?)+!", "bf16"), ("", "nf4"),
    (r"(.*)*(.*)*(.*)*\d\d\d", "bf16"), (r"((\w|\.)+)+[!]", "bf16"), (r"(?:\w*\.*)*$x", "bf16"),
    ("x" * 10**5, "bf16"), ("[", "bf16"), ("(?P<a>", "bf16"), ("\\", "bf16"), ("*", "bf16"),
):  # fmt: skip
    case(
        f"override: {repr(pattern)[:30]} {format}",
        lambda tmp, p=pattern, f=format: vk.preview("pebble", vk.Plan().override(p, f)),
    )
for device in ("gpu", "cuda:99", 5, [], b"cpu", "meta", "", "cpu:9", "mps"):
    case(f"device: {device!r}", lambda tmp, d=device: load("pebble", device=d))
for entries in (
    ["re:.*visual.*"], [".*vision.*"], [r"(\w+\.?)+!"], ["("], ["*"], [None], [5], "x", {}, [""],
    [[]], ["x" * 10**5], [".*.*.*.*.*.*.*.*.*.*!"],
):  # fmt: skip
    config = {"load_in_4bit": True, "llm_int8_skip_modules": entries}
    case(f"lint: {repr(entries)[:30]}", lambda tmp, c=config: vk.lint("pebble", c))
for config in (5, [], {}, "none.json", "/", "x" * 5000, "/dev/null", b"x", {"quant_method": "quip"},
               {"load_in_4bit": "yes"}, {"load_in_4bit": True, "bnb_4bit_compute_dtype": 5},
               {"load_in_4bit": True, "bnb_4bit_quant_type": []}):  # fmt: skip
    case(f"lint: config {repr(config)[:40]}", lambda tmp, c=config: vk.lint("pebble", c))

# --- sizes ----------------------------------------------------------------------------------------

for use in (
    {"images": 10**6}, {"images": 10**18}, {"images": -1}, {"images": 1.5}, {"images": "2"},
    {"tokens": 10**18}, {"tokens": None}, {"batch_size": 0}, {"batch_size": 10**30},
    {"images": 1, "image_size": (10**9, 10**9)}, {"images": 1, "image_size": "x"},
    {"images": 1, "image_size": (0, 0)}, {"images": 1, "image_size": (None, 1)},
    {"images": 1, "image_size": {}}, {"images": 1, "image_size": [(3, 3)] * 10**5},
    {"training": 5}, {"training": {"x": "full"}}, {"training": "lora", "optim": None},
    {"training": {"language_model": "half"}}, {"nonsense": 1}, {"allocator": 5},
):  # fmt: skip
    case(f"memory: {repr(use)[:50]}", lambda tmp, u=use: vk.memory.predict("pebble", **u))
for gpus in (["x"], [None], [5.5], [b"8 GB"], ["8,0 GB"], [-1], "T4", [[]]):
    case(f"fit: {gpus!r}", lambda tmp, g=gpus: vk.fit(["pebble"], gpus=g, tokens=0, images=0))

# --- folders to write to --------------------------------------------------------------------------


def save_to(make):
    def run(tmp):
        model, processor = load(template())
        return vk.save(model, processor, make(tmp))

    return run


def a_file(tmp):
    (tmp / "file").write_text("")
    return tmp / "file"


def a_link_to_nothing(tmp):
    (tmp / "link").symlink_to(tmp / "nothing")
    return tmp / "link"


def a_pipe(tmp):
    os.mkfifo(tmp / "pipe")
    return tmp / "pipe"


for name, make in {
    "a file": a_file, "below a file": lambda tmp: a_file(tmp) / "x", "a pipe": a_pipe,
    "a link to nothing": a_link_to_nothing, "/": lambda tmp: "/", "/proc/x": lambda tmp: "/proc/x",
    "/dev/null": lambda tmp: "/dev/null", "None": lambda tmp: None, "a number": lambda tmp: 5,
    "too long": lambda tmp: tmp / ("x" * 5000), "a zero byte": lambda tmp: f"{tmp}/a\0b",
    "bytes": lambda tmp: bytes(tmp), "~nobody": lambda tmp: "~nobody-of-this-name/x",
    "not empty": lambda tmp: [a_file(tmp), tmp][1],
}.items():  # fmt: skip
    case(f"save to {name}", save_to(make))
for thing in (None, 5, "pebble", []):
    case(f"audit: {thing!r}", lambda tmp, t=thing: vk.audit(t, "bf16"))
    case(f"save: {thing!r}", lambda tmp, t=thing: vk.save(t, None, tmp / "out"))
    case(
        f"finetuning.load: {thing!r}", lambda tmp, t=thing: vk.finetuning.load(load("pebble")[0], t)
    )

# --- the test -------------------------------------------------------------------------------------

SECONDS = 10  # of the processor
MEMORY = 2 * 10**9  # bytes beyond what was taken before
FORESEEN = ("name", "plan", "override", "memory", "index", "fit")
UNUSED = ("a folder", "missing", "empty", "text", "null", "a list", "an empty object", "not utf-8",
          "deeply nested")  # fmt: skip
WORKS = {
    "config: quantization_config that lies: load",  # the headers of the weights say what is stored
    "config: nested 900 deep: load",
    *(f"config: {name}: {call}" for name in ("no text_config", "wide")
      for call in ("memory", "anatomy")),  # they read the config alone
    "generation_config.json: missing", "generation_config.json: an empty object",
    *(f"preprocessor_config.json: {name}" for name in UNUSED),  # processor_config.json is used
    "tokenizer_config.json: a folder", "tokenizer_config.json: missing",
    "tokenizer_config.json: an empty object",
    *(f"chat_template.jinja: {name}" for name in UNUSED if name != "not utf-8"),  # asking fails
    "override: '' nf4", "device: b'cpu'", "device: 'cpu:9'", "save to a link to nothing",
    *(f"lint: {repr(entries)[:30]}" for entries in (
        ["re:.*visual.*"], [".*vision.*"], ["("], ["*"], [None], [5], [""], [[]], ["x" * 10**5]
    )),  # findings
}  # fmt: skip
"""Cases that are no error: what they name is not used, or is what somebody can mean."""


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Imports are not a case's time, and limits of time need not be waited for."""
    load(template(), "nf4")
    vk.memory.predict("pebble", images=1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plan", "linting.verdicts", "evaluation.templates"):
            patch.setattr(importlib.import_module(f"vlmkit.{name}"), "SECONDS", 0.5)
        yield


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_an_error_that_says_so(name, tmp_path):
    """`UnexpectedError`, for what no check foresaw, has no advice of its own: it is a last resort,
    and none for what somebody may have typed."""
    before, taken = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        CASES[name](tmp_path)
    except VlmkitError as error:
        assert name not in WORKS
        assert 20 < len(str(error)) < 3000 and "Traceback" not in str(error)
        assert not (name.startswith(FORESEEN) and isinstance(error, UnexpectedError))
    else:
        assert name in WORKS, "nothing was said"
    assert time.process_time() - before < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken) * 1024 < MEMORY


@pytest.mark.parametrize("command", ["--version", pytest.param("memory pebble", marks=SLOW)])
@pytest.mark.parametrize(("output", "status"), [(">&-", 0), ("> /dev/full", 2)])
def test_where_a_shell_sends_the_output(command, output, status):
    words = f'"{sys.executable}" -m vlmkit {command} {output}'
    result = subprocess.run(words, shell=True, capture_output=True, text=True)
    assert result.returncode == status and "Traceback" not in result.stderr
    assert bool(result.stderr) == bool(status)


@pytest.mark.parametrize("figure", ["/", "/dev/null/x.png"])
def test_where_no_figure_can_be_written(figure, capsys):
    words = f"fit --model pebble --tokens 0 --images 0 --figure {figure}"
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err
    assert said and "Traceback" not in said
