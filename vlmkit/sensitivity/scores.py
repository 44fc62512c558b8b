"""Layer scores: cheap guesses of what rounding a layer will break, and how good a guess each is.

    scores = vk.sensitivity.layer_scores(model, processor, calibration, formats=["int3", "int2"])
    damage = vk.sensitivity.sweep(model, processor, questions, ["int3", "int2"],
                                  vk.sensitivity.every(model, "layer"))
    vk.sensitivity.correlation(scores, damage)

Four scores, from the cheapest to the dearest. The first needs no question at all, the next two some
questions and one pass over each, whatever the number of formats, the last a pass for each format
and layer. With Δ the change of a weight W of a Linear layer, x its inputs and y = W x its outputs:

  weight_error   ‖Δ‖ / ‖W‖, Frobenius norms over the scope. No unit.
  sqnr           signal to quantization noise of the outputs, -10 log10 of ‖Δ x‖² / ‖y‖², over all
                 tokens of the questions, the shares averaged over the scope's Linear layers. In
                 dB; the higher, the less is lost. The inputs are those of the unquantized model.
  fisher         ½ Σ F Δ², F the mean over questions of the squared gradient of the answer's loss,
                 divided by its tokens: the second-order estimate of the damage, off-diagonal terms
                 left out (LeCun, Denker and Solla, Optimal Brain Damage, 1989; with these squared
                 gradients in place of second derivatives, SqueezeLLM, arXiv 2306.07629, section
                 4.1). In nats a token. Gradients of expected answers are the empirical Fisher,
                 which is not the Fisher matrix itself (arXiv 1905.12558).
  kl             the divergence from the unquantized model with this scope alone rounded, in nats a
                 token of its own answers, as in `sweep`.
"""

import re

from vlmkit import COMPONENTS
from vlmkit.errors import SensitivityError
from vlmkit.evaluation import batches, check, naming_rows, room_for_answers
from vlmkit.evaluation.asking import in_evaluation_mode, prepared
from vlmkit.evaluation.prompts import answered_inputs
from vlmkit.formats import rounding
from vlmkit.rows import LINEAR
from vlmkit.sensitivity.baseline import Baseline
from vlmkit.sensitivity.forcing import extended
from vlmkit.sensitivity.scopes import chosen, layers, weights_of
from vlmkit.sensitivity.swapping import Swap, require_float

SCORES = {"weight_error": 1, "sqnr": -1, "fisher": 1, "kl": 1}
"""The scores, and whether more of it means more damage (1) or less (-1)."""

COLUMNS = ("scope", "format", *SCORES, "parameters", "bits", "n")
BY = ("component", "layer", "linear")


def every(model, by="layer"):
    """The scopes that take the Linear layers of `model` apart: strings, in the model's order.

    by: "component", "layer" (a component's Linear layers outside its numbered layers are a scope
        of their own) or "linear" (each Linear layer).
    """
    if by not in BY:
        raise SensitivityError(f"scopes go by {', '.join(BY)}, not by {by!r}.")
    found = []
    for component in COMPONENTS:
        own = [w for w in weights_of(model) if (w.component, w.kind) == (component, LINEAR)]
        if not own:
            continue
        if by == "linear":
            found += [_pattern(model, [weight]) for weight in own]
            continue
        numbered = layers(model, component) if by == "layer" else ()
        inside = {w.name for scope in numbered for w in chosen(model, scope).weights}
        rest = [weight for weight in own if weight.name not in inside]
        found += numbered
        if rest:
            found.append(_pattern(model, rest) if inside else component)
    return tuple(found)


def _pattern(model, weights):
    """A scope that names these Linear layers: a plain name where that will do."""
    modules = [weight.name.rpartition(".")[0] for weight in weights]
    if len(modules) == 1 and len(chosen(model, modules[0]).weights) == 1:
        return modules[0]
    return "|".join(f"^{re.escape(module)}\\.$" for module in modules)


def layer_scores(
    model, processor, dataset, formats, *, scopes="layer", batch_size=64, max_new_tokens=None
):
    """The four scores (see this module) of each scope in each format: a DataFrame, a row for each.

    model: one that `vk.load` returned in a float format. It is given back as it was.
    dataset: the calibration questions. Keep them apart from those that the damage is measured on.
    formats: spellings that `vlmkit.formats.rounding` reads, of weights.
    scopes: "layer", "linear" or "component" (see `every`), or a list of scopes.
    batch_size, max_new_tokens: as in `vk.evaluate`, for the divergence.

    Columns: scope, format, weight_error, sqnr (dB), fisher and kl (nats a token), parameters, bits
    (of each, with its share of scales) and n, the number of questions. Without Linear layers a
    scope has no sqnr (NaN). Needs memory for a copy of the scopes' weights for each format, and for
    their squared gradients in float32.

    Raises SensitivityError for a scope that matches nothing, a format for activations, a model that
    is quantized already; PlanError for a format; and what `vk.evaluate` raises.
    """
    import pandas as pd

    check(processor, dataset, batch_size)
    require_float(model)
    if max_new_tokens is None:
        max_new_tokens = room_for_answers(processor, dataset)
    scopes = every(model, scopes) if scopes in BY else tuple(scopes)
    swaps = {(scope, str(f)): Swap(model, scope, f) for scope in scopes for f in formats}
    for (_, name), swap in swaps.items():
        if swap.format.activations:
            raise SensitivityError(f"{name} rounds activations, and the scores are of weights.")
        if swap.chosen.places is not None:
            raise SensitivityError(f"{swap.chosen.label}: the scores are of whole weights.")
    weights = {w.name: w for swap in swaps.values() for w in swap.chosen.weights}
    passes = _Passes(list(weights.values()), {str(f): rounding(f) for f in formats})
    passes.run(model, processor, dataset, max_new_tokens)
    baseline = Baseline(
        model, processor, dataset, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    rows = []
    for (scope, name), swap in swaps.items():
        own = [weight.name for weight in swap.chosen.weights]
        with swap:
            kl = baseline.compare([weight.parameter for weight in swap.chosen.weights]).kl
        rows.append(
            {
                "scope": scope,
                "format": name,
                **passes.scores(own, name),
                "kl": float(kl.mean()),
                "parameters": swap.parameters,
                "bits": swap.effective_bits,
                "n": len(dataset),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


class _Passes:
    """One pass forward and backward for each question: energies of outputs and of what rounding
    changes in them by forward hooks, squared gradients by autograd. Weights by their names."""

    def __init__(self, weights, formats):
        self.weights = weights
        self.changes = {  # a copy of each weight and format, in the model's own dtype
            (weight.name, name): format.rounded(weight.parameter) - weight.parameter.detach()
            for weight in weights
            for name, format in formats.items()
        }
        self.signal = {}
        self.noise = {}
        self.fisher = {weight.name: 0 for weight in weights}
        self.questions = 0

    def run(self, model, processor, dataset, max_new_tokens):
        import torch

        parameters = [weight.parameter for weight in self.weights]
        wanted = [parameter.requires_grad for parameter in parameters]
        hooks = []
        try:
            for weight in self.weights:
                if weight.kind == LINEAR:
                    hooks.append(weight.module.register_forward_hook(self._listen(weight.name)))
            with torch.inference_mode(False), torch.enable_grad(), in_evaluation_mode(model):
                for parameter in parameters:
                    parameter.requires_grad_(True)
                for rows, images, questions in batches(dataset, 1):
                    with naming_rows(rows):
                        inputs = prepared(model, processor, images, questions, max_new_tokens)
                    answer = answer_tokens(
                        model, processor, images[0], questions[0], dataset[rows[0]]["answer"]
                    )
                    self._add(model, inputs, answer, parameters)
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, before in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(before)

    def _add(self, model, inputs, answer, parameters):
        import torch

        logits = model(**extended(model, inputs, answer), use_cache=False).logits
        count = answer.shape[1]
        chances = logits[0, -count - 1 : -1].float().log_softmax(-1)
        loss = -chances.gather(-1, answer[0, :, None]).sum()
        # What the loss does not reach, such as a tower's last layer that is not read, has none
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            if gradient is not None:
                self.fisher[weight.name] += gradient.float() ** 2 / count
        self.questions += 1

    def _listen(self, name):
        import torch

        def hook(module, inputs, output):
            with torch.no_grad():
                x = inputs[0].detach()
                bias = 0 if module.bias is None else module.bias
                energy = (output.detach() - bias).float().square().sum().item()
                self.signal[name] = self.signal.get(name, 0) + energy
                for (weight, format), change in self.changes.items():
                    if weight == name:
                        lost = torch.nn.functional.linear(x, change).float().square().sum().item()
                        self.noise[name, format] = self.noise.get((name, format), 0) + lost

        return hook

    def scores(self, names, format):
        """The scores of the weights `names` in a format, but for the divergence."""
        import math

        parameters = {weight.name: weight.parameter for weight in self.weights}
        changed = sum(self.changes[name, format].float().square().sum().item() for name in names)
        there = sum(parameters[name].detach().float().square().sum().item() for name in names)
        shares = [
            self.noise[name, format] / self.signal[name] for name in names if self.signal.get(name)
        ]
        share = sum(shares) / len(shares) if shares else math.nan
        fisher = sum(
            (self.fisher[name] * self.changes[name, format].float() ** 2).sum().item()
            for name in names
            if self.questions and not isinstance(self.fisher[name], int)
        )
        return {
            "weight_error": math.sqrt(changed / there) if there else math.nan,
            "sqnr": -10 * math.log10(share) if share else math.inf,
            "fisher": fisher / self.questions / 2,
        }


def answer_tokens(model, processor, images, question, answer):
    """The tokens of an expected answer as the model's prompt goes on with it, up to and with the
    one that ends it: (1, tokens)."""
    import torch

    _, ends = answered_inputs(processor, [images], [question], [answer])
    tokens = torch.tensor(ends, device=model.device)
    stops = model.generation_config.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    found = torch.isin(tokens[0], torch.tensor(stops, device=model.device)).nonzero()
    return tokens[:, : found[0].item() + 1] if len(found) else tokens


def correlation(scores, damage, *, column="kl", draws=2_000, seed=0):
    """How well each score of `layer_scores` predicts the damage: a DataFrame.

    damage: a table of `sweep` with the same scopes and formats, on other questions.
    column: what of it is the damage: "kl", or "difference", whose fall is then the damage.

    A row for each score and format, and where there are several formats one for "all" together:
    `spearman`, the rank correlation with the damage (1: the score puts the scopes in the right
    order; the sign of sqnr is turned), its 95% percentile-bootstrap interval `low` and `high` over
    scopes, and how many `scopes`. All formats together mostly tell fewer bits from more, which
    takes no score: read the rows of single formats.

    Raises SensitivityError if fewer than three scopes are in both tables.
    """
    import pandas as pd

    both = scores.merge(damage, on=["scope", "format"], suffixes=("", "_true"))
    truth = f"{column}_true" if f"{column}_true" in both else column
    if truth not in both:
        raise SensitivityError(
            f"the damage has no column {column!r}; it has {', '.join(damage.columns)}."
        )
    if both["scope"].nunique() < 3:
        raise SensitivityError(
            f"{both['scope'].nunique()} scopes are in both tables, and an order needs three at "
            "least: sweep the scopes and formats of the scores."
        )
    formats = list(dict.fromkeys(both["format"]))
    groups = {f: both[both["format"] == f] for f in formats}
    if len(formats) > 1:
        groups["all"] = both
    turned = -1 if column == "difference" else 1
    rows = []
    for format, own in groups.items():
        for score, sign in SCORES.items():
            pairs = own[["scope", score, truth]].dropna()
            if pairs["scope"].nunique() < 3:
                continue
            found = _spearman_interval(
                pairs["scope"], sign * pairs[score], turned * pairs[truth], draws, seed
            )
            rows.append((score, format, *found, pairs["scope"].nunique()))
    return pd.DataFrame(rows, columns=["score", "format", "spearman", "low", "high", "scopes"])


def _spearman_interval(scopes, score, damage, draws, seed):
    """Spearman's correlation and its interval. All formats of a scope are drawn together."""
    import numpy as np
    from scipy.stats import rankdata

    def spearman(x, y):
        x, y = (rankdata(values, axis=-1) for values in (x, y))
        x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
        scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
        return np.where(scale > 0, (x * y).sum(-1) / np.where(scale > 0, scale, 1), np.nan)

    numbers = scopes.astype("category").cat.codes.to_numpy()
    x, y = score.to_numpy(dtype=float), damage.to_numpy(dtype=float)
    places = [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        rows = np.concatenate(
            [places[i] for i in generator.integers(len(places), size=len(places))]
        )
        drawn.append(spearman(x[rows], y[rows]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(spearman(x, y)), float(low), float(high)
