"""The bytes of a checkpoint as they lie in its weight files, by component and stored format."""

import json
import re
from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.anatomy import on_meta
from vlmkit.checkpoints import (
    find,
    quantization_method,
    read_config,
    require_plain_files,
    what_loads,
)
from vlmkit.errors import AnatomyError, CheckpointError, brief, public
from vlmkit.headers import gguf_files, gguf_rows, mismatch, stored_rows, unquantized
from vlmkit.memory.ledger import Ledger
from vlmkit.rows import STATE, STORED
from vlmkit.units import MEGABYTE


@dataclass(frozen=True)
class StoredLedger(Ledger):
    """A Ledger of what weight files hold, with `by_format`, `unknown` and `method`: what the
    weights are quantized by ("awq", "gguf", …), or None. Its entries are Rows, each a tensor."""

    method: str = field(default=None)

    @property
    def unknown(self):
        """Names of the tensors whose component is not known."""
        return tuple(entry.name for entry in self.entries if entry.component is None)

    @property
    def by_format(self):
        """{(component, stored format): bytes}, with the quantization state of each format."""
        found = {}
        for entry in self.entries:
            key = entry.component, entry.format
            found[key] = found.get(key, 0) + entry.bytes
        order = (*COMPONENTS, None)
        return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), -item[1])))

    def table(self):
        """A pandas DataFrame with a row for each component and stored format, and their sum: how
        many tensors, and the bytes of weights, of their quantization state, and of both."""
        import pandas as pd

        rows = []
        for component, label in self.by_format:
            own = [e for e in self.entries if (e.component, e.format) == (component, label)]
            sizes = [sum(e.bytes for e in own if e.kind == kind) for kind in (STORED, STATE)]
            rows.append((component or "unknown", label, len(own), *sizes, sum(sizes)))
        columns = ["component", "stored format", "tensors", STORED, STATE, "total"]
        table = pd.DataFrame(rows, columns=columns).set_index(columns[:2])
        table.loc[("total", ""), :] = table.sum(axis=0)
        return table.astype(int)

    def _text_table(self):
        table = self.table()
        for name in (STORED, STATE, "total"):
            table[name] = (table[name] / MEGABYTE).map("{:,.3f}".format)
        return table

    def _remarks(self):
        if self.unknown:
            more = f" and {len(self.unknown) - 3} more" if len(self.unknown) > 3 else ""
            yield f"No rule assigns to a component: {', '.join(self.unknown[:3])}{more}."
        yield from self.notes


@public
def stored(x, *, revision=None, trust_remote_code=False):
    """StoredLedger of the checkpoint `x`: the bytes of its tensors as they lie in the weight files,
    whatever they are quantized by. Only the headers of the files are read.

    x: a folder, a model of the course, a hub id whose weights are on this machine, a GGUF file, or
        a list of GGUF files (the model's and its mmproj).

    If transformers cannot build the model, the names in the files are taken as they are, and a
    note says so. Tensors whose component no rule knows are counted as unknown.

    Raises CheckpointError if there is no such checkpoint, if its weights are not here or only
    pickled, or if a file is damaged.
    """
    if files := gguf_files(x):
        return _of_gguf(files)
    folder = find(x, revision=revision, weights=False)
    if files := gguf_files(folder):
        return _of_gguf(files)
    require_plain_files(folder)  # before the headers are read: a pipe would be waited for
    model = method = bits = None
    notes = []
    try:
        config = read_config(folder, trust_remote_code=trust_remote_code)
        method, bits = quantization_method(config), _bits_of(config)
        model = on_meta(config, trust_remote_code=trust_remote_code)
    except (AnatomyError, CheckpointError) as error:
        if not any(folder.glob("*.safetensors")):
            raise
        notes.append(f"The names are taken as they are in the files, because {brief(error)}")
    entries = tuple(stored_rows(folder, model, bits))
    notes += [*unquantized(entries, method), *(mismatch(folder, model) if model else ())]
    if method is None and any(entry.kind == STATE for entry in entries):
        notes.append("config.json does not say that the weights are quantized, and they are.")
    return _ledger(folder.name, entries, method, notes)


def loadable(x, revision=None):
    """Whether vlmkit can load what the checkpoint `x`, a name or a path, has stored."""
    if gguf_files(x):
        return False
    folder = find(x, revision=revision, weights=False)
    require_plain_files(folder)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        said = raw.get("quantization_config") or {}
        return not (what_loads(str(said.get("quant_method", "bitsandbytes"))) or gguf_files(folder))
    except (OSError, ValueError, AttributeError, RecursionError):  # whoever uses it says what it is
        return not gguf_files(folder)


def _of_gguf(files):
    entries, names = gguf_rows(files)
    notes = ["The blocks of GGUF hold their scales, so these count as weights."]
    if "clip" not in names:
        notes.append("No mmproj file is here: vision encoder and projector are not counted.")
    if set(names) == {"clip"}:
        notes.append("Only the mmproj file is counted, not the language model.")
    return _ledger(", ".join(file.name for file in files), tuple(entries), "gguf", notes)


def _ledger(name, entries, method, notes):
    title = f"stored in {name}"
    if method not in (None, "gguf"):
        title += f" (quantized by {method})"
    return StoredLedger(title, entries, (*notes, *filter(None, [what_loads(method)])), method)


def _bits_of(config):
    """The bits of a weight that config.json says, if it says one number only."""
    said = getattr(config, "quantization_config", None) or {}
    said = said if isinstance(said, dict) else said.to_dict()
    found = set(re.findall(r'"(?:w_bit|n?bits|num_bits)": (\d+)', json.dumps(said, default=str)))
    return int(found.pop()) if len(found) == 1 else None
