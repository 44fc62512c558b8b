"""Scopes: which weights of a model an experiment quantizes.

    "language_model"              the Linear layers of a component
    "attention", "mlp"            a kind of layer, in every component
    "language_model:mlp"          that kind in one component
    "language_model:3"            one layer, counted from 0; or "language_model:3:attention"
    r"layers\\.0\\."                a regular expression, searched in full module names
    ["projector", "mlp"]          several of these together
    random_weights(like="projector", of="language_model")     a control experiment, see there

As in a plan, embeddings, the output head, convolutions and bare parameters stay as they are. To
quantize one of them, give a regular expression that matches no Linear layer ("lm_head",
"patch_embedding"). Norms and biases always stay.
"""

import re
from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.anatomy import anatomy_of, component_finder, unwrapped
from vlmkit.errors import SensitivityError, did_you_mean
from vlmkit.rows import BIAS, LINEAR, NORM, Row, kind_of

ATTENTION, MLP = KINDS = ("attention", "mlp")
COMPONENT, LAYER, ONE_LINEAR = BY = ("component", "layer", "linear")


@dataclass(frozen=True, eq=False)
class Weight(Row):
    """The Row of a weight, with the parameter itself and its layer, the torch module."""

    parameter: object = field(default=None, repr=False)
    layer: object = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Selection:
    """The weights of a model that a scope selects. places: None, or for each weight the positions
    in its flattened tensor that are rounded, if only some of them are."""

    label: str
    weights: tuple
    places: tuple = None

    @property
    def counts(self):
        """For each weight, how many of its numbers are rounded."""
        if self.places is not None:
            return [len(places) for places in self.places]
        return [weight.parameters for weight in self.weights]

    @property
    def parameters(self):
        """How many numbers are rounded, in all weights together."""
        return sum(self.counts)


@dataclass(frozen=True)
class RandomWeights:
    """A scope: see `random_weights`."""

    of: object
    like: object
    seed: int

    def __str__(self):
        return f"{label_of(self.of)}, as many as {label_of(self.like)}, seed {self.seed}"


def random_weights(*, like, of, seed=0):
    """A scope for a control experiment: as many weights as the scope `like` has, drawn at random
    from the scope `of`.

    If quantizing the projector does more damage than quantizing as many weights of the language
    model, the projector is fragile. If not, it is only small. The scales are those of the whole
    weights.
    """
    return RandomWeights(of, like, seed)


def label_of(scope):
    """The name of a scope, as tables and result files show it."""
    if isinstance(scope, (list, tuple)):
        return " + ".join(map(label_of, scope))
    return getattr(scope, "pattern", None) or str(scope)


def weights_of(model):
    """Every Weight of two or more dimensions in `model`. A tied weight appears once, as the
    embedding."""
    base, component_of = unwrapped(model), component_finder(model)
    found = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = kind_of(base, module, leaf)
            if parameter.dim() < 2 or kind in (BIAS, NORM) or id(parameter) in found:
                continue
            name = f"{path}.{leaf}" if path else leaf
            found[id(parameter)] = Weight(
                name,
                component_of(name),
                kind,
                parameter.nbytes,
                tuple(parameter.shape),
                parameter=parameter,
                layer=module,
            )
    return tuple(found.values())


def layers(model, component="language_model"):
    """The scopes of a component's layers, in order: ("language_model:0", "language_model:1", …).

    Weights belong to the same layer if their names are the same up to the first number.
    """
    found = {_layer(w) for w in weights_of(model) if w.component == component and w.kind == LINEAR}
    return tuple(f"{component}:{index}" for index in range(len(found - {None})))


def every(model, by=LAYER):
    """Scopes that together hold every Linear layer of `model` once: strings, in the model's order.

    by: "component", "layer" (the Linear layers of a component outside its numbered layers are one
        more scope) or "linear" (a scope for each Linear layer).
    """
    if by not in BY:
        raise SensitivityError(f"scopes go by {', '.join(BY)}, not by {by!r}.")
    found = []
    for component in COMPONENTS:
        own = [w for w in weights_of(model) if (w.component, w.kind) == (component, LINEAR)]
        if by == ONE_LINEAR:
            found += [_pattern(model, [weight]) for weight in own]
            continue
        numbered = layers(model, component) if by == LAYER else ()
        inside = {w.name for scope in numbered for w in select(model, scope).weights}
        rest = [weight for weight in own if weight.name not in inside]
        found += numbered
        if rest:
            found.append(_pattern(model, rest) if inside else component)
    return tuple(found)


def _pattern(model, weights):
    """A scope that selects these Linear layers: a plain module name if that is enough."""
    modules = [weight.module for weight in weights]
    if len(modules) == 1 and len(select(model, modules[0]).weights) == 1:
        return modules[0]
    return exactly(modules)


def exactly(modules):
    """A regular expression that matches these full module names and no others."""
    return "|".join(f"^{re.escape(module)}\\.$" for module in modules)


def select(model, scope):
    """The Selection of a scope in `model`. The module's docstring lists what a scope can be.

    Raises SensitivityError, with what the model has, if the scope matches nothing.
    """
    weights = weights_of(model)
    if isinstance(scope, RandomWeights):
        return _draw(model, scope)
    parts = scope if isinstance(scope, (list, tuple)) else [scope]
    if not parts:
        raise SensitivityError("the scope is an empty list: name a component, a kind or a pattern.")
    names = {weight.name for part in parts for weight in _matching(model, weights, part)}
    return Selection(label_of(scope), tuple(weight for weight in weights if weight.name in names))


def _matching(model, weights, scope):
    if isinstance(scope, re.Pattern):
        return _matching_pattern(model, weights, scope.pattern)
    if not isinstance(scope, str):
        raise SensitivityError(
            f"{scope!r} is not a scope: give a component, a kind of layer (attention, mlp), a "
            "regular expression over module names, random_weights(…), or a list of these."
        )
    linears = [weight for weight in weights if weight.kind == LINEAR]
    first, *rest = scope.split(":")
    if first in COMPONENTS:
        own = found = [weight for weight in linears if weight.component == first]
        for part in rest:
            found = _narrowed(scope, own, found, part)
    elif scope in KINDS:
        found = _of_kind(linears, scope)
    else:
        return _matching_pattern(model, weights, scope)
    if not found:
        counts = anatomy_of(model).by_component
        raise SensitivityError(
            f"the scope {scope!r} matches no Linear layer of this {type(unwrapped(model)).__name__}"
            f", which has {', '.join(f'{c} ({n:,} parameters)' for c, n in counts.items() if c)}."
        )
    return found


def _narrowed(scope, component, found, part):
    """Those of `found` that belong to a kind or a numbered layer of their component."""
    if part in KINDS:
        return _of_kind(found, part)
    numbered = list(dict.fromkeys(layer for w in component if (layer := _layer(w)) is not None))
    if part.isdecimal() and int(part) < len(numbered):
        return [weight for weight in found if _layer(weight) == numbered[int(part)]]
    raise SensitivityError(
        f"the scope {scope!r} matches nothing: after the component comes a kind (attention, mlp) "
        f"or the number of a layer, and there are {len(numbered)} layers, counted from 0."
    )


def _matching_pattern(model, weights, pattern):
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SensitivityError(f"{pattern!r} is not a regular expression: {error}") from error
    found = [weight for weight in weights if compiled.search(f"{weight.module}.")]
    if found:
        return [weight for weight in found if weight.kind == LINEAR] or found
    modules = [weight.module for weight in weights]
    words = [*COMPONENTS, *KINDS, *{word for module in modules for word in module.split(".")}]
    raise SensitivityError(
        f"the scope {pattern!r} matches nothing in this {type(unwrapped(model)).__name__}. "
        f"{did_you_mean(pattern, words, 0.6)}Scopes are the components ({', '.join(COMPONENTS)}), "
        "attention and mlp, and regular expressions over full module names such as\n  "
        + "\n  ".join(modules[:: 1 + len(modules) // 5])
    )


def _of_kind(weights, kind):
    def is_attention(weight):
        return any("attn" in word or "attention" in word for word in weight.name.split("."))

    return [weight for weight in weights if is_attention(weight) == (kind == ATTENTION)]


def _layer(weight):
    """The part of a weight's name up to the first number, or None if there is no number."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", weight.name)
    return found and found[0]


def _draw(model, scope):
    import torch

    pool, like = select(model, scope.of), select(model, scope.like)
    sizes = pool.counts
    if like.parameters > sum(sizes):
        raise SensitivityError(
            f"{label_of(scope.like)} has {like.parameters:,} weights, and {label_of(scope.of)} "
            f"only {sum(sizes):,} to draw them from: exchange the two, or choose a larger scope."
        )
    generator = torch.Generator().manual_seed(scope.seed)
    drawn = torch.randperm(sum(sizes), generator=generator)[: like.parameters].sort().values
    edges = torch.tensor([0, *sizes]).cumsum(0)
    cuts = torch.searchsorted(drawn, edges)
    places = [drawn[a:b] - start for a, b, start in zip(cuts, cuts[1:], edges, strict=False)]
    return Selection(str(scope), pool.weights, tuple(places))
