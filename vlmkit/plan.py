"""Plans: a number format for each component of a vision-language model.

    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model="nf4")
    plan = plan.override(r"language_model\\.layers\\.0\\.", "bf16")
    model, processor = vk.load("pebble", plan)
    plan.save("plan.yaml")  # and vk.load("pebble", "plan.yaml") reads it

A plan knows no model. `vlmkit.layout.layout_of(model, plan)` says what a plan does to a model.
"""

import json
import os
import re
import reprlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vlmkit import COMPONENTS
from vlmkit.errors import PlanError, brief, did_you_mean
from vlmkit.folders import write_whole
from vlmkit.formats import DEFAULT, FORMATS, format_named
from vlmkit.tables import Table

FILES = (".yaml", ".yml", ".json")


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
        """A plan from anything that says one:

        a Plan; None or "recommended"; a format's name; text such as
        "vision_encoder=bf16,language_model=nf4"; the name of a file that `save` wrote, which ends
        in .yaml, .yml or .json; a mapping as `to_dict` returns it; a transformers
        BitsAndBytesConfig (see `vlmkit.backend.converting.formats_of_config`).

        Raises PlanError for anything else.
        """
        if isinstance(x, Plan):
            return x
        if x is None or x == "recommended":
            return cls.recommended()
        if isinstance(x, Mapping):
            return cls._of_mapping(x)
        if type(x).__name__ == "BitsAndBytesConfig":
            from vlmkit.backend.converting import formats_of_config

            default, overrides = formats_of_config(x)
            return cls._make({}, overrides, default)
        if isinstance(x, os.PathLike) or (isinstance(x, str) and x.lower().endswith(FILES)):
            return cls._of_file(Path(x).expanduser())
        if not isinstance(x, str):
            raise PlanError(
                f"{x!r} is not a plan. Give a vk.Plan, the name of a format, text, a mapping, a "
                "file or a BitsAndBytesConfig."
            )
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

    @classmethod
    def _of_mapping(cls, said):
        said = dict(said)
        default, overrides = said.pop("default", DEFAULT), said.pop("overrides", ())
        if not isinstance(overrides, (list, tuple)):
            raise PlanError(f"overrides is a list of {{pattern, format}}, not {overrides!r}.")
        format_named(default)
        plan = cls._make({}, (), default)
        plan._set({str(component): name for component, name in said.items()}, (), default)
        for one in overrides:
            if not isinstance(one, Mapping) or set(one) != {"pattern", "format"}:
                raise PlanError(f"an override has a pattern and a format, and no more: {one!r}.")
            plan = plan.override(one["pattern"], one["format"])
        return plan

    @classmethod
    def _of_file(cls, path):
        import yaml  # here, since most plans are in no file

        from vlmkit.backend.validation import YamlLoader, unique_keys

        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix.lower() == ".json":
                said = json.loads(text, object_pairs_hook=unique_keys)
            else:
                said = yaml.load(text, YamlLoader)  # noqa: S506, a SafeLoader
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"The plan {path} cannot be read: {brief(error)}") from error
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
            kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
            raise PlanError(f"The plan {path} is not {kind}: {brief(error)}") from error
        if not isinstance(said, Mapping):
            raise PlanError(f"The plan {path} holds {said!r}, and no components with formats.")
        try:
            return cls._of_mapping(said)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def to_dict(self):
        """{component: format}, with "default" for those that are not named and "overrides", a list
        of {"pattern": ..., "format": ...}, where the plan has them. `parse` reads it back."""
        said = {} if self._default == DEFAULT else {"default": self._default}
        said |= self.named
        if self.overrides:
            said["overrides"] = [{"pattern": p, "format": f} for p, f in self.overrides]
        return said

    def save(self, path):
        """Write the plan to a file, as YAML or, if its name ends in .json, as JSON. Returns the
        path. `vk.load`, the command line and a training file take its name as a plan.

        Raises PlanError if the name ends otherwise, or if the file cannot be written.
        """
        path = Path(path).expanduser()
        if path.suffix.lower() not in FILES:
            raise PlanError(f"The name of a plan's file ends in {', '.join(FILES)}, not as {path}.")
        said = self.to_dict() or {COMPONENTS[0]: DEFAULT}
        if path.suffix.lower() == ".json":
            text = json.dumps(said, indent=2) + "\n"
        else:
            import yaml

            text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True)
        try:
            write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"The plan cannot be written to {path}: {brief(error)}") from error
        return path

    def override(self, pattern, name):
        """A new plan in which the modules that `pattern` finds get the format `name`.

        pattern: a regular expression, searched in the full name of a module with a dot at its end.
            So r"layers\\.1\\." finds layer 1 and not layer 11.
        """
        if not isinstance(pattern, str):
            raise PlanError(
                f"the pattern of an override is a text with a regular expression, and not "
                f"{reprlib.repr(pattern)}."
            )
        matching(pattern, ())
        format_named(name)
        return self._make(self.named, (*self.overrides, (pattern, name)), self._default)

    def with_format(self, component, name):
        """A new plan in which `component` has the format `name`."""
        return self._make({**self.named, component: name}, self.overrides, self._default)

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
        if self._default != DEFAULT and self.named:
            text = f"Plan.parse({ {'default': self._default, **self.named} })"
        elif self._default != DEFAULT:
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


SECONDS = 2
"""The time that one pattern may take to search all names of a model: a thousandth is usual."""


def matching(pattern, names):
    """Those of `names` in which the regular expression `pattern` is found, as a list.

    Raises PlanError if it is no regular expression, or if the search takes too long. Python's own
    `re` would go on for years for a pattern such as r"(\\w+\\.?)+!", with its many ways to try.
    """
    import regex  # transformers needs it too; unlike re, it can stop

    try:
        re.compile(pattern)
        search = regex.compile(pattern).search
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise PlanError(
            f"{reprlib.repr(pattern)} is not a regular expression: {brief(error)}"
        ) from error
    end = time.monotonic() + SECONDS
    try:
        return [n for n in names if search(n, timeout=max(end - time.monotonic(), 1e-3))]
    except TimeoutError as error:
        raise PlanError(
            f"the search for {reprlib.repr(pattern)} in the names of the modules takes longer than "
            f"{SECONDS} seconds. A repeated group in which something is repeated too, such as "
            "(a+)+, does that. Write it without the inner or the outer repetition."
        ) from error


def _require_component(name):
    if name not in COMPONENTS:
        raise PlanError(
            f"{name!r} is not a component. {did_you_mean(name, COMPONENTS, 0.4)}"
            f"The components are {', '.join(COMPONENTS)}."
        )
