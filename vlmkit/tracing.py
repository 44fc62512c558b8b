"""Trace: one image and one question followed through a model, from pixels to logits.

    vk.trace(model, processor, image, "What color is the circle?")

Each row is a step: its name, the tensor's shape and dtype, and the component that made it. Forward
hooks read the tensors at the borders between components, where `vlmkit.anatomy` draws them, so the
table is the same for every architecture. A step that an architecture does not have has no row.
"""

from dataclasses import dataclass
from functools import partial

from vlmkit.anatomy import component_finder
from vlmkit.architectures import CROSS, LANGUAGE, PROJECTOR, VISION
from vlmkit.errors import AnatomyError
from vlmkit.evaluation.asking import image_tokens, in_evaluation_mode, inputs_of
from vlmkit.tables import Table

FIXED_GRID, TILES, DYNAMIC = "fixed grid", "tiles", "dynamic resolution"
CROSS_ATTENTION, QUERIES = "cross-attention", "queries"

PIXELS, PATCHES, FEATURES = "pixels", "patches", "visual features"
PROJECTED, READ = "projected tokens", "read by cross-attention"
MERGED, LOGITS = "merged sequence", "logits"
STEPS = (PIXELS, PATCHES, FEATURES, PROJECTED, READ, MERGED, LOGITS)
"""In the order in which a picture passes them."""


@dataclass(frozen=True)
class Step:
    """The tensor after one step: `shape` as a tuple, `dtype` by name, the component that made it,
    and the module that the tensor enters or leaves there."""

    name: str
    shape: tuple
    dtype: str
    component: str
    module: str


@dataclass(frozen=True)
class Trace(Table):
    """The steps of one forward pass, and how many visual tokens the language model received.

    strategy: how many tokens an image becomes. A fixed grid (LLaVA-1.5, Liu et al., 2023, arXiv
    2310.03744), tiles of the image side by side (LLaVA-NeXT, SmolVLM), a number that depends on the
    resolution (Qwen2-VL, Wang et al., 2024, arXiv 2409.12191, section 2.1), learned queries
    (BLIP-2, Li et al., 2023, arXiv 2301.12597, section 3.1), or no token of the sequence, if
    cross-attention layers read the features (Llama 3.2 Vision).
    visual_tokens: of all images together, without tiles that are only padding.
    """

    steps: tuple
    strategy: str
    visual_tokens: int

    def __getitem__(self, name):
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(f"{name!r} is not a step of this trace: {[s.name for s in self.steps]}")

    def table(self):
        """A pandas DataFrame with a row per step, in the order of the forward pass."""
        import pandas as pd

        rows = [(s.name, s.component, str(s.shape), s.dtype, s.module) for s in self.steps]
        columns = ["step", "component", "shape", "dtype", "module"]
        return pd.DataFrame(rows, columns=columns).set_index("step")

    def _remarks(self):
        yield f"{self.visual_tokens:,} visual tokens ({self.strategy})"


def trace(model, processor, images, question):
    """Trace of a question about an image or a list of images, given as to `vk.ask`.

    Raises the errors of `vk.ask`, and AnatomyError if there is no image.
    """
    return trace_inputs(model, inputs_of(model, processor, images, question, max_new_tokens=1))


def trace_inputs(model, inputs):
    """Trace of one forward pass over `inputs`, the dict of tensors that a processor makes."""
    import torch

    if inputs.get("pixel_values") is None:
        raise AnatomyError("A trace follows an image through the model, and there is no image.")
    seen = _Seen(model)
    try:
        with in_evaluation_mode(model), torch.no_grad():
            output = model(**inputs)
    finally:
        seen.remove_hooks()
    found = seen.found | {
        PIXELS: (inputs["pixel_values"], "", ""),
        LOGITS: (output.logits, LANGUAGE, ""),
    }
    strategy = _strategy(model, inputs, found)
    steps = [_step(name, *found[name]) for name in STEPS if name in found]
    return Trace(tuple(steps), strategy, _visual_tokens(model, inputs, found, strategy))


def _step(name, tensor, component, module):
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Step(name, tuple(tensor.shape), dtype, component, module)


class _Seen:
    """The tensors that cross the borders between components during a forward pass.

    found: {step: (tensor, component, module)}. depth: how many modules of the projector are
    running, one inside the other. Only the outermost one counts.
    """

    def __init__(self, model):
        self.found, self.depth, self.handles = {}, 0, []
        component_of = component_finder(model)
        for name, module in model.named_modules():
            component = component_of(name)
            if component == VISION:
                self._after(module, self._left_vision, name)
            elif component == PROJECTOR:
                self._before(module, self._entered_projector, name)
                self._after(module, self._left_projector, name)
            elif component == CROSS:
                self._before(module, self._entered_cross_attention, name)
            elif component == LANGUAGE and _has_weights(module):
                self._before(module, self._entered_language_model, name)

    def remove_hooks(self):
        for handle in self.handles:
            handle.remove()

    def _before(self, module, hook, name):
        hook = partial(hook, name)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module, hook, name):
        hook = partial(hook, name)
        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _keep(self, step, tensor, component, module):
        if tensor is not None:
            self.found[step] = (tensor.detach(), component, module)

    def _left_vision(self, name, module, args, kwargs, output):
        # The first layer of the encoder that has weights makes patches from pixels.
        is_layer = next(module.children(), None) is None and _has_weights(module)
        if is_layer and PATCHES not in self.found:
            self._keep(PATCHES, _tensor(output), VISION, name)
        # Without a projector, the features are the last tensor that leaves the encoder.
        if PROJECTED not in self.found:
            self._keep(FEATURES, _tensor(output), VISION, name)

    def _entered_projector(self, name, module, args, kwargs):
        if self.depth == 0 and PROJECTED not in self.found:
            features = kwargs.get("encoder_hidden_states")  # the features that a Q-Former reads
            if features is None:
                features = _tensor((*args, *kwargs.values()))
            self._keep(FEATURES, features, VISION, name)
        self.depth += 1

    def _left_projector(self, name, module, args, kwargs, output):
        self.depth -= 1
        if self.depth == 0:
            self._keep(PROJECTED, _tensor(output), PROJECTOR, name)

    def _entered_cross_attention(self, name, module, args, kwargs):
        if READ not in self.found:
            for argument in ("cross_attention_states", "encoder_hidden_states"):
                self._keep(READ, kwargs.get(argument), PROJECTOR, name)

    def _entered_language_model(self, name, module, args, kwargs):
        if MERGED in self.found:
            return
        tensor = kwargs.get("inputs_embeds")
        if tensor is None:
            tensor = _tensor((*args, *kwargs.values()))
        # Floats of shape (…, tokens, width) come after the embedding, whose inputs are integers.
        if tensor is not None and tensor.is_floating_point() and tensor.ndim == 3:
            self._keep(MERGED, tensor, LANGUAGE, name)


def _has_weights(module):
    return next(module.parameters(), None) is not None


def _tensor(value):
    """The first tensor in the inputs or outputs of a module."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):  # a ModelOutput too
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    return next((t for t in map(_tensor, value) if t is not None), None)


def _strategy(model, inputs, found):
    if READ in found:
        return CROSS_ATTENTION
    if any(name.split(".")[-1] == "query_tokens" for name, _ in model.named_parameters()):
        return QUERIES
    if "image_grid_thw" in inputs:
        return DYNAMIC
    return TILES if inputs["pixel_values"].ndim == 5 else FIXED_GRID


def _visual_tokens(model, inputs, found, strategy):
    if strategy == CROSS_ATTENTION:
        shape = found[READ][0].shape
        tiles = inputs.get("aspect_ratio_mask")  # Llama 3.2 Vision masks the tiles that are padding
        return shape[:-1].numel() if tiles is None else int(tiles.sum()) * shape[-2]
    if placeholders := image_tokens(model, inputs["input_ids"]):
        return placeholders
    return found.get(PROJECTED, found.get(FEATURES))[0].shape[:-1].numel()
