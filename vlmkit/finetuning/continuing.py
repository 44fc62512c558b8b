"""Continuing a training: which checkpoint is whole, and whether it belongs to this training.

Each checkpoint has a list of its files with their hashes, which is written last. A checkpoint that
a kill, a full disk or anything else has damaged does not agree with its list, and is passed over
for the one before. The list also has the description of the training, since a folder can hold a
training on other rows, of another model, or with other settings.
"""

import hashlib
import json
import tempfile
from pathlib import Path

from vlmkit import COMPONENTS
from vlmkit.anatomy import component_finder, is_adapter, plain_name, unwrapped
from vlmkit.backend import sharding
from vlmkit.backend.storages import here
from vlmkit.errors import FinetuningError, brief, shown
from vlmkit.folders import write_whole
from vlmkit.loading.processors import limits_of

LIST = "training.json"
STATE = "trainer_state.json"
FREE = ("save_steps", "dataloader_num_workers", "per_device_eval_batch_size", "report_to")
"""Settings that change nothing in what is learnt."""
LENGTH = ("max_steps", "num_train_epochs")
"""Settings that may differ, so that a training can be made longer."""

MOST_TEXTS, MOST_PICTURES = 10_000, 256  # rows of a dataset that its description reads
_SOME = 4096  # numbers of a tensor that go into a hash


def writable_folder(path):
    """The folder at `path`, as a pathlib.Path, made if it does not exist. Raises FinetuningError if
    this process cannot write in it."""
    try:
        if not path:
            raise ValueError("it has no name")  # Path("") is the current directory
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # ValueError: a NUL
        raise FinetuningError(
            f"{shown(path)} cannot be the folder of a training: {brief(error)}. Name a folder that "
            "you can write in, or one that does not exist yet."
        ) from error


# --- whole checkpoints ----------------------------------------------------------------------------


def seal(checkpoint, description):
    """Write the list of the files in `checkpoint`, a folder that has everything else already."""
    files = {
        path.relative_to(checkpoint).as_posix(): _hash_of(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != LIST
    }
    content = {"training": description, "files": files}
    write_json(checkpoint / LIST, content | {"hash": _hash_of_json(content)})


def write_json(path, content):
    """Write `content` as JSON to the file `path`, which has either all of it or what it had."""
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def found_in(folder):
    """(the last whole checkpoint in `folder`, as a pathlib.Path, or None; and {a later one that is
    damaged: what is wrong with it})."""
    passed = {}
    for path in _newest_first(folder):
        wrong = damage(path)
        if not wrong:
            return path, passed
        passed[path] = wrong
    return None, passed


def last_checkpoint(folder):
    """The last whole checkpoint in `folder`, as a pathlib.Path; None if there is none."""
    return found_in(folder)[0]


def step_of(checkpoint):
    """The step after which a checkpoint was written; 0 for None."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def description_in(checkpoint):
    """The description of the training that a whole checkpoint belongs to (see `description`)."""
    return json.loads((checkpoint / LIST).read_text(encoding="utf-8"))["training"]


def state_in(checkpoint):
    """What a Trainer has noted in a whole checkpoint, as a dict."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def _newest_first(folder):
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def damage(checkpoint):
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        content = json.loads((checkpoint / LIST).read_text(encoding="utf-8"))
        intact = content.pop("hash") == _hash_of_json(content)
    except FileNotFoundError:
        return f"{LIST} is missing, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        return f"{LIST} is damaged"
    for name, wanted in content["files"].items():
        try:
            if _hash_of(checkpoint / name) != wanted:
                return f"{name} is damaged"
        except OSError:
            return f"{name} is missing"
    return None


def _hash_of_json(content):
    hasher = _hasher()
    hasher.update(json.dumps(content, sort_keys=True).encode())
    return hasher.hexdigest()


def _hash_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _hasher).hexdigest()


def _hasher():
    return hashlib.blake2b(digest_size=16)


# --- which training -------------------------------------------------------------------------------


def description(model, processor, dataset, settings, processes):
    """What a training is, as a dict that JSON can hold: its settings and the number of processes,
    and as texts its rows, the plan and the adapters by component, the base and the start.

    rows: how many, and a hash of the first 10,000 texts and 256 pictures that `_spread` chooses. So
        a change of one row of many can be missed, and a change of their number cannot. A dataset
        without a length is not read.
    pictures: the limits of a picture's size that the processor has.
    base: a hash of 4,096 numbers of each frozen tensor. start: the same of what is trained, without
        adapters that do nothing yet, since their random A does not change the model.
    """
    return settings | {
        "processes": processes,
        "rows": _rows(dataset),
        "pictures": limits_of(processor),
        "plan": _plan(model),
        "adapters": _adapters(model),
        "base": _base(model),
        "start": _start(model),
    }


def require_same(asked, checkpoint):
    """Raise FinetuningError if `checkpoint` belongs to another training than the one described by
    `asked`: what differs, with both values."""
    before = description_in(checkpoint)
    told = []
    for name in asked:
        if name not in (*FREE, *LENGTH) and before.get(name) != asked[name]:
            told.append(f"{name} was {_told(before.get(name))}, is {_told(asked[name])}")
    if told:
        raise FinetuningError(
            f"{checkpoint.parent} holds another training ({'; '.join(told)}). Continue it with "
            "what it began with, or choose another folder."
        )


def _told(value):
    if isinstance(value, dict):
        return ", ".join(f"{key}: {part}" for key, part in value.items()) or "nothing"
    return value if isinstance(value, str) else repr(value)


def _rows(dataset):
    if not hasattr(dataset, "__len__"):
        return "a dataset without a length"
    number, hasher = len(dataset), _hasher()
    with_pictures = set(_spread(number, MOST_PICTURES))
    texts = dataset
    columns = getattr(dataset, "column_names", None)
    if columns and hasattr(dataset, "select_columns"):
        texts = dataset.select_columns([name for name in columns if name != "images"])
    # Another kind of dataset may draw a picture to give a text.
    cheap = texts is not dataset or isinstance(dataset, list | tuple)
    for place in _spread(number, MOST_TEXTS) if cheap else sorted(with_pictures):
        row = dataset[place] if place in with_pictures else texts[place]
        for key in sorted(row, key=str):
            hasher.update(f"{{{key}".encode())
            if key != "images":
                _feed(hasher, row[key])
            elif place in with_pictures:
                pictures = row[key] if isinstance(row[key], list | tuple) else [row[key]]
                _feed(hasher, [Path(p) if isinstance(p, str) else p for p in pictures])
    return f"{number:,} rows with the hash {hasher.hexdigest()}"


def _spread(number, most):
    """At most `most` places of `number`, evenly spread, with the first and the last."""
    if number <= most:
        return range(number)
    return sorted({place * (number - 1) // (most - 1) for place in range(most)})


def _feed(hasher, value):
    """Feed a value of a row to a hash: text, numbers, pictures, and lists and dicts of these."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # a picture, not decoded
        value = value["bytes"] if value["bytes"] is not None else Path(value["path"] or "")
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            hasher.update(f"{{{key}".encode())
            _feed(hasher, value[key])
    elif isinstance(value, list | tuple):
        hasher.update(f"[{len(value)}".encode())
        for part in value:
            _feed(hasher, part)
    elif isinstance(value, bytes):
        hasher.update(value)
    elif isinstance(value, Path):
        try:
            hasher.update(value.read_bytes())
        except OSError:  # the collator says what is wrong with it
            hasher.update(value.name.encode())
    elif hasattr(value, "resize") and hasattr(value, "mode"):  # PIL's
        hasher.update(f"{value.mode} {value.size}".encode())
        try:
            hasher.update(value.resize((64, 64), resample=0).tobytes())
        except (OSError, ValueError, SyntaxError):  # damaged, which the collator will say
            hasher.update(b"damaged")
    elif hasattr(value, "tobytes"):  # an array
        hasher.update(value.tobytes())
    elif hasattr(value, "detach"):  # a tensor
        hasher.update(repr(value.detach().cpu().flatten()[:_SOME].tolist()).encode())
    else:
        text = value if isinstance(value, str) else repr(value)
        hasher.update(text.encode("utf-8", "surrogatepass"))


def _plan(model):
    """{component: the formats of its parameters, as text}."""
    from vlmkit.loading.audit import format_of

    component_of, found = component_finder(model), {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if not is_adapter(name) and parameter is not None:
                formats = found.setdefault(component_of(name), set())
                formats.add(format_of(module, leaf))
    return {c: " and ".join(sorted(found[c])) for c in COMPONENTS if c in found}


def _adapters(model):
    """{component: what is trained in it, as text}."""
    component_of = component_finder(model)
    full, ranks, others = {}, {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_adapter(name):
            component = component_of(name)
            full.setdefault(component, []).append(f"{plain_name(name)} {tuple(parameter.shape)}")
    for name, module in model.named_modules():
        for adapter, rank in (getattr(module, "r", None) or {}).items() if _is_lora(module) else ():
            component = component_of(name)
            dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
            kind = "DoRA" if adapter in module.lora_magnitude_vector else "LoRA"
            kind += f" r={rank}, scale {module.scaling[adapter]:g}, dropout {dropout:g}"
            ranks.setdefault(component, set()).add(kind)
            others.setdefault(component, []).append(f"{plain_name(name)} {kind}")
    told = {}
    for component in COMPONENTS:
        kinds = ["full"] * (component in full) + sorted(ranks.get(component, ()))
        if kinds:
            names = sorted(full.get(component, []) + others.get(component, []))
            hasher = _hasher()
            hasher.update("\n".join(names).encode())
            told[component] = f"{'; '.join(kinds)} ({len(names)} parts, {hasher.hexdigest()[:8]})"
    return told


def _is_lora(module):
    return isinstance(getattr(module, "r", None), dict) and hasattr(module, "lora_dropout")


def _base(model):
    frozen = (
        (plain_name(name), parameter)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and not is_adapter(name)
    )
    return f"{type(unwrapped(model)).__name__} with the hash {_hash_of_tensors(frozen)}"


def _start(model):
    parameters = dict(model.named_parameters())

    def does_nothing(name):
        """Whether this is the A of an adapter whose B is zero."""
        other = parameters.get(name.replace(".lora_A.", ".lora_B."))
        return ".lora_A." in name and other is not None and not sharding.whole(other).any()

    trained = ((n, p) for n, p in parameters.items() if p.requires_grad and not does_nothing(n))
    return f"weights with the hash {_hash_of_tensors(trained)}"


def _hash_of_tensors(named):
    import torch

    hasher, shards = _hasher(), False
    for name, parameter in named:
        shards = shards or hasattr(parameter, "full_tensor")
        tensors = [parameter.detach()]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors.append(state.absmax)
        hasher.update(name.encode())
        for tensor in tensors:
            tensor = here(tensor).reshape(-1)
            some = tensor[:: max(1, len(tensor) // _SOME)].contiguous()
            hasher.update(some.view(torch.uint8).cpu().numpy().tobytes())
    if shards:
        hashes = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(hashes, hasher.hexdigest())
        hasher = _hasher()  # of the hashes of all processes, and so the same in each
        hasher.update("".join(hashes).encode())
    return hasher.hexdigest()
