"""Predicting: the ledger of a model, a prompt and a training step that are not there yet."""

import gc
from contextlib import contextmanager
from pathlib import Path

from vlmkit.adapters import parse
from vlmkit.anatomy import on_meta
from vlmkit.backend.optimizers import check_optimizer
from vlmkit.checkpoints import find
from vlmkit.errors import FinetuningError
from vlmkit.formats import torch_dtype
from vlmkit.layout import layout_of
from vlmkit.memory.demand import demand_of, smallest
from vlmkit.memory.ledger import Ledger
from vlmkit.memory.on_cuda import check_allocator, overhead
from vlmkit.memory.processors import settings_of
from vlmkit.memory.visual_tokens import picture
from vlmkit.memory.weights import predicted_weights


def predict(
    x,
    plan=None,
    *,
    revision=None,
    trust_remote_code=False,
    tokens=0,
    new_tokens=0,
    images=0,
    image_size=None,
    batch=1,
    training=None,
    checkpointing=False,
    optimizer="adamw_torch_fused",
    prepare_kbit=False,
    allocator=None,
):
    """Ledger of what `x` needs under `plan`, without reading a weight.

    x: "pebble", a folder, a hub id, a name of the catalog, a transformers config, or a model (for
        its config).
    plan: a Plan or anything that `Plan.parse` takes; None is the recommended one, or what is stored
        for a checkpoint that is quantized already.

    With these alone the ledger is that of the loaded model before it is run, to the byte:
    parameters, quantization states and buffers. With the following it is that of a prompt, or of a
    training step:

    tokens: of text in each sample, beside those of its pictures.
    new_tokens: that have gone through the model after the prompt.
    images: pictures in each sample.
    image_size: (width, height) in pixels, or a list of one for each picture; by default the vision
        encoder's own resolution, or 1024 x 768 where it takes any.
    batch: samples.
    training: what is trained, as `vlmkit.finetuning.parse` reads it: a dictionary such as
        {"projector": "full", "language_model": vk.LoRA(r=16)}, "lora" or "full".
    checkpointing: whether layers are run once more going backward, in place of keeping everything,
        as `model.activation_checkpointing_enable()` has it. That gives gradients to the input of
        every part, so that a frozen vision encoder is gone through backward as well.
    optimizer: "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit" or "paged_adamw_8bit".
    prepare_kbit: whether `peft.prepare_model_for_kbit_training` makes float32 of what is not
        quantized.
    allocator: "cuda" for a GPU: what bitsandbytes' kernels need there, and what PyTorch's caching
        allocator rounds up to and cannot hand out. Otherwise all is as on a CPU.

    Keys and values, adapters, gradients and optimizer states are to the byte too. Activations are
    bounded: what the pass needs at its peak beyond all other entries. Where gradients are not there
    yet at that moment, activations have their room, which is counted as the gradients'.

    Raises CheckpointError, AnatomyError and PlanError as `vk.load` does, SizeError and ImageError
    for sizes that cannot be or do not fit the model, FinetuningError for training that cannot be.
    """
    _require_sense(training, new_tokens, checkpointing, prepare_kbit)
    check_optimizer(optimizer)
    check_allocator(allocator)
    with _uncollected():
        layout = layout_of(
            x, plan, loadable=False, revision=revision, trust_remote_code=trust_remote_code
        )
        config = layout.config
        folder = _folder_of(x, revision)
        demand = demand_of(config, folder, tokens, new_tokens, images, image_size, batch)

        def build():
            # Some buffers follow the dtype that a model is built in: build it as loading will.
            return on_meta(config, torch_dtype(layout.load_dtype), trust_remote_code)

        model = build()
        weights, notes = list(predicted_weights(model, layout)), list(demand.notes)
        more = [], []
        if training is not None:
            from vlmkit.memory.steps import Training, training_step

            how = Training(training, checkpointing, optimizer, prepare_kbit)
            seen = demand or smallest(config, folder)
            more = training_step(
                model, build, layout, seen, how, whole=bool(demand), device=allocator
            )
        elif demand:
            from vlmkit.memory.steps import prompt

            more = prompt(model, layout, demand, device=allocator)
    entries = weights + more[0]
    if allocator is not None:
        entries += overhead(layout, weights, more[0])
    notes += more[1]
    return Ledger(f"predicted for {type(model).__name__}", tuple(entries), tuple(notes))


@contextmanager
def _uncollected():
    """Without Python's garbage collector: what a rehearsal lets go is then let go by reference
    counts alone, as its sums expect, and a large model's many objects are not gone through again
    and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def visual_tokens(x, image_size, *, alone=True, revision=None, trust_remote_code=False):
    """The Picture that `x` makes of a picture of `image_size` (width, height), as its own processor
    would: `.tokens`, `.patches` and, in words, `.why`.

    x: as for `predict`. alone: whether it is the only one of its prompt.

    Raises AnatomyError where there is no rule for the architecture, SizeError and ImageError for
    sizes that no model takes.
    """
    config = layout_of(
        x, "bf16", loadable=False, revision=revision, trust_remote_code=trust_remote_code
    ).config
    settings, _ = settings_of(config, _folder_of(x, revision))
    return picture(config, settings, image_size, alone)


def _require_sense(training, new_tokens, checkpointing, prepare_kbit):
    if training is None and (checkpointing or prepare_kbit):
        word = "checkpointing" if checkpointing else "prepare_kbit"
        raise FinetuningError(
            f"{word} is for training: say what is trained, for example training='lora'"
        )
    if training is not None and new_tokens:
        raise FinetuningError("a training step generates nothing: leave new_tokens out")
    if training is not None:
        parse(training)


def _folder_of(x, revision):
    """The folder of a checkpoint's files, or None for a config, or a model from one."""
    if hasattr(x, "model_type") or hasattr(x, "config"):
        name = getattr(x, "name_or_path", None)
        return name if name and Path(name).is_dir() else None
    return find(x, revision=revision, weights=False)
