"""Outliers put into a model without changing what it computes, to the last bit.

Large language models have a few channels whose values are many times larger than those of the
others (LLM.int8, arXiv 2208.07339, section 4), and one scale for all channels has to reach that
far. A small model has none. A norm multiplies each channel by a weight of its own, and the Linear
layers after the norm multiply the same channel by a column of their weight. So the norm's weight
can be divided by a factor, and the column multiplied by it. If the factor is a power of two, no bit
of a product changes. (SmoothQuant, arXiv 2211.10438, section 4, uses the same idea in the other
direction.)
"""

from vlmkit.anatomy import unwrapped
from vlmkit.errors import SensitivityError
from vlmkit.evaluation.asking import in_evaluation_mode, prepared
from vlmkit.images import read_all
from vlmkit.rows import LINEAR, NORM, kind_of
from vlmkit.sensitivity.scopes import label_of, select
from vlmkit.sensitivity.temporary import TemporaryWeights, require_float

WEIGHTS, ACTIVATIONS = "weights", "activations"


def outliers(model, processor, scope, *, where=WEIGHTS, channels=2, factor=64, seed=0):
    """A context in which a scope has outliers, and the model the same logits as before.

        with vk.sensitivity.outliers(model, processor, "language_model"):
            vk.sensitivity.sweep(model, processor, dataset, ["int4-row"], ["language_model"])

    where: "weights" multiplies `channels` input channels of the scope's Linear layers by `factor`
    and divides the norm before them; "activations" does the reverse. factor: a power of two.
    seed: draws the channels. After every norm of one width they are the same, as in large models.

    The context's `pairs` are the names of the norms, each with the names of the Linear layers that
    read its output. One question about a picture of noise shows which layers these are. The same
    question shows whether the logits are equal to the last bit.

    Raises SensitivityError if no Linear layer of the scope reads a norm, and if the logits change.
    They do in models whose norms do not multiply by their weight (Gemma adds 1 to it).
    """
    return Outliers(model, processor, scope, where, channels, factor, seed)


class Outliers(TemporaryWeights):
    """What `outliers` returns. pairs: {name of a norm: names of the Linear layers that read it}."""

    def __init__(self, model, processor, scope, where, channels, factor, seed):
        super().__init__(model)
        if where not in (WEIGHTS, ACTIVATIONS):
            raise SensitivityError(f"outliers are in {WEIGHTS!r} or {ACTIVATIONS!r}, not {where!r}")
        if not (isinstance(factor, int) and factor > 1 and factor & (factor - 1) == 0):
            raise SensitivityError(
                "factor is a power of two, at least 2, so that no bit of a product changes, and "
                f"not {factor!r}"
            )
        require_float(model)
        self.inputs = _inputs(model, processor)
        self.factor = factor if where == WEIGHTS else 1 / factor
        self.channels, self.seed, self.label = channels, seed, label_of(scope)
        weights = select(model, scope).weights
        self.pairs = self._pairs({weight.module for weight in weights if weight.kind == LINEAR})
        if not self.pairs:
            raise SensitivityError(
                f"no Linear layer of the scope {self.label!r} reads the output of a norm, which is "
                "where outliers can be put without changing what the model computes."
            )

    def _logits(self):
        import torch

        with torch.no_grad(), in_evaluation_mode(self.model):
            return self.model(**self.inputs).logits

    def _pairs(self, scope):
        """`pairs`, for the names of a scope's Linear layers. A norm whose output is read by a layer
        outside the scope is left out."""
        readers, outputs, handles = {}, {}, []

        def note(norm):
            def hook(module, inputs, output):
                outputs[id(output)] = (norm, output)  # holds the output, so that its id is unique

            return hook

        def look(layer):
            def hook(module, inputs):
                norm, _ = outputs.get(id(inputs[0]), (None, None))
                if norm is not None and layer not in readers[norm]:
                    readers[norm].append(layer)

            return hook

        try:
            for name, module in self.model.named_modules():
                if not hasattr(module, "weight"):
                    continue
                if kind_of(unwrapped(self.model), module, "weight") == NORM:
                    readers[name] = []
                    handles.append(module.register_forward_hook(note(name)))
                elif module.weight.dim() == 2:
                    handles.append(module.register_forward_pre_hook(look(name)))
            self._logits()
        finally:
            for handle in handles:
                handle.remove()
        return {norm: found for norm, found in readers.items() if found and scope.issuperset(found)}

    def _change(self):
        import torch

        before = self._logits()
        for norm, names in self.pairs.items():
            norm = self.model.get_submodule(norm)
            generator = torch.Generator().manual_seed(self.seed)
            places = torch.randperm(norm.weight.numel(), generator=generator)[: self.channels]
            for parameter in (norm.weight, getattr(norm, "bias", None)):
                if parameter is not None:
                    self._scale(parameter, places, 1 / self.factor)
            for name in names:
                self._scale(self.model.get_submodule(name).weight, places, self.factor)
        if not torch.equal(before, self._logits()):
            raise SensitivityError(
                f"outliers in {self.label!r} change what this {type(self.model).__name__} "
                "computes: its norms do more than multiply each channel by their weight, or "
                "something else reads their output as well."
            )

    def _scale(self, parameter, places, factor):
        scaled = parameter.data.clone()
        scaled[..., places.to(scaled.device)] *= factor
        self._put(parameter, scaled)


def _inputs(model, processor):
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return prepared(model, processor, [read_all(pixels)], ["What is in the picture?"], 1)
