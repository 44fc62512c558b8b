"""The recipes: the same bytes everywhere, right answers, and no row in both splits."""

import hashlib
import re

import datasets
import pytest

from vlmkit import tasks
from vlmkit.errors import TaskError
from vlmkit.tasks import domains
from vlmkit.tasks.drawing import COLORS, SHAPES

# SHA-256 over every pixel, question and answer of the first 24 rows of each task for seed 7. The
# pictures are integer arithmetic, so this holds on any machine. To change them is to change pebble.
DIGESTS = {
    "caption": "8e5c144d4abec3fd",
    "vqa": "d9cb3edffc5cfd6f",
    "ocr": "ab22f0797c00c8a9",
    "chart": "fe34d0f26e30e574",
    "multi_image": "f842dafed7bcc7f8",
    "video": "eff4dcf990578c23",
    "clock": "0733c4e83d25a586",
    "dutch": "e7c4047dfe3ba636",
    "dutch_throughout": "03aa61bc6dc524c1",
}
EVERY = tasks.RECIPES | tasks.DOMAINS

NAME = re.compile(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")


def digest(task, indices, seed=7):
    result = {}
    for index in indices:
        row = tasks.example(task, index, seed=seed)
        content = b"".join(image.tobytes() for image in row["images"])
        content += f"{row['question']}|{row['answer']}|{row['kind']}".encode()
        result[index] = hashlib.sha256(content).hexdigest()
    return hashlib.sha256("".join(result[i] for i in sorted(result)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("task", EVERY)
def test_same_seed_same_bytes_in_any_order(task):
    forwards, backwards = digest(task, range(24)), digest(task, reversed(range(24)))
    assert forwards == backwards == DIGESTS[task]
    assert digest(task, range(24), seed=8) != forwards


def test_dataset_has_image_features_and_rows_independent_of_n():
    small = tasks.dataset("video", n=3, seed=1)
    large = tasks.dataset("video", n=9, seed=1)
    assert isinstance(small.features["images"].feature, datasets.Image)
    assert small.column_names == ["images", "question", "answer", "task", "kind"]
    assert small[2]["question"] == large[2]["question"]
    assert [f.tobytes() for f in small[2]["images"]] == [f.tobytes() for f in large[2]["images"]]
    assert [frame.size for frame in small[0]["images"]] == [(tasks.SIZE, tasks.SIZE)] * 4


def test_all_alternates_between_the_tasks():
    rows = tasks.dataset("all", n=12, seed=0)
    assert rows["task"] == [*tasks.TASKS, *tasks.TASKS]
    assert set(tasks.dataset(["ocr", "chart"], n=4, seed=0)["task"]) == {"ocr", "chart"}


def test_domains_that_pebble_never_saw_are_asked_by_name_alone():
    """Neither pebble's batches nor the text of its tokenizer go through them."""
    assert set(tasks.DOMAINS) == {"clock", "dutch", "dutch_throughout"}
    assert not set(tasks.DOMAINS) & (set(tasks.TASKS) | set(tasks.RECIPES))
    assert set(tasks.dataset(["clock", "dutch"], n=8, seed=0)["task"]) == {"clock", "dutch"}


def test_the_splits_share_no_seed():
    """The split is part of what seeds a row, so no number given as a seed can make them meet."""
    rows = {}
    for split in tasks.SPLITS:
        for seed in range(4):
            for index in range(20):
                row = tasks.example("video", index, seed=seed, split=split)
                rows.setdefault(split, set()).add(row["images"][0].tobytes())
    assert not rows["train"] & rows["evaluation"]


@pytest.mark.parametrize(
    ("task", "kind"), [(task, kind) for task, kinds in tasks.KINDS.items() for kind in kinds]
)
def test_every_kind_has_four_phrasings_and_no_answer_that_wins_by_itself(task, kind):
    recipe = EVERY[task]
    phrasings, answers = set(), []
    named = "|".join([*COLORS, *SHAPES, "left of", "right of", "above", "below"])
    for index in range(400):
        _, question, answer = recipe.example(kind, tasks.generator("test", task, kind, index))
        phrasings.add(re.sub(rf"\b(an?\s)?({named})\b", "_", question))
        answers.append(answer)
    assert len(phrasings) >= 4
    assert max(answers.count(answer) for answer in set(answers)) <= 0.6 * len(answers)
    assert all(answer == answer.strip() and answer for answer in answers)


@pytest.mark.parametrize(
    "kind", ["color", "shape", "spatial", "value", "which", "moving", "word", "time"]
)
def test_some_honest_answers_are_none(kind):
    task = next(task for task, kinds in tasks.KINDS.items() if kind in kinds)
    recipe = EVERY[task]
    asked = [recipe.example(kind, tasks.generator("none", kind, i)) for i in range(300)]
    assert 0.02 < sum(answer == tasks.NONE for _, _, answer in asked) / 300 < 0.5


def test_answers_agree_with_the_drawing():
    """Recomputed from the facts by other means than the recipes use."""
    for index in range(300):
        rng = tasks.generator("facts", index)
        picture, question, answer = tasks.RECIPES["vqa"].example("exist", rng)
        color, shape = NAME.search(question).groups()
        shown = any(mark.color == color and mark.what == shape for mark in picture.marks[0])
        assert (answer == "yes") == shown
        picture, question, answer = tasks.RECIPES["chart"].example("value", rng)
        color = next(word for word in COLORS if re.search(rf"\b{word}\b", question))
        bars = {mark.color: str(mark.value) for mark in picture.marks[0]}
        assert answer == bars.get(color, tasks.NONE)
        picture, question, answer = tasks.RECIPES["ocr"].example("code", rng)
        assert answer in ("".join(mark.what for mark in picture.marks[0]), tasks.NONE)
        picture, question, answer = tasks.RECIPES["video"].example("direction", rng)
        name = NAME.search(question).groups()
        path = [(m.x, m.y) for marks in picture.marks for m in marks if (m.color, m.what) == name]
        (x0, y0), (x1, y1) = path[0], path[-1]
        way = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up", (0, 0): "none"}
        assert answer == way[((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))]


@pytest.mark.parametrize("kind", tasks.KINDS["vqa"])
def test_dutch_is_vqa_in_other_words(kind):
    """Each phrasing is translated as a whole, with the article and the ending of its nouns."""
    key, translated = ("dutch", kind), {}
    for index in range(200):
        made = [
            EVERY[task].example(kind, tasks.generator(*key, index))
            for task in ("vqa", "dutch", "dutch_throughout")
        ]
        (_, english, answer), (_, unchanged, said), (_, asked, again) = made
        assert english == unchanged and said == again
        assert (said == answer) == answer.isdigit()
        assert translated.setdefault(english, asked) == asked and asked == asked.upper()
        for article, color, noun in re.findall(r"(DE|HET|EEN) (ROOD|RODE|GEEL|GELE) (\w+)", asked):
            neuter = noun in ("VIERKANT", "KRUIS", "VOORWERP")
            assert article == "EEN" or (article == "HET") == neuter, asked
            assert color.endswith("E") == (not neuter or article == "HET"), asked
    named = "|".join([*COLORS, *SHAPES, *domains.RELATIONS])
    phrasings = {re.sub(rf"\b(an?\s)?({named})\b", "_", english) for english in translated}
    openings = {asked.split()[0] + asked.split()[1] for asked in translated.values()}
    assert len(phrasings) >= 4 and len(openings) >= 3


@pytest.mark.parametrize(
    ("kind", "slots", "asked"),
    [
        (
            "spatial",
            {"first": "red cross", "relation": "left of", "second": "blue ring"},
            "LIGT HET RODE KRUIS LINKS VAN DE BLAUWE RING?",
        ),
        ("exist", {"thing": "a red cross"}, "IS ER EEN ROOD KRUIS?"),
        ("exist", {"thing": "an orange circle"}, "IS ER EEN ORANJE CIRKEL?"),
        ("color", {"name": "square"}, "WELKE KLEUR HEEFT HET VIERKANT?"),
        ("shape", {"name": "blue object"}, "WELKE VORM HEEFT HET BLAUWE VOORWERP?"),
        ("count_color", {"color": "purple"}, "HOEVEEL PAARSE VOORWERPEN ZIJN ER?"),
    ],
)
def test_dutch_in_full(kind, slots, asked):
    texts = {slot: domains._slot_in_dutch(slot, text) for slot, text in slots.items()}
    assert domains.PHRASINGS[kind][0].format(**texts) == asked
    assert list(map(domains.answer_in_dutch, ("circle", "red", "no", "3"))) == [
        *("CIRKEL", "ROOD", "NEE", "3")
    ]


def test_a_clock_shows_its_time():
    """Read from its pixels. There are 144 times; noon is 12, not 0."""
    texts = [domains.clock_text((hour, 5 * fives)) for hour in range(12) for fives in range(12)]
    assert len(set(texts)) == 144 and {"1200", "0105", "1155"} < set(texts)
    assert domains.TURN == 144 and domains.direction(36) == (1024, 0) == domains.direction(180)
    for index in range(60):
        picture = tasks.DOMAINS["clock"].draw(tasks.generator("hands", index))
        if picture.facts is None:
            continue
        assert domains.clock_text(picture.facts) == read_off(picture.frames[0])


def read_off(pixels):
    """The time that a clock shows, read from its pixels alone."""
    ys, xs = (pixels != pixels[0, 0]).any(axis=2).nonzero()
    x, y = (xs.min() + xs.max()) // 2, (ys.min() + ys.max()) // 2
    radius = ys.max() - y
    ink = (pixels == pixels[y, x]).all(axis=2)

    def drawn(part, near, far):
        dx, dy = domains.direction(part)
        steps = range(near, far)
        return all(ink[y + round(dy * s / 1024), x + round(dx * s / 1024)] for s in steps)

    (minute,) = (5 * m for m in range(12) if drawn(12 * m, radius * 6 // 10, radius - 9))
    hands = [h for h in range(12) if drawn(12 * h + minute // 5, 3, radius // 2)]
    if len(hands) > 1:  # one of them is the minute hand
        hands = [h for h in hands if abs(12 * h + minute // 5 - 12 * (minute // 5)) % 144 > 5]
    return domains.clock_text((hands[0], minute))


def test_everything_drawn_is_visible():
    """No mark is off the picture, and the pixel at the heart of a shape is not the background's."""
    for index in range(200):
        for task in ("vqa", "multi_image", "video"):
            picture = tasks.RECIPES[task].draw(tasks.generator("visible", index))
            for frame, marks in zip(picture.frames, picture.marks, strict=True):
                for mark in marks:
                    assert 0 <= mark.x < tasks.SIZE and 0 <= mark.y < tasks.SIZE
                    if mark.what != "ring":
                        assert (frame[mark.y, mark.x] != frame[0, 0]).any()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"task": "vqaa"}, "'vqa'"),
        ({"task": []}, "no task"),
        ({"split": "test"}, "evaluation"),
        ({"n": 0}, "positive"),
        ({"n": 2.5}, "positive"),
    ],
)
def test_bad_input_says_what_there_is(arguments, says):
    with pytest.raises(TaskError, match=says):
        tasks.dataset(**({"task": "vqa", "n": 2} | arguments))
