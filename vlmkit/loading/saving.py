"""Saving: a loaded model on disk, whole or not at all, and the same when it comes back.

    vk.save(model, processor, "my-model")
    model, processor = vk.load("my-model")        # bit for bit, audited

The folder is an ordinary checkpoint. config.json lists the full names of the modules that are not
quantized, so that transformers alone loads it under the same plan:

    AutoModelForImageTextToText.from_pretrained("my-model")

A model with int8 and a 4-bit format needs one more line before that, `import
vlmkit.backend.mixed`. Without it transformers stops at the weights that it cannot place. Several
4-bit formats need no such line, because the scales of each layer say which format it has. Where
components are held in different float formats, transformers alone reads them all in the one that
config.json names, and vlmkit reads each in its own.
"""

import contextlib
import copy
from pathlib import Path

from vlmkit.anatomy import on_meta
from vlmkit.backend.quiet import quiet
from vlmkit.checkpoints import stored_formats
from vlmkit.errors import CheckpointError
from vlmkit.folders import whole_folder
from vlmkit.formats import FORMATS, torch_dtype
from vlmkit.layout import layout_of
from vlmkit.loading.audit import audit_layout, plan_of
from vlmkit.units import MEGABYTE


def save(model, processor, path, *, overwrite=False):
    """Write `model` and `processor` to the folder `path`. Returns its pathlib.Path.

    model: one that `vk.load` returned, quantized or not; any transformers VLM whose formats a plan
        can say.
    processor: its processor; None leaves it out.
    overwrite: whether a folder that is there and not empty is replaced. It stays until the new one
        is complete, and comes back if that cannot take its place.

    All is written to a new folder beside `path`, compared with the model, and given its name at the
    end: if anything fails, a full disk for one, nothing is left at `path` that was not there.

    Raises CheckpointError if `path` is taken or cannot be written, and AuditError if the model
    holds what no plan asks for.
    """
    if hasattr(model, "peft_config"):
        raise CheckpointError(
            "the model has PEFT adapters. Merge them and save all: "
            "vk.save(model.merge_and_unload(), ...). Or use model.save_pretrained(path), "
            "which leaves out a component trained in full; vk.save(model.unload(), ...) keeps that."
        )
    layout = layout_of(model, plan_of(model))
    size = audit_layout(model, layout).total
    need = f"The model takes {size / MEGABYTE:,.2f} MB."
    with whole_folder(path, overwrite=overwrite, size=size, need=need) as folder:
        with quiet():
            _write(model, processor, folder, layout)
        _require_same(folder, layout)
    return Path(path).expanduser().resolve()


def _write(model, processor, folder, layout):
    with _ready_to_save(model):
        model.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch_dtype(layout.plan["language_model"])
    if layout.quantized:
        config.quantization_config = _config_to_store(layout)
    config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


@contextlib.contextmanager
def _ready_to_save(model):
    """Within it, `model.save_pretrained` works as it should; afterwards the model is as before."""
    kept = model.config.dtype  # save_pretrained writes that of the first parameter over it
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        # The names and shapes of a checkpoint are given back on saving by turning round what was
        # done on loading. transformers 5.23 counts the reading of scales among that, and has no
        # way to turn it round.
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(op, "hf_quantizer") for op in getattr(conversion, "operations", ()))
        ]
    try:
        yield
    finally:
        model.config.dtype = kept
        if conversions is not None:
            model._weight_conversions = conversions


def _config_to_store(layout):
    """What config.json says about quantization: what the layout would be loaded with, in a simpler
    form where all formats have 4 bits, since each layer's state says which."""
    config = layout.quantization_config()
    if {FORMATS[name].bits for name in layout.quantized.values()} == {4}:
        config = getattr(config, "configs", [config])[0]
        config.llm_int8_skip_modules = layout.skipped
    return config


def _require_same(folder, layout):
    """Read the headers of what was written: every parameter has to be there in its format."""
    from transformers import AutoConfig

    meta = on_meta(AutoConfig.from_pretrained(folder, trust_remote_code=True), None, True)
    stored = stored_formats(folder, meta)
    wrong = [row.name for row in layout.rows if stored.get(row.name, row.format) != row.format]
    if wrong or len(stored) < len(layout.rows) - len(meta.all_tied_weights_keys):
        raise OSError(f"{len(wrong)} weights came out in another format ({', '.join(wrong[:3])})")
