"""Trace: one image and one question followed through a model, from pixels to logits.

    vk.trace(model, processor, image, "What color is the circle?")

A row per stage with what is there then, its shape, its type, and the component that made it. The
stages are read off with forward hooks, at the borders that `vlmkit.anatomy` draws, so the same
table is made for every architecture; a stage that an architecture does not have has no row.
"""

from dataclasses import dataclass

from vlmkit.anatomy import component_finder
from vlmkit.architectures import CROSS, LANGUAGE, PROJECTOR, VISION
from vlmkit.errors import AnatomyError
from vlmkit.tables import Table

FIXED_GRID, TILES, DYNAMIC = "fixed grid", "tiles", "dynamic resolution"
CROSS_ATTENTION, QUERIES = "cross-attention", "queries"

STAGES = (
    "pixels",
    "patches",
    "visual features",
    "projected tokens",
    "read by cross-attention",
    "merged sequence",
    "logits",
)
"""In the order in which a picture passes them."""


@dataclass(frozen=True)
class Stage:
    """What there is after one step: `shape` as a tuple, `dtype` by name, the component that it
    belongs to, and the module at whose border it was seen, the one that it enters or leaves."""

    name: str
    shape: tuple
    dtype: str
    component: str
    module: str


@dataclass(frozen=True)
class Trace(Table):
    """The stages of one forward pass, and how many visual tokens the language model was given.

    strategy: how many tokens an image becomes. A fixed grid (LLaVA-1.5, Liu et al., 2023, arXiv
    2310.03744), tiles of the image beside each other (LLaVA-NeXT, SmolVLM), its own resolution
    (Qwen2-VL, Wang et al., 2024, arXiv 2409.12191, section 2.1), learned queries (BLIP-2, Li et
    al., 2023, arXiv 2301.12597, section 3.1), or none in the sequence, where cross-attention layers
    look at the features (Llama 3.2 Vision).
    visual_tokens: of all images together, without tiles that are only there to fill up.
    """

    stages: tuple
    strategy: str
    visual_tokens: int

    def __getitem__(self, name):
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"{name!r} is no stage of this trace: {[s.name for s in self.stages]}")

    def table(self):
        """A pandas DataFrame, a row per stage in the order in which they are passed."""
        import pandas as pd

        rows = [(s.name, s.component, str(s.shape), s.dtype, s.module) for s in self.stages]
        columns = ["stage", "component", "shape", "dtype", "module"]
        return pd.DataFrame(rows, columns=columns).set_index("stage")

    def _remarks(self):
        yield f"{self.visual_tokens:,} visual tokens ({self.strategy})"


def trace(model, processor, images, question):
    """Trace of a question about an image, or a list of them, given as to `vk.ask`.

    Raises what `vk.ask` raises, and AnatomyError where no image reached the model.
    """
    from vlmkit.evaluation.asking import check_processor, check_question, prepared
    from vlmkit.images import read_all

    check_processor(processor)
    check_question(question)
    return trace_inputs(model, prepared(model, processor, [read_all(images)], [question], 1))


def trace_inputs(model, inputs):
    """Trace of one forward pass over `inputs`, a dict of the tensors that the processor makes."""
    import torch

    from vlmkit.evaluation.asking import in_evaluation_mode

    if inputs.get("pixel_values") is None:
        raise AnatomyError("a trace follows an image through the model, and no image was given.")
    seen = _Seen(model)
    try:
        with in_evaluation_mode(model), torch.no_grad():
            output = model(**inputs)
    finally:
        seen.remove_hooks()
    seen.found["pixels"] = (inputs["pixel_values"], "", "")
    seen.found["logits"] = (output.logits, LANGUAGE, "")
    stages = [_stage(name, *seen.found[name]) for name in STAGES if name in seen.found]
    strategy = _strategy(model, inputs, seen)
    return Trace(tuple(stages), strategy, _visual_tokens(model, inputs, seen, strategy))


def _stage(name, tensor, component, module):
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Stage(name, tuple(tensor.shape), dtype, component, module)


class _Seen:
    """What passes the components' borders during a forward pass.

    found: {stage: (tensor, component, module)}. inside_projector: how many of the projector's
    modules are running, one inside the other; what counts is the outermost.
    """

    def __init__(self, model):
        self.found = {}
        self.inside_projector = 0
        self.handles = []
        component_of = component_finder(model)
        for name, module in model.named_modules():
            component = component_of(name)
            if component == VISION:
                self._on_vision(name, module)
            elif component == PROJECTOR:
                self._on_projector(name, module)
            elif component == CROSS:
                self._before(module, self._cross_attention(name))
            elif component == LANGUAGE and _has_weights(module):
                self._before(module, self._language(name))

    def remove_hooks(self):
        for handle in self.handles:
            handle.remove()

    def _before(self, module, hook):
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module, hook):
        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _keep(self, stage, tensor, component, module):
        if tensor is not None:
            self.found[stage] = (tensor.detach(), component, module)

    def _on_vision(self, name, module):
        makes_patches = next(module.children(), None) is None and _has_weights(module)

        def after(module, args, kwargs, output):
            # The first layer of the encoder that has weights makes patches of pixels.
            if makes_patches and "patches" not in self.found:
                self._keep("patches", _tensor(output), VISION, name)
            # Without a projector, the last that comes out of the encoder are the features.
            if "projected tokens" not in self.found:
                self._keep("visual features", _tensor(output), VISION, name)

        self._after(module, after)

    def _on_projector(self, name, module):
        def before(module, args, kwargs):
            if self.inside_projector == 0 and "projected tokens" not in self.found:
                features = kwargs.get("encoder_hidden_states")  # what a Q-Former looks at
                if features is None:
                    features = _tensor((*args, *kwargs.values()))
                self._keep("visual features", features, VISION, name)
            self.inside_projector += 1

        def after(module, args, kwargs, output):
            self.inside_projector -= 1
            if self.inside_projector == 0:
                self._keep("projected tokens", _tensor(output), PROJECTOR, name)

        self._before(module, before)
        self._after(module, after)

    def _cross_attention(self, name):
        def before(module, args, kwargs):
            if "read by cross-attention" not in self.found:
                for argument in ("cross_attention_states", "encoder_hidden_states"):
                    self._keep("read by cross-attention", kwargs.get(argument), PROJECTOR, name)

        return before

    def _language(self, name):
        def before(module, args, kwargs):
            if "merged sequence" in self.found:
                return
            tensor = kwargs.get("inputs_embeds")
            if tensor is None:
                tensor = _tensor((*args, *kwargs.values()))
            # Floating-point (…, tokens, width): past the embedding, whose input are whole numbers.
            if tensor is not None and tensor.is_floating_point() and tensor.ndim == 3:
                self._keep("merged sequence", tensor, LANGUAGE, name)

        return before


def _has_weights(module):
    return next(module.parameters(), None) is not None


def _tensor(value):
    """The first tensor in what a module was given or gave."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):  # a ModelOutput too
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    return next((t for t in map(_tensor, value) if t is not None), None)


def _strategy(model, inputs, seen):
    if "read by cross-attention" in seen.found:
        return CROSS_ATTENTION
    if any(name.split(".")[-1] == "query_tokens" for name, _ in model.named_parameters()):
        return QUERIES
    if "image_grid_thw" in inputs:
        return DYNAMIC
    return TILES if inputs["pixel_values"].ndim == 5 else FIXED_GRID


def _visual_tokens(model, inputs, seen, strategy):
    from vlmkit.evaluation.asking import image_tokens

    if strategy == CROSS_ATTENTION:
        tensor = seen.found["read by cross-attention"][0]
        tiles = inputs.get("aspect_ratio_mask")  # Llama 3.2 Vision fills up with tiles it masks
        if tiles is not None:
            return int(tiles.sum()) * tensor.shape[-2]
        return tensor.shape[:-1].numel()
    if placeholders := image_tokens(model, inputs["input_ids"]):
        return placeholders
    projected = seen.found.get("projected tokens", seen.found.get("visual features"))
    return projected[0].shape[:-1].numel()
