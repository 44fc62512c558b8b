"""Quantizing a scope of a loaded model for a while, and giving back what was there, bit for bit."""

from fractions import Fraction

from vlmkit.errors import SensitivityError
from vlmkit.formats import rounding
from vlmkit.rows import LINEAR
from vlmkit.sensitivity.scopes import Chosen, chosen


def quantized(model, scope, format):
    """A context in which the weights of a scope, or the inputs of its layers, are rounded.

        with vk.sensitivity.quantized(model, "language_model", "int3-g32") as swap:
            vk.evaluate(model, processor, dataset)
        swap.effective_bits, swap.bytes_saved

    model: a loaded transformers model in a float format. scope: see `vlmkit.sensitivity.scopes`.
    format: a spelling that `vlmkit.formats.rounding` reads, or a Rounding.

    Weights are exchanged for rounded ones of the same dtype in the model's own parameters, a tied
    one once; the original tensors are set aside, and put back however the block is left, by an
    exception or Ctrl-C as well. Contexts can be nested, for weights and activations together. A
    format for activations rounds the inputs of the scope's Linear layers by forward hooks, and
    reaches no layer whose weight is read by the module around it (torch's MultiheadAttention).

    Raises PlanError for a format that does not exist, SensitivityError if the scope matches
    nothing, if the model is quantized already, or for a weight with NaN or infinite values.
    """
    return Swap(model, scope, format)


class Exchange:
    """Tensors of parameters exchanged for others, and put back however the block is left."""

    def __init__(self):
        self._original, self._hooks = [], []

    def __enter__(self):
        import torch

        if self._original or self._hooks:
            raise SensitivityError("this is in use already: make another one.")
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._change()
        except BaseException:  # Ctrl-C among them
            self._restore()
            raise
        return self

    def __exit__(self, *_):
        self._restore()

    def _exchange(self, parameter, tensor):
        self._original.append((parameter, parameter.data))  # noted before it is done
        parameter.data = tensor

    def _restore(self):
        interrupted = None
        while self._original or self._hooks:
            try:
                if self._hooks:
                    self._hooks[-1].remove()
                    self._hooks.pop()
                else:
                    parameter, original = self._original[-1]
                    parameter.data = original
                    self._original.pop()
            except KeyboardInterrupt as error:  # an impatient second one waits for the last weight
                interrupted = error
        if interrupted:
            raise interrupted


class Swap(Exchange):
    """What `quantized` returns. `parameters`: how many numbers the scope has; `effective_bits` of
    each as it would be stored, scales included; `bytes_saved` against the dtype it is stored in
    now. The last two count nothing as saved where activations are rounded."""

    def __init__(self, model, scope, format):
        super().__init__()
        self.format = rounding(format)
        require_float(model)
        self.chosen = scope if isinstance(scope, Chosen) else chosen(model, scope)
        if self.format.activations:
            self._require_called()
        else:
            self._require_finite()

    @property
    def parameters(self):
        return self.chosen.parameters

    @property
    def bits_before(self):
        """Bits of the chosen numbers as they are stored now, all together."""
        return sum(
            count * 8 * weight.parameter.element_size()
            for count, weight in zip(self._counts(), self.chosen.weights, strict=True)
        )

    @property
    def bits_after(self):
        """Bits of the chosen numbers in the format: of a whole weight that is rounded in places,
        the share of these places. An exact Fraction."""
        if self.format.activations:
            return Fraction(self.bits_before)
        return sum(
            count * self.format.effective_bits(weight.parameter.shape)
            for count, weight in zip(self._counts(), self.chosen.weights, strict=True)
        )

    @property
    def effective_bits(self):
        return float(self.bits_after / self.parameters)

    @property
    def bytes_saved(self):
        return int((self.bits_before - self.bits_after) / 8)

    def _counts(self):
        if self.chosen.places is not None:
            return [len(places) for places in self.chosen.places]
        return [weight.parameter.numel() for weight in self.chosen.weights]

    def _change(self):
        for index, weight in enumerate(self.chosen.weights):
            if self.format.activations:
                self._hooks.append(weight.module.register_forward_pre_hook(self._round))
            else:
                self._exchange(weight.parameter, self._rounded(index, weight.parameter.data))

    def _rounded(self, index, original):
        rounded = self.format.rounded(original)
        if self.chosen.places is None:
            return rounded
        places = self.chosen.places[index].to(original.device)
        mixed = original.flatten().clone()
        mixed[places] = rounded.flatten()[places]
        return mixed.reshape(original.shape)

    def _round(self, module, inputs):
        return (self.format.rounded(inputs[0]), *inputs[1:])

    def _require_finite(self):
        for weight in self.chosen.weights:
            if not weight.parameter.isfinite().all():
                raise SensitivityError(
                    f"{weight.name} has NaN or infinite values, which no scale fits: the "
                    "checkpoint is damaged, or training has diverged. Look at it first."
                )

    def _require_called(self):
        other = [weight.name for weight in self.chosen.weights if weight.kind != LINEAR]
        if other or self.chosen.places is not None:
            raise SensitivityError(
                f"{self.format} rounds the inputs of Linear layers, and the scope "
                f"{self.chosen.label!r} has none: it is for whole Linear layers only."
            )


def require_float(model):
    """Raise SensitivityError if `model` has quantized weights."""
    quantized = [
        name
        for name, parameter in model.named_parameters()
        if getattr(parameter, "quant_state", None) is not None or not parameter.is_floating_point()
    ]
    if quantized:
        raise SensitivityError(
            f"the model is quantized already ({quantized[0]} and {len(quantized) - 1} more "
            "weights), and what is rounded twice shows neither format. Load it in a float format: "
            'vk.load(name, plan="bf16").'
        )
