"""vlmkit: how a vision-language model is built, loaded so that it fits, measured and fine-tuned.

    import vlmkit as vk

    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model="nf4")
    model, processor = vk.load("pebble", plan=plan)
    vk.ask(model, processor, image, "What color is the circle?")

Importing this package imports nothing heavy: every name below is looked up when it is first used.
"""

import importlib
import warnings

# Imported in a notebook without ipywidgets, tqdm (and so transformers) warns that its bars will be
# text. They may be: it would be the first thing that a reader of the course sees, in red.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

COMPONENTS = ("vision_encoder", "projector", "cross_attention", "language_model", "other")
"""The only names of a VLM's components, in the order in which tables and figures show them."""

_HOME_OF = {
    "Plan": "plan",
    "preview": "loading",
    "load": "loading",
    "audit": "loading",
    "save": "loading",
    "default_model": "loading",
    "trace": "tracing",
    "lint": "linting",
    "fit": "memory.fitting",
    "ask": "evaluation",
    "evaluate": "evaluation",
    "LoRA": "adapters",
    "VlmkitError": "errors",
}
# `anatomy` is both a module and a question to ask: the module is callable (see its last lines).
_MODULES = (
    "adapters",
    "anatomy",
    "architectures",
    "attention",
    "catalog",
    "checkpoints",
    "course",
    "environment",
    "errors",
    "evaluation",
    "figures",
    "finetuning",
    "formats",
    "images",
    "linting",
    "loading",
    "memory",
    "models",
    "plan",
    "planner",
    "sensitivity",
    "tasks",
)

__all__ = ["COMPONENTS", *_HOME_OF, *_MODULES]


def __getattr__(name):
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"vlmkit.{_HOME_OF[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"vlmkit.{name}")
    raise AttributeError(f"module 'vlmkit' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted([*globals(), *__all__])
