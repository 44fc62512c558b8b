"""Controls change the pictures, and only them."""

import numpy as np
import pytest
from PIL import Image

import vlmkit as vk
from vlmkit.errors import TaskError

controls = vk.course.controls


def gray(level, size=(4, 3)):
    return Image.new("RGB", size, (level,) * 3)


def row(*levels, answer="yes", kind="a"):
    images = [gray(level) for level in levels]
    return {"images": images, "question": "?", "answer": answer, "task": "t", "kind": kind}


def levels(rows):
    return [[image.getpixel((0, 0))[0] for image in row["images"]] for row in rows]


def test_a_blank_has_the_size_of_its_picture_and_one_gray():
    rows = [row(1, 2)]
    (made,) = controls.blank(rows, level=77)
    assert levels([made]) == [[77, 77]] and made["images"][0].size == (4, 3)
    assert {**made, "images": None} == {**rows[0], "images": None}
    assert levels(rows) == [[1, 2]]  # as they were


def test_pictures_are_exchanged_within_a_kind():
    rows = [row(1), row(10, kind="b"), row(2), row(20, kind="b"), row(3, answer="no")]
    made = controls.exchanged(rows)
    assert levels(made) == [[2], [20], [3], [10], [1]]
    assert [r["answer"] for r in made] == [r["answer"] for r in rows]


def test_pictures_are_exchanged_between_rows_with_the_same_number():
    rows = [row(1), row(5, 6), row(2), row(7, 8)]
    assert levels(controls.exchanged(rows)) == [[2], [7, 8], [1], [5, 6]]
    with pytest.raises(TaskError, match="only one row of t/b"):
        controls.exchanged([row(1), row(2), row(3, kind="b")])


def test_rows_need_neither_task_nor_kind():
    rows = [{"images": [gray(n)], "question": "?", "answer": str(n)} for n in (1, 2)]
    assert levels(controls.exchanged(rows)) == [[2], [1]]
    assert controls.most_frequent(rows).accuracy == 0.5


def test_an_order_can_leave_out_and_repeat_pictures_and_change_the_answer():
    rows = [row(1, 2, 3, answer="left"), row(4, 5, 6, answer="none")]
    made = controls.arranged(rows, [2, 2, 0], {"left": "right"})
    assert levels(made) == [[3, 3, 1], [6, 6, 4]]
    assert [r["answer"] for r in made] == ["right", "none"]
    for order in ([0, 3], [-1]):
        with pytest.raises(TaskError, match="Row 0 has 3 pictures"):
            controls.arranged(rows, order)


def test_blank_pictures_before_and_after():
    assert levels(controls.among([row(1, 2)], before=1, after=2)) == [[128, 1, 2, 128, 128]]


def test_the_most_frequent_answer_of_each_kind():
    rows = [row(1, answer=a) for a in ("x", "x", "y")] + [row(1, answer="y", kind="b")]
    scores = controls.most_frequent(rows)
    assert scores.answers["predicted"].tolist() == ["x", "x", "x", "y"]
    assert scores.accuracy == 0.75


def test_a_dataset_is_taken_as_it_is():
    rows = vk.tasks.dataset("video", n=4, seed=1)
    (first, *_) = controls.arranged(rows, [3, 2, 1, 0])
    assert np.array_equal(first["images"][0], rows[0]["images"][3])


def test_questions_about_other_pictures():
    made = controls.about([row(1), row(2)], [row(7), row(8), row(9)], "nothing")
    assert levels(made) == [[7], [8]] and {r["answer"] for r in made} == {"nothing"}


def changed(before, after):
    """The columns of the picture in which a pixel has changed."""
    pictures = (np.asarray(r["images"][0]).astype(int) for r in (before, after))
    return set((np.subtract(*pictures) != 0).any(axis=(0, 2)).nonzero()[0])


def test_a_bar_is_painted_over_and_nothing_else():
    as_it_is, asked, another = (controls.charts(40, hide) for hide in (None, "asked", "another"))
    for one, two, three in zip(as_it_is, asked, another, strict=True):
        assert one["question"] == two["question"] == three["question"]
        assert one["answer"] == three["answer"] != "none" == two["answer"]
        of_two, of_three = changed(one, two), changed(one, three)
        assert of_two and of_three and not of_two & of_three  # each its own bar
        for columns in (of_two, of_three):  # one bar: columns side by side
            assert max(columns) - min(columns) == len(columns) - 1 <= 16
        left = np.asarray(two["images"][0])[6:78, min(of_two)]
        assert (left == np.asarray(two["images"][0])[6:78, 9]).all()  # grid lines go on


def test_a_sign_is_on_its_quarter_of_the_page():
    for page in controls.pages(12, seed=3):
        pixels = np.asarray(page["images"][0])
        assert pixels.shape == (168, 168, 3)
        quarters = pixels.reshape(2, 84, 2, 84, 3).swapaxes(1, 2).reshape(4, -1, 3)
        drawn = [len(np.unique(quarter, axis=0)) > 1 for quarter in quarters]
        assert drawn == [place == page["quarter"] for place in range(4)]


def test_signs_and_crowds_have_what_was_asked_for():
    assert all(len(r["answer"]) == 6 for r in controls.signs(5, 6))
    assert {r["answer"] for r in controls.crowds(5, 7)} == {"7"}
    with pytest.raises(TaskError, match="1 to 6 letters, not 7"):
        controls.signs(1, 7)
    with pytest.raises(TaskError, match="0 to 9 objects, not 10"):
        controls.crowds(1, 10)
