"""The fast 4-bit quantizer: bitsandbytes' bytes for every tensor, alone and while a model loads."""

import threading
from contextlib import nullcontext

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vlmkit as vk
from vlmkit.backend import quantizing
from vlmkit.backend.quantizing import fast_quantizer, quantize_4bit
from vlmkit.errors import CheckpointError
from vlmkit.formats import FP4, NF4

OPERATOR = "bitsandbytes::quantize_4bit"
KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(weight, kind, block=64):
    """`quantize_4bit` gives bitsandbytes' bytes, and leaves `weight` alone."""
    before = weight.clone()
    packed, absmax = quantize_4bit(weight, kind, block)
    own_packed, own_absmax = torch.ops.bitsandbytes.quantize_4bit(weight, block, kind, torch.uint8)
    assert torch.equal(packed, own_packed)
    assert torch.equal(absmax.view(torch.int32), own_absmax.view(torch.int32))
    assert torch.equal(weight, before)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, and so several threads, for tensors of only a few hundred weights."""
    monkeypatch.setattr(quantizing, "CHUNK", 128)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0,), (1,), (1, 63), (64,), (65,), (3, 43), (96, 64), (7, 2**17 // 6 + 1), (600, 513)]
)
def test_any_shape_and_dtype(shape, dtype, kind):
    torch.manual_seed(0)
    check((torch.randn(shape) * 0.02).to(dtype), kind)


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 700),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-45, 1e-40, 9e-39, 1e-38, 2e-38, 1e-30, 0.02, 1.0, 60000.0, 1e38]),
    zeros=st.sampled_from([0.0, 0.3, 0.98, 1.0]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from([32, 64, 128, 256, 4096]),
)
def test_any_values(n, seed, scale, zeros, kind, dtype, block):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, generator=generator).clamp(-3, 3) * scale
    weight *= torch.rand(n, generator=generator) >= zeros
    weight = weight.to(dtype)
    check(weight.nan_to_num(posinf=1.0, neginf=-1.0), kind, block)  # infinite in fp16


@pytest.mark.parametrize("kind", KINDS)
def test_at_and_beside_every_midpoint(kind):
    """Where the rounding changes: the 15 midpoints, and 40 floats on each side of them."""
    values = torch.tensor(sorted({"nf4": NF4, "fp4": FP4}[kind]))
    middle = (values[1:] + values[:-1]) / 2
    points = [middle, torch.tensor([-0.0, 1e-45, -1e-45, 1.0, -1.0])]
    for direction in (-torch.inf, torch.inf):
        near = middle
        for _ in range(40):
            near = torch.nextafter(near, torch.tensor(direction))
            points.append(near)
    blocks = torch.nn.functional.pad(torch.cat(points), (0, 62)).unfold(0, 63, 63)
    blocks = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1)  # so the scale is 1
    check(blocks, kind)
    for scale in (0.02, 3.0, 1.7e-38, 1e38):
        check(blocks * scale, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number(dtype, kind):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    weight = weight[weight.isfinite()]
    check(weight, kind)  # beside its neighbors
    torch.manual_seed(0)
    for _ in range(4):  # and beside any other
        check(weight[torch.randperm(len(weight))], kind)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_state(kind, nested):
    """Through bitsandbytes' own function, which also quantizes the scales."""

    def quantized():
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=nested
        )
        return {"packed": packed, **state.as_dict(packed=True)}

    torch.manual_seed(0)
    weight = torch.randn(1111, 77).bfloat16()
    own = quantized()
    with fast_quantizer():
        fast = quantized()
    assert own.keys() == fast.keys() and len(own) == (6 if nested else 4)
    assert all(torch.equal(own[name], fast[name]) for name in own)


def test_views_and_what_requires_a_gradient():
    torch.manual_seed(0)
    check(torch.randn(96, 130).t(), "nf4")
    check(torch.randn(96, 130)[:, ::2], "fp4")
    weight = torch.nn.Parameter(torch.randn(96, 64))
    packed, absmax = quantize_4bit(weight, "nf4")
    assert not packed.requires_grad and not absmax.requires_grad


def test_whatever_the_defaults_of_torch_are():
    weight = torch.randn(300, 65)
    quantizing._tables.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            packed, absmax = quantize_4bit(weight, "fp4")
    finally:
        torch.set_default_dtype(torch.float32)
    own_packed, own_absmax = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "fp4", torch.uint8)
    assert torch.equal(packed, own_packed) and torch.equal(absmax, own_absmax)


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads, small_chunks):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (127, 128, 129, 256, 1000):
            check(torch.randn(n), "nf4")
            check(torch.randn(n), "fp4", 32)
        with pytest.raises(CheckpointError, match="infinity or NaN"):
            quantize_4bit(torch.full((1000,), torch.inf), "nf4")
        assert torch.get_num_threads() == threads
        seen = []
        quantizing._in_threads(lambda _: seen.append(torch.get_num_threads()), range(9))
        assert seen == [1] * min(threads, 9)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen[-1] == threads  # later threads start with this number
    finally:
        torch.set_num_threads(before)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_refused(bad, dtype, small_chunks):
    for place in (0, 64, 639, 640, 649):
        weight = torch.randn(650).to(dtype)
        weight[place] = bad
        with pytest.raises(CheckpointError, match="infinity or NaN"):
            quantize_4bit(weight, "nf4")


@pytest.mark.parametrize("plan", ["nf4", "nf4-dq", "fp4", "int8"])
def test_load_names_the_parameters_that_hold_infinities(llava, copy, plan):
    folder = copy(llava)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    for bad in (torch.inf, torch.nan):
        weights[name][3, 5] = bad
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="infinities or NaN.*language_model.*1.mlp.up_pr"):
            vk.load(folder, f"language_model={plan}", processor=False)
    model, _ = vk.load(folder, "bf16", processor=False)  # a float format loses nothing
    weight = model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")
    assert not weight.isfinite().all()


# --- in place of bitsandbytes ---------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the tensors that the fast quantizer quantized."""
    seen = []

    def counting(weight, *args):
        seen.append(weight.numel())
        return quantize_4bit(weight, *args)

    monkeypatch.setattr(quantizing, "quantize_4bit", counting)
    return seen


def own(weight=None, storage=torch.uint8):
    weight = torch.ones(2, 64) if weight is None else weight
    return torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", storage)


def test_bitsandbytes_has_no_kernel_of_its_own_and_its_default_comes_back(calls):
    """If a release adds a kernel, this fails. Then measure whether that kernel is faster."""

    def registered():
        return torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CPU")

    assert not registered()
    with fast_quantizer():
        assert registered()
        own()
    assert not registered()
    own()
    assert calls == [128]


def test_with_blocks_can_overlap(calls):
    first, second = fast_quantizer(), fast_quantizer()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    own()
    second.__exit__(None, None, None)
    own()
    with pytest.raises(RuntimeError, match="stop"), fast_quantizer():
        raise RuntimeError("stop")
    own()
    assert calls == [128]


def test_several_threads_can_use_it():
    weight = torch.randn(333, 65)
    wanted = own(weight)
    wrong = []

    def work():
        for _ in range(50):
            with fast_quantizer():
                found = own(weight)
            if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and quantizing._users == 0 and quantizing._library is None


def test_bitsandbytes_does_what_the_quantizer_does_not():
    weight = torch.randn(4, 64)
    bad = weight.clone()
    bad[1, 2] = torch.nan
    plain = own(weight, torch.bfloat16), own(bad)
    with fast_quantizer():
        fast = own(weight, torch.bfloat16), own(bad)
    for a, b in zip(plain, fast, strict=True):
        assert torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8))
        assert torch.equal(a[1].view(torch.int32), b[1].view(torch.int32))


@pytest.mark.parametrize("plan", ["nf4", "nf4-dq", "fp4"])
def test_load_uses_it_and_gives_the_same_model(llava, plan, calls, monkeypatch):
    model, _ = vk.load(llava, plan, processor=False)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(calls) == len(layers) > 20
    monkeypatch.setattr("vlmkit.loading.weights._quantizer", lambda layout: nullcontext())
    other, _ = vk.load(llava, plan, processor=False)
    assert len(calls) == len(layers)
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and any("absmax" in name for name in mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_other_plans_do_not_use_it(llava, calls):
    vk.load(llava, "bf16", processor=False)
    vk.load(llava, "int8", processor=False)
    assert not calls
