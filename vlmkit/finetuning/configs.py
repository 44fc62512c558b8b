"""A training as a file: model, plan, what each component learns, data, settings, evaluation.

    config = read("train.yaml")
    config.training            # for vk.finetuning.add_adapters: {"projector": "full", ...}
    rows(config.data, "train") # for vk.finetuning.train

What the file says is checked before anything is loaded: a key that does not exist would otherwise
be a setting that was not set. See docs/training.md and docs/train.yaml for an example.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vlmkit.adapters import LoRA, parse
from vlmkit.errors import FinetuningError, VlmkitError
from vlmkit.finetuning.settings import Settings
from vlmkit.plan import Plan

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
WORDS |= {dict: "a mapping", list: "a list"}


@dataclass(frozen=True)
class Rows:
    """Where rows come from: the tasks of vlmkit, or published data.

    task, n, seed: as in `vk.tasks.dataset`. source, schema, name, prompt, limit: as in
    `vk.tasks.from_dataset`; a source that is a path is relative to the current directory.
    split: of either; that of a task is "train" for training and "evaluation" for the questions.
    """

    task: str | list = None
    n: int = 100
    seed: int = 0
    source: str = None
    schema: str = None
    name: str = None
    prompt: str = None
    limit: int = None
    split: str = None


@dataclass(frozen=True)
class Config:
    """What a file says. model, plan: as in `vk.load`, a Plan once it is read. output: a folder.

    train: {component: "frozen", "full", "lora" or the fields of a LoRA}.
    data, evaluation: Rows to learn from, and to ask before and after (None for no questions).
    settings: those of `vk.finetuning.train`.
    """

    model: str = "pebble"
    plan: str | dict = None
    train: dict = None
    data: dict = None
    settings: dict = field(default_factory=dict)
    evaluation: dict = None
    output: str = None

    @property
    def training(self):
        """`train` as `vk.finetuning.add_adapters` takes it."""
        return {component: _way(component, way) for component, way in self.train.items()}


def read(path):
    """The Config in the YAML file `path`, checked.

    Raises FinetuningError for a file that is missing or no YAML, for a key that does not exist
    (with the nearest that does) or stands there twice, and for a value of another type; and the
    errors of a Plan, a LoRA and Settings for values that cannot be.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FinetuningError(
            f"There is no file {path}; the current directory is {Path.cwd()}."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise FinetuningError(f"{path} cannot be read as text: {error}") from error
    try:
        said = yaml.load(text, _Loader)  # noqa: S506, a SafeLoader
    except yaml.YAMLError as error:
        raise FinetuningError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _checked(said)
    except VlmkitError as error:
        raise type(error)(f"{path}: {error}") from error


def rows(source, split):
    """The rows that a `Rows` means, as a `datasets.Dataset`. split: of a task without one."""
    from vlmkit import tasks

    if source.task:
        return tasks.dataset(source.task, source.n, source.seed, source.split or split)
    named = {"name": source.name, "prompt": source.prompt, "limit": source.limit}
    return tasks.from_dataset(source.source, source.schema, source.split, decode=False, **named)


# --- checks ---------------------------------------------------------------------------------------


def _checked(said):
    if not isinstance(said, dict):
        raise FinetuningError(f"the file holds no mapping of keys to values, but {said!r}")
    config = _built(Config, said, "")
    for key in ("train", "data", "output"):
        if not getattr(config, key):
            raise FinetuningError(f"{key} is missing; needed are train, data and output")
    plan = config.plan
    if isinstance(plan, dict):
        plan = ",".join(f"{component}={format}" for component, format in plan.items())
    plan = None if plan is None else Plan.parse(plan)
    parse(config.training)
    Settings.of(_typed(Settings, config.settings, "settings"))
    sources = {name: _rows(getattr(config, name), name) for name in ("data", "evaluation")}
    if config.evaluation is None and (config.settings.get("evaluate_every") is not None):
        raise FinetuningError("settings: evaluate_every needs questions: say which in evaluation")
    return dataclasses.replace(config, plan=plan, **sources)


def _rows(said, where):
    if said is None:
        return None
    found = _built(Rows, said, where)
    if bool(found.task) == bool(found.source):
        raise FinetuningError(
            f"{where} names either a task (of vlmkit's own) or a source (published data), and here "
            f"it has {'both' if found.task else 'neither'}"
        )
    if found.source:
        idle = [key for key in ("n", "seed") if key in said]
    else:
        idle = [key for key in ("schema", "name", "prompt", "limit") if key in said]
    if idle:
        raise FinetuningError(
            f"{where}: {' and '.join(idle)} does nothing for a "
            f"{'source' if found.source else 'task'}"
        )
    return found


def _way(component, said):
    """What a component learns, of what the file says."""
    if isinstance(said, dict):
        return _built(LoRA, said, f"train: {component}")
    words = {"frozen": None, None: None, "full": "full", "lora": LoRA()}
    if not (said is None or isinstance(said, str)) or said not in words:
        raise FinetuningError(
            f"train: {component} is frozen, full, lora, or a mapping with the fields of a LoRA; it "
            f"is {said!r}"
        )
    return words[said]


def _built(kind, said, where):
    return kind(**_typed(kind, said, where))


def _typed(kind, said, where):
    """`said`, if its keys are fields of the dataclass `kind` and its values of their types."""
    place = f"{where}: " if where else ""
    if not isinstance(said, dict):
        raise FinetuningError(f"{where} is a mapping of keys to values, not {said!r}")
    types = {one.name: _types(one) for one in dataclasses.fields(kind)}
    for key, value in said.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise FinetuningError(
                f"{place}{key!r} is no key: {hint}they are {', '.join(map(str, types))}"
            )
        if not any(_is(value, one) for one in types[key]):
            wanted = " or ".join(WORDS[one] for one in types[key] if one in WORDS)
            raise FinetuningError(f"{place}{key} is {wanted}, not {value!r}")
    return said


def _types(one):
    """The types that a field of a dataclass may have."""
    types = getattr(one.type, "__args__", (one.type,))
    return (*types, type(None)) if one.default is None else types


def _is(value, wanted):
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads 2e-4 as a number, as YAML 1.2 does, and refuses a key said twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    "-+0123456789",
)
