"""vlmkit: how a vision-language model is built, loaded so that it fits, measured and fine-tuned.

    import vlmkit as vk

    vk.anatomy("cobble")                          # which parameter belongs to which component
    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model="nf4")
    model, processor = vk.load("cobble", plan)    # a transformers model, an AutoProcessor
    vk.audit(model, plan)                         # what each component got; raises where it differs
    vk.ask(model, processor, image, "What is in the photo?")
    vk.memory.predict("cobble", plan)             # what it needs: no weights, no network
    vk.evaluate(model, processor, dataset)        # accuracy with its interval, by task
    vk.sensitivity.sweep(model, processor, dataset, formats=[...], scopes=[...])
    vk.planner.best_plan(model, processor, dataset, budget="100 MB")
    model = vk.finetuning.add_adapters(model, projector="full", language_model=vk.LoRA(r=16))
    vk.finetuning.train(model, processor, dataset, "runs/first", max_steps=200)

Two models come with the course. pebble was made here, on drawings, and is there to be taken apart.
cobble is a real pretrained language model with eyes, which `vlmkit fetch cobble` fetches once.

A model is a short table of components (`COMPONENTS`, `architectures`, `anatomy`). A plan gives
each component a number format (`formats`, `plan`, `layout`). Everything else is a question about
that pair.

`import vlmkit` imports no torch: each name below is looked up when it is first used.
"""

import importlib
import warnings

# tqdm, which transformers imports, warns in a notebook without ipywidgets that its bars are text.
# This warning would be the first thing that a reader of the course sees, in red.
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
    "ask": "evaluation",
    "evaluate": "evaluation",
    "fit": "memory.fitting",
    "lint": "linting",
    "trace": "tracing",
    "LoRA": "adapters",
    "VlmkitError": "errors",
}
_MODULES = (
    "architectures",
    "anatomy",  # a module that can be called, see its last lines
    "formats",
    "plan",
    "adapters",
    "checkpoints",
    "catalog",
    "loading",
    "memory",
    "evaluation",
    "sensitivity",
    "planner",
    "finetuning",
    "linting",
    "tasks",
    "attention",
    "images",
    "figures",
    "models",
    "course",
    "environment",
    "errors",
)

__all__ = ["COMPONENTS", *_HOME_OF, *_MODULES]


def __getattr__(name):
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"vlmkit.{_HOME_OF[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"vlmkit.{name}")
    raise AttributeError(f"module 'vlmkit' has no attribute {name!r}. It has {', '.join(__all__)}.")


def __dir__():
    return sorted([*globals(), *__all__])
