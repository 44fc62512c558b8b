"""Train cobble's vision encoder, projectors and adapters, stage by stage.

    python -m vlmkit.models.cobble.train --photographs ../photos --device cuda

pictures         photographs, handwriting, drawings and easy-VQA, decoded once (arrays.py)
teacher          a convolutional network learns the photographs, and is not kept (vision.py)
vision_encoder   learns what the teacher sees, digits, and what is where in drawings
projector-nf4    learns to answer, with the language model frozen in NF4; other formats likewise
                 (conversations.py)
chat             adapters on the language model in NF4, and its projector, learn mixed instructions,
                 and to write as the language model did before (own_words.py)

The projectors depend on the vision encoder alone. So they can be trained side by side, each by a
call of its own with --stages. A run that was killed continues where it last saved.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import torch

from vlmkit.errors import VlmkitError, brief
from vlmkit.folders import cache_folder, write_whole
from vlmkit.models.cobble import fetching
from vlmkit.models.cobble.arrays import Arrays, prepare_pictures
from vlmkit.models.cobble.conversations import (
    load_parts,
    naming,
    round_linear_layers,
    train_chat,
    train_projector,
)
from vlmkit.models.cobble.loop import Schedule
from vlmkit.models.cobble.own_words import OwnWords, own_answers, own_texts
from vlmkit.models.cobble.vision import build_encoder, train_teacher, train_vision_encoder
from vlmkit.tasks import real

FORMATS = ("bf16", "int8", "nf4", "nf4-dq", "int3")
PROJECTORS = {f"projector-{format}": format for format in FORMATS}
SETTINGS = {
    "teacher": Schedule(3_000, 512, 2e-3, 0.05, 300),
    "vision_encoder": Schedule(9_000, 1_024, 2e-3, 0.05, 300),
    "projector": Schedule(1_200, 128, 1e-3),
    "chat": Schedule(1_000, 256, 5e-4),
}
RESULTS = {
    "pictures": "pictures",
    "teacher": "teacher.pt",
    "vision_encoder": "vision_encoder.safetensors",
    **{name: f"{name}.safetensors" for name in PROJECTORS},
    "chat": "adapters",
}
"""{stage: what it writes last}, in the order of the stages. What is there is not made again."""

NEEDS = {
    "teacher": ("pictures",),
    "vision_encoder": ("pictures",),
    **dict.fromkeys(PROJECTORS, ("pictures", "vision_encoder")),
    "chat": ("pictures", "vision_encoder", "projector-nf4"),
}
STAGES = tuple(RESULTS)


def train(folder, photos, language_model=None, device="cpu", stages=STAGES, workers=0, seed=0):
    """Run `stages` in the order of STAGES and write what they learned to `folder`.

    photos: see `tasks.real.read_photographs`. language_model: the GGUF file of SmolLM2, by default
        the one that `vlmkit fetch cobble` has put into the cache. workers: processes that draw.

    A folder of a run that was killed continues it. Raises VlmkitError before anything is trained if
    a stage needs the result of another one, or the language model, and it is not there.
    """
    device = _device(device)
    todo = [stage for stage in STAGES if stage in stages and not (folder / RESULTS[stage]).exists()]
    _require_earlier_stages(folder, todo)
    language_model = Path(language_model or cache_folder() / fetching.GGUF)
    if any(stage == "chat" or stage in PROJECTORS for stage in todo):
        _require_language_model(language_model)
    folder.mkdir(parents=True, exist_ok=True)
    if "pictures" in todo:
        prepare_pictures(folder, photos, workers)
    pictures = Arrays(folder, device)
    for stage in todo:
        if stage == "teacher":
            train_teacher(folder, pictures, device, seed, SETTINGS["teacher"])
        elif stage == "vision_encoder":
            _vision_encoder(folder, pictures, device, seed)
        elif stage in PROJECTORS:
            _projector(stage, folder, pictures, language_model, device, seed)
        elif stage == "chat":
            _chat(folder, pictures, language_model, device, seed)


def _vision_encoder(folder, pictures, device, seed):
    teacher = train_teacher(folder, pictures, device, seed, SETTINGS["teacher"])
    encoder, settings = build_encoder(seed).to(device), SETTINGS["vision_encoder"]
    train_vision_encoder(folder, encoder, pictures, device, seed, settings, teacher)
    weights = encoder.to(torch.bfloat16).state_dict()
    weights = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
    _save(folder, "vision_encoder", weights)


def _projector(stage, folder, pictures, language_model, device, seed):
    model, tokenizer = load_parts(folder, language_model, device, language=PROJECTORS[stage])
    weights = train_projector(
        folder, model, pictures, tokenizer, device, SETTINGS["projector"], stage, seed
    )
    _save(folder, stage, weights)
    _report(stage, model, tokenizer, pictures)


def _chat(folder, pictures, language_model, device, seed):
    from safetensors.torch import load_file

    model, tokenizer = load_parts(folder, language_model, device)
    answers = own_answers(folder / "own_answers.json", model, tokenizer)
    texts = own_texts(folder / "own_texts.pt", model, seed)
    settings, reference = SETTINGS["chat"], copy.deepcopy(model.model.language_model)
    words = OwnWords(reference, tokenizer, answers, texts, settings.batch_size)
    round_linear_layers(model.model.language_model, "nf4")
    weights = load_file(folder / RESULTS["projector-nf4"])
    model.model.multi_modal_projector.load_state_dict(weights)
    adapted = train_chat(folder, model, pictures, tokenizer, device, settings, answers, words, seed)
    _report("chat", adapted, tokenizer, pictures)


def _save(folder, stage, weights):
    from safetensors.torch import save_file

    write_whole(folder / RESULTS[stage], lambda path: save_file(weights, path))


def _report(stage, model, tokenizer, pictures):
    share, n = naming(model, tokenizer, pictures)
    print(f"{stage}: {share:.3f} of {n:,} test photographs named", flush=True)


def _device(name):
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise VlmkitError(f"The device {name!r} cannot be used: {brief(error)}") from error


def _require_earlier_stages(folder, todo):
    for stage in todo:
        for earlier in NEEDS.get(stage, ()):
            if earlier not in todo and not (folder / RESULTS[earlier]).exists():
                raise VlmkitError(
                    f"The stage {stage} needs {folder / RESULTS[earlier]}, which does not exist. "
                    f"The stage {earlier} writes it: --stages {earlier} {stage}"
                )


def _require_language_model(file):
    if not file.is_file():
        raise VlmkitError(
            f"There is no language model {file}. Run `vlmkit fetch cobble`, or name the file "
            f"{fetching.GGUF} with --language-model."
        )
    if not fetching.is_language_model(file):
        raise VlmkitError(
            f"{file} is not the language model that cobble is made for. That is {fetching.GGUF} of "
            f"{fetching.PACKAGE}: run `vlmkit fetch cobble`."
        )


def main(argv=None):
    """Train as the command line says. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmkit.models.cobble.train", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("runs/cobble"), help="where to write")
    parser.add_argument(
        "--photographs", default=real.HUB, help="a folder, or a data set on the hub"
    )
    parser.add_argument(
        "--language-model", type=Path, help="the GGUF file of SmolLM2, by default the fetched one"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    try:
        train(
            given.output,
            given.photographs,
            given.language_model,
            given.device,
            given.stages,
            given.workers,
            given.seed,
        )
    except VlmkitError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written to
        print(f"{parser.prog}: {given.output} cannot be written: {brief(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
