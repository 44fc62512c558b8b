"""Storages: the tensors behind a quantized weight, and memory that several tensors share.

bitsandbytes (0.50 and before) keeps the scales of a weight in places that differ by format and
change with the first forward pass. Loading, auditing and measuring all need these places.
"""


def state_tensors(module, parameter):
    """The tensors that a quantized parameter of `module` needs beside its own data."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    if parameter is not getattr(module, "weight", None):
        return
    # LLM.int8 keeps scales and a handle to the weights at the parameter until the first forward
    # pass, and in the module's state after it.
    for owner in (parameter, getattr(module, "state", None)):
        for leaf in ("CB", "SCB"):
            tensor = getattr(owner, leaf, None)
            if tensor is not None:
                yield tensor


def here(tensor):
    """What this process holds of `tensor`, which can be a shard (see vlmkit.backend.sharding)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Storages:
    """Counts distinct storages: each counts once, with its full size."""

    def __init__(self):
        self._seen = set()

    def nbytes(self, tensor):
        """Bytes of the storage of `tensor`, or 0 if this storage was counted before."""
        storage = here(tensor).untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key in self._seen:
            return 0
        self._seen.add(key)
        return storage.nbytes()
