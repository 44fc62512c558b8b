"""Scopes: which weights of a model an experiment quantizes.

    "language_model"              the Linear layers of a component
    "attention", "mlp"            a kind of layer, in every component
    "language_model:mlp"          that kind in one component
    "language_model:3"            one layer, from 0 on; "language_model:3:attention" is a part of it
    r"layers\\.0\\."                any regular expression, searched in full module names
    ["projector", "mlp"]          several of these together
    random_weights(like="projector", of="language_model")     a control, see there

As in a plan, embeddings, output head, convolutions and bare parameters stay as they are unless a
regular expression names nothing else ("lm_head", "patch_embedding"). Norms and biases always stay.
"""

import difflib
import re
from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.anatomy import anatomy_of, component_finder, unwrapped
from vlmkit.errors import SensitivityError
from vlmkit.rows import BIAS, LINEAR, NORM, kind_of

ATTENTION, MLP = "attention", "mlp"
PARTS = (ATTENTION, MLP)


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight: its full name, where it is, and what it is (`kind`: see vlmkit.layout.KINDS)."""

    name: str
    module: object = field(repr=False)
    parameter: object = field(repr=False)
    component: str
    kind: str


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a scope names in a model. `places` is None, or for each weight the places within its
    flattened tensor that are to be rounded, where that is not all of them."""

    label: str
    weights: tuple
    places: tuple = None

    @property
    def parameters(self):
        """How many numbers are rounded."""
        if self.places is not None:
            return sum(len(places) for places in self.places)
        return sum(weight.parameter.numel() for weight in self.weights)


@dataclass(frozen=True)
class RandomWeights:
    """A scope: see `random_weights`."""

    of: object
    like: object
    seed: int

    def __str__(self):
        return f"{label_of(self.of)}, as many as {label_of(self.like)}, seed {self.seed}"


def random_weights(*, like, of, seed=0):
    """A control: as many weights as the scope `like` has, drawn at random from the scope `of`.

    If quantizing the projector does more damage than quantizing as many weights of the language
    model, it is fragile; if not, it is small. The scales are those of the whole weights.
    """
    return RandomWeights(of, like, seed)


def label_of(scope):
    """The name of a scope, as tables and result files show it."""
    if isinstance(scope, (list, tuple)):
        return " + ".join(map(label_of, scope))
    return getattr(scope, "pattern", None) or str(scope)


def weights_of(model):
    """Every Weight of two or more dimensions in `model`, a tied one once (and as an embedding)."""
    base, component_of = unwrapped(model), component_finder(model)
    found = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = kind_of(base, module, leaf)
            if parameter.dim() < 2 or kind in (BIAS, NORM) or id(parameter) in found:
                continue
            name = f"{path}.{leaf}" if path else leaf
            found[id(parameter)] = Weight(name, module, parameter, component_of(name), kind)
    return tuple(found.values())


def layers(model, component="language_model"):
    """The scopes of a component's layers, in order: ("language_model:0", "language_model:1", …).

    A layer is what a number in a module's name tells apart.
    """
    found = {_layer(w) for w in weights_of(model) if w.component == component and w.kind == LINEAR}
    return tuple(f"{component}:{index}" for index in range(len(found - {None})))


def chosen(model, scope):
    """The Chosen of a scope (see this module) in `model`.

    Raises SensitivityError if it matches nothing, with what there is.
    """
    weights = weights_of(model)
    if isinstance(scope, RandomWeights):
        return _drawn(model, weights, scope)
    parts = scope if isinstance(scope, (list, tuple)) else [scope]
    if not parts:
        raise SensitivityError("the scope is an empty list: name a component, a kind or a pattern.")
    named = {weight.name for part in parts for weight in _named(model, weights, part)}
    return Chosen(label_of(scope), tuple(weight for weight in weights if weight.name in named))


def _named(model, weights, scope):
    if isinstance(scope, re.Pattern):
        return _matching(model, weights, scope.pattern)
    if not isinstance(scope, str):
        raise SensitivityError(
            f"{scope!r} is not a scope: give a component, a kind of layer (attention, mlp), a "
            "regular expression over module names, random_weights(…), or a list of these."
        )
    first, *rest = scope.split(":")
    linears = [weight for weight in weights if weight.kind == LINEAR]
    if first in COMPONENTS:
        has = [w for w in linears if w.component == first]
        found = has
        for part in rest:
            found = _part(scope, has, found, part)
    elif scope in PARTS:
        found = [weight for weight in linears if _is_attention(weight) == (scope == ATTENTION)]
    else:
        return _matching(model, weights, scope)
    if not found:
        counts = anatomy_of(model).by_component
        raise SensitivityError(
            f"the scope {scope!r} matches no Linear layer of this {type(unwrapped(model)).__name__}"
            f", which has {', '.join(f'{c} ({n:,} parameters)' for c, n in counts.items() if c)}."
        )
    return found


def _part(scope, component, found, part):
    if part in PARTS:
        return [weight for weight in found if _is_attention(weight) == (part == ATTENTION)]
    numbered = list(dict.fromkeys(layer for w in component if (layer := _layer(w)) is not None))
    if part.isdecimal() and int(part) < len(numbered):
        return [weight for weight in found if _layer(weight) == numbered[int(part)]]
    raise SensitivityError(
        f"the scope {scope!r} matches nothing: after the component comes a kind (attention, mlp) "
        f"or the number of a layer, and there are {len(numbered)} layers, from 0 on."
    )


def _matching(model, weights, pattern):
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SensitivityError(f"{pattern!r} is not a regular expression: {error}") from error
    found = [w for w in weights if compiled.search(w.name.rpartition(".")[0] + ".")]
    if found:
        return [weight for weight in found if weight.kind == LINEAR] or found
    modules = [weight.name.rpartition(".")[0] for weight in weights]
    segments = {segment for module in modules for segment in module.split(".")}
    near = difflib.get_close_matches(pattern, [*COMPONENTS, *PARTS, *segments], n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise SensitivityError(
        f"the scope {pattern!r} matches nothing in this {type(unwrapped(model)).__name__}. {hint}"
        f"Scopes are the components ({', '.join(COMPONENTS)}), attention and mlp, and regular "
        "expressions over full module names such as\n  "
        + "\n  ".join(modules[:: 1 + len(modules) // 5])
    )


def _is_attention(weight):
    return any("attn" in part or "attention" in part for part in weight.name.split("."))


def _layer(weight):
    """The path up to the first number in a weight's name, or None where there is none."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.)", weight.name)
    return found and found[0]


def _drawn(model, weights, scope):
    import torch

    pool, like = chosen(model, scope.of), chosen(model, scope.like)
    sizes = [weight.parameter.numel() for weight in pool.weights]
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
    return Chosen(str(scope), pool.weights, tuple(places))
