"""Loading: weights and processor under a plan, and the audit that proves that it took effect.

    model, processor = vk.load("pebble", plan=vk.Plan(language_model="nf4"))

What comes back is what the ecosystem expects: a transformers model in eval mode, quantized by
transformers' own BitsAndBytesConfig, and the checkpoint's AutoProcessor.
"""

import contextlib
import gc
import os

from vlmkit.backend.boundaries import join_dtypes
from vlmkit.backend.cpu import guard_against_cpu_traps
from vlmkit.backend.quiet import quiet
from vlmkit.checkpoints import PEBBLE, check_weights, find, read_config
from vlmkit.loading.audit import audit, audit_layout, plan_of, preview
from vlmkit.loading.devices import check_formats, resolve_device
from vlmkit.loading.processors import load_processor
from vlmkit.loading.saving import save
from vlmkit.loading.tables import Audit, Preview
from vlmkit.loading.weights import load_weights
from vlmkit.plan import Plan
from vlmkit.stored import layout_of

__all__ = ["Audit", "Preview", "audit", "default_model", "load", "plan_of", "preview", "save"]


def default_model():
    """The name that the chapters load: what the environment variable VLMKIT_MODEL says, or
    "pebble"."""
    return os.environ.get("VLMKIT_MODEL") or PEBBLE


def load(name, plan=None, *, processor=True, device=None, revision=None, trust_remote_code=False):
    """Load the model `name` under `plan`. Returns (model, processor), audited.

    name: "pebble", a folder, or a hub id.
    plan: a Plan or anything that `Plan.parse` takes; None is `Plan.recommended()`, or for a
        checkpoint that is quantized already what it holds, with which any plan has to agree.
    processor: False leaves the processor out, returns None for it and needs none of its files.
    device: "cpu", "cuda", …; None is cuda if there is one, otherwise the CPU.
    revision: branch, tag or commit of a hub id.
    trust_remote_code: whether Python code that comes with the checkpoint may run.

    The plan is resolved to full module names on the meta device before any weight is read. All or
    nothing: if anything is wrong, nothing is returned.

    Raises PlanError (the plan does not fit the model or the device), CheckpointError (files
    missing, damaged or refused), AnatomyError (not a VLM, or parts of it unknown), AuditError
    (what was loaded is not what the plan asked for).
    """
    plan = None if plan is None else Plan.parse(plan)
    device = resolve_device(device)
    with quiet(), _no_collections():
        folder = find(name, revision=revision, trust_remote_code=trust_remote_code)
        config = read_config(folder, trust_remote_code=trust_remote_code)
        layout = layout_of(folder, config, plan, trust_remote_code)
        check_formats(layout, device)
        layout.quantization_config()  # what cannot be expressed is said before a file is read
        check_weights(folder)
        # The processor before the weights: it is quick, and most of what can be missing is its.
        loaded_processor = load_processor(folder, trust_remote_code) if processor else None
        model = load_weights(folder, config, layout, device, trust_remote_code)
        guard_against_cpu_traps(model)
        join_dtypes(model, layout)
        audit_layout(model, layout)
    return model, loaded_processor


@contextlib.contextmanager
def _no_collections():
    """Within it, Python does not look for garbage in cycles. While a model is built it would do so
    over and over, through all that the imports have left, for a third of the time of a load."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
