"""Quiet: loading says nothing unless there is something to say."""

import contextlib
import importlib
import logging
import os
import sys
import warnings


@contextlib.contextmanager
def quiet():
    """Within it, transformers prints no progress bars and no advice; errors still come through.

    What its load report would warn of (missing and unexpected weights) is raised as an error here.
    """
    from transformers.utils import logging as transformers_logging

    _import_bitsandbytes()
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


# Said in every forward pass of every int8 layer: that it casts to fp16, as LLM.int8 is defined.
_CAST_NOTE = "MatMul8bitLt: inputs will be cast"


def _import_bitsandbytes():
    """Import bitsandbytes, which transformers would do on the way, without its notes and faster."""
    # A note on import says that an optional kernel for one-row products is not installed. Those
    # products are not computed here (see vlmkit.backend.cpu).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    notes = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_a_cast_note not in notes.filters:
        notes.addFilter(_not_a_cast_note)
    if "bitsandbytes" in sys.modules:
        return
    # On import it hands a few fallback functions to torch.compile, which loads the compiler: a
    # third of the time that a first load takes, for functions that run as well without.
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):  # only a quantized plan needs it, and says so
            importlib.import_module("bitsandbytes")
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _not_a_cast_note(record):
    return not str(record.msg).startswith(_CAST_NOTE)
