"""Guards against three bugs of bitsandbytes' layers.

Since bitsandbytes 0.50, until a release in which tests/test_versions.py no longer finds them:

1. On a CPU with AVX512-BF16, a forward pass in eval mode repacks the weights in place. Their bytes
   change, double quantization is undone, and a later training step gets no gradient.
   `Linear4bit.support_avx512bf16_for_cpu = False` turns this off for a layer.
2. On a CPU with AVX512, dequantizing is wrong (12 dB instead of 20.6) where a row is not a whole
   number of blocks. Blocks run over the flattened weight, and the kernel starts a new block at
   every row. It is right if every row is one block, so `dequantize_in_whole_blocks` reshapes the
   weight.
3. On every device, an int8 layer fails for inputs of four dimensions and looks for outliers along
   the wrong one. The projector of Llama 3.2 Vision has such inputs (images, tiles, patches, width).
   Two hooks flatten the input and give the output its shape back.
"""

import warnings
from functools import cache
from math import ceil, prod


def guard_against_cpu_traps(model):
    """Make the quantized layers of `model` safe to run on a CPU, wherever the model is now."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            rows = _Rows()
            module.register_forward_pre_hook(rows.flatten)
            module.register_forward_hook(rows.restore)
        elif isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if module.in_features % module.weight.blocksize:
                dequantize_in_whole_blocks()


class _Rows:
    """The two hooks of an int8 layer, and the input's shape, which both need."""

    shape = ()

    def flatten(self, module, args):
        x, *rest = args
        self.shape = x.shape
        return (x.flatten(0, -3), *rest) if x.dim() > 3 else args

    def restore(self, module, args, output):
        shape = self.shape
        return output.reshape(*shape[:-1], output.shape[-1]) if len(shape) > 3 else output


@cache  # once a process, when the first layer needs it; the cache keeps the registration
def dequantize_in_whole_blocks():
    """Register a CPU kernel for bitsandbytes' dequantize_4bit that is right for every shape."""
    import torch

    def kernel(original, keys, packed, absmax, blocksize, quant_type, shape, dtype):
        if shape[-1] % blocksize == 0:
            return original.call_boxed(keys, packed, absmax, blocksize, quant_type, shape, dtype)
        n = prod(shape)
        blocks = ceil(n / blocksize)
        packed = packed.reshape(-1).view(torch.uint8)
        packed = torch.nn.functional.pad(packed, (0, blocks * blocksize // 2 - packed.numel()))
        rows = (blocks, blocksize)
        flat = original.call_boxed(keys, packed, absmax, blocksize, quant_type, rows, dtype)
        return flat.reshape(-1)[:n].reshape(*shape)

    return register_cpu_kernel("dequantize_4bit", kernel)


def register_cpu_kernel(name, kernel):
    """Let bitsandbytes' operator `name` call `kernel(original, keys, *arguments)` on a CPU.

    original: the kernel that bitsandbytes has, called by `original.call_boxed(keys, *arguments)`.
    Returns an object. The registration lasts as long as this object.
    """
    import bitsandbytes  # noqa: F401  (it defines the operators)
    import torch

    original = torch.library.get_kernel(f"bitsandbytes::{name}", "CPU")
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is replaced, as intended
        library.impl(name, lambda *args: kernel(original, *args), "CPU", with_keyset=True)
    return library
