"""The formats against bitsandbytes, byte for byte."""

import pytest
import torch

from vlmkit.errors import PlanError
from vlmkit.formats import (
    BLOCK,
    FORMATS,
    dequantize,
    dynamic_code,
    format_named,
    quantize,
    torch_dtype,
)

F = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(192, 128), (64, 64), (5, 96), (7, 33), (3, 4304), (3, 43), (300, 64), (512, 4096)]
FOUR_BIT = [name for name in FORMATS if FORMATS[name].bits == 4]


def tensors_of(state):
    own = [state.absmax, state.code]
    return own + [state.offset, state.state2.absmax, state.state2.code] if state.nested else own


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FOUR_BIT)
def test_4bit_is_bitsandbytes(name, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    weight = weight.to(torch.bfloat16)
    data, state = F.quantize_4bit(
        weight, quant_type=name.removesuffix("-dq"), compress_statistics=name.endswith("-dq")
    )
    ours = quantize(weight, name)
    assert torch.equal(ours.data, data.flatten())
    assert torch.equal(ours.state["code"], state.code)
    real = sum(t.numel() * t.element_size() for t in (data, *tensors_of(state)))
    assert real == FORMATS[name].nbytes(shape) == ours.nbytes
    assert torch.equal(ours.state["absmax"], state.absmax)
    if state.nested:
        assert torch.equal(ours.state["nested_absmax"], state.state2.absmax)
        assert torch.equal(ours.state["nested_code"], state.state2.code)
        assert torch.equal(ours.state["offset"], state.offset)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_4bit_dequantizes_like_bitsandbytes(name):
    # Columns in whole blocks: where its CPU kernel is right (see vlmkit.backend.cpu).
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    data, state = F.quantize_4bit(
        weight, quant_type=name.removesuffix("-dq"), compress_statistics=name.endswith("-dq")
    )
    theirs = F.dequantize_4bit(data, state)
    ours = quantize(weight, name)
    torch.testing.assert_close(dequantize(ours), theirs, rtol=1e-6, atol=0)


def test_int8_is_bitsandbytes():
    weight = torch.randn(33, 70)
    data, scales, _ = F.int8_vectorwise_quant(weight.to(torch.float16))
    ours = quantize(weight, "int8")
    assert torch.equal(ours.data, data)
    assert torch.equal(ours.state["row_absmax"], scales)
    assert ours.nbytes == FORMATS["int8"].nbytes(weight.shape) == weight.numel() + 4 * 33
    theirs = F.int8_vectorwise_dequant(data, scales)
    torch.testing.assert_close(dequantize(ours), theirs, rtol=1e-6, atol=0)


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(2, BLOCK)
    for name in ("nf4", "fp4", "nf4-dq"):
        assert not dequantize(quantize(weight, name)).any()


def test_float_formats_are_their_dtype():
    for name in ("fp32", "fp16", "bf16"):
        assert not FORMATS[name].quantized
        assert FORMATS[name].nbytes((3, 5)) == 15 * torch_dtype(name).itemsize
    with pytest.raises(PlanError, match="float format"):
        quantize(torch.ones(2, 2), "bf16")


def test_a_wrong_name_gets_the_nearest_right_one():
    with pytest.raises(PlanError, match="Did you mean 'nf4'"):
        format_named("nf44")
    with pytest.raises(PlanError, match="Did you mean 'bf16'"):
        format_named("bfloat16")
    with pytest.raises(PlanError, match="The formats are fp32"):
        format_named("zzz")


def test_the_dynamic_code_is_sorted_and_complete():
    code = dynamic_code()
    assert len(code) == 256 and code == sorted(code) and code[-1] == 1.0 and 0.0 in code
