"""Llama 4: a field that it reads of its language model's output, and that is missing there.

Its forward pass returns `outputs.image_outputs`. The output of its language model has no such
field, so that every call ends in an AttributeError. A hook adds the field, empty. Since
transformers 5.24, until a release in which tests/test_versions.py finds that Llama 4 runs without
the hook.
"""


def complete_outputs(model):
    """Make `model` run if it is a Llama 4. Other models stay as they are."""
    if model.config.model_type == "llama4":
        model.language_model.register_forward_hook(_add_field)


def _add_field(module, args, output):
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
