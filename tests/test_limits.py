"""The most that fits on a card: each limit fits, and one step more does not."""

import random

import pytest

import vlmkit as vk
from vlmkit.errors import AnatomyError, SizeError
from vlmkit.memory.limits import LOAD, NOISE, PROMPT, STEPS, TRAINING, _search
from vlmkit.memory.predicting import Predictor

SMOL, QWEN = "HuggingFaceTB/SmolVLM-256M-Instruct", "Qwen/Qwen2-VL-2B-Instruct"


def total(name, arguments, **more):
    return vk.memory.predict(name, **{"allocator": "cuda", **more, **arguments}).total


def one_more(axis, arguments, value):
    step = STEPS[axis]
    if axis == "rank":
        return arguments | {"training": {"language_model": vk.LoRA(r=value + step)}}
    if axis == "image_size":
        scale = (max(value) + step) / max(value)
        return arguments | {axis: tuple(round(side * scale) for side in value)}
    return arguments | {axis: value + step}


def at(axis, arguments, value):
    if axis == "rank":
        return arguments | {"training": {"language_model": vk.LoRA(r=value)}}
    return arguments | {axis: value}


def check(name, found, use, axes, **more):
    use = found[use]
    for axis in axes:
        limit = use.limits[axis]
        assert limit.by == "memory", (axis, limit)
        assert total(name, at(axis, use.arguments, limit.value), **more) <= found.room
        assert total(name, one_more(axis, use.arguments, limit.value), **more) > found.room


def test_the_search_is_right_for_every_line_that_gets_steeper():
    chance = random.Random(0)
    calls = 0
    for _ in range(300):
        slopes = sorted(chance.uniform(1, 400) * 2**20 for _ in range(3))
        bends, high = sorted(chance.sample(range(1, 60), 2)), chance.choice([0, 1, 7, 64, 2000])

        def need(k, slopes=slopes, bends=bends):
            nonlocal calls
            calls += 1
            parts = min(k, bends[0]), min(max(k - bends[0], 0), bends[1] - bends[0])
            parts = (*parts, max(k - bends[1], 0))
            noise = random.Random(k).uniform(0, NOISE / 4)
            return 10**9 + noise + sum(s * n for s, n in zip(slopes, parts, strict=True))

        room = need(0) + chance.uniform(0, 4e9)
        best = _search(need, lambda k: k, room, high, chance.uniform(0.5, 2) * slopes[0])
        assert need(best) <= room and (best == high or need(best + 1) > room)
    assert calls / 300 < 3 + 8  # three are the test's own


def test_limits_of_a_prompt_fit_and_one_more_does_not():
    found = vk.memory.largest("pebble", "60 MB", uses=[LOAD, PROMPT], reserved="1 MB")
    assert found.room == 59_000_000 and found.fits
    assert found[LOAD].needed == total("pebble", {})
    check("pebble", found, PROMPT, ["batch_size"])
    limits = found[PROMPT].limits
    assert limits["image_size"].by == "picture"  # as many tokens whatever the size
    assert limits["images"].by == limits["tokens"].by == "model"
    with pytest.raises(SizeError, match="context"):
        total("pebble", one_more("images", found[PROMPT].arguments, limits["images"].value))
    assert str(limits["batch_size"]) in str(found) and f"{limits['images'].value} m" in str(found)


def test_what_does_not_fit_names_the_saving_with_which_it_fits():
    use = {"uses": [TRAINING], "images": 0, "tokens": 512}
    found = vk.memory.largest("pebble", "40 MB", reserved="1 MB", **use)
    assert not found.fits and found[TRAINING].limits == {}
    (*others, saving) = found[TRAINING].savings
    assert saving.arguments == {"gradient_checkpointing": True} and saving.fits and not others
    arguments = found[TRAINING].arguments | saving.arguments
    assert total("pebble", arguments) == found[TRAINING].needed - saving.saved <= found.room
    with_it = found[f"{TRAINING} + {saving.what}"]
    assert with_it.needed <= found.room
    check("pebble", found, with_it.name, ["rank"])
    document = found.to_dict()["uses"]
    assert [use["fits"] for use in document] == [False, True]
    assert document[1]["limits"]["rank"]["value"] == with_it.limits["rank"].value


def test_savings_add_up_and_the_last_of_all_is_no_promise():
    found = vk.memory.largest(SMOL, "1300 MB", "bf16", uses=[LOAD])
    savings = found[LOAD].savings
    assert savings[-1].fits and not any(saving.fits for saving in savings[:-1])
    for saving in savings:
        assert found[LOAD].needed - saving.saved == total(SMOL, saving.arguments)
    nothing = vk.memory.largest(SMOL, "1001 MB", "bf16", uses=[LOAD])
    assert nothing[LOAD].savings and not any(saving.fits for saving in nothing[LOAD].savings)
    assert len(nothing.uses) == 1 and "Nothing that was tried" in str(nothing)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("pebble", "RTX 4091"), "'RTX 4090'"),
        (("pebble", "1 GB"), "no more memory"),
    ],
)
def test_mistakes(arguments, says):
    with pytest.raises(SizeError, match=says):
        vk.memory.largest(*arguments)
    with pytest.raises(SizeError, match="load"):
        vk.memory.largest("pebble", "T4", uses=["lod"])
    with pytest.raises(SizeError, match="different sizes"):
        vk.memory.largest("pebble", "T4", image_size=[(84, 84), (90, 84)], images=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "card", "axes"),
    [
        (QWEN, "8 GB", ["batch_size", "images", "image_size", "tokens", "rank"]),
        ("llava-hf/llava-1.5-7b-hf", "RTX 4080", ["batch_size"]),
    ],
)
def test_limits_of_a_training_step(name, card, axes):
    found = vk.memory.largest(name, card, uses=[TRAINING], gradient_checkpointing=True)
    check(name, found, TRAINING, axes)


@pytest.mark.slow
def test_limits_of_a_prompt_with_pictures():
    found = vk.memory.largest(QWEN, "3.7 GB", image_size=(448, 448), uses=[PROMPT])
    check(QWEN, found, PROMPT, ["batch_size", "images", "image_size", "tokens"])


@pytest.mark.parametrize(
    "name", ["pebble", *(pytest.param(n, marks=pytest.mark.slow) for n in vk.catalog.NAMES)]
)
def test_one_dry_run_after_another_finds_the_same(name):
    """What a search reuses leaves no trace: every prediction is that of a model made for it."""
    model = Predictor(name, None, None, False, "cuda")
    for tokens, size, r in ((40, 3, 4), (20, 1, 9), (20, 1, 2)):
        lora = {"projector": "full", "language_model": vk.LoRA(r=r)}
        step = {"training": lora, "gradient_checkpointing": True}
        for way in ({"new_tokens": 3}, step):
            use = {"tokens": tokens, "batch_size": size, "images": 1} | way
            try:
                expected = vk.memory.predict(name, allocator="cuda", **use)
            except AnatomyError:
                pytest.skip("cannot be predicted")
            found = model.ledger(**use)
            assert found.by_kind == expected.by_kind, use
            assert found.by_component == expected.by_component, use
