"""Plans: a number format for each component of a vision-language model.

    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model="nf4")
    plan = plan.override(r"language_model\\.layers\\.0\\.", "bf16")
    model, processor = vk.load("pebble", plan)

A plan knows no model. `vlmkit.layout.layout_of(model, plan)` says what a plan does to a model.
"""

import re
from types import MappingProxyType

from vlmkit import COMPONENTS
from vlmkit.errors import PlanError, did_you_mean
from vlmkit.formats import DEFAULT, FORMATS, format_named
from vlmkit.tables import Table


class Plan(Table):
    """A format for each component. A component that is not named gets bf16. Immutable.

    The formats are the names in `vlmkit.formats.FORMATS`. A quantized format applies to the Linear
    layers of a component. The output head, tied weights, embeddings, norms, biases and convolutions
    stay in the format's float format (bf16), as transformers and bitsandbytes keep them.

    Raises PlanError, with the nearest right name, for an unknown component or format.
    """

    def __init__(self, **formats):
        self._set(formats)

    def _set(self, formats, overrides=(), default=DEFAULT):
        for component, name in formats.items():
            _require_component(component)
            format_named(name)
        named = {c: formats[c] for c in COMPONENTS if c in formats}
        object.__setattr__(self, "named", MappingProxyType(named))
        object.__setattr__(self, "_default", default)
        object.__setattr__(self, "overrides", tuple(overrides))

    @classmethod
    def _make(cls, formats, overrides=(), default=DEFAULT):
        plan = cls.__new__(cls)
        plan._set(formats, overrides, default)
        return plan

    @classmethod
    def recommended(cls):
        """Vision encoder and projector in bf16, language model in nf4. This saves nearly all that a
        plan can save, since most of the bytes are the language model's."""
        return cls(vision_encoder="bf16", projector="bf16", language_model="nf4")

    @classmethod
    def uniform(cls, name):
        """Every component in the format `name`."""
        format_named(name)
        return cls._make({}, default=name)

    @classmethod
    def parse(cls, x):
        """A plan from a Plan, from None or "recommended", from a format's name, or from text such
        as "vision_encoder=bf16,language_model=nf4". Raises PlanError for anything else."""
        if isinstance(x, Plan):
            return x
        if x is None or x == "recommended":
            return cls.recommended()
        if not isinstance(x, str):
            raise PlanError(f"{x!r} is not a plan. Give a vk.Plan, the name of a format, or text.")
        if "=" not in x:
            return cls.uniform(x.strip())
        formats = {}
        for item in filter(None, (item.strip() for item in x.split(","))):
            component, equals, name = (part.strip() for part in item.partition("="))
            if not equals:
                raise PlanError(f"{item!r} in the plan {x!r} is not of the form component=format.")
            if component in formats:
                raise PlanError(f"The plan {x!r} names {component} twice. Name it once.")
            formats[component] = name
        return cls(**formats)

    def override(self, pattern, name):
        """A new plan in which the modules that `pattern` finds get the format `name`.

        pattern: a regular expression, searched in the full name of a module with a dot at its end.
            So r"layers\\.1\\." finds layer 1 and not layer 11.
        """
        try:
            re.compile(pattern)
        except re.error as error:
            raise PlanError(f"{pattern!r} is not a regular expression: {error}") from error
        format_named(name)
        return self._make(self.named, (*self.overrides, (pattern, name)), self._default)

    def __getitem__(self, component):
        _require_component(component)
        return self.named.get(component, self._default)

    def __setattr__(self, name, value):
        raise AttributeError("A Plan does not change. Make a new one, or use plan.override(…).")

    def _key(self):
        return (*(self[c] for c in COMPONENTS), self.overrides)

    def __eq__(self, other):
        return isinstance(other, Plan) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __reduce__(self):  # pickle and copy set attributes one by one, which a Plan forbids
        return Plan._make, (dict(self.named), self.overrides, self._default)

    def __repr__(self):
        if self._default != DEFAULT:
            text = f"Plan.uniform({self._default!r})"
        else:
            text = f"Plan({', '.join(f'{c}={f!r}' for c, f in self.named.items())})"
        return text + "".join(f".override({p!r}, {f!r})" for p, f in self.overrides)

    def table(self):
        """A pandas DataFrame: what is planned, its format, and what the format is."""
        import pandas as pd

        rows = [(c, self[c], FORMATS[self[c]].about) for c in COMPONENTS]
        rows += [(f"modules matching {p}", f, FORMATS[f].about) for p, f in self.overrides]
        columns = ["component", "format", "which is"]
        return pd.DataFrame(rows, columns=columns).set_index("component")


def _require_component(name):
    if name not in COMPONENTS:
        raise PlanError(
            f"{name!r} is not a component. {did_you_mean(name, COMPONENTS, 0.4)}"
            f"The components are {', '.join(COMPONENTS)}."
        )
