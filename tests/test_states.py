"""pebble's states in between: each stage left alone what it does not train."""

import pytest
import torch

from vlmkit.errors import VlmkitError
from vlmkit.models.pebble import recipe, states, train


@pytest.fixture(scope="module")
def ends():
    return {stage: states.after(stage).state_dict() for stage in states.LEARNT}


def changed(before, after):
    """The components in which two states differ."""
    assert set(before) == set(after)
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {
        part
        for part in ("vision_tower", *train.LANGUAGE_SIDE)
        for name in names
        if part in name.split(".")
    }


def test_each_stage_changed_what_it_trains_and_nothing_else(ends):
    trained = {stage.name: set(stage.trains) for stage in train.STAGES}
    order = list(states.LEARNT)
    for before, after in zip(order, order[1:], strict=False):
        assert changed(ends[before], ends[after]) == trained[after], after


def test_before_the_first_stage_it_is_what_the_recipe_begins_with(ends):
    config = recipe.build_config(recipe.build_tokenizer())
    assert not changed(recipe.build_model(config, 0).state_dict(), ends["nothing"])
    assert {value.dtype for value in ends["nothing"].values()} == {torch.float32}


def test_a_seed_changes_what_has_learnt_nothing(ends):
    other = states.after("language", seed=1).state_dict()
    assert changed(ends["language"], other) == {"multi_modal_projector"}


def test_a_state_that_is_not_shipped_is_refused():
    with pytest.raises(VlmkitError, match="'lessons'.*instruct"):
        states.after("lessons")
