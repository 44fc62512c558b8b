"""Photographs, handwriting and easy-VQA as tasks: what is read, what is refused, and why."""

import io
import json
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

import vlmkit as vk
from vlmkit import tasks
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.errors import TaskError
from vlmkit.tasks import real
from vlmkit.tasks.real import DIGITS, THINGS, read_photographs

GRAY = {thing: 20 * i for i, thing in enumerate(THINGS)}
"""Each thing has a shade of its own, so that pictures can be told apart after reading."""


def picture(thing, size=(32, 32)):
    return Image.new("RGB", size, (GRAY[thing],) * 3)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two training photographs and one test photograph of each thing."""
    for split, n in (("train", 2), ("test", 1)):
        for thing in THINGS:
            (tmp_path / split / thing).mkdir(parents=True)
            for i in range(n):
                picture(thing).save(tmp_path / split / thing / f"{i}.png")
    return tmp_path


def shades(source, split="train", **options):
    """{thing: the pictures' shades}, read from a source."""
    pictures, labels = read_photographs(source, split, **options)
    assert pictures.shape[1:] == (32, 32, 3)
    assert (pictures.dtype, labels.dtype) == (np.uint8, np.int64)
    found = {thing: [] for thing in THINGS}
    for one, label in zip(pictures, labels, strict=True):
        found[THINGS[label]].append(int(one[16, 16, 0]))
    return found


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_for_each_thing(folder):
    assert shades(folder) == {thing: [GRAY[thing]] * 2 for thing in THINGS}
    assert shades(str(folder), "test") == {thing: [GRAY[thing]] for thing in THINGS}


def test_other_names_and_what_systems_leave_in_folders(folder):
    train = folder / "train"
    (train / "car").rename(train / "Automobile")
    (train / "airplane").rename(train / "AEROPLANE")
    (train / ".ipynb_checkpoints").mkdir()
    (train / "readme.txt").write_text("about these photographs")
    (train / "cat" / "list.csv").write_text("0.png")
    (train / "cat" / "._0.png").write_bytes(b"not a picture")
    (train / "cat" / "0.png").rename(train / "cat" / "0.PNG")
    assert shades(folder) == {thing: [GRAY[thing]] * 2 for thing in THINGS}


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"this is no picture",
    "cut.png": png(Image.effect_noise((64, 64), 50))[:900],
    "long.png": png(Image.new("L", (2000, 2))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_or_left_out(folder, name):
    (folder / "train" / "cat" / name).write_bytes(BROKEN[name])
    with pytest.raises(TaskError, match=f"1 of 21 pictures.*{name}.*skip_broken"):
        read_photographs(folder)
    assert shades(folder, skip_broken=True)["cat"] == [GRAY["cat"]] * 2
    with pytest.raises(TaskError, match=name):
        tasks.photographs(folder, n=3, split="train")
    assert len(tasks.photographs(folder, n=20, split="train", skip_broken=True)) == 20


def test_many_broken_files_make_a_short_message(folder):
    for i in range(200):
        (folder / "train" / "cat" / f"broken{i}.png").write_bytes(b"")
    with pytest.raises(TaskError, match="200 of 220") as caught:
        read_photographs(folder)
    assert len(str(caught.value)) < 1200


def test_all_ten_things_are_needed(folder):
    for file in (folder / "train" / "cat").iterdir():
        file.write_bytes(b"")
    (folder / "train" / "dog").rename(folder / "train" / ".dog")
    with pytest.raises(TaskError, match="no photographs of cat, dog for 'train'"):
        read_photographs(folder, skip_broken=True)


def test_an_unknown_thing(folder):
    (folder / "train" / "cats").mkdir()
    with pytest.raises(TaskError, match="'cats' is none of the ten things. Did you mean 'cat'?"):
        read_photographs(folder)


def test_sources_that_are_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    empty = tmp_path / "empty"
    empty.mkdir()
    file = tmp_path / "file.png"
    file.write_bytes(b"")
    for source, words in (
        (empty, "neither a folder 'train' nor parquet"),
        (file, "is not a folder"),
        (tmp_path / "gone", "is not a folder"),
        ("~/nobody/has/this/folder", "is not a folder"),
        ("photos", "the hub it cannot be read.*no network"),
    ):
        with pytest.raises(TaskError, match=words):
            read_photographs(source)


def no_network(*arguments, **options):
    raise ConnectionError("no network")


def test_an_empty_split(folder):
    for thing in (folder / "test").iterdir():
        (thing / "0.png").unlink()
    with pytest.raises(TaskError, match="no photographs of airplane, car, .* for 'test'"):
        read_photographs(folder, "test")


# --- pictures of all kinds ------------------------------------------------------------------------


def test_the_middle_square_of_other_sizes(folder):
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste((0, 0, 0), (100, 0, 200, 100))
    file = folder / "train" / "cat" / "1.png"
    for image in (wide, wide.rotate(90, expand=True)):
        image.save(file)
        pictures, _ = read_photographs(folder)
        assert sorted(p.max() for p in pictures)[0] == 0
    for size in ((1, 1), (5, 3), (32, 33), (1000, 700)):
        picture("cat", size).save(file)
        assert shades(folder)["cat"] == [GRAY["cat"]] * 2


def transparent():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    return image


def palette_with_transparency():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = 0
    return image


MODES = {
    "gray": (Image.new("L", (32, 32), 77), 77),
    "gray and transparent": (Image.new("LA", (32, 32), (77, 0)), 255),
    "transparent": (transparent(), 255),
    "palette": (Image.new("RGB", (32, 32), (77, 77, 77)).quantize(2), 77),
    "palette and transparent": (palette_with_transparency(), 255),
    "black and white": (Image.new("1", (32, 32), 1), 255),
    "16 bits": (Image.fromarray(np.full((32, 32), 77 * 257, np.uint16)), 77),
}


@pytest.mark.parametrize("name", MODES)
def test_pictures_of_other_modes(folder, name):
    image, shade = MODES[name]
    image.save(folder / "train" / "cat" / "1.png")
    assert shades(folder)["cat"] == [GRAY["cat"], shade]


def test_other_formats_and_animations(folder):
    frames = [Image.new("L", (32, 32), shade) for shade in (60, 200)]
    cat = folder / "train" / "cat"
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        frames[0].save(cat / name, save_all=True, append_images=frames[1:], lossless=True)
        assert shades(folder)["cat"] == [GRAY["cat"], GRAY["cat"], 60]
        (cat / name).unlink()


def test_a_camera_that_was_turned(folder):
    image = Image.new("L", (32, 32), 0)
    image.paste(255, (0, 0, 32, 16))  # the upper half is bright
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(folder / "train" / "cat" / "1.png", exif=exif)
    pictures, labels = read_photographs(folder)
    turned = pictures[labels == THINGS.index("cat")][1]
    assert turned[:16].max() == 0
    assert turned[16:].min() == 255


# --- parquet --------------------------------------------------------------------------------------


def write(file, column="img", label="label", labels=range(10), pictures=None, names=None):
    """A parquet file as the hub has them, with one column that nobody needs."""
    import pyarrow
    from pyarrow import parquet

    labels = list(labels)
    if pictures is None:
        pictures = [{"bytes": png(picture(thing)), "path": f"{thing}.png"} for thing in THINGS]
    table = pyarrow.table({"id": [*range(len(labels))], column: pictures, label: labels})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, file)


ONE_OF_EACH = {thing: [GRAY[thing]] for thing in THINGS}


def test_parquet_files(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet")
    write(tmp_path / "train-00001-of-00002.parquet", column="image", labels=THINGS)
    write(tmp_path / "test.parquet", pictures=[png(picture(thing)) for thing in THINGS])
    assert shades(tmp_path) == {thing: [GRAY[thing]] * 2 for thing in THINGS}
    assert shades(tmp_path, "test") == ONE_OF_EACH


def test_numbers_mean_what_the_file_says(tmp_path):
    names = ["automobile" if thing == "car" else thing for thing in sorted(THINGS)]
    labels = [sorted(THINGS).index(thing) for thing in THINGS]
    write(tmp_path / "train.parquet", labels=labels, names=names)
    assert shades(tmp_path) == ONE_OF_EACH


@pytest.mark.parametrize("label", [10, -1, 2.5, None, True, "zebra"])
def test_labels_that_are_none(tmp_path, label):
    labels = [label] * 10
    write(tmp_path / "train.parquet", labels=labels)
    with pytest.raises(TaskError, match=r"train.parquet, row 0: .* is none of the ten things"):
        read_photographs(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_broken_rows(tmp_path, content):
    pictures = [{"bytes": png(picture(thing)), "path": None} for thing in THINGS]
    pictures.append({"bytes": content, "path": None})
    write(tmp_path / "train.parquet", labels=[*range(10), 3], pictures=pictures)
    with pytest.raises(TaskError, match=r"1 of 11 pictures.*train.parquet, row 10"):
        read_photographs(tmp_path)
    assert shades(tmp_path, skip_broken=True) == ONE_OF_EACH


def test_rows_that_are_no_pictures_at_all(tmp_path):
    write(tmp_path / "train.parquet", pictures=[f"{thing}.png" for thing in THINGS])
    with pytest.raises(TaskError, match="10 of 10 pictures"):
        read_photographs(tmp_path)


def test_parquet_files_of_another_form(tmp_path):
    file = tmp_path / "train.parquet"
    write(file, column="photo")
    with pytest.raises(TaskError, match=r"columns id, photo, label\. A column img or image"):
        read_photographs(tmp_path)
    write(file, label="fine_label")
    with pytest.raises(TaskError, match="columns id, img, fine_label"):
        read_photographs(tmp_path)
    write(file, labels=[], pictures=[])
    with pytest.raises(TaskError, match="no photographs of airplane"):
        read_photographs(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TaskError, match="cannot be read as parquet"):
        read_photographs(tmp_path)


# --- the hub --------------------------------------------------------------------------------------


def hub(monkeypatch, pictures, labels, label=None):
    features = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=[*THINGS])}
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "label": labels}, features=datasets.Features(features)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)


def test_a_data_set_on_the_hub(monkeypatch):
    stored = [{"bytes": png(picture(thing)), "path": None} for thing in THINGS]
    hub(monkeypatch, stored, [*range(10)])
    assert shades("somebody/photographs") == ONE_OF_EACH
    hub(monkeypatch, stored, [*range(10)], datasets.Value("int64"))
    assert shades("somebody/photographs") == ONE_OF_EACH
    hub(monkeypatch, stored, [*THINGS], datasets.Value("string"))
    assert shades("somebody/photographs") == ONE_OF_EACH
    hub(monkeypatch, [*stored, {"bytes": b"?", "path": None}], [*range(10), 0])
    with pytest.raises(TaskError, match="1 of 11 pictures.*somebody/photographs, row 10"):
        read_photographs("somebody/photographs")
    assert shades("somebody/photographs", skip_broken=True) == ONE_OF_EACH


def test_a_data_set_of_another_form(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a cat"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    with pytest.raises(TaskError, match="has the columns text"):
        read_photographs("somebody/texts")


# --- the three as tasks ---------------------------------------------------------------------------


@pytest.fixture(params=["photographs", "handwriting", "easy_vqa"])
def make(request, folder):
    """A function of (n, seed, split) that gives rows."""
    if request.param == "photographs":
        return lambda **options: tasks.photographs(folder, **options)
    if request.param == "easy_vqa":
        pytest.importorskip("easy_vqa")
    return getattr(tasks, request.param)


def content(rows):
    return [(row["question"], row["answer"], row["images"][0].tobytes()) for row in rows]


def test_rows_are_like_those_of_other_tasks(make):
    rows, others = make(n=5), tasks.dataset(n=1)
    assert rows.features == others.features
    assert len(rows) == 5
    assert all(len(row["images"]) == 1 and row["images"][0].mode == "RGB" for row in rows)


def test_the_same_seed_gives_the_same_rows(make):
    assert content(make(n=8, seed=3)) == content(make(n=8, seed=3))
    assert content(make(n=8, seed=3))[:4] == content(make(n=4, seed=3))
    assert content(make(n=8, seed=3)) != content(make(n=8, seed=4))


@pytest.mark.parametrize("split", ["test", "Train", "eval", None])
def test_splits_that_are_none(make, split):
    with pytest.raises(TaskError, match="is not a split"):
        make(n=1, split=split)


@pytest.mark.parametrize("n", [0, -1, True, 2.0, None, 10**7])
def test_numbers_of_rows(make, n):
    with pytest.raises(TaskError, match="n, the number of rows, must be from 1 to"):
        make(n=n)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None])
def test_seeds(make, seed):
    with pytest.raises(TaskError, match="seed must be"):
        make(n=1, seed=seed)


@pytest.mark.parametrize("read", [real.read_digits, real.read_easy_vqa, read_photographs])
def test_halves_that_are_none(read, folder):
    source = (folder,) if read is read_photographs else ()
    with pytest.raises(TaskError, match="'evaluation' is not a half"):
        read(*source, split="evaluation")


def test_training_and_evaluation_share_no_handwriting():
    train, test = (real.read_digits(split) for split in ("train", "test"))
    assert (len(train[0]), len(test[0])) == (1200, 597)
    seen = {picture.tobytes() for picture in train[0]}
    assert not seen & {picture.tobytes() for picture in test[0]}
    rows = tasks.handwriting(n=597)
    assert sorted(row["answer"] for row in rows) == sorted(DIGITS[i] for i in test[1])
    assert len(set(content(rows))) == 597


def test_every_question_of_easy_vqa_is_about_its_picture():
    easy_vqa = pytest.importorskip("easy_vqa")
    pictures, questions = real.read_easy_vqa("test")
    asked, answers, owners = easy_vqa.get_test_questions()
    assert pictures.shape == (1000, 64, 64, 3)
    assert sum(map(len, questions)) == len(asked) == 9673
    for i in (0, 1, 5000, 9672):
        assert [asked[i], answers[i]] in questions[owners[i]]


@pytest.mark.parametrize(
    ("package", "module", "read"),
    [
        ("scikit-learn", "sklearn.datasets", tasks.handwriting),
        ("easy-vqa", "easy_vqa", tasks.easy_vqa),
    ],
)
def test_a_package_is_missing(package, module, read, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TaskError, match=f"pip install {package}$") as caught:
        read(n=1)
    assert "\n" not in str(caught.value)


# --- asked ----------------------------------------------------------------------------------------

MODELS = ["pebble"]
if BUNDLED["cobble"].is_current:
    MODELS.append("cobble")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_asked_about_handwriting(name, one_thread):
    model, processor = vk.load(name)
    rows = tasks.handwriting(n=20)
    result = vk.evaluate(model, processor, rows)
    assert result.n == 20
    assert list(result.answers["answer"]) == list(rows["answer"])
    assert list(result.by_kind.index) == [("handwriting", "digit")]
    assert name == "pebble" or result.accuracy > 0.8
