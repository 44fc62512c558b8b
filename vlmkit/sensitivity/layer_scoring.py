"""Layer scores: cheap estimates of the damage of rounding a layer, and how good each estimate is.

    scores = vk.sensitivity.layer_scores(model, processor, calibration, formats=["int3", "int2"])
    damage = vk.sensitivity.sweep(model, processor, questions, ["int3", "int2"],
                                  vk.sensitivity.every(model, "layer"))
    vk.sensitivity.correlation(scores, damage)

There are four scores, from the cheapest to the most expensive. The first needs no question. The
next two need one pass over each question, for any number of formats. The last needs a pass for each
format and layer. Here Δ is the change of a weight W of a Linear layer, x the layer's inputs, and
y = W x its outputs:

  weight_error   ‖Δ‖ / ‖W‖, Frobenius norms over the scope. No unit.
  sqnr           signal to quantization noise of the outputs, -10 log10 of ‖Δ x‖² / ‖y‖², over all
                 tokens of the questions, averaged (before the logarithm) over the scope's Linear
                 layers. In dB; a higher value means less damage. The inputs are those of the
                 unquantized model.
  fisher         ½ Σ F Δ², where F is the mean over questions of the squared gradient of the
                 answer's loss, divided by the answer's tokens. This is the second-order estimate of
                 the damage without off-diagonal terms (LeCun, Denker and Solla, Optimal Brain
                 Damage, 1989; with these squared gradients in place of second derivatives,
                 SqueezeLLM, arXiv 2306.07629, section 4.1). In nats a token. Gradients of expected
                 answers give the empirical Fisher, which is not the Fisher matrix itself (arXiv
                 1905.12558).
  kl             the divergence from the unquantized model with only this scope rounded, in nats a
                 token of the unquantized model's answers, as in `sweep`.
"""

import math

from vlmkit.errors import SensitivityError, public
from vlmkit.evaluation import batches, check, naming_rows, room_for_answers
from vlmkit.evaluation.asking import in_evaluation_mode, prepared
from vlmkit.evaluation.prompts import answered_inputs, turns_of
from vlmkit.formats import rounding
from vlmkit.rows import LINEAR
from vlmkit.sensitivity.baseline import Baseline
from vlmkit.sensitivity.scopes import BY, every
from vlmkit.sensitivity.teacher_forcing import end_tokens, extended
from vlmkit.sensitivity.temporary import Rounded, require_float

SCORES = {"weight_error": 1, "sqnr": -1, "fisher": 1, "kl": 1}
"""The scores, and whether a higher one means more damage (1) or less (-1)."""


@public
def layer_scores(
    model, processor, dataset, formats, *, scopes="layer", batch_size=64, max_new_tokens=None
):
    """The four scores (see this module) of each scope in each format: a DataFrame, a row for each.

    model: one that `vk.load` returned in a float format. It is the same afterwards, bit for bit.
    dataset: the calibration questions. Measure the damage on other questions.
    formats: spellings that `vlmkit.formats.rounding` reads, of weights.
    scopes: "layer", "linear" or "component" (see `every`), or a list of scopes.
    batch_size, max_new_tokens: as in `vk.evaluate`, for the divergence.

    Columns: scope, format, weight_error, sqnr (dB), fisher and kl (nats a token), parameters, bits
    (of each, with its share of scales) and n, the number of questions. A scope without Linear
    layers has no sqnr (NaN). This needs memory for a copy of the scopes' weights for each format,
    and for their squared gradients in float32.

    Raises SensitivityError for a scope that matches nothing, a format for activations, and a model
    that is quantized already; PlanError for a format; and the errors of `vk.evaluate`.
    """
    import pandas as pd

    check(processor, dataset, batch_size)
    require_float(model)
    if max_new_tokens is None:
        max_new_tokens = room_for_answers(processor, dataset)
    scopes = every(model, scopes) if scopes in BY else tuple(scopes)
    cells = {(scope, str(f)): Rounded(model, scope, f) for scope in scopes for f in formats}
    for (_, name), rounded in cells.items():
        if rounded.format.activations:
            raise SensitivityError(f"{name} rounds activations, and the scores are of weights.")
        if rounded.selection.places is not None:
            raise SensitivityError(f"{rounded.selection.label}: the scores are of whole weights.")
    weights = {w.name: w for rounded in cells.values() for w in rounded.selection.weights}
    passes = _Passes(list(weights.values()), {str(f): rounding(f) for f in formats})
    passes.run(model, processor, dataset, max_new_tokens)
    baseline = Baseline(
        model, processor, dataset, batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    rows = []
    for (scope, name), rounded in cells.items():
        own = rounded.selection.weights
        with rounded:
            kl = baseline.compare(own, answers=False).kl
        rows.append(
            {
                "scope": scope,
                "format": name,
                **passes.scores([weight.name for weight in own], name),
                "kl": float(kl.mean()),
                "parameters": rounded.parameters,
                "bits": rounded.effective_bits,
                "n": len(dataset),
            }
        )
    return pd.DataFrame(rows)


class _Passes:
    """One pass forward and backward for each question. Forward hooks sum the energies of outputs
    and of what rounding changes in them; autograd gives the squared gradients."""

    def __init__(self, weights, formats):
        self.weights = weights
        self.changes = {  # {format: {name of a weight: its change}}, in the model's own dtype
            name: {w.name: format.rounded(w.parameter) - w.parameter.detach() for w in weights}
            for name, format in formats.items()
        }
        self.signal, self.noise = {}, {}
        self.fisher = {}
        self.questions = 0

    def run(self, model, processor, dataset, max_new_tokens):
        import torch

        parameters = [weight.parameter for weight in self.weights]
        wanted = [parameter.requires_grad for parameter in parameters]
        hooks = [
            weight.layer.register_forward_hook(self._hook(weight.name))
            for weight in self.weights
            if weight.kind == LINEAR
        ]
        try:
            with torch.inference_mode(False), torch.enable_grad(), in_evaluation_mode(model):
                for parameter in parameters:
                    parameter.requires_grad_(True)
                for rows, images, questions in batches(dataset, 1):
                    with naming_rows(rows):
                        inputs = prepared(model, processor, images, questions, max_new_tokens)
                    answer = answer_tokens(
                        model, processor, images[0], questions[0], dataset[rows[0]]["answer"]
                    )
                    self._add_gradients(model, inputs, answer, parameters)
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, before in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(before)

    def _add_gradients(self, model, inputs, answer, parameters):
        import torch

        logits = model(**extended(model, inputs, answer), use_cache=False).logits
        count = answer.shape[1]
        log_p = logits[0, -count - 1 : -1].float().log_softmax(-1)
        loss = -log_p.gather(-1, answer[0, :, None]).sum()
        # The loss does not reach every weight: a vision encoder's last layer may not be read
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            if gradient is not None:
                before = self.fisher.get(weight.name, 0)
                self.fisher[weight.name] = before + gradient.float() ** 2 / count
        self.questions += 1

    def _hook(self, name):
        import torch

        def hook(module, inputs, output):
            with torch.no_grad():
                bias = 0 if module.bias is None else module.bias
                self.signal[name] = self.signal.get(name, 0) + _energy(output.detach() - bias)
                for format, changes in self.changes.items():
                    changed = torch.nn.functional.linear(inputs[0].detach(), changes[name])
                    before = self.noise.get((name, format), 0)
                    self.noise[name, format] = before + _energy(changed)

        return hook

    def scores(self, names, format):
        """The scores of the weights `names` in a format, except the divergence."""
        changes = self.changes[format]
        changed = sum(_energy(changes[name]) for name in names)
        before = sum(_energy(w.parameter.detach()) for w in self.weights if w.name in names)
        shares = [
            self.noise[name, format] / self.signal[name] for name in names if self.signal.get(name)
        ]
        share = sum(shares) / len(shares) if shares else math.nan
        fisher = sum(
            (self.fisher[name] * changes[name].float() ** 2).sum().item()
            for name in names
            if name in self.fisher
        )
        return {
            "weight_error": math.sqrt(changed / before) if before else math.nan,
            "sqnr": -10 * math.log10(share) if share else math.inf,
            "fisher": fisher / self.questions / 2,
        }


def _energy(x):
    return x.float().square().sum().item()


def answer_tokens(model, processor, images, question, answer):
    """The tokens of an expected answer after the model's prompt, up to and with the token that ends
    it: (1, tokens)."""
    import torch

    inputs, learnt = answered_inputs(processor, [images], [turns_of(images, question, answer)])
    tokens = inputs["input_ids"][learnt][None].to(model.device)
    found = torch.isin(tokens[0], end_tokens(model).to(model.device)).nonzero()
    return tokens[:, : found[0].item() + 1] if len(found) else tokens


def correlation(scores, damage, *, column="kl", draws=2_000, seed=0):
    """How well each score of `layer_scores` predicts the damage: a DataFrame.

    damage: a table of `sweep` with the same scopes and formats, on other questions.
    column: its column with the damage: "kl", or "difference", where a fall is damage.

    A row for each score and format, and if there are several formats one for "all" together:
    `spearman`, the rank correlation with the damage (1 if the score puts the scopes in the right
    order; the sign of sqnr is turned), its 95% percentile-bootstrap interval `low` and `high` over
    scopes, and the number of `scopes`. The rows of single formats say more than "all": it is easy
    to see that fewer bits do more damage.

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
            f"{both['scope'].nunique()} scopes are in both tables, and an order needs at least "
            "three: sweep the scopes and formats of the scores."
        )
    groups = dict(list(both.groupby("format", sort=False)))
    if len(groups) > 1:
        groups["all"] = both
    turned = -1 if column == "difference" else 1
    rows = []
    for format, own in groups.items():
        for score, sign in SCORES.items():
            pairs = own[["scope", score, truth]].dropna()
            if (count := pairs["scope"].nunique()) < 3:
                continue
            found = _spearman_interval(
                pairs["scope"], sign * pairs[score], turned * pairs[truth], draws, seed
            )
            rows.append((score, format, *found, count))
    return pd.DataFrame(rows, columns=["score", "format", "spearman", "low", "high", "scopes"])


def _spearman_interval(scopes, score, damage, draws, seed):
    """Spearman's correlation and its interval. A resample draws scopes, with all their formats."""
    import numpy as np
    from scipy.stats import rankdata

    def spearman(x, y):
        x, y = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
        scale = np.sqrt((x**2).sum() * (y**2).sum())
        return (x * y).sum() / scale if scale > 0 else np.nan

    numbers = scopes.astype("category").cat.codes.to_numpy()
    x, y = score.to_numpy(dtype=float), damage.to_numpy(dtype=float)
    places = [np.flatnonzero(numbers == number) for number in range(numbers.max() + 1)]
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        scopes_drawn = generator.integers(len(places), size=len(places))
        rows = np.concatenate([places[i] for i in scopes_drawn])
        drawn.append(spearman(x[rows], y[rows]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(spearman(x, y)), float(low), float(high)
