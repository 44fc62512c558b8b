"""Memory: what a model's weights cost in bytes, predicted from a config, and measured.

    vk.memory.predict("pebble", plan)     # a Ledger, without reading a weight
    vk.memory.measure(model)              # a Ledger of what is there, from distinct storages

`model.get_memory_footprint()` leaves the scales of quantised weights out, 5.6% of an nf4 model, and
sums over modules count tied weights twice. So neither is used here.
"""

from dataclasses import dataclass, field

from vlmkit import COMPONENTS
from vlmkit.anatomy import component_finder, on_meta, unwrapped
from vlmkit.formats import FORMATS, torch_dtype
from vlmkit.layout import KINDS, kind_of
from vlmkit.stored import planned

MEGABYTE = 10**6
STATE, BUFFER = "quantisation state", "buffer"
"""Kinds of bytes beside those of the parameters (`vlmkit.layout.KINDS`)."""


@dataclass(frozen=True)
class Entry:
    """Bytes of one tensor's storage: whose, of which component (None: unknown), of which kind."""

    name: str
    component: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Ledger:
    """Bytes of a model's weights. `total`, `by_component`, `by_kind`, `entries`."""

    title: str
    entries: tuple = field(repr=False)

    @property
    def total(self):
        """All bytes."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def by_component(self):
        """Bytes of each component that has any, in the order of `vlmkit.COMPONENTS`."""
        return _sums(self.entries, "component", COMPONENTS)

    @property
    def by_kind(self):
        """Bytes of each kind: linear weights, embeddings, quantisation state, buffers, …"""
        return _sums(self.entries, "kind", (*KINDS, STATE, BUFFER))

    def table(self):
        """A pandas DataFrame of bytes: a row per component, a column per kind, and the sums."""
        import pandas as pd

        kinds = list(self.by_kind)
        rows = {
            component or "unknown": [
                sum(e.bytes for e in self.entries if (e.component, e.kind) == (component, kind))
                for kind in kinds
            ]
            for component in self.by_component
        }
        table = pd.DataFrame.from_dict(rows, orient="index", columns=kinds)
        table["total"] = table.sum(axis=1)
        table.loc["total"] = table.sum(axis=0)
        return table

    def __str__(self):
        head = f"{self.title}: {self.total / MEGABYTE:.2f} MB (1 MB = 10^6 bytes)"
        return f"{head}\n{_in_megabytes(self.table()).to_string()}"

    def _repr_html_(self):
        size = f"{self.total / MEGABYTE:.2f} MB (1 MB = 10<sup>6</sup> bytes)"
        return f"<p><b>{self.title}</b>: {size}</p>{_in_megabytes(self.table()).to_html()}"


def _sums(entries, what, order):
    sums = {}
    for entry in entries:
        key = getattr(entry, what)
        sums[key] = sums.get(key, 0) + entry.bytes
    return {key: sums[key] for key in (*order, None) if key in sums}


def _in_megabytes(table):
    return (table / MEGABYTE).map("{:.3f}".format)


def predict(x, plan=None, *, revision=None, trust_remote_code=False):
    """Ledger of the weights of `x` under `plan`, to the byte, without reading any.

    x: "pebble", a folder, a hub id, a transformers config, or a model (for its config).
    plan: a Plan or anything that `Plan.parse` takes; None is the recommended one, or what is stored
        for a checkpoint that is quantised already.

    The ledger holds parameters, quantisation states and buffers: what the loaded model occupies
    before it is run. Activations and the cache of keys and values come on top.

    Raises CheckpointError, AnatomyError and PlanError as `vk.load` does.
    """
    config, layout = planned(x, plan, revision=revision, trust_remote_code=trust_remote_code)
    # Some buffers follow the dtype that a model is built in: build it as loading will.
    model = on_meta(config, torch_dtype(layout.load_dtype), trust_remote_code)
    entries = []
    for row in layout.rows:
        weights, state = FORMATS[row.format].parts(row.shape)
        entries.append(Entry(row.name, row.component, row.kind, weights))
        if state:
            entries.append(Entry(row.name, row.component, STATE, state))
    component_of = component_finder(model)
    for name, buffer in model.named_buffers():
        size = buffer.numel() * buffer.element_size()
        entries.append(Entry(name, component_of(name), BUFFER, size))
    return Ledger(f"predicted for {type(model).__name__}", tuple(entries))


def measure(model):
    """Ledger of what `model` really holds: every distinct storage of a parameter, a buffer or a
    quantisation state, counted once and at its full size."""
    entries = [entry for entry in _entries(model) if entry.bytes]
    return Ledger(f"measured on {type(model).__name__}", tuple(entries))


def compare(predicted, measured):
    """A pandas DataFrame of two ledgers' bytes by component and kind, and their difference."""
    import pandas as pd

    pairs = {}
    for column, ledger in enumerate((predicted, measured)):
        for entry in ledger.entries:
            key = (entry.component or "unknown", entry.kind)
            pairs.setdefault(key, [0, 0])[column] += entry.bytes
    table = pd.DataFrame.from_dict(pairs, orient="index", columns=["predicted", "measured"])
    table.index = pd.MultiIndex.from_tuples(table.index, names=["component", "kind"])
    table["difference"] = table["measured"] - table["predicted"]
    return table


def storages_of(model):
    """{full parameter name: Entry} with the bytes of each parameter and its quantisation state."""
    sizes = {}
    for entry in _entries(model):
        if entry.kind != BUFFER:
            before = sizes.get(entry.name)
            total = entry.bytes + (before.bytes if before else 0)
            sizes[entry.name] = Entry(entry.name, entry.component, entry.kind, total)
    return sizes


def _entries(model):
    seen = set()
    base = unwrapped(model)
    component_of = component_finder(model)

    def entry(name, kind, tensor):
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        size = 0 if key in seen else storage.nbytes()
        seen.add(key)
        return Entry(name, component_of(name), kind, size)

    for path, module in model.named_modules():
        dot = path + "." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield entry(dot + leaf, kind_of(base, module, leaf), parameter)
            for tensor in state_tensors(module, parameter):
                yield entry(dot + leaf, STATE, tensor)
        for leaf, buffer in module.named_buffers(recurse=False):
            yield entry(dot + leaf, BUFFER, buffer)


def state_tensors(module, parameter):
    """The tensors that a quantised parameter needs beside its own data."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    # LLM.int8 keeps scales and a handle to the weights at the parameter until the first forward
    # pass, and in the module's state from then on.
    if parameter is not getattr(module, "weight", None):
        return
    for owner in (parameter, getattr(module, "state", None)):
        for leaf in ("CB", "SCB"):
            tensor = getattr(owner, leaf, None)
            if tensor is not None:
                yield tensor
