"""Guards against what bitsandbytes 0.50 does to its layers, on a CPU above all.

Three traps, all measured, all pinned by tests:

1. On a CPU with AVX512-BF16, a forward pass in eval mode repacks the weights in place: their bytes
   change, double quantization is undone, and a later training step gets no gradient.
   `Linear4bit.support_avx512bf16_for_cpu = False` keeps a layer out of it.
2. With AVX512, dequantizing is wrong (12 dB instead of 20.6) where a row is not a whole number of
   blocks: blocks run over the flattened weight, and the kernel starts a new one at every row. The
   same kernel is right when it is handed the weight as one block a row, and that is how
   `dequantize_in_whole_blocks` hands it over.
3. An int8 layer takes tensors of two and three dimensions and fails with four, which is what the
   projector of Llama 3.2 Vision is handed (images, tiles, patches, width). It looks for outliers
   along the wrong dimension, on every device. Two hooks flatten what comes in, and give what goes
   out its shape back.
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
    """The hooks of one int8 layer, and the shape that they carry from one to the other."""

    shape = ()

    def flatten(self, module, args):
        x, *rest = args
        self.shape = x.shape
        return (x.flatten(0, -3), *rest) if x.dim() > 3 else args

    def restore(self, module, args, output):
        shape = self.shape
        return output.reshape(*shape[:-1], output.shape[-1]) if len(shape) > 3 else output


@cache  # registered once a process, and only when a layer needs it
def dequantize_in_whole_blocks():
    """Register a CPU kernel for bitsandbytes' dequantize_4bit that is right for every shape."""
    import torch

    name = "bitsandbytes::dequantize_4bit"
    original = torch.library.get_kernel(name, "CPU")

    def kernel(keys, packed, absmax, blocksize, quant_type, shape, dtype):
        if shape[-1] % blocksize == 0:
            return original.call_boxed(keys, packed, absmax, blocksize, quant_type, shape, dtype)
        n = prod(shape)
        blocks = ceil(n / blocksize)
        packed = packed.reshape(-1).view(torch.uint8)
        packed = torch.nn.functional.pad(packed, (0, blocks * blocksize // 2 - packed.numel()))
        rows = (blocks, blocksize)
        flat = original.call_boxed(keys, packed, absmax, blocksize, quant_type, rows, dtype)
        return flat.reshape(-1)[:n].reshape(*shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, which is what is meant
        library.impl("dequantize_4bit", kernel, "CPU", with_keyset=True)
    return library  # the registration lives as long as this object, which the cache keeps
