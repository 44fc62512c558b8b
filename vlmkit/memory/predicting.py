"""Predicting: the ledger of a model, a prompt and a training step that do not exist yet."""

import copy
from functools import cached_property
from pathlib import Path

from vlmkit.adapters import as_stored, parse
from vlmkit.anatomy import component_finder, on_meta
from vlmkit.backend import dora
from vlmkit.backend.optimizers import check_optimizer
from vlmkit.backend.quiet import without_garbage_collection
from vlmkit.checkpoints import adapters_of, find
from vlmkit.errors import FinetuningError, SizeError, did_you_mean, public
from vlmkit.families import LIMITS
from vlmkit.formats import torch_dtype
from vlmkit.headers import mismatch
from vlmkit.layout import layout_of
from vlmkit.loading.placing import set_attention
from vlmkit.memory.allocator import CachingAllocator, check_allocator, loaded, overhead
from vlmkit.memory.batch import batch_of, picture_of, smallest
from vlmkit.memory.cards import FSDP, check_cards, note_on, on_cards
from vlmkit.memory.ledger import Ledger
from vlmkit.memory.parameters import predicted_weights
from vlmkit.memory.stored import loadable, stored
from vlmkit.memory.training_state import adapter_entries

OTHER_NAMES = {
    "batch": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "optimizer": "optim",
    "max_new_tokens": "new_tokens",
    "frames": "num_frames",
    "videos": "num_frames",
    "device": "allocator",
}
"""Earlier names of arguments, and names from other libraries -> ours."""


@public
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
    num_frames=0,
    batch_size=1,
    training=None,
    gradient_checkpointing=False,
    optim="adamw_torch_fused",
    prepare_kbit=False,
    bf16=True,
    allocator=None,
    attn_implementation=None,
    gpus=1,
    shard=None,
    **limits,
):
    """Ledger of what `x` needs under `plan`, without reading a weight.

    x: "pebble", a folder, a hub id, a name of the catalog, a transformers config, or a model (for
        its config).
    plan: a Plan or anything that `Plan.parse` takes. None is the recommended plan, or what is
        stored if the checkpoint is quantized already. If vlmkit cannot load what is stored (AWQ,
        GGUF, …), the ledger without a plan is that of `vlmkit.memory.stored`: the bytes of the
        weights as they lie in the files. A prompt or a training step needs a plan then.

    With these arguments alone, the ledger is that of the loaded model before it runs, to the byte:
    parameters, quantization states and buffers, and the adapters of a checkpoint that has some, as
    cobble-chat has. A training step is that of a model without them, since
    `vk.finetuning.add_adapters` wants them taken off. The next arguments add a prompt, or a
    training step:

    tokens: tokens of text in each sample, beside those of its pictures.
    new_tokens: tokens that have gone through the model after the prompt. Florence-2's decoder,
        which writes apart from the prompt, begins with one token of its own.
    images: pictures in each sample.
    image_size: (width, height) in pixels of each picture and frame, or a list of one for each
        picture and one more for the video. By default it is the vision encoder's own resolution, or
        1024 x 768 if the encoder takes any.
    num_frames: frames of a video in each sample, as many as the processor keeps of the film. 0 is
        no video. It has no sound.
    batch_size: samples.
    training: what is trained, as `vlmkit.adapters.parse` reads it: a dictionary such as
        {"projector": "full", "language_model": vk.LoRA(r=16)}, or "lora" or "full".
    gradient_checkpointing: whether the backward pass runs layers again, so that they need not keep
        everything (transformers' `gradient_checkpointing`, with use_reentrant=False). With
        prepare_kbit the input of every part gets gradients, as peft makes them, and the backward
        pass also goes through a frozen vision encoder.
    optim: the optimizer, by transformers' name: "adamw_torch_fused", "adamw_8bit",
        "paged_adamw_32bit" or "paged_adamw_8bit".
    prepare_kbit: whether `peft.prepare_model_for_kbit_training` makes everything float32 that is
        not quantized.
    bf16: whether a training step computes under autocast, as `vk.finetuning.train` does by default.
        On a CPU it then computes attention in the plain way, as that does. With fp16 in the plan a
        training takes bf16=False only, and that is predicted.
    allocator: "cuda" for a GPU: what bitsandbytes' kernels need there, and what PyTorch's caching
        allocator rounds up to and cannot give out. Otherwise everything is as on a CPU.
    attn_implementation: as for `vk.load`. By default it is what `vk.load` uses by default ("sdpa"
        where the model has it), or that of a model `x`. "eager" keeps a matrix of all positions by
        all positions for each head, so its activations are larger.
    gpus: cards that share the model. With more than one the result is a `vlmkit.memory.Cards`: a
        Ledger of each card, and by itself that of the fullest.
    shard: how they share it. "layers" is transformers' `device_map="auto"`: each card has some of
        the layers. It is the default for loading and for a prompt. "fsdp" is FSDP2 through
        accelerate, with the layers of the model's `_no_split_modules` as units; each card takes
        `batch_size` samples. It is the default for training.
    limits: min_pixels, max_pixels, size, … as for `vk.load`: they change the visual tokens of a
        picture and of a video, see `vlmkit.families.with_limits`.

    If the weight files of `x` are here and hold other weights than config.json says, a note of the
    ledger says so: the ledger is that of config.json.

    Keys and values, adapters, gradients and optimizer states are exact to the byte too. Activations
    are bounded: they are what the pass needs at its peak beyond all other entries, without what
    PyTorch's kernels take for themselves on some CPUs (see `vlmkit.memory.tracker`). If the
    gradients do not exist yet at that moment, activations may use their room, which counts as the
    gradients'.

    Raises CheckpointError, AnatomyError and PlanError as `vk.load` does; SizeError and ImageError
    for sizes that are impossible or do not fit the model; SizeError for an unknown argument;
    FinetuningError for training that is impossible.
    """
    check_arguments(limits)
    _check_training(training, new_tokens, gradient_checkpointing, prepare_kbit)
    check_optimizer(optim)
    check_allocator(allocator)
    shard = check_cards(gpus, shard, training, tokens or images or num_frames)
    use = (tokens, new_tokens, images, num_frames, training, allocator, shard)
    if plan is None and not any(use) and isinstance(x, (str, Path)) and not loadable(x, revision):
        return stored(x, revision=revision, trust_remote_code=trust_remote_code)
    model = Predictor(x, plan, revision, trust_remote_code, allocator, attn_implementation)
    return model.ledger(
        tokens=tokens, new_tokens=new_tokens, images=images, image_size=image_size,
        batch_size=batch_size, training=training, gradient_checkpointing=gradient_checkpointing,
        optim=optim, prepare_kbit=prepare_kbit, bf16=bf16, num_frames=num_frames, gpus=gpus,
        shard=shard, **limits,
    )  # fmt: skip


class Predictor:
    """The predictions for one model under one plan, which share what it is made of. Arguments: as
    for `predict`, without its checks."""

    def __init__(self, x, plan, revision, trust_remote_code, allocator, attn_implementation=None):
        self.x, self.revision, self.allocator = x, revision, allocator
        self.trust_remote_code, self.on_cards = trust_remote_code, {}
        with without_garbage_collection():
            self.layout = layout_of(
                x, plan, loadable=False, revision=revision, trust_remote_code=trust_remote_code
            )
            self.config = self.layout.config
            if attn_implementation is not None:
                self.config = copy.deepcopy(self.config)  # it can be the caller's
                set_attention(self.config, attn_implementation, trust_remote_code)
            self.folder = folder_of(x, revision)

    def build(self):
        """The model on the meta device. Some buffers follow the dtype that it is built in: it is
        built as loading will."""
        dtype = torch_dtype(self.layout.load_dtype)
        return on_meta(self.config, dtype, self.trust_remote_code)

    @cached_property
    def weights(self):
        """(title, entries of the weights, notes on a config that does not belong to its files)."""
        model = self.build()
        entries = tuple(predicted_weights(model, self.layout))
        # A config can have been changed on purpose; one that is read from a folder has not.
        lies = mismatch(self.folder, model) if isinstance(self.x, (str, Path)) else ()
        return f"predicted for {type(model).__name__}", entries, tuple(lies)

    @cached_property
    def adapters(self):
        """Entries of the checkpoint's adapters."""
        folder = _adapters_of(self.x, self.revision)
        if folder is None:
            return ()
        model = as_stored(self.build(), folder)
        return tuple(adapter_entries(dict(model.named_parameters()), component_finder(model)))

    @cached_property
    def runs(self):
        from vlmkit.memory.steps import DryRuns

        return DryRuns(self.build, self.layout, self.allocator, _adapters_of(self.x, self.revision))

    @cached_property
    def load(self):
        """(the allocator after a load, bytes of its blocks by component)."""
        cuda = CachingAllocator()
        return cuda, loaded(cuda, self.layout)

    def batch(self, *use):
        """The Batch of a use. See `vlmkit.memory.batch.batch_of`."""
        return batch_of(self.config, self.folder, *use)

    def ledger(
        self, *, tokens=0, new_tokens=0, images=0, image_size=None, batch_size=1, training=None,
        gradient_checkpointing=False, optim="adamw_torch_fused", prepare_kbit=False, bf16=True,
        num_frames=0, gpus=1, shard=None,
        **limits,
    ):  # fmt: skip
        """The Ledger of a use."""
        with without_garbage_collection(), dora.without_data():
            batch = self.batch(
                tokens, new_tokens, images, image_size, batch_size, limits, num_frames
            )
            title, weights, lies = self.weights
            entries, notes, how, seen = (), (), None, batch
            if training is not None:
                from vlmkit.memory.steps import Training

                bf16 = bf16 and not any(row.format == "fp16" for row in self.layout.rows)
                how = Training(training, gradient_checkpointing, optim, prepare_kbit, bf16)
                seen = batch or smallest(self.config, self.folder, limits)
            if gpus > 1:
                return self._cards(gpus, shard, batch, seen, how)
            if how is not None:
                entries, notes = self.runs.training_step(seen, how, whole=bool(batch))
            else:
                if batch:
                    entries, notes = self.runs.prompt(batch)
                entries = [*entries, *self.adapters]
            more = [] if self.allocator is None else overhead(self.load, weights, entries)
        return Ledger(title, (*weights, *entries, *more), (*batch.notes, *notes, *lies))

    def _runs_on(self, gpus, shard):
        """The dry runs on `gpus` cards."""
        if (gpus, shard) not in self.on_cards:
            given = self.build, self.layout, gpus, self.allocator
            if shard == FSDP:
                from vlmkit.memory.fsdp import ShardedRuns

                self.on_cards[gpus, shard] = ShardedRuns(*given)
            else:
                from vlmkit.memory.layered import PlacedRuns

                adapters = _adapters_of(self.x, self.revision)
                self.on_cards[gpus, shard] = PlacedRuns(*given, adapters)
        return self.on_cards[gpus, shard]

    def _cards(self, gpus, shard, batch, seen, how):
        """The Cards of a use."""
        (title, weights, lies), runs = self.weights, self._runs_on(gpus, shard)
        notes = ()
        if how is not None:
            found, notes = runs.steps(seen, how, weights, whole=bool(batch))
        elif shard == FSDP:
            found = [runs.weights(weights) for _ in range(gpus)]
        else:
            found = runs.prompts(batch) if batch else [[] for _ in range(gpus)]
            for entry in (*weights, *self.adapters):
                found[runs.card_of(entry.name)].append(entry)
        notes = [*batch.notes, note_on(shard, gpus), *notes, *lies]
        return on_cards(title, found, notes, runs.loads if self.allocator else None)


def check_arguments(unknown):
    """Raises SizeError for arguments that `predict` does not have, with the right names."""
    known = (*predict.__wrapped__.__kwdefaults__, *LIMITS)
    for name in set(unknown) - set(LIMITS):
        hint = did_you_mean(OTHER_NAMES.get(name, name), known)
        raise SizeError(
            f"{name!r} is not an argument of predict. {hint}The arguments are {', '.join(known)}."
        )


@public
def visual_tokens(
    x, image_size, *, num_frames=0, alone=True, revision=None, trust_remote_code=False, **limits
):
    """The Picture that `x` makes of a picture of `image_size` (width, height), as its own processor
    would: `.tokens`, `.patches` and, in words, `.why`.

    x, limits: as for `predict`. num_frames: of a video whose frames have this size, or 0. alone:
        whether it is the only picture of its prompt.

    Raises AnatomyError if vlmkit has no rule for the architecture, SizeError and ImageError for
    sizes that no model takes, and for a video if the model takes none.
    """
    check_arguments(limits)
    config = layout_of(
        x, "bf16", loadable=False, revision=revision, trust_remote_code=trust_remote_code
    ).config
    return picture_of(config, folder_of(x, revision), image_size, alone, limits, num_frames)[0]


def _check_training(training, new_tokens, gradient_checkpointing, prepare_kbit):
    if training is None and (gradient_checkpointing or prepare_kbit):
        word = "gradient_checkpointing" if gradient_checkpointing else "prepare_kbit"
        raise FinetuningError(
            f"{word} is for training: say what is trained, for example training='lora'"
        )
    if training is not None and new_tokens:
        raise FinetuningError("a training step generates nothing: leave new_tokens out")
    if training is not None:
        parse(training)


def _adapters_of(x, revision):
    """The folder with the adapters of a checkpoint, or None."""
    is_name = not (hasattr(x, "model_type") or hasattr(x, "config"))
    return adapters_of(x, revision=revision) if is_name else None


def folder_of(x, revision):
    """The folder of a checkpoint's files, or None for a config, or a model from one."""
    if hasattr(x, "model_type") or hasattr(x, "config"):
        name = getattr(x, "name_or_path", None)
        return name if name and Path(name).is_dir() else None
    return find(x, revision=revision, weights=False)
