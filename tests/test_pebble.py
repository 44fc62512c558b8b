"""How pebble is made: its batches, its stages, and that a killed run ends as an unbroken one."""

import csv
from importlib import resources

import pytest
import torch

from vlmkit import tasks
from vlmkit.models.pebble import batches, recipe, train


@pytest.fixture(scope="module")
def tokenizer():
    return recipe.build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return recipe.build_model(recipe.build_config(tokenizer)).eval()


def conversation(row, answered):
    content = [{"type": "image"} for _ in row["images"]]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": row["question"]}]}]
    if answered:
        text = [{"type": "text", "text": row["answer"]}]
        messages.append({"role": "assistant", "content": text})
    return messages


@pytest.mark.parametrize("group", train.GROUPS, ids=lambda group: group.name)
def test_a_packed_question_is_what_the_processor_makes_of_it_alone(group, tokenizer, model):
    """Same tokens, same positions, same logits: packing is bookkeeping, not another task."""
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
        packed = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=mask,
            pixel_values=batch["pixel_values"],
        ).logits
        first = batch["questions"][1][batch["questions"][1] >= 0].min()
        for number, (_, question, answer) in enumerate(asked):
            row = {"images": images, "question": question, "answer": answer}
            text = processor.apply_chat_template(conversation(row, answered=True))
            alone = processor(images=images, text=text, return_tensors="pt")
            logits = model(**alone).logits
            where = batch["questions"][1] == first + number
            ids = tokenizer.encode(f" {answer}{recipe.END}")
            assert (
                batch["labels"][1][where].tolist()
                == ids
                == alone.input_ids[0, -len(ids) :].tolist()
            )
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
    assert 2e6 < parameters < 5e6
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert all(size % 64 == 0 for m in linears for size in (m.in_features, m.out_features))


TINY = (
    train.Stage("vision", 4, 1e-3, ("vision_tower",)),
    train.Stage(
        "language",
        4,
        1e-3,
        ("language_model", "lm_head"),
        (train.Group("signs", ("ocr",), 2, 1),),
        False,
    ),
    train.Stage("instruct", 6, 1e-3, ("",), (train.Group("videos", ("video",), 2, 2),)),
)


class Killed(BaseException):
    pass


def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(train, "CHUNK", 2)
    monkeypatch.setattr(recipe, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(
        batches, "vision_batch", lambda size, *key, make=batches.vision_batch: make(4, *key)
    )
    whole = train.train(tmp_path / "whole", TINY)

    calls = iter(range(100))

    def answer_loss(*arguments, honest=train.answer_loss):
        if next(calls) in (3, 5, 9):  # in the middle of a chunk, of two stages
            raise Killed
        return honest(*arguments)

    seen = iter(range(100))

    def vision_loss(*arguments, honest=train.vision_loss):
        if next(seen) == 3:
            raise Killed
        return honest(*arguments)

    monkeypatch.setattr(train, "answer_loss", answer_loss)
    monkeypatch.setattr(train, "vision_loss", vision_loss)
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
            name.split(".")[1] if name.startswith("model.") else name.split(".")[0]
            for name, parameter in model.named_parameters()
            if train.trainable(model, stage) is not None and parameter.requires_grad
        }
        for stage in train.STAGES
    }
    assert names["vision"] == {"vision_tower"}
    assert names["language"] == {"language_model", "lm_head"}
    assert names["projector"] == {"multi_modal_projector"}
    # LLaVA keeps its vision encoder frozen in both of its stages, and so does every one of these.
    assert all("vision_tower" not in names[name] for name in names if name != "vision")
    assert names["mixed"] == {"multi_modal_projector", "language_model", "lm_head"}


def test_the_shipped_log_is_of_the_stages_in_order():
    log = resources.files("vlmkit.models.pebble") / "training_log.csv"
    rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["stage", "step", "seconds", "loss", "patches", *train.ALL_KINDS]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == [s.name for s in train.STAGES]
    last = {row["stage"]: row for row in rows}
    assert all(0 <= float(right) <= 1 for right in list(last["final"].values())[4:] if right)
