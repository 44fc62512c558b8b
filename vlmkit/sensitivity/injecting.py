"""Outliers put into a model without changing what it computes, to the last bit.

Large language models have a few channels whose values are many times those of the others (LLM.int8,
arXiv 2208.07339, section 4), and one scale for all has to reach that far. A small model has none. A
norm multiplies each channel by a number of its own, and the Linear layers after it multiply the
same channel by a column: what the one is divided by, the other can be multiplied by. With a power
of two no bit of a product changes (SmoothQuant, arXiv 2211.10438, section 4, goes the other way).
"""

from vlmkit.errors import SensitivityError
from vlmkit.rows import LINEAR, NORM, kind_of
from vlmkit.sensitivity.scopes import chosen, label_of
from vlmkit.sensitivity.swapping import Exchange, require_float

WEIGHTS, ACTIVATIONS = "weights", "activations"


def outliers(model, processor, scope, *, where=WEIGHTS, channels=2, factor=64, seed=0):
    """A context in which a scope has outliers, and the model the same logits as before.

        with vk.sensitivity.outliers(model, processor, "language_model"):
            vk.sensitivity.sweep(model, processor, dataset, ["int4-row"], ["language_model"])

    where: "weights" multiplies `channels` input channels of the scope's Linear layers by `factor`
    and divides the norm before them; "activations" does the reverse. factor: a power of two.
    seed: draws the channels, the same ones after every norm of one width, as in large models.

    `pairs` of what the context gives are the norms and how many layers follow each. Which layers
    read a norm's output is found by asking a question about a noise picture, and with it the logits
    are compared: they are equal to the last bit, or there is an error.

    Raises SensitivityError if no Linear layer of the scope reads a norm, and if the logits change,
    for one where a norm's weight is not what it multiplies by (Gemma adds 1 to it).
    """
    return Outliers(model, processor, scope, where, channels, factor, seed)


class Outliers(Exchange):
    """What `outliers` returns. pairs: {name of a norm: names of the Linear layers that read it}."""

    def __init__(self, model, processor, scope, where, channels, factor, seed):
        super().__init__()
        if where not in (WEIGHTS, ACTIVATIONS):
            raise SensitivityError(f"outliers are in {WEIGHTS!r} or {ACTIVATIONS!r}, not {where!r}")
        if not (isinstance(factor, int) and factor > 1 and factor & (factor - 1) == 0):
            raise SensitivityError(
                f"factor is a power of two from 2 on, so that no bit of a product changes, and not "
                f"{factor!r}"
            )
        require_float(model)
        self.model, self.inputs = model, _inputs(model, processor)
        self.factor = factor if where == WEIGHTS else 1 / factor
        self.channels, self.seed, self.label = channels, seed, label_of(scope)
        modules = {id(w.module) for w in chosen(model, scope).weights if w.kind == LINEAR}
        self.pairs = self._pairs(modules)
        if not self.pairs:
            raise SensitivityError(
                f"no Linear layer of the scope {self.label!r} reads the output of a norm, which is "
                "where outliers can be put without changing what the model computes."
            )

    def _logits(self):
        import torch

        from vlmkit.evaluation.asking import in_evaluation_mode

        with torch.no_grad(), in_evaluation_mode(self.model):
            return self.model(**self.inputs).logits

    def _pairs(self, linears):
        readers, norms, outputs, handles = {}, [], {}, []
        base = getattr(self.model, "get_base_model", lambda: self.model)()

        def note(name):
            def hook(module, inputs, output):
                outputs[id(output)] = (name, output)  # held, so that no other gets its id

            return hook

        def look(name, module):
            def hook(_, inputs):
                norm, output = outputs.get(id(inputs[0]), (None, None))
                if norm is not None:
                    readers.setdefault(norm, []).append((name, id(module) in linears))

            return hook

        try:
            for name, module in self.model.named_modules():
                if not hasattr(module, "weight"):
                    continue
                if kind_of(base, module, "weight") == NORM:
                    norms.append(name)
                    handles.append(module.register_forward_hook(note(name)))
                elif module.weight.dim() == 2:
                    handles.append(module.register_forward_pre_hook(look(name, module)))
            self._logits()
        finally:
            for handle in handles:
                handle.remove()
        return {
            norm: list(dict.fromkeys(name for name, _ in found))
            for norm in norms
            if (found := readers.get(norm)) and all(inside for _, inside in found)
        }

    def _change(self):
        import torch

        before = self._logits()
        for norm, names in self.pairs.items():
            norm = self.model.get_submodule(norm)
            width = norm.weight.numel()
            generator = torch.Generator().manual_seed(self.seed)
            places = torch.randperm(width, generator=generator)[: self.channels]
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
        self._exchange(parameter, scaled)


def _inputs(model, processor):
    import numpy as np

    from vlmkit.evaluation.asking import prepared
    from vlmkit.images import read_all

    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return prepared(model, processor, [read_all(pixels)], ["What is in the picture?"], 1)
