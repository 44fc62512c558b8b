"""Quantizing a scope of a loaded model for a while, and restoring the model bit for bit."""

import threading
from fractions import Fraction

from vlmkit.anatomy import unwrapped
from vlmkit.errors import SensitivityError
from vlmkit.formats import rounding
from vlmkit.formats.experiments import INTEGERS, TABLES
from vlmkit.rows import LINEAR
from vlmkit.sensitivity.scopes import Selection, select


def quantized(model, scope, format):
    """A context in which the weights of a scope, or the inputs of its layers, are rounded.

        with vk.sensitivity.quantized(model, "language_model", "int3-g32") as rounded:
            vk.evaluate(model, processor, dataset)
        rounded.effective_bits, rounded.bytes_saved

    model: a loaded transformers model in a float format. scope: see `vlmkit.sensitivity.scopes`.
    format: a spelling that `vlmkit.formats.rounding` reads, or a Rounding.

    The model's parameters get rounded tensors of the same dtype; a tied parameter is rounded once.
    The original tensors are kept, and they come back when the block ends, also after an exception
    or Ctrl-C. Contexts can be nested, for weights and activations together. A format for
    activations rounds the inputs of the scope's Linear layers by forward hooks. It does not reach
    a layer whose weight is read by the module around it (torch's MultiheadAttention).

    Raises PlanError for a format that does not exist. Raises SensitivityError if the scope matches
    nothing, if the model is quantized already, and for a weight with NaN or infinite values.
    """
    return Rounded(model, scope, format)


class TemporaryWeights:
    """A context in which parameters hold other tensors. A subclass puts them in, in `_change`, and
    sets `model`.

    Contexts on one model may end in any order. A context that ends before one that began after it
    leaves its originals to that one, so that the last one restores them. Only one thread at a time
    may have contexts on a model, since every thread would see the changes of all the others.
    """

    _lock = threading.Lock()
    _threads = {}  # id of a model: the thread that changes it, once for each context
    _stacks = {}  # id of a parameter: its changes, [parameter, original tensor], oldest first

    def __init__(self, model):
        self.model = model
        self._original, self._hooks, self._held = [], [], False

    def __enter__(self):
        import torch

        if self._held:
            raise SensitivityError("this is in use already: make another one.")
        self._take_model()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._change()
        except BaseException:  # Ctrl-C is one
            self._restore()
            raise
        return self

    def _take_model(self):
        own = threading.get_ident()
        with self._lock:
            threads = self._threads.setdefault(id(unwrapped(self.model)), [])
            if any(thread != own for thread in threads):
                raise SensitivityError(
                    "another thread changes the weights of this model for a while, and its changes "
                    "would be measured here too. Let one thread end first, or load the model once "
                    "for each thread."
                )
            threads.append(own)
            self._held = True

    def _put(self, parameter, tensor):
        change = [parameter, parameter.data]
        self._original.append(change)  # first, in case of an interrupt
        self._stacks.setdefault(id(parameter), []).append(change)
        parameter.data = tensor

    def _restore(self, *_):
        interrupted, restored = None, False
        while not restored:
            try:
                # Inside the `try`, since an interrupt can also come between two turns of a loop.
                while self._original or self._hooks or self._held:
                    if self._hooks:
                        self._hooks[-1].remove()
                        self._hooks.pop()
                    elif self._original:
                        self._take_back(self._original[-1])
                        self._original.pop()
                    else:
                        self._leave_model()
                restored = True
            except KeyboardInterrupt as error:  # a second Ctrl-C waits until all is restored
                interrupted = error
        if interrupted:
            raise interrupted

    __exit__ = _restore  # not a call of it, at whose beginning an interrupt could come

    def _take_back(self, change):
        """Undo a change. Doing this twice, after an interrupt, has no further effect."""
        parameter, original = change
        stack = self._stacks.get(id(parameter), [])
        place = next((i for i, other in enumerate(stack) if other is change), None)
        if place is None:
            return
        if change is stack[-1]:
            parameter.data = original
        else:
            stack[place + 1][1] = original
        del stack[place]
        if not stack:
            self._stacks.pop(id(parameter), None)

    def _leave_model(self):
        with self._lock:
            key = id(unwrapped(self.model))
            threads = self._threads.get(key)
            if threads:
                threads.pop()
            if not threads:
                self._threads.pop(key, None)
            self._held = False


class Rounded(TemporaryWeights):
    """What `quantized` returns.

    selection: the Selection of the scope. parameters: how many numbers it has. effective_bits: bits
    of a number as it would be stored, scales included. bytes_saved: against the dtype of the model.
    Nothing counts as saved if activations are rounded.
    """

    def __init__(self, model, scope, format):
        super().__init__(model)
        self.format = rounding(format)
        require_float(model)
        self.selection = scope if isinstance(scope, Selection) else select(model, scope)
        if self.format.activations:
            self._require_linear_layers()
        else:
            self._require_finite()

    @property
    def parameters(self):
        return self.selection.parameters

    @property
    def effective_bits(self):
        return float(self._bits()[1] / self.parameters)

    @property
    def bytes_saved(self):
        before, after = self._bits()
        return int((before - after) / 8)

    def _bits(self):
        """(bits of all selected numbers as they are stored now, bits in the format): exact
        Fractions. If only some numbers of a weight are rounded, they count with their share."""
        counted = list(zip(self.selection.counts, self.selection.weights, strict=True))
        before = Fraction(sum(n * 8 * w.parameter.element_size() for n, w in counted))
        if self.format.activations:
            return before, before
        return before, sum(n * self.format.effective_bits(w.shape) for n, w in counted)

    def _change(self):
        for index, weight in enumerate(self.selection.weights):
            if self.format.activations:
                self._hooks.append(weight.layer.register_forward_pre_hook(self._round_input))
            else:
                self._put(weight.parameter, self._rounded(index, weight.parameter.data))

    def _rounded(self, index, original):
        rounded = self.format.rounded(original)
        if self.selection.places is None:
            return rounded
        places = self.selection.places[index].to(original.device)
        mixed = original.flatten().clone()
        mixed[places] = rounded.flatten()[places]
        return mixed.reshape(original.shape)

    def _round_input(self, module, inputs):
        return (self.format.rounded(inputs[0]), *inputs[1:])

    def _require_finite(self):
        for weight in self.selection.weights:
            if not weight.parameter.isfinite().all():
                raise SensitivityError(
                    f"{weight.name} has NaN or infinite values, which no scale fits: the "
                    "checkpoint is damaged, or training has diverged. Look at it first."
                )

    def _require_linear_layers(self):
        other = [weight.name for weight in self.selection.weights if weight.kind != LINEAR]
        if other or self.selection.places is not None:
            raise SensitivityError(
                f"{self.format} rounds the inputs of Linear layers, and the scope "
                f"{self.selection.label!r} has none: it is for whole Linear layers only."
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
            "weights), and rounding a weight twice shows neither format. Load the model in a float "
            'format: vk.load(name, plan="bf16").'
        )


def equal_bits(model, scope, bits, within=0.05):
    """Formats that take about `bits` bits a weight on a scope, scales and zero points included:
    a DataFrame with the columns format and bits, the closest first.

    Use it for a control experiment: formats with the same nominal bits do not take the same bytes.
    The search covers integers of 2 to 8 bits, per tensor, per row and in groups of 16 to 128, with
    and without zero points and double quantization, and NF4 and FP4 in blocks of 16 to 4096.
    Raises SensitivityError, with the closest format, if none is within `within` bits.
    """
    import pandas as pd

    selection = select(model, scope)
    shapes = [weight.shape for weight in selection.weights]
    count = sum(weight.parameters for weight in selection.weights)
    rows = []
    for name in _spellings():
        total = sum(rounding(name).total_bits(shape) for shape in shapes)
        rows.append((name, total / count))
    rows.sort(key=lambda row: (abs(row[1] - bits), row[0]))
    found = [row for row in rows if abs(row[1] - bits) <= within]
    if not found:
        raise SensitivityError(
            f"no format takes {bits} bits a weight within {within} on {scope!r}: the closest is "
            f"{rows[0][0]} with {rows[0][1]:.3f}."
        )
    return pd.DataFrame(found, columns=["format", "bits"])


def _spellings():
    for kind in INTEGERS:
        for ending in ("", "-asym"):
            yield from (f"{kind}-tensor{ending}", f"{kind}-row{ending}")
            for group in (16, 32, 64, 128):
                yield from (f"{kind}-g{group}{ending}", f"{kind}-g{group}{ending}-dq")
    for kind in TABLES:
        for block in (16, 32, 64, 128, 256, 1024, 4096):
            yield from (f"{kind}-b{block}", f"{kind}-b{block}-dq")
