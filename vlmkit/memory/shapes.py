"""A rehearsal: a model run on tensors that have a shape and no data.

    rehearsal = Rehearsal()
    rehearsal.empty(model)                 # built on the meta device
    with rehearsal:
        model(**inputs)                    # transformers' own code, layer by layer
    rehearsal.peak                         # bytes that the real pass would hold at most

PyTorch's fake tensors (`torch._subclasses.fake_tensor`) answer for shapes and choose the kernels
that a CPU would. They know no values, and a VLM's forward looks at some: which positions are image
tokens, how large each picture's grid is. So integers and masks stay real here, and what is computed
from them alone is computed; whatever meets a weight or a pixel is a shape. A mask that depends on
pixels counts as true everywhere, as it is for pictures that are not black.

A storage is live from the operation that makes it until the last tensor that uses it is gone, in
the order in which Python and autograd let go: that is what the allocator of the real run sees too.
What a kernel allocates within itself is seen for bitsandbytes' kernels, which are written out in
`vlmkit.memory.kernels`, and not for PyTorch's, where it is small (oneDNN packs weights in pieces of
0.25 MB).
"""

import weakref

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vlmkit.anatomy import component_finder
from vlmkit.memory.kernels import KERNELS

aten = torch.ops.aten
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
DEVICE = torch.ops.prim.device.default
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SMALL, LARGE = 2**10, 2**25
"""Elements up to which a tensor is computed with at once, and bytes from which on a result is a
shape even where it could be computed."""


class Rehearsal(TorchDispatchMode):
    """The mode in which a model runs without data.

    device: "cuda" for bitsandbytes' kernels on a GPU, None for those on a CPU.

    live, peak: bytes now and at most, of all storages made in this mode.
    by_component: {component: bytes} at that peak. See `watch`.
    """

    def __init__(self, device=None):
        super().__init__()
        self.kernels = KERNELS[device]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self.parts, self.by_component = {}, {}
        self.component = None
        self._known, self._owner = {}, {}

    def restart(self):
        """Begin a new measurement: the peak is what is live now."""
        self.peak, self.by_component = self.live, dict(self.parts)

    def now(self):
        """Bytes that are live, by component."""
        return dict(self.parts)

    def since(self, then):
        """Bytes that have come to be live since `then`, by component."""
        return {component: size - then.get(component, 0) for component, size in self.parts.items()}

    def shift(self, parts):
        """Count bytes by component as live, or as no longer live, without a tensor."""
        for component, size in parts.items():
            self._add(size, component)

    # --- tensors without data --------------------------------------------------------------------

    def empty(self, model, but=()):
        """Replace all tensors of `model`, on the meta device, by tensors without data on the CPU,
        except below the modules that `but` names. They count as there before the run."""
        memo, but = {}, tuple(f"{name}." for name in but)
        with _disable_current_modes():  # this one, where a layer is emptied just before it is run
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
                if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                    setattr(holder, key, self._emptied(value, memo))

    def _emptied(self, tensor, memo):
        if isinstance(tensor, FakeTensor) or tensor.device.type != "meta":
            return tensor
        if id(tensor) not in memo:
            new = FakeTensor(self.fake, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, torch.nn.Parameter):
                new.requires_grad_(tensor.requires_grad)
                # The attribute is what makes a tensor an nn.Parameter.
                new.__dict__.update(tensor.__dict__, _is_param=True)
                for hook in (tensor._post_accumulate_grad_hooks or {}).values():
                    new.register_post_accumulate_grad_hook(hook)
            self.know(new)
            memo[id(tensor)] = new, tensor  # the old one too, so that its id is not given again
        return memo[id(tensor)][0]

    def tensor(self, shape, dtype):
        """A tensor of `shape` without data, which counts as there before the run."""
        with self.fake:
            return self.know(torch.empty(shape, dtype=dtype))

    def know(self, tensor):
        """Count `tensor` as there before the run. Returns it."""
        self._known[tensor.untyped_storage()._cdata] = None
        return tensor

    # --- the run ---------------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is DEVICE and isinstance(args[0], FakeTensor):  # half of all that is asked
            return args[0].fake_device
        result = self._run(function, args, kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _run(self, function, args, kwargs):
        written_out = self.kernels.get(str(function))
        if written_out:
            with self:
                return written_out(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if function in INDEXING:
                args = (args[0], _positions(args[1]), *args[2:])
            shape = self._shape_of(function, args, kwargs)
            if isinstance(shape, torch.Tensor) and shape.dtype == torch.bool:
                return shape if shape.numel() > SMALL else torch.ones(shape.shape, dtype=torch.bool)
            return shape
        if not tensors and kwargs.get("dtype") in FLOATS:
            return self._shape_of(function, args, kwargs)
        if any(tensor.numel() > SMALL for tensor in tensors):
            try:
                shape = self._shape_of(function, args, kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                return function(*args, **kwargs)
            made = [t for t in tree_leaves(shape) if isinstance(t, torch.Tensor)]
            if any(t.numel() * t.element_size() > LARGE for t in made):
                return shape
        return function(*args, **kwargs)

    def _shape_of(self, function, args, kwargs):
        return self.fake.dispatch(function, (), args, kwargs)

    def _see(self, storage):
        key = storage._cdata
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
        key = tensor.untyped_storage()._cdata
        if key in self._owner and self._owner[key] != component:
            size = tensor.untyped_storage().nbytes()
            self.parts[self._owner[key]] -= size
            self.parts[component] = self.parts.get(component, 0) + size
            self._owner[key] = component

    def _add(self, size, component):
        self.live += size
        self.parts[component] = self.parts.get(component, 0) + size
        if self.live > self.peak:
            self.restart()

    # --- whose bytes -----------------------------------------------------------------------------

    def watch(self, model):
        """Count what is made while a component's module runs, forward or backward, as that
        component's. A module belongs to the component of its full name."""
        component_of = component_finder(model)
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


def _positions(indices):
    """Masks among the `indices` of a tensor as the positions where they are true."""
    found = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            if isinstance(index, FakeTensor):
                index = torch.ones(index.shape, dtype=torch.bool)
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
