"""The planner: exact bytes, an exact choice, and a result that holds when it is loaded."""

import copy
import itertools
import random
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch

import vlmkit as vk
from vlmkit.errors import PlanError, SensitivityError, SizeError
from vlmkit.planner import Planner, best_plan, least_damage, split
from vlmkit.planner.choices import Int8Inputs, choices_of
from vlmkit.planner.results import verdict
from vlmkit.sensitivity import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("llava", "qwen2_vl", "qwen3_vl_moe", "mllama", "idefics2", "gemma3", "blip2", "glm4v")


@pytest.fixture(scope="module")
def pebble():
    return vk.load("pebble", "bf16")


@pytest.fixture(scope="module")
def questions():
    return vk.tasks.dataset("all", n=60, seed=21)


@pytest.fixture(scope="module")
def planner(pebble, questions):
    return Planner(*pebble, questions, progress=False)


# --- choosing ------------------------------------------------------------------------------------


def test_the_choice_is_the_best_of_all():
    draw = random.Random(0)
    for _ in range(60):
        sizes = {p: {f: draw.randint(1, 9) for f in "abcd"} for p in range(5)}
        damages = {p: {f: draw.choice([0, 1, 2, 5, 9]) for f in "abcd"} for p in range(5)}
        room = draw.randint(4, 30)
        fitting = [
            (sum(damages[p][f] for p, f in enumerate(choice)), size)
            for choice in itertools.product("abcd", repeat=5)
            if (size := sum(sizes[p][f] for p, f in enumerate(choice))) <= room
        ]
        found = least_damage(sizes, damages, room)
        if not fitting:
            assert found is None
            continue
        size = sum(sizes[p][f] for p, f in found.items())
        assert (sum(damages[p][f] for p, f in found.items()), size) == min(fitting)


def test_eighty_layers_are_chosen_for():
    draw = random.Random(1)
    bits = {"a": 2, "b": 3, "c": 4, "d": 8, "e": 16}
    sizes = {p: {f: (1 + p % 2) * bits[f] * 100_003 for f in bits} for p in range(80)}
    damages = {p: {f: draw.random() / (i + 1) ** 3 for i, f in enumerate("abcde")} for p in sizes}
    room = sum(options["c"] for options in sizes.values())
    found = least_damage(sizes, damages, room)
    assert sum(sizes[p][f] for p, f in found.items()) <= room


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_items_add_up_to_the_ledger(family, name):
    model, _ = vk.load(family(name), "bf16", processor=False)
    draw = random.Random(name)
    for by in ("component", "layer"):
        choices = choices_of(model, by=by)
        drawn = {item.scope: draw.choice(choices.formats) for item in choices.items}
        for assignment in (drawn, choices.uniform()["nf4"], choices.uniform()["bf16"]):
            assert choices.total(assignment) == choices.counted(assignment)
        if name == "mllama" and by == "component":
            assert "cross_attention" in drawn
    loaded, _ = vk.load(family(name), choices.plan(drawn), processor=False)
    assert vk.memory.measure(loaded).total == choices.total(drawn)


def test_bytes_of_a_float32_model(llava):
    model, _ = vk.load(llava, "fp32", processor=False)
    choices = choices_of(model, ["fp32", "bf16", "nf4"])
    for names in itertools.product(choices.formats, repeat=len(choices.items)):
        assignment = {item.scope: name for item, name in zip(choices.items, names, strict=True)}
        assert choices.total(assignment) == choices.counted(assignment)


def test_bytes_of_formats_for_experiments(pebble):
    choices = choices_of(pebble[0], "experimental")
    assert choices.plan(choices.all_in("int2")) is None
    whole = vk.memory.predict(pebble[0], "bf16").total
    base = choices.all_in("bf16")
    assert choices.total(base) == whole
    saved = quantized(pebble[0], "language_model", "int3").bytes_saved
    assert whole - choices.total(base | {"language_model": "int3"}) == saved
    extra = {item.weights[0].kind for item in choices.items if not item.main}
    assert extra == {"head", "embedding"}


# --- rounding in place is what loading does ------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4", "int8"])
def test_in_place_is_as_loaded(planner, name):
    assignment = planner.choices.uniform()[f"{name}, head too"]
    loaded, _ = vk.load("pebble", planner.choices.plan(assignment), processor=False)
    here = planner._outcome(planner.calibration, assignment)
    other = copy.copy(planner.calibration)
    other.model = loaded
    there = other.compare()
    if name == "int8":  # rounded to bf16 in other places: as large a change, not the same one
        assert there.kl.mean() / 5 < here.kl.mean() < there.kl.mean() * 5
    else:
        assert here.kl.mean() > 0
        assert here.kl.tolist() == pytest.approx(there.kl.tolist(), rel=1e-3, abs=1e-6)


def test_outliers_among_the_inputs_of_int8_are_kept():
    x = torch.randn(2, 3, 8)
    x[0, 1, 5] = 40.0
    rounded = Int8Inputs().rounded(x)
    assert rounded[..., 5].equal(x[..., 5])
    rest = [i for i in range(8) if i != 5]
    step = x.where(x.abs() < 6, 0).abs().amax(-1, keepdim=True) / 127
    assert ((rounded - x)[..., rest].abs() <= step / 2 + 1e-6).all()
    assert not rounded[..., rest].equal(x[..., rest])


# --- the plan ------------------------------------------------------------------------------------


def test_the_split_is_disjoint_and_even(questions):
    ours, theirs = split(questions, 0.5)
    assert not set(ours) & set(theirs)
    assert sorted(ours + theirs) == list(range(len(questions)))
    for task in vk.tasks.TASKS:
        counts = [sum(questions[row]["task"] == task for row in rows) for rows in (ours, theirs)]
        assert abs(counts[0] - counts[1]) <= len(vk.tasks.KINDS[task])
    assert split(questions, 0.5, seed=1)[0] != ours
    assert len(split(questions, 0.25)[0]) == len(questions) // 4


def test_the_plan_is_loaded_audited_and_as_measured(pebble, questions, planner):
    model, processor = pebble
    before = families.state(model)
    result = planner.best("3 MB")
    assert not families.differing(before, families.state(model))

    loaded, _ = vk.load("pebble", plan=result.plan)
    vk.audit(loaded, result.plan)
    ledger = vk.memory.predict("pebble", result.plan).total
    assert result.bytes == vk.memory.measure(loaded).total == ledger <= 3_000_000
    held_out = questions.select(split(questions)[1])
    found = vk.evaluate(loaded, processor, held_out, max_new_tokens=planner.max_new_tokens)
    assert found.accuracy == result.measured.accuracy
    assert result.measured.n == len(held_out)

    assert result.uniform.bytes <= 3_000_000
    assert result.measured.kl <= result.uniform.measured.kl or result.best.joint < (
        result.uniform.joint
    )
    assert result.predicted == pytest.approx(
        sum(planner.damages[s][f] for s, f in result.assignment.items())
    )
    low, high = result.measured.kl_interval
    assert low <= result.measured.kl <= high
    table = result.table()
    assert table.loc["unquantized", "kl"] < 1e-4
    assert table.loc["unquantized", "bytes"] == vk.memory.measure(model).total
    assert "<table" in result._repr_html_() and result.reason in str(result)
    assert "language_model embedding" in str(result)


def test_more_bytes_never_predict_more_damage(planner):
    planned = [planner._planned(budget) for budget in (2_310_000, 2_600_000, 3_500_000, 7_600_000)]
    damages = [sum(planner.damages[s][f] for s, f in one.items()) for one in planned]
    assert damages == sorted(damages, reverse=True) and damages[-1] == 0
    assert set(planned[-1].values()) == {"bf16"}


def test_layers_below_four_bits(pebble, questions):
    model, _ = pebble
    planner = Planner(
        *pebble,
        questions,
        formats=["int8", "int2-g32"],
        by="layer",
        progress=False,
    )
    # as if measured, which takes a cell for each layer: the language model's middle gives way
    planner.damages = {
        item.scope: {
            name: 0.0 if name == "bf16" else len(item.scope) * (0.01 if "int2" in name else 1e-4)
            for name in planner.choices.formats
        }
        for item in planner.choices.items
    }
    result = planner.best("3 MB")
    assert result.plan is None and result.bytes <= 3_000_000
    planned = result.rejected or result.best
    assert len(set(planned.assignment.values())) > 1
    before = families.state(model)
    with result.applied(model):
        again = planner.held_out.compare()
    assert again.kl.mean() == pytest.approx(result.measured.kl, rel=1e-3, abs=1e-6)
    assert not families.differing(before, families.state(model))


def test_a_plan_that_fails_on_held_out_questions_gives_way_to_the_uniform_one(pebble, questions):
    class Deceived(Planner):
        """Believes that two bits cost the vision encoder nothing."""

        @property
        def damages(self):
            return {
                item.scope: {
                    name: 0.0 if name == "bf16" or item.scope == "vision_encoder" else 0.1
                    for name in self.choices.formats
                }
                for item in self.choices.items
            }

        def joint(self, assignment):
            return sum(self.damages[scope][name] for scope, name in assignment.items())

    planner = Deceived(*pebble, questions, formats=["int8", "int2"], progress=False)
    size = planner.choices.counted(planner.choices.all_in("int8"))
    result = planner.best(int(size * 1.6))
    assert result.rejected.assignment["vision_encoder"] == "int2"
    assert result.best is result.uniform and result.best.name.startswith("uniform int8")
    assert result.rejected.measured.kl > result.measured.kl
    assert "uniform plan is returned" in result.reason and "worse" in result.reason
    assert len(result.table()) == 3


@pytest.mark.slow
def test_cross_attention_is_planned(family):
    """A model without processor files: pictures and words are made by hand, and the expected answer
    is the one that it gives."""
    import tiny
    from transformers import BatchFeature

    model, _ = vk.load(family("mllama"), "bf16", processor=False)
    one = families.inputs(model)
    words = tiny.tokenizer()

    class Processor:
        tokenizer, chat_template = words, "by hand"

        def apply_chat_template(self, conversations, **_):
            return ["a prompt"] * len(conversations)

        def __call__(self, text, **_):
            n = len(text)
            return BatchFeature({k: v.repeat(n, *[1] * (v.dim() - 1)) for k, v in one.items()})

    row = {"images": [], "question": "What is it?", "answer": ""}
    expected = vk.evaluate(model, Processor(), [row], max_new_tokens=3).answers["predicted"][0]
    dataset = [{**row, "answer": expected}] * 60
    choices = choices_of(model)
    budget = choices.total(choices.smallest()) + 60_000
    result = best_plan(model, Processor(), dataset, budget, max_new_tokens=3, progress=False)
    assert {"cross_attention", "vision_encoder", "projector"} <= set(result.assignment)
    loaded, _ = vk.load(family("mllama"), plan=result.plan, processor=False)
    assert vk.memory.measure(loaded).total == result.bytes <= budget


# --- bad input -----------------------------------------------------------------------------------


def test_budgets(planner):
    least = planner.choices.smallest()
    smallest = planner.choices.counted(least)
    with pytest.raises(SizeError, match=rf"smallest takes {smallest:,} bytes, with .*embedding"):
        planner.best(smallest - 1)
    assert planner._planned(smallest) == least
    assert planner.best(3_000_000).bytes <= 3_000_000
    assert planner.best("3MiB").budget == 3 * 2**20
    with pytest.raises(SizeError, match="not a number of bytes"):
        planner.best("three")


def test_bad_input(pebble, questions, llava):
    model, processor = pebble
    few = questions.select(range(40))
    with pytest.raises(SensitivityError, match="40 questions are too few.*60 at least"):
        best_plan(model, processor, few, "3 MB")
    with pytest.raises(SensitivityError, match="interval 0.020 wide.*at least"):
        best_plan(model, processor, questions, "3 MB", width=0.02)
    with pytest.raises(SensitivityError, match="by component or layer"):
        Planner(model, processor, questions, by="head")
    with pytest.raises(SensitivityError, match="share between 0 and 1"):
        Planner(model, processor, questions, calibration=1)
    with pytest.raises(SensitivityError, match="activations"):
        Planner(model, processor, questions, formats=["int4", "int8-act-token"])
    with pytest.raises(PlanError, match="int3"):
        Planner(model, processor, questions, formats=["int33"])
    with pytest.raises(SensitivityError, match="formats is a list"):
        Planner(model, processor, questions, formats="nf4")
    other, _ = vk.load("pebble", "nf4", processor=False)
    with pytest.raises(SensitivityError, match="quantized already"):
        best_plan(other, processor, questions, "3 MB")
    random_model, its_processor = vk.load(llava, "bf16")
    with pytest.raises(SensitivityError, match="answers none of"):
        best_plan(random_model, its_processor, questions, "1 MB", max_new_tokens=2, progress=False)


def test_the_verdict_on_two_plans():
    def trial(name, correct, kl):
        outcome = SimpleNamespace(correct=np.array(correct), kl=np.array(kl))
        measured = SimpleNamespace(outcome=outcome, n=len(kl))
        return SimpleNamespace(name=name, assignment=name, measured=measured)

    noise = np.random.default_rng(0).random(100) * 0.01
    right, wrong = [True] * 100, [i % 5 > 0 for i in range(100)]
    good, near = trial("planned", right, noise), trial("uniform nf4", right, noise[::-1])
    far, bad = trial("uniform nf4", right, noise + 0.1), trial("uniform nf4", wrong, noise + 0.1)
    for planned, uniform, is_worse, says in (
        (good, far, False, "closer to the unquantized"),
        (good, bad, False, "more questions right"),
        (good, near, False, "as good as"),
        (good, None, False, "No uniform plan"),
        (near, near, False, "is the uniform one, nf4"),
        (far, good, True, "planned one is worse"),
        (bad, good, True, "planned one is worse"),
    ):
        found, why = verdict(planned, uniform)
        assert found == is_worse and says in why
