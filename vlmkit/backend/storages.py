"""Storages: the tensors behind a quantized weight, and memory that several tensors share.

bitsandbytes keeps the scales of a weight beside it, in places that differ by format and that change
with the first forward pass. Loading, auditing and measuring all have to find them, so the places
are listed here, once.
"""


def state_tensors(module, parameter):
    """The tensors that a quantized parameter needs beside its own data."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
    if parameter is not getattr(module, "weight", None):
        return
    # LLM.int8 keeps scales and a handle to the weights at the parameter until the first forward
    # pass, and in the module's state from then on.
    for owner in (parameter, getattr(module, "state", None)):
        for leaf in ("CB", "SCB"):
            tensor = getattr(owner, leaf, None)
            if tensor is not None:
                yield tensor


class Storages:
    """Counts distinct storages: each counts once, at its full size."""

    def __init__(self):
        self._seen = set()

    def nbytes(self, tensor):
        """Bytes of the storage of `tensor`, and 0 if that storage was counted before."""
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key in self._seen:
            return 0
        self._seen.add(key)
        return storage.nbytes()
