"""Rows as people keep them: every layout becomes one form, when asked, when trained, and back."""

import base64
import datetime
import io
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import tiny
from PIL import Image
from processors import PROCESSORS

import vlmkit as vk
from vlmkit.cli.training import train as cli_train
from vlmkit.errors import FinetuningError, ImageError, TaskError
from vlmkit.finetuning import Collator, token_table
from vlmkit.finetuning.collating import IGNORED, check_rows
from vlmkit.loading.processors import load_processor
from vlmkit.tasks import from_dataset, to_messages

pytestmark = pytest.mark.usefixtures("one_thread")

SYSTEM = {"role": "system", "content": "Be brief."}
YES = {"role": "assistant", "content": "yes"}
ASKED = [
    ("system", "Be brief."),
    ("user", "Is this", "<1>", "red?"),
    ("assistant", "yes"),
    ("user", "Sure?"),
    ("assistant", "no"),
]
TURNS = [
    SYSTEM,
    {"role": "user", "content": ["Is this", {"type": "image"}, "red?"]},
    YES,
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in (1, 2):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path


def picture(i=1):
    return Image.new("RGB", (10 + i, 8), (200, 20 * i, 0))


def png(i=1):
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def lines(path, *rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def said(row):
    """A row's conversation as tuples, with <number> where a picture is, by its width."""
    pictures = iter(row["images"])
    turns = row.get("messages") or [
        {
            "role": "user",
            "content": [{"type": "image"} for _ in row["images"]]
            + [{"type": "text", "text": row["question"]}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
    ]
    return [
        (
            turn["role"],
            *(
                f"<{next(pictures).width - 10}>"
                if part["type"] == "image"
                else part["text"].strip()
                for part in turn["content"]
            ),
        )
        for turn in turns
    ]


ONE = [("user", "<1>", "Which?"), ("assistant", "red")]
TEXT = [("user", "Which?"), ("assistant", "red")]
RED = {"role": "assistant", "content": "red"}
FILE = "pictures/1.png"
LAYOUTS = {
    "messages with texts": (
        {"messages": [{"role": "user", "content": "Which?"}, RED], "images": [FILE]},
        ONE,
    ),
    "messages with parts": ({"messages": TURNS, "images": [FILE]}, ASKED),
    "one picture in image": ({"messages": TURNS, "image": FILE}, ASKED),
    "pictures inside": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": FILE}, "Which?"]},
                RED,
            ]
        },
        ONE,
    ),
    "an address inside": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {
                                "url": "data:image/png;base64," + base64.b64encode(png()).decode()
                            },
                        },
                        {"type": "text", "text": "Which?"},
                    ],
                },
                RED,
            ]
        },
        ONE,
    ),
    "numbered parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "index": 1}, {"type": "image", "index": 0}, "?"],
                },
                RED,
            ],
            "images": [FILE, "pictures/2.png"],
        },
        [("user", "<2>", "<1>", "?"), ("assistant", "red")],
    ),
    "<image> in messages": (
        {
            "messages": [{"role": "user", "content": "Compare <image> and <image>."}, RED],
            "images": [FILE, "pictures/2.png"],
        },
        [("user", "Compare", "<1>", "and", "<2>", "."), ("assistant", "red")],
    ),
    "text alone": (
        {"messages": [{"role": "user", "content": "Which?"}, RED], "images": None},
        TEXT,
    ),
    "prompt and completion": ({"prompt": "Which?", "completion": "red", "images": [FILE]}, ONE),
    "prompt and completion of messages": (
        {"prompt": TURNS[:4], "completion": TURNS[4:], "images": [FILE]},
        ASKED,
    ),
    "LLaVA": (
        {
            "id": "7",
            "image": FILE,
            "conversations": [
                {"from": "human", "value": "<image>\nWhich?"},
                {"from": "gpt", "value": "red"},
            ],
        },
        ONE,
    ),
    "LLaVA, the picture last": (
        {
            "image": FILE,
            "conversations": [
                {"from": "human", "value": "Which?\n<image>"},
                {"from": "gpt", "value": "red"},
            ],
        },
        [("user", "Which?", "<1>"), ("assistant", "red")],
    ),
    "ShareGPT": (
        {
            "system": "Be brief.",
            "images": [FILE],
            "conversations": [
                {"from": "human", "value": "Is this <image> red?"},
                {"from": "gpt", "value": "yes"},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "no"},
            ],
        },
        ASKED,
    ),
    "plain": ({"image": FILE, "question": "Which?", "answer": "red"}, ONE),
    "plain with several": (
        {"images": [FILE, "pictures/2.png"], "question": "Which?", "answer": "red"},
        [("user", "<1>", "<2>", "Which?"), ("assistant", "red")],
    ),
    "plain with <image>": (
        {"images": [FILE], "question": "Is this <image> red?", "answer": "no"},
        [("user", "Is this", "<1>", "red?"), ("assistant", "no")],
    ),
    "plain without": ({"image": None, "question": "Which?", "answer": "red"}, TEXT),
    "plain with none": ({"images": [], "question": "Which?", "answer": "red"}, TEXT),
    "written on Windows": (
        {"image": "pictures\\1.png", "question": "Which?", "answer": "red"},
        ONE,
    ),
    "file_name": ({"file_name": FILE, "question": "Which?", "answer": "red"}, ONE),
    "two file names": (
        {
            "left_file_name": FILE,
            "right_file_name": "pictures/2.png",
            "question": "Which?",
            "answer": "red",
        },
        [("user", "<1>", "<2>", "Which?"), ("assistant", "red")],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_from_a_file_a_stream_a_list_and_in_the_collator(layout, folder, monkeypatch):
    row, expected = LAYOUTS[layout]
    source = lines(folder / "rows.jsonl", row)
    assert [said(one) for one in from_dataset(source)] == [expected]
    assert [said(one) for one in from_dataset(source, streaming=True)] == [expected]
    (folder / "rows.json").write_text(json.dumps([row, row], indent=1))
    assert [said(one) for one in from_dataset(folder / "rows.json")] == [expected] * 2
    monkeypatch.chdir(folder)
    (again,) = from_dataset([row])
    assert said(again) == expected
    processor = PROCESSORS["qwen2_5_vl"]()
    batches = [Collator(processor)([one]) for one in (row, again)]
    assert all(batches[0][name].equal(batches[1][name]) for name in batches[0])
    learnt = batches[0]["input_ids"][batches[0]["labels"] != IGNORED]
    answers = [turn[1] for turn in expected if turn[0] == "assistant"]
    assert processor.tokenizer.decode(learnt) == "".join(f"{a}<eos>" for a in answers)


def test_rows_of_several_layouts_in_one_file(folder):
    rows = [row for row, _ in LAYOUTS.values()]
    found = from_dataset(lines(folder / "rows.jsonl", *rows))
    assert [said(row) for row in found] == [expected for _, expected in LAYOUTS.values()]


def test_an_arrow_dataset_with_pictures_inside_its_messages(folder):
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    part["image"] = datasets.Image()
    features = datasets.Features(
        messages=datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    )
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "Which?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    rows = {"messages": [[{"role": "user", "content": content}, answer]]}
    opened = datasets.Dataset.from_dict(rows, features=features)
    opened.to_parquet(folder / "rows.parquet")
    for source in (opened, opened.to_iterable_dataset(), folder / "rows.parquet"):
        assert [said(row) for row in from_dataset(source)] == [ONE]
    learnt = Collator(PROCESSORS["llava"]())(list(opened))["labels"]
    assert (learnt != IGNORED).sum() == 4


def test_an_imagefolder_with_its_metadata(tmp_path):
    for split, i in (("train", 1), ("test", 2)):
        lines(
            tmp_path / "folder" / split / "metadata.jsonl",
            {"file_name": "same.png", "question": "Which?", "answer": "red"},
        )
        picture(i).save(tmp_path / "folder" / split / "same.png")
    (tmp_path / "folder" / "info.json").write_text('{"about": "this folder"}')
    assert said(from_dataset(tmp_path / "folder", split="train")[0]) == ONE
    (row,) = from_dataset(tmp_path / "folder", split="test", streaming=True)
    assert row["images"][0].width == 12
    source = lines(tmp_path / "one" / "metadata.jsonl", {"file_name": "1.png", "text": "a dog"})
    picture().save(source.parent / "1.png")
    (row,) = from_dataset(source.parent, prompt="What is it?")
    assert (row["question"], row["answer"]) == ("What is it?", "a dog")
    with pytest.raises(TaskError, match="Row 0 .*no question.*prompt="):
        from_dataset(source.parent)


def test_text_stands_as_it_does_in_the_file(tmp_path):
    written = ["3", "2.5", "2.50", "1e-3", "-0", "true", "false", "NaN", "-Infinity", "007"]
    texts = ['"2019-05-01"', '"12:30"', '"NaN"', '"null"', '" padded "', '"[1, 2]"']
    rows = [f'{{"question": "?", "answer": {one}}}' for one in [*written[:-1], '"007"', *texts]]
    source = lines(tmp_path / "rows.jsonl", *rows)
    expected = [*written, *(json.loads(text) for text in texts)]
    for options in ({}, {"streaming": True}):
        assert [row["answer"] for row in from_dataset(source, **options)] == expected
    csv = tmp_path / "rows.csv"
    table = "question,answer,image\n?,2019-05-01,\n?,2.50,\n?,NaN,\n"
    csv.write_text(table)
    (tmp_path / "rows.tsv").write_text(table.replace(",", "\t"))
    (tmp_path / "semicolons.csv").write_text(table.replace(",", ";"))
    for source in (csv, tmp_path / "rows.tsv", tmp_path / "semicolons.csv"):
        assert [row["answer"] for row in from_dataset(source)] == ["2019-05-01", "2.50", "NaN"]
    csv.write_bytes(table.encode("utf-16"))
    with pytest.raises(TaskError, match="UTF-8"):
        from_dataset(csv)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "question,answer\n?,red\n?,red, dark\n", "Row 1 .*' dark' has no column"),
        ("a.csv", 'question,answer\n?,"red\n?,blue\n', "cannot be read"),  # a quote stays open
        ("a.csv", "question,answer,answer\n?,red,blue\n", "the column answer twice"),
        (
            "a.jsonl",
            '{"question": "?", "answer": "a", "answer": "b"}',
            "Row 0 .*'answer' is .*twice",
        ),
    ],
)
def test_a_table_of_which_a_part_would_be_lost(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=says):
        from_dataset(tmp_path / name)
    (tmp_path / "b.csv").write_text('question,answer\n?,red,\n?,"red, dark"\n')
    assert [row["answer"] for row in from_dataset(tmp_path / "b.csv")] == ["red", "red, dark"]


def test_values_of_python_are_texts_too():
    day = datetime.datetime(2019, 5, 1)
    values = [day.date(), day, day.replace(hour=3), 3, 2.5, True, float("nan"), np.float32(0.5)]
    rows = from_dataset([{"question": "?", "answer": value} for value in values])
    expected = ["2019-05-01"] * 2 + ["2019-05-01T03:00:00", "3", "2.5", "true", "NaN", "0.5"]
    assert [row["answer"] for row in rows] == expected
    typed = datasets.Dataset.from_dict({"question": ["?"] * 2, "answer": [day.date()] * 2})
    assert [row["answer"] for row in from_dataset(typed)] == ["2019-05-01"] * 2


def test_pictures_of_every_kind(folder, monkeypatch):
    monkeypatch.chdir(folder)
    kinds = [
        FILE,
        folder / FILE,
        "pictures\\1.png",
        (folder / FILE).as_uri(),
        png(),
        {"bytes": png(), "path": None},
        {"bytes": None, "path": FILE},
        {"path": FILE},
        io.BytesIO(png()),
        picture(),
        np.asarray(picture()),
    ]
    with open(FILE, "rb") as file:
        for kind in [*kinds, file]:
            row = {"images": [kind, kind], "question": "Which?", "answer": "red"}
            for _ in range(2):  # an opened file is read from its beginning each time
                assert [image.size for image in from_dataset([row])[0]["images"]] == [(11, 8)] * 2
    with open("rows.txt", "w+") as file, pytest.raises(ImageError, match="rb"):
        vk.images.read(file)


BAD = {
    "no question": ({"question": " ", "answer": "red"}, "question is empty"),
    "no answer": ({"question": "?", "answer": None}, "answer .*is empty"),
    "an answer that is a list": ({"question": "?", "answer": ["red"]}, "is a list"),
    "a missing picture": ({"image": "9.png", "question": "?", "answer": "red"}, "no file"),
    "a missing picture inside": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "9.png"}, "?"]},
                RED,
            ]
        },
        "no file",
    ),
    "a folder": ({"image": "pictures", "question": "?", "answer": "red"}, "directory"),
    "too few pictures": (
        {"images": [FILE], "question": "<image><image>?", "answer": "red"},
        "1 picture and 2 places",
    ),
    "too many pictures": (
        {"images": [FILE, FILE], "messages": [{"role": "user", "content": "<image>?"}, RED]},
        "2 pictures and 1 place",
    ),
    "<image> and no picture": (
        {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]},
        "0 pictures and 1 place",
    ),
    "no messages": ({"messages": []}, "no messages"),
    "no dicts": ({"messages": ["hello"]}, "message 1 is no message"),
    "no user": ({"messages": [RED]}, "asks no question"),
    "no last answer": ({"messages": TURNS[:4], "images": [FILE]}, "not an answer"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}, RED]}, "role 'tool'"),
    "a call of a tool": (
        {"messages": [TURNS[3], {"role": "assistant", "tool_calls": [{"id": "1"}]}, RED]},
        "message 2 has tool_calls",
    ),
    "an answer without weight": (
        {"messages": [TURNS[3], {**RED, "weight": 0}, TURNS[3], RED]},
        "message 2 .*not to be learned",
    ),
    "an empty turn": ({"messages": [{"role": "user", "content": None}, RED]}, "message 1 .*empty"),
    "a video": (
        {"messages": [{"role": "user", "content": [{"type": "video"}, "?"]}, RED]},
        "type 'video'",
    ),
    "no such picture": (
        {
            "images": [FILE],
            "messages": [{"role": "user", "content": [{"type": "image", "index": 3}]}, RED],
        },
        "no picture number 3",
    ),
    "half a character": ({"question": "?", "answer": "\ud800"}, "half a character"),
    "no JSON": ('{"question": ', "cannot be read as json"),
    "no object": ('"a text"', "no object"),
    "null": ({"messages": None}, "messages: NoneType|no messages"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_cannot_be_used_is_named_or_skipped(kind, folder, monkeypatch):
    bad, says = BAD[kind]
    good = {"image": FILE, "question": "Which?", "answer": "red"}
    source = lines(folder / "rows.jsonl", good, good, bad, good)
    with pytest.raises((TaskError, ImageError), match=f"(?s)Row 2 of .*{says}"):
        from_dataset(source)
    with pytest.raises((TaskError, ImageError), match=f"(?s)Row 2 of .*{says}"):
        list(from_dataset(source, streaming=True))
    skipped = []
    with pytest.warns(UserWarning, match="skipped 1 rows, the first is row 2"):
        rows = from_dataset(source, on_error="skip", skipped=skipped)
    assert len(rows) == 3 and [number for number, _ in skipped] == [2]
    if isinstance(bad, dict):
        monkeypatch.chdir(folder)
        with pytest.raises((FinetuningError, ImageError), match=f"(?s)Row 2: .*{says}"):
            check_rows([good, good, bad])
        assert check_rows([good, good, bad], unreadable="skip") == 1
        collator = Collator(PROCESSORS["llava"](), unreadable="skip")
        assert len(collator([good, bad])["input_ids"]) == 1
        assert collator.skipped == {"unreadable": 1}


def test_training_finds_a_missing_picture_before_its_first_step(folder, tmp_path):
    model, processor = vk.load("pebble")
    model = vk.finetuning.add_adapters(model, projector="full")
    rows = [{"images": [picture()], "question": "Which?", "answer": "red"}] * 5
    rows.append({"images": [str(folder / "9.png")], "question": "Which?", "answer": "red"})
    with pytest.raises(ImageError, match=r"^Row 5: .*9\.png"):
        vk.finetuning.train(model, processor, rows, tmp_path / "run", max_steps=1)
    with pytest.raises(ImageError, match=r"eval_dataset: Row 1: .*9\.png"):
        vk.finetuning.train(model, processor, rows[:4], tmp_path / "run", eval_dataset=rows[4:])
    for nothing in ([], 5, [{"question": "Which?"}]):
        with pytest.raises(TaskError, match=r"eval_dataset: "):
            vk.finetuning.train(model, processor, rows[:4], tmp_path, eval_dataset=nothing)
    assert not (tmp_path / "run").exists()


def test_vlmkit_train_finds_a_missing_picture_before_it_loads_the_model(folder, monkeypatch):
    good = {"image": FILE, "question": "Which?", "answer": "red"}
    source = lines(folder / "rows.jsonl", *[good] * 3, good | {"image": "9.png"})
    said = f"data: {{source: {source}}}\ntrain: {{projector: full}}\noutput: {folder / 'out'}\n"
    (folder / "train.yaml").write_text(said)
    monkeypatch.setattr(vk, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ImageError, match=r"Row 3: .*9\.png"):
        cli_train(folder / "train.yaml")


def test_vlmkit_train_reads_messages_and_says_what_it_skips(folder, capsys):
    good = {"messages": TURNS, "images": [FILE]}
    source = lines(folder / "rows.jsonl", good, good, good | {"images": ["9.png"]})
    (folder / "train.yaml").write_text(
        f"data: {{source: {source}}}\ntrain: {{projector: full}}\noutput: {folder / 'out'}\n"
        "settings: {max_steps: 2, per_device_train_batch_size: 2, unreadable: skip}\n"
    )
    cli_train(folder / "train.yaml")
    assert "skipping   1 of 3 rows" in capsys.readouterr().out
    assert "unreadable" in (folder / "out" / "summary.md").read_text()


def test_an_answer_of_100_000_words_is_refused(tmp_path):
    model, processor = vk.load("pebble")
    model = vk.finetuning.add_adapters(model, projector="full")
    rows = [{"images": [picture()], "question": "Which?", "answer": "word " * 100_000}]
    with pytest.raises(FinetuningError, match="the model's context"):
        vk.finetuning.train(model, processor, rows, tmp_path / "run", max_steps=1)


def test_training_on_messages(tmp_path):
    model, processor = vk.load("pebble")
    model = vk.finetuning.add_adapters(model, projector="full")
    rows = [{"messages": TURNS, "images": [picture()]}, {"messages": TURNS[3:], "images": None}] * 4
    run = vk.finetuning.train(model, processor, rows, tmp_path / "run", max_steps=2)
    assert len(run.curve) == 2 and run.curve["loss"].notna().all() and run.skipped == {}


def test_token_table_shows_what_is_learnt():
    table = token_table(vk.load("pebble")[1], {"messages": TURNS, "images": [picture()]})
    learnt = table[table["in_loss"]]["token"].tolist()
    assert "".join(learnt) == " yes<|end|> no<|end|>"
    assert table.loc[table["token"] == "<image>", "repeated"].tolist() == [49]


@pytest.mark.parametrize("family", sorted(set(PROCESSORS) - {"paligemma", "blip2"}))
def test_every_answer_is_learnt_in_every_family(family):
    """Answers before, between and after pictures, one of them a letter of the end token."""
    turns = [
        *TURNS[:3],
        {"role": "user", "content": [{"type": "image"}, "Sure?"]},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "Is this <image>?"},
        {"role": "assistant", "content": "yes"},
    ]
    rows = [
        {"messages": turns, "images": [picture(1), picture(2), picture(1)]},
        {"question": "Which?", "answer": "red", "images": [picture()]},
        {"question": "Which?", "answer": "none", "images": None},
    ]
    processor = PROCESSORS[family]()
    batch = Collator(processor)(rows)
    learnt = [
        ids[labels != IGNORED]
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert [processor.tokenizer.decode(ids) for ids in learnt] == [
        "yes<eos>e<eos>yes<eos>",
        "red<eos>",
        "none<eos>",
    ]


@pytest.mark.parametrize("family", ["paligemma", "blip2"])
def test_a_family_that_needs_a_picture_says_so(family):
    """A batch of text alone was a ValueError of its processor."""
    row = {"question": "Which?", "answer": "red"}
    processor, says = PROCESSORS[family](), "(one image for each|no question without)"
    mixed = [row | {"images": [picture()]}, row]
    for rows in ([row], [row | {"images": []}] * 2, mixed):
        with pytest.raises(ImageError, match=rf"'Which\?': .*{says}"):
            Collator(processor)(rows)
    with pytest.raises(ImageError, match=rf"Row 1: .*{says}"):
        check_rows(mixed, processor)
    collator = Collator(processor, unreadable="skip")
    assert len(collator(mixed)["labels"]) == 1 and collator.skipped == {"unreadable": 1}


def test_a_conversation_is_asked_after_the_turns_before(monkeypatch):
    asked = []
    original = vk.evaluation.answers

    def spy(model, processor, images, questions, **rest):
        asked.extend(questions)
        return original(model, processor, images, questions, **rest)

    monkeypatch.setattr("vlmkit.evaluation.answers", spy)
    rows = from_dataset([{"messages": TURNS, "images": [picture()]}])
    assert vk.evaluate(*vk.load("pebble"), rows).n == 1
    (turns,) = asked
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]


# --- the way back ---------------------------------------------------------------------------------


def test_messages_are_written_and_read_again(folder, monkeypatch):
    monkeypatch.chdir(folder)
    rows = from_dataset([row for row, _ in LAYOUTS.values()])
    written = to_messages(rows)
    assert written.column_names == ["images", "messages"]
    for one in written:  # the rules of TRL: a part for each picture, and no picture inside
        parts = [part for turn in one["messages"] for part in turn["content"]]
        assert [part["type"] for part in parts].count("image") == len(one["images"])
        assert all(set(part) == {"type", "text"} for part in parts)
    written.to_parquet(folder / "out.parquet")
    again = from_dataset(folder / "out.parquet")
    assert [said(row) for row in again] == [expected for _, expected in LAYOUTS.values()]
    drawn = vk.tasks.dataset("multi_image", 2)
    assert [said(r)[1] for r in from_dataset(to_messages(drawn))] == [
        ("assistant", row["answer"]) for row in drawn
    ]


TRL = "trl==1.16.0"
READS = """
import json, sys, datasets
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
rows = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train")
collator = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(sys.argv[2]))
print(json.dumps(collator(list(rows))["input_ids"].tolist()))
"""


@pytest.mark.slow
def test_trl_reads_what_is_written(tmp_path):
    """TRL is installed in a folder of its own, from the package index."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    if subprocess.run([*install, tmp_path / "trl", TRL], capture_output=True).returncode:
        pytest.skip(f"the package index has no {TRL}")
    rows = [
        {"messages": TURNS, "images": [picture()]},
        {"question": "Which?", "answer": "none", "images": None},
    ]
    to_messages(rows).to_parquet(tmp_path / "out.parquet")
    folder = tiny.llava(tmp_path / "llava")
    paths = os.pathsep.join([str(tmp_path / "trl"), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", READS, tmp_path / "out.parquet", folder],
        env={**os.environ, "PYTHONPATH": paths, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(found.stdout.splitlines()[-1])
    batch = Collator(load_processor(folder))(rows)
    for ids, mask, other in zip(batch["input_ids"], batch["attention_mask"], theirs, strict=True):
        ids = ids[mask.bool()].tolist()
        assert other[: len(ids)] == ids
