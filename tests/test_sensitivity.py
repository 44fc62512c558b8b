"""Scopes, rounding and restoring, control experiments, statistics."""

import os
import re
import signal

import families
import numpy as np
import pytest
import torch

import vlmkit as vk
from vlmkit.errors import PlanError, SensitivityError
from vlmkit.formats import Rounding, rounding
from vlmkit.rows import LINEAR
from vlmkit.sensitivity import (
    equal_bits,
    label_of,
    layers,
    mcnemar,
    needed,
    outliers,
    paired_interval,
    quantized,
    random_weights,
    select,
)
from vlmkit.sensitivity.scopes import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def with_processor(llava):
    return vk.load(str(llava), "bf16")


@pytest.fixture(scope="module")
def model(with_processor):
    return with_processor[0]


@pytest.fixture
def load(family):
    return lambda name, **options: vk.load(str(family(name, **options)), "bf16", processor=False)[0]


@pytest.fixture
def unchanged(model):
    """unchanged() fails if the model is not what it was when the test began."""
    before = families.state(model)
    yield lambda: not families.differing(before, families.state(model))
    assert not families.differing(before, families.state(model))


def names(model, scope):
    return {weight.name for weight in select(model, scope).weights}


# --- scopes ---------------------------------------------------------------------------------------


def test_a_component_is_its_linear_layers(model):
    for component in ("vision_encoder", "projector", "language_model"):
        weights = select(model, component).weights
        assert weights and {w.component for w in weights} == {component}
        assert {w.kind for w in weights} == {LINEAR}
    assert not any("embed" in n or "lm_head" in n for n in names(model, "language_model"))


def test_scopes_split_a_component(model):
    whole = names(model, "language_model")
    assert layers(model) == ("language_model:0", "language_model:1")
    assert set().union(*(names(model, layer) for layer in layers(model))) == whole
    attention, mlp = names(model, "language_model:attention"), names(model, "language_model:mlp")
    assert attention | mlp == whole and not attention & mlp
    assert names(model, "language_model:1:mlp") == mlp & names(model, "language_model:1")
    assert all("self_attn" in name for name in attention)
    assert attention < names(model, "attention")
    assert names(model, ["projector", r"layers\.0\.mlp"]) >= names(model, "projector")
    assert names(model, re.compile(r"\.q_proj")) == names(model, r"\.q_proj")
    assert label_of(["projector", "mlp"]) == "projector + mlp"


def test_embeddings_and_head_only_if_a_pattern_names_nothing_else(model):
    assert names(model, "lm_head") == {"lm_head.weight"}
    assert names(model, "embed_tokens") == {"model.language_model.embed_tokens.weight"}
    assert names(model, r"language_model") == names(model, "language_model")
    assert all("norm" not in weight.name for weight in weights_of(model))


def test_a_tied_weight_appears_once(load):
    model = load("qwen2_vl", tie=True)
    assert len(select(model, "embed_tokens").weights) == 1
    with pytest.raises(SensitivityError, match="matches nothing"):
        select(model, r"^lm_head")
    before = model.lm_head.weight.clone()
    with quantized(model, "embed_tokens", "int2"):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert not torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.lm_head.weight, before)


def test_cross_attention_is_a_scope_of_its_own(load):
    model = load("mllama")
    cross = names(model, "cross_attention")
    assert cross and all("cross_attn" in name or "layers" in name for name in cross)
    assert not cross & names(model, "language_model")


@pytest.mark.parametrize(
    "scope, says",
    [
        ("cross_attention", "which has vision_encoder .* projector"),
        ("visoin_encoder", "Did you mean 'vision_encoder'"),
        ("language_model:7", "there are 2 layers"),
        ("language_model:head", "after the component comes"),
        ("model.visual", "full module names such as\n"),
        ("(", "not a regular expression"),
        ([], "empty list"),
        (3, "not a scope"),
    ],
)
def test_a_scope_that_matches_nothing_says_what_there_is(model, scope, says):
    with pytest.raises(SensitivityError, match=says):
        quantized(model, scope, "int4")


# --- rounding and restoring -----------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["language_model", "attention", "lm_head", "patch_embedding"])
@pytest.mark.parametrize("name", ["int2", "int3-row-asym", "nf4-dq"])
def test_weights_are_the_rounded_ones_and_come_back(model, unchanged, scope, name):
    before = families.state(model)
    objects = dict(model.named_parameters())
    with quantized(model, scope, name) as context:
        changed = families.differing(before, families.state(model))
        assert set(changed) == names(model, scope)
        for n in changed:
            assert torch.equal(objects[n], rounding(name).rounded(before[n][0]))
        assert context.parameters == sum(objects[n].numel() for n in changed)
    assert all(objects[n] is p for n, p in model.named_parameters())


def test_effective_bits_and_bytes_saved(model):
    weights = select(model, "projector").weights
    context = quantized(model, "projector", "int4")
    total = sum(rounding("int4").total_bits(w.parameter.shape) for w in weights)
    assert context.effective_bits == pytest.approx(total / context.parameters)
    assert context.bytes_saved == 2 * context.parameters - total // 8
    assert quantized(model, "projector", "int8-act-token").bytes_saved == 0


class Interrupted(Rounding):
    """A format that is interrupted at its third weight, by `how`."""

    count = 0

    def rounded(self, x):
        type(self).count += 1
        if type(self).count == 3:
            type(self).how()
        return super().rounded(x)


def raise_error():
    raise RuntimeError("out of memory")


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "how, error", [(raise_error, RuntimeError), (press_ctrl_c, KeyboardInterrupt)]
)
def test_an_interrupt_leaves_the_model_as_it_was(model, unchanged, how, error):
    Interrupted.count, Interrupted.how = 0, staticmethod(how)
    with pytest.raises(error), quantized(model, "language_model", Interrupted("int2")):
        raise AssertionError("the block is not reached")
    assert Interrupted.count == 3
    assert unchanged()
    with pytest.raises(error), quantized(model, "language_model", "int2"):
        assert not unchanged()
        how()


def test_interrupts_at_random_moments(model, unchanged):
    """A timer that interrupts the rounding, the block or the restoring."""
    caught = 0
    rng = np.random.default_rng(0)

    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0002, 0.006))
                with quantized(model, "language_model", "int2"):
                    pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
            assert unchanged()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert caught


def test_contexts_nest_and_are_used_once_at_a_time(model, unchanged):
    context = quantized(model, "language_model", "int4")
    with context, quantized(model, "language_model", "int8-act-token"):
        with quantized(model, "projector", "int2"):
            pass
        with pytest.raises(SensitivityError, match="in use"):
            context.__enter__()
    assert unchanged()
    with context:  # and again
        assert not unchanged()


def test_activations_are_the_inputs_of_linear_layers(load):
    model = load("llava")
    inputs = families.inputs(model)
    seen = []
    linear = select(model, "projector").weights[0].layer  # whose input nothing has rounded before
    handle = linear.register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    with torch.no_grad():
        plain = model(**inputs).logits
        with quantized(model, "projector", "int4-act-token"):
            rounded = model(**inputs).logits
        again = model(**inputs).logits
    handle.remove()
    assert torch.equal(plain, again) and not torch.equal(plain, rounded)
    expected = rounding("int4-act-token").rounded(seen[0][0])
    assert torch.equal(seen[1][1], torch.nn.functional.linear(expected, linear.weight, linear.bias))
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(SensitivityError, match="inputs of Linear layers"):
        quantized(model, "embed_tokens", "int8-act-token")


def test_a_weight_with_nan_is_named(llava):
    model = vk.load(str(llava), "bf16", processor=False)[0]
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    for value in (float("nan"), float("inf")):
        model.get_parameter(name).data[3, 5] = value
        with pytest.raises(SensitivityError, match=re.escape(name)):
            quantized(model, "language_model", "int4")


def test_what_is_refused_first(llava, model):
    for plan in ("recommended", "int8"):
        quantized_model = vk.load(str(llava), plan, processor=False)[0]
        with pytest.raises(SensitivityError, match='quantized already.*plan="bf16"'):
            quantized(quantized_model, "vision_encoder", "int4")
    with pytest.raises(PlanError, match="(?i)did you mean 'int4-g32'"):
        quantized(model, "language_model", "int4g32")


# --- control experiments --------------------------------------------------------------------------


def test_random_weights_are_as_many_and_elsewhere(model, unchanged):
    before = families.state(model)
    scope = random_weights(like="projector", of="language_model", seed=3)
    count = select(model, "projector").parameters
    with quantized(model, scope, "int2") as context:
        after = families.state(model)
        changed = families.differing(before, after)
        assert set(changed) <= names(model, "language_model")
        moved = sum(int((before[n][0] != after[n][0]).sum()) for n in changed)
        assert 0.9 * count < moved <= count == context.parameters
        for n in changed:  # each as if the whole weight had been rounded
            full = rounding("int2").rounded(before[n][0])
            assert ((after[n][0] == full) | (after[n][0] == before[n][0])).all()
    assert context.effective_bits == pytest.approx(2.5)
    other = select(model, random_weights(like="projector", of="language_model", seed=4))
    pairs = zip(other.places, context.selection.places, strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    with pytest.raises(SensitivityError, match="only .* to draw them from"):
        quantized(model, random_weights(like="language_model", of="projector"), "int2")


def test_formats_of_equal_bits(model):
    found = equal_bits(model, "language_model", 4.5)
    assert {"int4-g64", "nf4-b64", "fp4-b64"} <= set(found["format"])
    for row in found.itertuples():
        context = quantized(model, "language_model", row.format)
        assert context.effective_bits == pytest.approx(row.bits)
        assert abs(row.bits - 4.5) <= 0.05
    with pytest.raises(SensitivityError, match="closest is int8"):
        equal_bits(model, "language_model", 20)


@pytest.mark.parametrize("scope", ["language_model", "vision_encoder"])
@pytest.mark.parametrize("where", ["weights", "activations"])
def test_outliers_change_no_logit(with_processor, unchanged, scope, where):
    from vlmkit.evaluation.asking import prepared
    from vlmkit.images import read_all

    model, processor = with_processor
    before = families.state(model)
    pixels = np.random.default_rng(5).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    inputs = prepared(model, processor, [read_all(pixels)], ["How many?"], 4)
    with torch.no_grad():
        logits = model(**inputs).logits
        with outliers(model, processor, scope, where=where, channels=3, factor=64) as put:
            assert torch.equal(model(**inputs).logits, logits)
            assert len(put.pairs) == 4  # two norms in each of two layers
            assert len(families.differing(before, families.state(model))) > 8
            linear = model.get_submodule(next(iter(put.pairs.values()))[0])
            columns = linear.weight.float().abs().amax(0)
            extreme = columns.topk(3).values if where == "weights" else columns.sort().values[:3]
            ratio = extreme.mean() / columns.median()
            assert ratio > 20 if where == "weights" else ratio < 0.05
            with quantized(model, scope, "int4-row"):
                assert not torch.equal(model(**inputs).logits, logits)


def test_outliers_that_would_change_the_model_are_refused(with_processor, unchanged):
    model, processor = with_processor
    with pytest.raises(SensitivityError, match="power of two"):
        outliers(model, processor, "language_model", factor=10)
    with pytest.raises(SensitivityError, match="reads the output of a norm"):
        outliers(model, processor, "projector")
    norm = model.model.language_model.layers[0].input_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) + x  # one that adds its input
    try:
        with pytest.raises(SensitivityError, match="change what this Llava"):
            outliers(model, processor, "language_model").__enter__()
    finally:
        del norm.forward


# --- statistics -----------------------------------------------------------------------------------


def test_paired_interval_is_the_bootstrap_over_questions():
    rng = np.random.default_rng(0)
    before, after = rng.random(300) < 0.9, rng.random(300) < 0.8
    low, high = paired_interval((before & ~after).sum(), (~before & after).sum(), 300)
    difference = after.astype(int) - before.astype(int)
    draws = rng.choice(difference, (4000, 300)).mean(1)
    assert (low, high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.006)
    assert low < difference.mean() < high
    assert paired_interval(0, 0, 50) == (0, 0)


def test_mcnemar_is_the_sign_test_of_the_changed():
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(6, 0) == pytest.approx(2 / 2**6)
    assert mcnemar(0, 6) == mcnemar(6, 0) > mcnemar(9, 0)


def test_needed_questions_make_the_interval_that_narrow():
    for width in (0.02, 0.05):
        n = needed(width)
        low, high = paired_interval(round(0.05 * n), round(0.05 * n), n)
        assert high - low == pytest.approx(width, rel=0.1)
