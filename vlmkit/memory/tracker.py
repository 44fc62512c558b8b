"""Tracking: which bytes are live while a model runs on tensors that have a shape and no data.

    tracker = AllocationTracker()
    tracker.empty(model)                   # built on the meta device
    with tracker:
        model(**inputs)                    # transformers' own code, layer by layer
    tracker.peak                           # bytes that the real pass would hold at most

A `ShapeTensor` says that it is on the CPU, so that PyTorch and transformers take the way that they
take there; PyTorch's meta device works out the shape of every result. Such tensors have no values,
and the forward pass of a VLM looks at some values: which positions are image tokens, how large the
grid of each picture is. Integers and masks therefore stay real, and results that follow from them
alone are computed. Everything that meets a weight or a pixel has a shape only. A mask that depends
on pixels counts as true everywhere, which is right for pictures that are not black.

A storage is live from the operation that makes it until the last tensor that uses it is gone, in
the order in which Python and autograd drop tensors. The allocator of the real run sees the same.
Memory that a kernel allocates inside itself is counted for bitsandbytes' kernels, which
`vlmkit.memory.kernels` writes out, and for arithmetic between two dtypes on a CPU, which copies one
of them. It is not counted for PyTorch's other kernels. Most take little, but on a CPU with AMX
oneDNN's convolutions copy what they read and attention packs keys and values, which was up to 14%
of the peak of small models. Kernels for a GPU do neither.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vlmkit.anatomy import component_finder
from vlmkit.memory.kernels import KERNELS
from vlmkit.memory.ledger import GATHERED

aten = torch.ops.aten
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
SLOW = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.addmm.default,
    aten.pow.Tensor_Scalar,
    aten.mean.dim,
    aten.linear.default,
    aten.cat.default,
    aten.stack.default,
    aten.mm.default,
    aten.neg.default,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.ne.Scalar,
    aten.rsqrt.default,
    aten.empty_like.default,
    aten.sum.dim_IntList,
    aten.slice_backward.default,
    aten._to_copy.default,
)
"""Operators whose shapes PyTorch works out slowly, in Python. They are remembered. None of them
returns a view."""
ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
"""Operators that copy an argument of another dtype to that of the result. On a GPU they do not."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype))
CPU, META = torch.device("cpu"), torch.device("meta")
SMALL, LARGE = 2**10, 2**25
"""A result from integers is computed at once if they have up to SMALL elements. Beyond that, it is
only a shape if it has more than LARGE bytes."""


class Storage:
    """Memory that tensors share. `nbytes()` is its size, as for PyTorch's own storages."""

    __slots__ = ("__weakref__", "size")

    def __init__(self, size):
        self.size = size

    def nbytes(self):
        return self.size


class ShapeTensor(torch.Tensor):
    """A tensor on the CPU with a shape, strides and a dtype, and without data.

    meta: a tensor of the same shape on the meta device. storage: the Storage that it shares with
        its views; None makes one.
    """

    @staticmethod
    def __new__(cls, meta, storage=None):
        new = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=CPU
        )
        # Not the storage of `meta`: PyTorch's functions in Python may hold on to that.
        new.meta, new.storage = meta, storage or Storage(meta.untyped_storage().nbytes())
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_on_shapes(function, args, kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):  # bitsandbytes casts the bias of a layer in this way
        torch.Tensor.data.__set__(self, other)
        self.meta, self.storage = other.meta, other.storage

    def __repr__(self):
        return f"ShapeTensor({tuple(self.shape)}, {self.dtype})"


def storage_of(tensor):
    """The storage of a tensor with or without data."""
    return tensor.storage if type(tensor) is ShapeTensor else tensor.untyped_storage()


def _shape_of(tensor):
    """The ShapeTensor for a tensor with data, the same each time."""
    if "shape_tensor" not in vars(tensor):
        meta = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)
        tensor.shape_tensor = ShapeTensor(meta, tensor.untyped_storage())
    return tensor.shape_tensor


def run_on_shapes(function, args, kwargs):
    """The result of an operator, as ShapeTensors."""
    given = []  # (a meta tensor, the tensor that it stands for, its storage)
    args = [_meta(value, given) for value in args]
    if kwargs:
        kwargs = {key: _meta(value, given) for key, value in kwargs.items()}
    if not given:
        kwargs["device"] = META
    if function in SLOW:
        return _remembered(function, args, kwargs)
    result = function(*args, **kwargs)
    if function is aten.native_layer_norm.default:
        # On a CPU the mean and the deviation have the dtype of the input, unlike on other devices.
        result = result[0], *(item.to(args[0].dtype) for item in result[1:])
    return _wrapped(result, given)


def _meta(value, given):
    kind = type(value)
    if kind in PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        shape = value if kind is ShapeTensor else _shape_of(value)
        given.append((shape.meta, value, shape.storage))
        return shape.meta
    if kind is list or kind is tuple:
        return [_meta(item, given) for item in value]
    return META if kind is torch.device else value


def _wrapped(value, given):
    if isinstance(value, torch.Tensor):
        for meta, tensor, storage in given:
            if value is meta:  # an operator in place returns its argument
                return tensor
            if torch._C._is_alias_of(value, meta):
                return ShapeTensor(value, storage)
        return ShapeTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_wrapped(item, given) for item in value])
    return value


_REMEMBERED = {}


def _remembered(function, args, kwargs):
    """The result of an operator whose results share no memory with its arguments."""
    named = [item for pair in kwargs.items() for item in pair]
    key = function, *map(_description, args + named)
    if key not in _REMEMBERED:
        found = function(*args, **kwargs)
        alone = isinstance(found, torch.Tensor)
        _REMEMBERED[key] = (
            None if alone else type(found),
            [_description(item) for item in ([found] if alone else found)],
        )
    kind, items = _REMEMBERED[key]
    made = [
        ShapeTensor(torch.empty_strided(item[0], item[1], dtype=item[2], device=META))
        if len(item) == 3
        else item[1]
        for item in items
    ]
    return kind(made) if kind else made[0]


def _description(value):
    """What an operator's result depends on, of a tensor: size, strides, dtype. Of anything else:
    its type, since 1 == 1.0, and itself."""
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype
    return type(value), tuple(map(_description, value)) if isinstance(value, list) else value


class AllocationTracker(TorchDispatchMode):
    """The mode in which a model runs on ShapeTensors.

    device: "cuda" for bitsandbytes' kernels on a GPU, None for those on a CPU.

    live, peak: bytes now and at most, of all storages made in this mode.
    by_component: {component: bytes} at that peak. See `watch`.
    """

    def __init__(self, device=None):
        super().__init__()
        self.kernels, self.copies = KERNELS[device], device is None
        self.live = self.peak = 0
        self.parts, self.by_component = {}, {}
        self.component = None
        self._known, self._owner = {}, {}

    def restart(self):
        """Begin a new measurement: the peak is what is live now."""
        self.peak, self.by_component = self.live, dict(self.parts)

    def forget(self):
        """Begin anew: what is live counts no longer. What was there before the run still is."""
        known = self._known.items()
        self._known = {key: kept for key, kept in known if type(kept) is not weakref.ref}
        self._owner, self.parts, self.live = {}, {}, 0
        self.component = None
        self.restart()

    def made(self, tensor):
        """Whether `tensor` was made in the run and is live."""
        return id(storage_of(tensor)) in self._owner

    def now(self):
        """Bytes that are live, by component, without weights that are gathered for a moment."""
        return {
            component: size
            for component, size in self.parts.items()
            if not (isinstance(component, tuple) and component[0] == GATHERED)
        }

    def since(self, then):
        """Bytes by component that are live now and were not live `then`."""
        return {component: size - then.get(component, 0) for component, size in self.now().items()}

    def shift(self, parts):
        """Count bytes by component as live, or as no longer live, without a tensor."""
        for component, size in parts.items():
            self._add(size, component)

    # --- tensors without data --------------------------------------------------------------------

    def empty(self, model, but=()):
        """Replace all meta tensors of `model` by ShapeTensors, except below the modules that `but`
        names. They count as there before the run."""
        memo, but = {}, tuple(f"{name}." for name in but)
        with _disable_current_modes():  # this one, where a layer is emptied just before it runs
            for name, module in model.named_modules():
                if f"{name}.".startswith(but):
                    continue
                for tensors in (module._parameters, module._buffers, module.__dict__):
                    for key, value in list(tensors.items()):
                        if isinstance(value, torch.Tensor):
                            tensors[key] = self._emptied(value, memo)
                for owner in (getattr(module, "weight", None), getattr(module, "state", None)):
                    self._empty_state(owner, memo)
        return model

    def _empty_state(self, owner, memo):
        state = getattr(owner, "quant_state", None)
        for holder in (owner, state, getattr(state, "state2", None)):
            for key, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, torch.Tensor) and key != "meta":
                    setattr(holder, key, self._emptied(value, memo))

    def _emptied(self, tensor, memo):
        if type(tensor) is ShapeTensor or tensor.device.type != "meta":
            return tensor
        if id(tensor) not in memo:
            new = ShapeTensor(tensor.detach())
            if isinstance(tensor, torch.nn.Parameter):
                new.requires_grad_(tensor.requires_grad)
                # The attribute is what makes a tensor an nn.Parameter.
                new.__dict__.update(tensor.__dict__, _is_param=True)
                for hook in (tensor._post_accumulate_grad_hooks or {}).values():
                    new.register_post_accumulate_grad_hook(hook)
            self.know(new)
            memo[id(tensor)] = new, tensor  # the old one too, so that its id is not used again
        return memo[id(tensor)][0]

    def tensor(self, shape, dtype=torch.float32):
        """A ShapeTensor that counts as there before the run."""
        return self.know(ShapeTensor(torch.empty(shape, dtype=dtype, device=META)))

    def know(self, tensor):
        """Count `tensor` as there before the run. Returns it."""
        storage = storage_of(tensor)
        self._known[id(storage)] = storage  # kept, so that its id is not used again
        return tensor

    # --- the run ---------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls):  # nothing here is compiled, and asking costs time
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = self._run(function, args, kwargs or {})
        if self.copies and function in ARITHMETIC:
            copied = sum(
                tensor.numel() * result.element_size()
                for tensor in args[:2]
                if isinstance(tensor, torch.Tensor) and tensor.dtype != result.dtype
            )
            if copied:
                self._see(storage_of(result))
                self._add(copied, self.component)
                self._add(-copied, self.component)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._see(storage_of(tensor))
        return result

    def _run(self, function, args, kwargs):
        written_out = function.namespace == "bitsandbytes" and self.kernels.get(str(function))
        if written_out:
            with self:
                return written_out(*args, **kwargs)
        tensors = [*_tensors(args), *(_tensors(kwargs.values()) if kwargs else ())]
        if ShapeTensor in map(type, tensors):
            if function in INDEXING:
                args = (args[0], _positions(args[1]), *args[2:])
            shape = run_on_shapes(function, args, kwargs)
            if isinstance(shape, torch.Tensor) and shape.dtype == torch.bool:
                return shape if shape.numel() > SMALL else torch.ones(shape.shape, dtype=torch.bool)
            return shape
        if not tensors and kwargs.get("dtype") in FLOATS:
            return run_on_shapes(function, args, kwargs)
        if any(tensor.numel() > SMALL for tensor in tensors):
            try:
                shape = run_on_shapes(function, args, kwargs)
            except RuntimeError:  # the shape depends on values
                return function(*args, **kwargs)
            made = [t for t in tree_leaves(shape) if isinstance(t, torch.Tensor)]
            if any(t.numel() * t.element_size() > LARGE for t in made):
                return shape
        return function(*args, **kwargs)

    def _see(self, storage):
        key = id(storage)
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self._owner[key] = self.component
            self._add(size, self.component)

    def _forget(self, key, size):
        del self._known[key]
        self._add(-size, self._owner.pop(key))

    def relabel(self, tensor, component):
        """Count the storage of `tensor` as `component`'s from now on."""
        storage = storage_of(tensor)
        key, size = id(storage), storage.nbytes()
        if key in self._owner and self._owner[key] != component:
            self.parts[self._owner[key]] -= size
            self.parts[component] = self.parts.get(component, 0) + size
            self._owner[key] = component

    def _add(self, size, component):
        self.live += size
        self.parts[component] = self.parts.get(component, 0) + size
        if self.live > self.peak:
            self.restart()

    # --- whose bytes -----------------------------------------------------------------------------

    def watch(self, model, component_of=None):
        """Count what is made while a component's module runs, forward or backward, as that
        component's. A module belongs to the component of its full name, or to what `component_of`
        says of that name."""
        component_of = component_of or component_finder(model)
        for name, module in model.named_modules():
            component = component_of(name)
            if component and component != component_of(name.rpartition(".")[0]):
                outer = []
                module.register_forward_pre_hook(self._entering(component, outer))
                module.register_forward_hook(self._leaving(component, outer))

    def _entering(self, component, outer):
        def hook(module, args):
            outer.append(self.component)
            self.component = component

        return hook

    def _leaving(self, component, outer):
        def backward(gradient):
            self.component = component

        def hook(module, args, output):
            self.component = outer.pop()
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(backward)

        return hook


def _tensors(values):
    """Tensors among the arguments of an operator, those in lists included."""
    found = []
    for value in values:
        kind = type(value)
        if kind is ShapeTensor or kind not in PLAIN and isinstance(value, torch.Tensor):
            found.append(value)
        elif kind is list or kind is tuple:
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _positions(indices):
    """`indices` with masks replaced by the positions where they are true."""
    found = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            if type(index) is ShapeTensor:
                index = torch.ones(index.shape, dtype=torch.bool)
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
