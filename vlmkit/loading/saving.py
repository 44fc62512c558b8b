"""Saving: a model on disk that is the same, bit for bit, when it is loaded again.

    vk.save(model, processor, "my-model")
    model, processor = vk.load("my-model")

The folder is an ordinary checkpoint. config.json lists the full names of the modules that are not
quantized, so transformers alone loads it under the same plan. A model with int8 and a 4-bit format
needs `import vlmkit.backend.mixed` before that. docs/loading.md has the details.
"""

import contextlib
import copy
from pathlib import Path

from vlmkit.anatomy import on_meta
from vlmkit.backend import sharding
from vlmkit.backend.quiet import quiet
from vlmkit.checkpoints import stored_formats
from vlmkit.errors import CheckpointError, public
from vlmkit.folders import whole_folder
from vlmkit.formats import FORMATS, torch_dtype
from vlmkit.layout import layout_of
from vlmkit.loading.audit import audit_layout, plan_of
from vlmkit.units import MEGABYTE


@public
def save(model, processor, path, *, overwrite=False):
    """Write `model` and `processor` to the folder `path`. Returns its pathlib.Path.

    model: one that `vk.load` returned, quantized or not, or any transformers VLM whose formats a
        plan can describe.
    processor: its processor. None leaves it out.
    overwrite: whether a folder at `path` that is not empty is replaced. It stays until the new one
        is complete, and comes back if the new one cannot take its place.

    Everything is written to a new folder beside `path` and compared with the model. Then the folder
    gets its name. If anything fails (a full disk, an interrupt), `path` stays as it was.

    Raises CheckpointError if `path` is taken or cannot be written, or if the model has adapters.
    Raises AuditError if a weight is in a format that no plan has.
    """
    if hasattr(model, "peft_config"):
        raise CheckpointError(
            "The model has PEFT adapters. To merge them and save everything: "
            "vk.save(vk.finetuning.merge(model)[0], ...). To save the model without them, with a "
            "component that was trained in full: vk.save(model.unload(), ...). To save what was "
            "trained: vk.finetuning.save(model, path). To save the adapters alone: "
            "model.save_pretrained(path)."
        )
    sharding.require_whole(model, "saved")
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
    """Within it, `model.save_pretrained` works. Afterwards the model is as before.

    On saving, transformers undoes the conversions of names and shapes that it did on loading. Since
    5.23, until it can undo it, one of these conversions reads the scales of quantized weights. It
    is left out here.
    """
    dtype = model.config.dtype  # save_pretrained replaces it by the first parameter's
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any(hasattr(op, "hf_quantizer") for op in getattr(conversion, "operations", ()))
        ]
    try:
        yield
    finally:
        model.config.dtype = dtype
        if conversions is not None:
            model._weight_conversions = conversions


def _config_to_store(layout):
    """The `quantization_config` of config.json. If all formats have 4 bits, one BitsAndBytesConfig
    is enough, since each layer's scales say which format it has."""
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
