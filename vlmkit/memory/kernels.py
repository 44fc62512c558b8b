"""bitsandbytes' kernels, written out as the tensor operations that they are made of.

A dry run (`vlmkit.memory.tracker`) sees the tensors between operations, not those inside one.
Inside are a whole weight in 16 bits, activations in several formats, and the copies that PyTorch
makes when it multiplies numbers of two kinds. They all count towards a peak. Each function does
what bitsandbytes 0.50 does in `backends/default/ops.py`, and on a GPU in `backends/cuda/ops.py`,
without the values. Only values could tell the outliers of LLM.int8, so no activation counts as one.
(With outliers, the columns of the weight that belong to them are dequantized as well.)
"""

import torch


def gemm_4bit(x, packed, shape, absmax, blocksize, kind, bias=None, absmax_8bit=None,
              absmax_code=None, absmax_offset=None):  # fmt: skip
    """y = x W^T + b. W is dequantized as a whole."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = absmax + absmax_offset
    weight = ops.dequantize_4bit(packed, absmax, blocksize, kind, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def int8_vectorwise_quant(x, threshold=0.0):
    """Rows of x in int8, and their scales."""
    outliers = x.abs() >= threshold if threshold else None
    scales = torch.max(x.abs(), dim=1).values.float()
    rows = torch.round(x.float() * (127.0 / scales.unsqueeze(-1))).to(torch.int8)
    return rows, scales, None if outliers is None else scales.new_empty(0, dtype=torch.int64)


def int8_scaled_mm(x, weight, x_scales, scales, bias=None, dtype=None):
    """The products of int8 in int32, scaled in float32."""
    products = torch._int_mm(x, weight.t())
    y = (x_scales.reshape(-1, 1) * scales.reshape(1, -1)) * products.float() * 6.2e-05
    if bias is not None:
        y += bias
    return y.to(dtype or torch.float16)


def int8_mixed_scaled_mm(x, x_rows, weight, x_scales, scales, outliers=None, bias=None):
    """The same for every device. Without outliers there is nothing to mix."""
    product = torch.ops.bitsandbytes.int8_scaled_mm
    return product(x_rows, weight, x_scales, scales, bias, x.dtype), x.new_empty(0)


def int8_vectorwise_dequant(rows, scales):
    """Rows of int8 in float32. peft dequantizes them for DoRA."""
    return rows * scales.view(-1, 1) * 7.874015718698502e-3


# --- on a GPU -------------------------------------------------------------------------------------

FEW = 4
"""Up to so many rows a GPU multiplies with the 4-bit weights directly. With more rows it depends on
the card and the shape, and the whole weight counts as dequantized."""


def gemm_4bit_on_cuda(x, packed, shape, *scales, **more):
    if x.numel() // x.shape[-1] <= FEW:
        return x.new_empty(*x.shape[:-1], shape[0])
    return gemm_4bit(x, packed, shape, *scales, **more)


def int8_vectorwise_quant_on_cuda(x, threshold=0.0):
    scales = x.new_empty(x.shape[0], dtype=torch.float32)
    rows = torch.empty_like(x, dtype=torch.int8)
    if not threshold:
        return rows, scales, None
    outliers = x.abs() >= threshold  # both are there until the function ends
    return rows, scales, outliers.new_empty(0, dtype=torch.int64)


def int8_scaled_mm_on_cuda(x, weight, x_scales, scales, bias=None, dtype=None):
    """The products of int8 in int32, scaled to float16, which is what the kernel can write."""
    products = torch._int_mm(x, weight.t())
    y = torch.empty_like(products, dtype=torch.float16)
    if bias is not None:
        y += bias
    return y.to(dtype or torch.float16)


def _by_operator(*functions):
    names = (function.__name__.removesuffix("_on_cuda") for function in functions)
    return {f"bitsandbytes.{n}.default": f for n, f in zip(names, functions, strict=True)}


KERNELS = {
    None: _by_operator(
        gemm_4bit,
        int8_vectorwise_quant,
        int8_scaled_mm,
        int8_mixed_scaled_mm,
        int8_vectorwise_dequant,
    ),
    "cuda": _by_operator(
        gemm_4bit_on_cuda,
        int8_vectorwise_quant_on_cuda,
        int8_scaled_mm_on_cuda,
        int8_mixed_scaled_mm,
        int8_vectorwise_dequant,
    ),
}
"""Device -> name of the operator -> the function to run in its place."""
