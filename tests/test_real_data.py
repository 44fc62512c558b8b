"""Published data: small files in each schema, written here and read without a network."""

import io
import json
import pickle
import re
import warnings
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import vlmkit as vk
from vlmkit.errors import ImageError, TaskError
from vlmkit.evaluation import OF_TASK
from vlmkit.images import read_all
from vlmkit.tasks import SCHEMAS, from_dataset
from vlmkit.tasks.published import opening
from vlmkit.tasks.published.reading import Pictures
from vlmkit.tasks.published.schemas import find

COLORS = [(200, 10 * i, 30) for i in range(6)]


def picture(i=0):
    return Image.new("RGB", (12 + i, 8), COLORS[i])


def png(i=0):
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


# Rows as in the cards and readers of the data sets, without columns that vlmkit does not read.
TEN = ["down"] * 7 + ["table", "at table", "skateboard"]
ROWS = {
    "vqav2": {
        "question": "Where is he looking?",
        "multiple_choice_answer": "down",
        "question_type": "none of the above",
        "answers": [
            {"answer": text, "answer_confidence": "yes", "answer_id": i + 1}
            for i, text in enumerate(TEN)
        ],
        "image_id": 262148,
        "answer_type": "other",
        "question_id": 262148000,
    },
    "textvqa": {
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "question": "what is the brand of this camera?",
        "image_classes": ["Camera"],
        "flickr_original_url": "https://example.org/o.jpg",
        "answers": ["dakota", "Dakota"] + ["dakota digital"] * 5 + ["nous les gosses"] * 3,
        "set_name": "val",
    },
    "docvqa": {
        "questionId": "49153",
        "question": "What is the name of the company?",
        "question_types": ["layout", "form"],
        "docId": 14465,
        "ucsf_document_id": "pybv0228",
        "answers": ["itc limited", "ITC Limited"],
        "data_split": "val",
    },
    "chartqa": {
        "query": "How many food items are shown?",
        "label": ["14"],
        "human_or_machine": 0,
    },
    "gqa": {
        "id": "201307251",
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is not overcast.",
        "isBalanced": True,
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
    },
    "aokvqa": {
        "question_id": "22jbM6gDxdaMaunuzgrsBB",
        "question": "What is in the motorcyclist's mouth?",
        "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": str(["cigarette"] * 9 + ["smoke"]),
        "difficult_direct_answer": False,
        "rationales": ["He's smoking while riding."],
    },
    "the_cauldron": {
        "texts": [
            {"user": "What is shown?\nAnswer briefly.", "assistant": "A dog.", "source": "VQAv2"},
            {"user": "Is it red?", "assistant": "Yes.", "source": "VQAv2"},
        ],
    },
    "plain": {"question": "What color is it?", "answer": "red"},
}
EXPECTED = {  # schema: its rows as (answer, kind, answers)
    "vqav2": [("down", "other", TEN)],
    "textvqa": [("dakota digital", "all", ROWS["textvqa"]["answers"])],
    "docvqa": [("itc limited", "layout + form", ["itc limited", "ITC Limited"])],
    "chartqa": [("14", "human", ["14"])],
    "gqa": [("no", "verify", ["no"])],
    "aokvqa": [("cigarette", "direct", ["cigarette"] * 9 + ["smoke"])],
    "the_cauldron": [("A dog.", "VQAv2", ["A dog."]), ("Yes.", "VQAv2", ["Yes."])],
    "plain": [("red", "all", ["red"])],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """datasets keeps files that it has read as Arrow files: here, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def data(schema, n=3):
    """A `datasets.Dataset` in a schema, with its pictures embedded."""
    feature, cells = datasets.Image(), [picture(i) for i in range(n)]
    if schema == "the_cauldron":
        feature, cells = datasets.List(feature), [[picture(i), picture(i + 1)] for i in range(n)]
    column, rows = column_of(schema), [ROWS[schema]]
    features = datasets.Features(datasets.Dataset.from_list(rows).features | {column: feature})
    rows = [{**ROWS[schema], column: cell} for cell in cells]
    return datasets.Dataset.from_list(rows, features=features)


def column_of(schema):
    return "images" if schema == "the_cauldron" else "image"


def json_lines(folder, schema, n=3):
    (folder / "pictures").mkdir(parents=True)
    paths = [f"pictures/{i}.png" for i in range(n + 1)]
    for i, path in enumerate(paths):
        picture(i).save(folder / path)
    cells = [paths[i : i + 2] if schema == "the_cauldron" else paths[i] for i in range(n)]
    rows = [json.dumps({**ROWS[schema], column_of(schema): cell}) for cell in cells]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def parquet(folder, schema, n=3):
    folder.mkdir()
    data(schema, n).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def saved(folder, schema):
    data(schema).save_to_disk(folder)
    return folder


def memory(folder, schema):
    return data(schema)


def check(rows, schema, n=3):
    """The rows of `n` source rows are what the schema means, each with its pictures."""
    rows, expected = list(rows), EXPECTED[schema]
    asked = [t["user"] for t in ROWS[schema].get("texts", ())] or [
        ROWS[schema].get("question", ROWS[schema].get("query"))
    ]
    assert len(rows) == n * len(expected)
    for number, row in enumerate(rows):
        i, turn = divmod(number, len(expected))
        answer, kind, answers = expected[turn]
        assert (row["question"], row["answer"], row["task"], row["kind"]) == (
            *(asked[turn], answer, schema, kind),
        )
        assert list(row["answers"]) == answers
        shown = [i, i + 1] if schema == "the_cauldron" else [i]
        assert [image.tobytes() for image in row["images"]] == [picture(j).tobytes() for j in shown]
        assert all(image.mode == "RGB" for image in row["images"])


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [json_lines, parquet, saved, memory])
def test_every_schema_from_every_place(schema, write, streaming, tmp_path):
    source = write(tmp_path / "data", schema)
    rows = from_dataset(source, streaming=streaming)
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    assert isinstance(rows, kind)
    check(rows, schema)
    check(from_dataset(source, schema, streaming=streaming), schema)


def test_a_folder_of_files_by_split(tmp_path):
    for split, n in (("train", 2), ("validation", 3)):
        for part in range(2):
            name = f"{split}-0000{part}-of-00002.parquet"
            data("chartqa", n).to_parquet(tmp_path / name)
    (tmp_path / "info.json").write_text("{}")  # describes the files and holds no rows
    assert len(from_dataset(tmp_path, split="train")) == 4
    assert len(from_dataset(str(tmp_path), split="validation")) == 6
    with pytest.raises(TaskError, match="several splits.*train, validation"):
        from_dataset(tmp_path)
    with pytest.raises(TaskError, match="no split 'test'"):
        from_dataset(tmp_path, split="test")
    assert len(from_dataset(tmp_path / "train-00000-of-00002.parquet")) == 2
    with pytest.raises(TaskError, match="no split 'validation'"):
        from_dataset(tmp_path / "train-00000-of-00002.parquet", split="validation")
    assert len(from_dataset(parquet(tmp_path / "own", "gqa"), split="validation")) == 3


def test_several_splits_in_a_dictionary(tmp_path):
    both = datasets.DatasetDict(train=data("gqa", 2), test=data("gqa", 3))
    both.save_to_disk(tmp_path / "both")
    for source in (both, tmp_path / "both"):
        check(from_dataset(source, split="test"), "gqa", 3)
        with pytest.raises(TaskError, match="train, test"):
            from_dataset(source)


def test_gqa_with_its_pictures_apart():
    questions = data("gqa").remove_columns("image").add_column("imageId", ["b", "a", "b"])
    pictures = datasets.Dataset.from_dict(
        {"id": ["a", "b"], "image": [picture(0), picture(1)]},
        features=datasets.Features(id=datasets.Value("string"), image=datasets.Image()),
    )
    for source in (questions, questions.to_iterable_dataset()):
        rows = list(from_dataset(source, images=pictures))
        assert [row["images"][0].size for row in rows] == [(13, 8), (12, 8), (13, 8)]
        assert {row["task"] for row in rows} == {"gqa"}
        with pytest.raises(TaskError, match="imageId.*images="):
            from_dataset(source)
        with pytest.raises(ImageError, match="Row 0 of the dataset: there is no image b"):
            list(from_dataset(source, images=pictures.select([0])))
        with pytest.raises(TaskError, match="no column id\\."):
            from_dataset(source, images=pictures.remove_columns("id"))


def test_gqa_on_the_hub_takes_its_pictures_from_the_subset_beside(monkeypatch):
    questions = data("gqa", 1).remove_columns("image").add_column("imageId", ["a"])
    subsets = {
        "testdev_balanced_instructions": questions,
        "testdev_balanced_images": datasets.Dataset.from_dict({"id": ["a"], "image": [png(2)]}),
    }
    calls = []

    def load(path, name, *, split, streaming, **loading):
        calls.append((path, split, streaming, loading))
        return subsets[name]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = from_dataset(
        "lmms-lab/GQA", name="testdev_balanced_instructions", split="testdev", revision="main"
    )
    assert rows[0]["images"][0].size == (14, 8)
    assert calls == [("lmms-lab/GQA", "testdev", False, {"revision": "main"})] * 2


def test_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for options in ({"split": "validation"}, {}, {"split": "validation", "streaming": True}):
        with pytest.raises(TaskError, match="lmms-lab/VQAv2 could not be opened.*network"):
            from_dataset("lmms-lab/VQAv2", **options)


def test_no_schema_recognizes_the_rows_of_another():
    """Whatever the order of the columns."""
    for name, row in ROWS.items():
        for columns in ([*row, column_of(name)], [column_of(name), *reversed(row)]):
            assert find(columns).name == name


def test_pictures_are_read_only_when_asked_for(tmp_path):
    source = json_lines(tmp_path / "data", "plain")
    rows = from_dataset(source)
    for path in (tmp_path / "data" / "pictures").iterdir():
        path.unlink()
    assert list(rows.select_columns("answer")["answer"]) == ["red"] * 3 and len(rows) == 3
    with pytest.raises(ImageError, match="Row 1 of .*rows.jsonl: There is no file .*1.png"):
        rows[1]


def widths(rows):
    return [row["images"][0].width for row in rows]


def test_the_result_is_a_dataset_like_any_other():
    rows = from_dataset(data("vqav2", 5))
    assert rows.column_names == ["images", "question", "answer", "task", "kind", "answers"]
    assert widths(rows.select([4, 1])) == [16, 13]
    parts = rows.train_test_split(2, seed=0)
    assert sorted(widths(parts["train"]) + widths(parts["test"])) == [12, 13, 14, 15, 16]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=2, collate_fn=list)
    assert [w for batch in loader for w in widths(batch)] == [12, 13, 14, 15, 16]
    assert widths(pickle.loads(pickle.dumps(rows))) == [12, 13, 14, 15, 16]


@pytest.mark.parametrize("streaming", [False, True])
def test_limit(streaming):
    source = data("the_cauldron")
    rows = from_dataset(source.to_iterable_dataset() if streaming else source, limit=3)
    assert [row["answer"] for row in rows] == ["A dog.", "Yes.", "A dog."]


# --- what goes wrong ------------------------------------------------------------------------------


def faulty():
    """Rows 1, 3, 4 and 5 cannot be used; row 2 has one turn of two that can."""
    image = datasets.Image(decode=False)
    turn = ROWS["the_cauldron"]["texts"]
    cells = [png(0), None, png(2), png(3)[:-30], b"no picture", b""]
    texts = [turn, turn, [turn[0], {**turn[1], "assistant": " "}], turn, turn, turn]
    return datasets.Dataset.from_dict(
        {
            "images": [[None if cell is None else {"bytes": cell, "path": None}] for cell in cells],
            "texts": texts,
        }
    ).cast_column("images", datasets.List(image))


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_rows_are_skipped_and_counted(streaming):
    source, skipped = faulty(), []
    if streaming:
        rows = from_dataset(source.to_iterable_dataset(), on_error="skip", skipped=skipped)
        rows = list(rows)
    else:
        with pytest.warns(UserWarning, match="the dataset: skipped 5 rows, the first is row 1"):
            rows = from_dataset(source, on_error="skip", skipped=skipped)
    assert [row["answer"] for row in rows] == ["A dog.", "Yes.", "A dog."]
    assert [row["images"][0].width for row in rows] == [12, 12, 14]
    assert [number for number, _ in skipped] == [1, 2, 3, 4, 5]
    reasons = dict(skipped)
    assert "no picture" in reasons[1] and "answer is empty" in reasons[2]
    assert "damaged" in reasons[3] and "not an image" in reasons[4] and "0 bytes" in reasons[5]


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_rows_are_named(streaming):
    def given(source):
        return from_dataset(source.to_iterable_dataset() if streaming else source)

    with pytest.raises(TaskError, match="Row 2 of the dataset: the answer is empty"):
        list(given(faulty().select([0, 0, 2])))
    with pytest.raises(ImageError, match="Row 1 of the dataset: there is no picture"):
        list(given(faulty().select([0, 1])))
    with pytest.raises(ImageError, match="Row 1 of the dataset: .*damaged"):
        list(given(faulty().select([0, 3])))
    test_split = data("vqav2", 1).map(lambda row: {"multiple_choice_answer": None, "answers": None})
    with pytest.raises(TaskError, match="Row 0 .*answer is empty.*Test splits"):
        list(given(test_split))
    odd = data("vqav2", 1).remove_columns("answers").add_column("answers", [["down"]])
    with pytest.raises(TaskError, match="Row 0 .*does not match the schema vqav2"):
        list(given(odd))
    with pytest.raises(TaskError, match="Row 0 .*asks no question"):
        list(given(faulty().select([0]).map(lambda row: {"texts": []})))


@pytest.mark.filterwarnings("ignore:the dataset. skipped 1")
@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_can_be_left_to_a_collator(streaming, tmp_path):
    source = faulty()
    rows = from_dataset(
        source.to_iterable_dataset() if streaming else source, on_error="skip", decode=False
    )
    readable = []
    for row in rows:
        try:
            readable.append(len(read_all(row["images"])) == 1)
        except ImageError:
            readable.append(False)
    # Each row has two turns, the third row only one. The first and the third row have a picture.
    assert readable == [True] * 2 + [False] * 2 + [True] + [False] * 6
    (row,) = from_dataset(json_lines(tmp_path / "data", "plain", 1), decode=False)
    assert row["images"] == [str(tmp_path / "data" / "pictures" / "0.png")]


def test_nothing_left(tmp_path):
    with pytest.raises(TaskError, match="no row that can be used. row 0: there is no picture"):
        from_dataset(faulty().select([1]), on_error="skip")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TaskError, match="empty.jsonl"):
        from_dataset(tmp_path / "empty.jsonl")


def test_columns_of_no_schema():
    with pytest.raises(TaskError, match="questionId.*The nearest is") as caught:
        from_dataset(data("docvqa").remove_columns("answers"))
    assert all(str(schema) in str(caught.value) for schema in SCHEMAS.values())
    bare = data("textvqa").select_columns(["image", "question", "answers"])
    with pytest.raises(TaskError, match="They fit docvqa and textvqa.*schema='docvqa'"):
        from_dataset(bare)
    assert from_dataset(bare, "textvqa")[0]["task"] == "textvqa"
    with pytest.raises(TaskError, match="'chartqa' needs a column query and a column label, and"):
        from_dataset(bare, "chartqa")
    with pytest.raises(TaskError, match="a column image or images"):
        from_dataset(bare.remove_columns("image"), "textvqa")
    with pytest.raises(TaskError, match="'VQA2' is not a schema. Did you mean 'vqav2'"):
        from_dataset(bare, "VQA2")


def test_sources_that_cannot_be_opened(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"question": ')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, says in {
        "broken.jsonl": "cannot be read as json",
        "broken.parquet": "cannot be read as parquet",
        "notes.txt": "is no file of .parquet, .jsonl",
        "saved": "The saved dataset .* cannot be read",
        "empty": "holds no file of",
        "nowhere.jsonl": "There is no file or folder",
    }.items():
        with pytest.raises(TaskError, match=says):
            from_dataset(tmp_path / name)
    with pytest.raises(TaskError, match="owner/name"):
        from_dataset("vqav2")
    with pytest.raises(TaskError, match="this is a dict"):
        from_dataset({"question": "?"})


def test_options(tmp_path):
    for options, says in (
        ({"limit": 0}, "limit"),
        ({"limit": 1.5}, "limit"),
        ({"prompt": "Briefly:"}, "{question}"),
        ({"split": "test"}, "already one split"),
        ({"on_error": "ignore"}, "'raise' or 'skip'"),
        ({"skipped": []}, "skipped"),
        ({"skipped": {}, "on_error": "skip"}, "skipped"),
    ):
        with pytest.raises(TaskError, match=says):
            from_dataset(data("plain"), **options)


def test_splits_are_told_from_names():
    names = {
        "data/train-00000-of-00004.parquet": ["train"],
        "val/part.parquet": ["val"],
        "vqa_test.jsonl": ["test"],
        "testdev-0.parquet": ["testdev"],
        "latest.parquet": [],
        "training.jsonl": [],
    }
    assert {name: opening._SPLITS.findall(name) for name in names} == names


def test_your_own_rows_keep_their_task_and_numbers_become_text():
    rows = datasets.Dataset.from_list(
        [{"question": "How many?", "answer": 3, "task": "counting", "kind": "few"}]
    ).add_column("image", [png()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = from_dataset(rows)
    assert (row["answer"], row["task"], row["kind"]) == ("3", "counting", "few")
    assert np.array_equal(row["images"][0], picture())


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def replies(monkeypatch):
    """replies(text): from now on, this is the answer of every model."""

    def set_to(text):
        monkeypatch.setattr(
            "vlmkit.evaluation.answers",
            lambda model, processor, images, questions, **rest: [text] * len(questions),
        )

    monkeypatch.setattr("vlmkit.evaluation.check_processor", lambda processor: None)
    return set_to


def test_evaluation_reads_every_picture_once(monkeypatch, replies):
    read, original = [], Pictures.__getitem__
    monkeypatch.setattr(
        Pictures, "__getitem__", lambda self, number: read.append(number) or original(self, number)
    )
    replies("no")
    rows = from_dataset(data("gqa", 4))
    assert vk.evaluate(None, None, rows, max_new_tokens=8).accuracy == 1
    assert sorted(read) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("schema", "reply", "expected"),
    [
        ("vqav2", "at table", 0.3),
        ("textvqa", "nous les gosses", 0.9),
        ("docvqa", "itc limitid", 10 / 11),
        ("chartqa", "14.5", 1.0),
        ("gqa", "No.", 1.0),
        ("aokvqa", "smoke", 1 / 3),
        ("the_cauldron", "a dog", 0.5),
        ("plain", "blue", 0.0),
    ],
)
def test_evaluation_scores_each_schema_by_its_own_metric(schema, reply, expected, replies):
    replies(reply)
    rows = from_dataset(data(schema, 2))
    scores = vk.evaluate(None, None, rows, max_new_tokens=8)
    assert scores.accuracy == pytest.approx(expected)
    assert list(scores.by_task.index) == [schema]
    exact = vk.evaluate(None, None, rows, max_new_tokens=8, metric="exact_match")
    assert set(exact.answers["correct"]) <= {True, False} and "score" not in exact.answers
    stream = from_dataset(data(schema, 2).to_iterable_dataset())
    again = vk.evaluate(None, None, list(stream.take(4)), max_new_tokens=8)
    assert again.accuracy == scores.accuracy


# --- docs/data.md ---------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs_on_files_of_your_own(tmp_path, monkeypatch):
    """All blocks but the one about the hub, in order, on the two lines of JSON of the page."""
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in (1, 2):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "questions.jsonl").write_text(shown)
    mine = [{"img": "pictures/1.png", "q": "What color is the car?", "a": "red"}]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    (tmp_path / "exported").mkdir()
    data("chartqa", 2).to_parquet(tmp_path / "exported" / "validation-00000.parquet")
    data("chartqa", 2).to_parquet(tmp_path / "exported" / "train-00000.parquet")
    data("docvqa", 2).save_to_disk(tmp_path / "saved")
    opened = data("plain").rename_column("answer", "caption")
    names = {"opened": opened, "vk": vk}
    for block in BLOCKS:
        if "lmms-lab" not in block:
            exec(block, names)
    assert [len(row["images"]) for row in names["rows"]] == [1, 2] and names["skipped"] == []
    assert (
        names["rows"][1]["question"]
        == "Same car?\nAnswer the question using a single word or phrase."
    )


def test_the_pages_lines_for_the_hub(monkeypatch):
    """With the rows of this file in place of the hub: each line has the schema that it says."""
    (block,) = (block for block in BLOCKS if "lmms-lab" in block)
    lines = [line.split("  # ") for line in block.splitlines()]
    assert {schema for _, schema in lines} == set(SCHEMAS) - {"plain"}
    for line, schema in lines:

        def load(path, name, *, split, streaming, schema=schema):
            rows = data(schema, 2)
            return rows.to_iterable_dataset() if streaming else rows

        monkeypatch.setattr(datasets, "load_dataset", load)
        rows = eval(line, {"vk": vk})
        check(rows, schema, 2)


def test_the_page_says_which_columns_and_which_metric():
    for name, schema in SCHEMAS.items():
        (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", PAGE, re.MULTILINE)
        needs, *_, metric = (cell.strip() for cell in row.split("|"))
        for column in schema.needs:
            assert column in needs.split(", ")
        assert metric == f"`{OF_TASK.get(name, 'exact_match')}`"
