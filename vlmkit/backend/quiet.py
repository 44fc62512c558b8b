"""Quiet: the libraries print nothing while vlmkit works, unless somebody waits for a long load."""

import contextlib
import gc
import importlib
import logging
import os
import sys
import warnings

from vlmkit.anatomy import one_at_a_time


@contextlib.contextmanager
def quiet(bars=False):
    """Within it, transformers prints no advice and, without `bars`, no progress bars. Errors still
    come through.

    transformers would only warn of missing and unexpected weights. `vk.load` raises an error for
    them instead. What is switched off here is switched off for the whole process, so one thread at
    a time is in such a block: two that overlap could leave it switched off.
    """
    with one_at_a_time(), _quiet(bars):
        yield


@contextlib.contextmanager
def _quiet(bars):
    with without_garbage_collection():
        from transformers.utils import logging as transformers_logging

        import_bitsandbytes()
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def is_watched():
    """Whether a person may be looking at what this process prints: in a terminal or a notebook."""
    return "ipykernel" in sys.modules or bool(sys.stderr and sys.stderr.isatty())


def import_bitsandbytes():
    """Import bitsandbytes without its notes, in a third less time. transformers would import it
    anyway. Since bitsandbytes 0.50, until it compiles nothing on import."""
    notes = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_a_cast_note not in notes.filters:
        notes.addFilter(_not_a_cast_note)
    if "bitsandbytes" in sys.modules:
        return
    # It hands a few fallback functions to torch.compile, and that loads the compiler. The functions
    # run as well without it.
    with environment("TORCHDYNAMO_DISABLE", "1"), contextlib.suppress(ImportError):
        importlib.import_module("bitsandbytes")  # if it is missing, a quantized plan says so


@contextlib.contextmanager
def without_native_notes():
    """Within it, what libraries in C++ write to stderr is dropped. Python's own stderr, where it is
    another file, is not touched.

    Since torch 2.13 its profiler writes a line when it starts and one when it stops, which a
    notebook shows in red. Until it stops doing so.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def environment(name, value):
    """Within it, the environment variable `name` has this value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _not_a_cast_note(record):
    # Every int8 layer says in every forward pass that it casts to fp16, which LLM.int8 prescribes.
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


@contextlib.contextmanager
def without_garbage_collection():
    """Within it, Python's garbage collector does not run. While a model is built it would search
    everything that the imports left, again and again, for a third of the time of a load. A dry run
    also counts on it: there a tensor is gone when its last reference is."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
