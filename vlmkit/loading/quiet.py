"""Quiet: loading says nothing unless there is something to say."""

import logging
import warnings
from contextlib import contextmanager


@contextmanager
def quiet():
    """Within it, transformers prints no progress bars and no advice; errors still come through.

    What its load report would warn of (missing and unexpected weights) is raised as an error here.
    """
    from transformers.utils import logging as transformers_logging

    _bitsandbytes_notes_off()
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


# Of every forward pass of every int8 layer: that the cast to fp16, which is LLM.int8's own, is made.
_CAST_NOTE = "MatMul8bitLt: inputs will be cast"


def _bitsandbytes_notes_off():
    # On import: that an optional kernel for one-row products, which this package does not use, is
    # not installed. Said with logging, so it would reach the stderr of every script.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    notes = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_a_cast_note not in notes.filters:
        notes.addFilter(_not_a_cast_note)


def _not_a_cast_note(record):
    return not str(record.msg).startswith(_CAST_NOTE)
