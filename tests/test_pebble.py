"""How pebble is made: its batches, its stages, its early states; a killed run ends as an unbroken
one."""

import csv
import itertools
from importlib import resources

import pytest
import torch
from transformers import AutoTokenizer

from vlmkit import tasks
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.errors import VlmkitError
from vlmkit.models.pebble import batches, recipe, states, train


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED["pebble"].folder)


@pytest.mark.slow
def test_the_tokenizer_is_made_again_as_it_is(tokenizer):
    again = recipe.build_tokenizer()
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "Is the red circle left of 27 squares? STOP"
    assert again.encode(text) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def model(tokenizer):
    return recipe.build_model(recipe.build_config(tokenizer)).eval()


@pytest.mark.parametrize("group", train.GROUPS, ids=lambda group: group.name)
def test_a_packed_question_is_what_the_processor_makes_of_it_alone(group, tokenizer, model):
    """Same tokens, same positions, same logits: packing changes nothing but the cost."""
    small = train.Group(group.name, group.tasks, pictures=2, questions=3)
    batch = batches.question_batch(small, tokenizer, "test", 0)
    processor = recipe.build_processor(tokenizer)
    rng = tasks.generator("train", small.name, "test", 0, 1)
    recipes = [batches.RECIPES[name] for name in small.tasks]
    picture = rng.choice(recipes).draw(rng)
    asked = batches._questions(recipes, picture, small.questions, rng, {})
    images = [tasks.to_image(frame) for frame in picture.frames]
    with torch.no_grad():
        mask = torch.zeros(batch["mask"].shape).masked_fill_(~batch["mask"], -1e30)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "pixel_values")}
        packed = model(**inputs, attention_mask=mask).logits
        first = batch["questions"][1][batch["questions"][1] >= 0].min()
        for number, (_, question, answer) in enumerate(asked):
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            text = processor.apply_chat_template(messages)
            alone = processor(images=images, text=text, return_tensors="pt")
            logits = model(**alone).logits
            where = batch["questions"][1] == first + number
            ids = tokenizer.encode(f" {answer}{recipe.END}")
            assert batch["labels"][1][where].tolist() == ids
            assert alone.input_ids[0, -len(ids) :].tolist() == ids
            torch.testing.assert_close(
                packed[1][where], logits[0, -len(ids) - 1 : -1], rtol=1e-4, atol=1e-4
            )


def test_any_question_tokenizes_and_printed_text_is_read_letter_by_letter(tokenizer):
    odd = "Où est le chat? 犬はどこ？ 🦊\n\t<b>"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
    assert len(tokenizer.encode(" CAFE7")) == 6
    assert len(tokenizer.encode(" red square")) == 2
    assert len(tokenizer) <= recipe.VOCABULARY


def test_the_architecture_is_what_the_card_says(model):
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 3_794_752
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(size % 64 == 0 for m in linears for size in (m.in_features, m.out_features))


# --- training -------------------------------------------------------------------------------------

SIGNS, VIDEOS = train.Group("signs", ("ocr",), 2, 1), train.Group("videos", ("video",), 2, 2)
TINY = (
    train.Stage("vision", 4, 1e-3, ("vision_tower",)),
    train.Stage("language", 4, 1e-3, ("language_model", "lm_head"), (SIGNS,), images=False),
    train.Stage("instruct", 6, 1e-3, ("",), (VIDEOS,)),
)


class Killed(BaseException):
    pass


def killed(function, *calls):
    """The function, except that these calls of it, counted from 0, raise Killed."""
    count = itertools.count()

    def call(*arguments):
        if next(count) in calls:
            raise Killed
        return function(*arguments)

    return call


def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(train, "CHUNK", 2)
    monkeypatch.setattr(recipe, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(
        batches, "vision_batch", lambda size, *key, make=batches.vision_batch: make(4, *key)
    )
    whole = train.train(tmp_path / "whole", TINY)
    monkeypatch.setattr(train, "vision_loss", killed(train.vision_loss, 3))
    monkeypatch.setattr(train, "answer_loss", killed(train.answer_loss, 3, 5, 9))
    for _ in range(5):
        try:
            pieces = train.train(tmp_path / "pieces", TINY)
            break
        except Killed:
            continue
    for (name, a), b in zip(whole.state_dict().items(), pieces.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [(tmp_path / run / "log.csv").read_text() for run in ("whole", "pieces")]
    rows = [list(csv.DictReader(log.splitlines())) for log in logs]
    for a, b in zip(*rows, strict=True):
        assert a | {"seconds": ""} == b | {"seconds": ""}
    assert [(row["stage"], row["step"]) for row in rows[0]][-1] == ("instruct", "6")
    assert not list((tmp_path / "pieces").glob("*.part"))


def test_a_stage_trains_what_it_names(model):
    names = {
        stage.name: {
            name.removeprefix("model.").split(".")[0]
            for name, parameter in model.named_parameters()
            if train.trainable(model, stage) is not None and parameter.requires_grad
        }
        for stage in train.STAGES
    }
    assert names.pop("vision") == {"vision_tower"}
    assert names["language"] == {"language_model", "lm_head"}
    assert names["projector"] == {"multi_modal_projector"}
    assert names["mixed"] == {"multi_modal_projector", "language_model", "lm_head"}
    # As in both stages of LLaVA, the vision encoder is frozen in all other stages.
    assert all("vision_tower" not in parts for parts in names.values())


def test_the_shipped_log_has_the_stages_in_order():
    log = resources.files("vlmkit.models.pebble") / "training_log.csv"
    rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["stage", "step", "seconds", "loss", "patches", *train.ALL_KINDS]
    last = {row["stage"]: int(row["step"]) for row in rows}
    assert list(last.items()) == [(stage.name, stage.max_steps) for stage in train.STAGES]


# --- early states ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends():
    return {stage: states.after(stage).state_dict() for stage in states.TRAINED}


def changed(before, after):
    """The parts in which two states differ."""
    assert set(before) == set(after)
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {part for part in states.ALL for name in names if part in name.split(".")}


def test_each_stage_changed_what_it_trains_and_nothing_else(ends):
    trained = {stage.name: set(stage.trains) for stage in train.STAGES}
    for before, after in itertools.pairwise(states.TRAINED):
        assert changed(ends[before], ends[after]) == trained[after], after


def test_before_the_first_stage_it_is_what_the_recipe_begins_with(ends, model):
    assert not changed(model.state_dict(), ends["nothing"])
    assert {value.dtype for value in ends["nothing"].values()} == {torch.float32}


def test_a_seed_changes_what_is_not_trained_yet(ends):
    other = states.after("language", seed=1).state_dict()
    assert changed(ends["language"], other) == {"multi_modal_projector"}


def test_a_state_that_is_not_in_the_package_is_refused():
    with pytest.raises(VlmkitError, match=r"'instrct'.*'instruct'\?"):
        states.after("instrct")
