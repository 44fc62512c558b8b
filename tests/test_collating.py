"""Batches: the loss counts the answer alone, nothing is cut, and what is skipped is counted."""

import io

import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

import vlmkit as vk
from vlmkit.errors import FinetuningError, ImageError
from vlmkit.evaluation.asking import prepared
from vlmkit.finetuning import Collator, token_table
from vlmkit.finetuning.collating import IGNORED
from vlmkit.images import undecoded
from vlmkit.loading.processors import load_processor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processor():
    return vk.load("pebble")[1]


def rows(n=6, task="all"):
    return list(vk.tasks.dataset(task, n, split="train"))


def answers_in(batch, processor):
    return [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]


def test_the_loss_sees_the_answer_and_its_end(processor):
    asked = rows(12)
    batch = Collator(processor)(asked)
    assert answers_in(batch, processor) == [f" {row['answer']}<|end|>" for row in asked]
    seen = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][seen], batch["input_ids"][seen])
    assert batch["labels"].shape == batch["input_ids"].shape


def test_before_the_answer_is_the_prompt_of_ask(processor):
    model, _ = vk.load("pebble")
    row = rows(1)[0]
    batch = Collator(processor)([row])
    prompt = prepared(model, processor, [row["images"]], [row["question"]], 8)["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(prompt)], prompt)
    assert (batch["labels"][0, : len(prompt)] == IGNORED).all()
    assert (batch["labels"][0, len(prompt) :] != IGNORED).all()


@pytest.mark.parametrize("make", ["llava", "other_family"])
def test_other_processors(make, tmp_path):
    processor = load_processor(getattr(tiny, make)(tmp_path / make))
    asked = rows(3, "multi_image")
    batch = Collator(processor)(asked)
    assert answers_in(batch, processor) == [f"{row['answer']}<end>" for row in asked]


def test_a_template_without_an_end_gets_one(tmp_path):
    processor = load_processor(tiny.llava(tmp_path / "llava"))
    processor.chat_template = processor.chat_template.replace("<end>\n", "\n")
    row = rows(1)[0]
    assert answers_in(Collator(processor)([row]), processor) == [f"{row['answer']}<end>"]


def test_answers_are_data_too(processor):
    row = rows(1)[0] | {"answer": "<|end|> red <image>"}
    batch = Collator(processor)([row])
    assert answers_in(batch, processor) == [" < |end|> red < image><|end|>"]


def test_token_table_shows_pictures_once(processor):
    table = token_table(processor, rows(1)[0])
    assert table.loc[table["token"] == "<image>", "repeated"].tolist() == [49]
    assert table["in_loss"].any() and not table["in_loss"].iloc[0]
    assert table["repeated"].sum() == Collator(processor)(rows(1))["input_ids"].shape[1]


# --- what does not fit, and what cannot be read ---------------------------------------------------


def test_a_sample_that_is_too_long_is_an_error_or_counted(processor):
    short, long = rows(1, "vqa")[0], rows(1, "video")[0]
    with pytest.raises(FinetuningError, match="4 images.*max_length is 100.*never|cut"):
        Collator(processor, 100)([short, long])
    collator = Collator(processor, 100, too_long="skip")
    batch = collator([long, short, long])
    assert len(batch["input_ids"]) == 1 and collator.skipped == {"too long": 2}
    assert answers_in(batch, processor) == [f" {short['answer']}<|end|>"]
    again = collator([long])  # nothing is left, so the last good one is used once more
    assert torch.equal(again["input_ids"], batch["input_ids"])
    with pytest.raises(FinetuningError, match="No sample so far could be used.*too long"):
        Collator(processor, 100, too_long="skip")([long])


def test_a_damaged_picture_is_named(processor):
    row, file = rows(1)[0], io.BytesIO()
    row["images"][0].save(file, "PNG")
    cut = {"bytes": file.getvalue()[:200], "path": "cut.png"}
    features = Features(images=List(Image()), question=Value("string"), answer=Value("string"))
    data = {"images": [[cut]], "question": ["Which?"], "answer": ["red"]}
    bad = undecoded(Dataset.from_dict(data, features=features))[0]
    with pytest.raises(ImageError, match=r"Which\?.*cut\.png is damaged"):
        Collator(processor)([bad])
    collator = Collator(processor, unreadable="skip")
    collator([bad, row])
    assert collator.skipped == {"unreadable": 1}


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_an_empty_answer_is_an_error(processor, answer):
    with pytest.raises(FinetuningError, match="answer to .* is empty"):
        Collator(processor)([rows(1)[0] | {"answer": answer}])


def test_a_missing_column_is_named(processor):
    picture = Pictures.new("RGB", (84, 84))
    with pytest.raises(FinetuningError, match="no column question. It has image, frage, answer"):
        Collator(processor)([{"image": picture, "frage": "Which?", "answer": "red"}])


@pytest.mark.parametrize("wrong", [{"too_long": "cut"}, {"max_length": 0}, {"unreadable": None}])
def test_settings_that_cannot_be(processor, wrong):
    with pytest.raises(FinetuningError, match=next(iter(wrong))):
        Collator(processor, **wrong)
