"""Formats for experiments, compared with references of a few lines and with bitsandbytes."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmkit.errors import PlanError
from vlmkit.formats import FORMATS, FP4, NF4, Rounding, dequantize, quantize, rounding

SHAPES = [(64, 128), (5, 96), (7, 33), (3, 200), (16, 3, 4, 4)]


def weight(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02


def by_hand(x, bits, group, asymmetric):
    """Each group of a row rounded in plain Python."""
    rows = x.reshape(x.shape[0], -1) if x.dim() > 3 else x
    result = torch.empty_like(rows)
    for r, row in enumerate(rows):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            if asymmetric:
                low, high = min(0, part.min()), max(0, part.max())
                step = (high - low) / (2**bits - 1)
                zero = torch.round(-low / step)
                level = torch.clamp(torch.round(part / step) + zero, 0, 2**bits - 1) - zero
            else:
                step = part.abs().max() / (2 ** (bits - 1) - 1)
                level = torch.round(part / step)
            result[r, start : start + group] = level * step
    return result.reshape(x.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_integers_are_the_reference(shape, bits, asymmetric):
    x = weight(shape)
    ending = "-asym" if asymmetric else ""
    columns = x[0].numel()
    for share, group in (("g64", 64), ("g48", 48), ("row", columns)):
        ours = rounding(f"int{bits}-{share}{ending}").rounded(x)
        torch.testing.assert_close(ours, by_hand(x, bits, group, asymmetric), rtol=1e-6, atol=0)
    whole = rounding(f"int{bits}-tensor{ending}").rounded(x)
    expected = by_hand(x.reshape(1, -1), bits, x.numel(), asymmetric).reshape(shape)
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("table, values", [("nf4", NF4), ("fp4", FP4)])
@pytest.mark.parametrize("block", [32, 64, 100, 4096])
def test_tables_are_the_nearest_value(table, values, block):
    x = weight((24, 96))
    ours = rounding(f"{table}-b{block}").rounded(x)
    code = torch.tensor(values)
    for start in range(0, x.numel(), block):
        part = x.flatten()[start : start + block]
        scaled = part / part.abs().max()
        distance = (scaled[:, None] - code).abs()
        found = ours.flatten()[start : start + block] / part.abs().max()
        assert torch.allclose((scaled - found).abs(), distance.min(1).values, atol=1e-6)


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("ending", ["", "-dq"])
def test_tables_are_bitsandbytes(kind, block, ending):
    F = pytest.importorskip("bitsandbytes.functional")
    x = weight((64, 256))
    data, state = F.quantize_4bit(
        x, blocksize=block, quant_type=kind, compress_statistics=bool(ending)
    )
    theirs = F.dequantize_4bit(data, state)
    ours = rounding(f"{kind}-b{block}{ending}")
    torch.testing.assert_close(ours.rounded(x), theirs, rtol=1e-5, atol=1e-9)
    state_bits = 8 * sum(
        t.numel() * t.element_size()
        for t in ([state.absmax, state.state2.absmax, state.offset] if ending else [state.absmax])
    )
    assert ours.total_bits(x.shape) == 4 * x.numel() + state_bits


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4"])
def test_the_names_that_plans_have_round_as_in_a_plan(name):
    x = weight((96, 192))
    assert torch.equal(rounding(name).rounded(x), dequantize(quantize(x, name)))


def test_int8_of_a_plan_is_int8_row_here():
    x = weight((32, 200)).half().float()
    loaded = dequantize(quantize(x, "int8"))
    step = x.abs().amax(1, keepdim=True) / 127
    # LLM.int8 divides in fp16, which moves a number that lies half-way between two steps
    assert ((rounding("int8-row").rounded(x) - loaded).abs() <= step * 1.001).all()
    assert ((rounding("int8-row").rounded(x) - loaded).abs() < 1e-7).float().mean() > 0.95
    assert rounding("int8-row").total_bits(x.shape) == 8 * FORMATS["int8"].nbytes(x.shape)
    assert rounding("int8") == rounding("int8-g64") != rounding("int8-row")


def test_activations_have_a_scale_for_each_token_or_one_for_all():
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0] = 100
    token = rounding("int8-act-token").rounded(x)
    expected = by_hand(x.reshape(10, 48), 8, 48, False).reshape(x.shape)
    torch.testing.assert_close(token, expected, rtol=1e-6, atol=0)
    tensor = rounding("int8-act-tensor").rounded(x)
    step = 100 / 127
    torch.testing.assert_close(tensor, torch.round(x / step) * step, rtol=1e-5, atol=1e-6)


def test_double_quantization_rounds_the_scales_alone():
    x = weight((64, 256))
    plain, double = rounding("int4-g32"), rounding("int4-g32-dq")
    scale = plain.rounded(x).reshape(-1, 32), double.rounded(x).reshape(-1, 32)
    ratio = scale[1] / scale[0]
    ratio = torch.where(ratio.isnan(), ratio.nanmean(1, keepdim=True), ratio)  # zeros stay zeros
    assert (ratio.amax(1) - ratio.amin(1)).max() < 1e-5  # one factor a group
    assert ratio.min() > 0.97 and ratio.max() < 1.03
    assert double.effective_bits(x.shape) < plain.effective_bits(x.shape)


def test_effective_bits_count_scales_and_zero_points():
    assert rounding("int4").effective_bits((64, 128)) == 4 + 32 / 64
    assert rounding("int4-asym").effective_bits((64, 128)) == 4 + 36 / 64
    assert rounding("int3-row").effective_bits((10, 128)) == 3 + 32 / 128
    assert rounding("int2-tensor").effective_bits((10, 10)) == Fraction(232, 100)
    assert rounding("int4-g64").total_bits((5, 96)) == 4 * 480 + 32 * 5 * 2  # a short group a row
    assert rounding("nf4-b64").total_bits((5, 96)) == 4 * 480 + 32 * 8  # blocks run across rows
    assert rounding("nf4-dq").total_bits((64, 512)) == 4 * 2**15 + 8 * 512 + 32 * (2 + 1)


def test_signal_to_noise_of_gaussian_weights():
    """In groups of 64, as published for a standard normal: see chapter 05."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    for name, decibel in (("nf4", 20.7), ("fp4", 18.3), ("int4", 19.4), ("int4-asym", 20.8)):
        noise = rounding(name).rounded(x) - x
        found = 10 * torch.log10(x.pow(2).sum() / noise.pow(2).sum())
        assert found == pytest.approx(decibel, abs=0.1), name


def test_dtype_shape_and_the_original_are_kept():
    x = weight((6, 70), torch.bfloat16)
    before = x.clone()
    for name in ("int2", "int5-row-asym", "nf4-b32", "fp4-dq", "int4-tensor", "int8-act-token"):
        rounded = rounding(name).rounded(x)
        assert rounded.dtype == x.dtype and rounded.shape == x.shape and torch.equal(x, before)
        zeros = torch.zeros(4, 64)
        assert torch.equal(rounding(name).rounded(zeros), zeros)


@given(
    st.sampled_from([f"int{b}" for b in range(2, 9)]),
    st.sampled_from(["tensor", "row", "g16", "g64", "b1"]),
    st.booleans(),
    st.booleans(),
)
def test_a_full_name_reads_back(kind, share, asymmetric, double):
    text = "-".join([kind, share] + ["asym"] * asymmetric + ["dq"] * double)
    if double and share == "tensor":
        with pytest.raises(PlanError):
            rounding(text)
        return
    found = rounding(text)
    assert rounding(found.name) == found and rounding(found) is found
    assert isinstance(found, Rounding) and found.bits == int(kind[-1])


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("int9", "int8"),
        ("int4g32", "int4-g32"),
        ("itn3", "int3"),
        ("nf4-128", "nf4-b128"),
        ("int8-act", "int8-act-token"),
        ("INT4-GROUP32", "int4"),
    ],
)
def test_a_wrong_spelling_gets_the_nearest_right_one(wrong, near):
    with pytest.raises(PlanError, match=f"Did you mean '{near}"):
        rounding(wrong)


@pytest.mark.parametrize(
    "wrong", ["nf4-asym", "nf4-row", "int4-token", "int4-row-row", "int4-row-g32", 4, None, ""]
)
def test_what_makes_no_format_is_refused(wrong):
    with pytest.raises(PlanError, match="not a format for experiments"):
        rounding(wrong)


def test_a_plan_refuses_them_and_says_what_they_are_for():
    import vlmkit as vk

    for name in ("int4", "int3-g32", "nf4-b128"):
        with pytest.raises(PlanError, match=r"for experiments.*vk\.sensitivity\.quantized"):
            vk.Plan(language_model=name)
    assert vk.Plan(language_model="int8")["language_model"] == "int8"
