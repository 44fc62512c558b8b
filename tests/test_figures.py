"""The figures draw the data that they get."""

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt
from PIL import Image

import vlmkit as vk
from vlmkit import figures
from vlmkit.evaluation import Scores, wilson

LLAMA = "meta-llama/Llama-3.2-11B-Vision-Instruct"


@pytest.fixture(autouse=True)
def closed():
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


class Has:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def rows():
    one, two = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    return [
        {"images": [one], "question": "What color is it?", "answer": "red"},
        {"images": [one, two], "question": "Same color?", "answer": "no"},
    ]


def texts(of):
    return [text.get_text() for text in of]


def stacked(ax):
    """{label of a color: (left, width) of its bars, from top to bottom}."""
    return {b.get_label(): [(bar.get_x(), bar.get_width()) for bar in b] for b in ax.containers}


def dots(ax, shapes):
    """The lines of one point, and not those that only the legend shows."""
    return [line for line in ax.lines if line.get_marker() in shapes and len(line.get_xdata())]


def interval(bars, point):
    return bars.lines[2][0].get_segments()[point][:, 1]


# --- pictures -------------------------------------------------------------------------------------


def test_questions_show_each_picture_with_its_caption():
    ax = figures.questions(rows())
    drawn = [np.asarray(image.get_array())[0, 0, :3].tolist() for image in ax.images]
    assert drawn == [[255, 0, 0], [255, 0, 0], [0, 0, 255]]
    assert texts(ax.texts) == ["What color is it?\n→ red", "Same color?\n→ no"]
    first, second, third = (image.get_extent()[:2] for image in ax.images)
    assert first[1] < second[0] < second[1] <= third[0]
    assert first[0] < ax.texts[0].get_position()[0] < first[1]
    assert second[0] < ax.texts[1].get_position()[0] < third[1]
    ax = figures.questions(rows(), answers=["green", "yes"])
    assert [text.rpartition(" ")[2] for text in texts(ax.texts)] == ["green", "yes"]
    with pytest.raises(ValueError):
        figures.questions(rows(), answers=["green"])


def test_questions_are_on_several_lines_and_keep_the_shape_of_a_picture():
    wide = {"images": [Image.new("RGB", (8, 4))], "question": "$5 " * 99, "answer": "$"}
    ax = figures.questions([*rows(), wide], across=2)
    tops = [image.get_extent()[2] for image in ax.images]
    assert tops[0] == 0 > tops[1] == tops[2] > tops[3]
    left, right, bottom, top = ax.images[3].get_extent()
    assert (right - left) / (top - bottom) == pytest.approx(2, rel=0.05)
    assert ax.texts[2].get_text().count("\n") == 3  # three lines of the question, and the answer
    assert ax.get_ylim() == (tops[3], 1)
    ax.figure.canvas.draw()  # a dollar sign is no formula


def test_mistakes_are_the_wrong_answers_with_the_expected_ones():
    asked = [dict(row, task="a", kind="b") for row in rows() * 3]
    scores = vk.evaluation.scored(asked, ["red", "no", "blue", "no", "red", "yes"])
    ax = figures.mistakes(asked, scores)
    assert [text.rpartition("→ ")[2] for text in texts(ax.texts)] == [
        "blue (expected: red)",
        "yes (expected: no)",
    ]
    assert len(ax.images) == 3 and ax.get_title().startswith("2 of 6")
    ax = figures.mistakes(asked, scores, most=1)
    assert len(ax.texts) == 1 and ax.get_title().startswith("2 of 6")
    none = vk.evaluation.scored(asked, [row["answer"] for row in asked])
    ax = figures.mistakes(asked, none)
    assert not ax.images and ax.get_title().startswith("0 of 6")


def test_attention_covers_the_whole_picture_in_percent():
    weights = np.array([[0.1, 0.0], [0.25, 0.05]])
    ax = figures.attention(Image.new("RGB", (8, 4), "white"), weights)
    picture, heat = ax.images
    assert picture.get_extent() == heat.get_extent() == [0, 8, 4, 0]
    assert np.asarray(picture.get_array()).tolist() == [[255] * 8] * 4
    np.testing.assert_allclose(heat.get_array(), 100 * weights)
    assert heat.get_clim() == (0, 25)
    assert 0 < heat.get_alpha() < 1  # the picture shows through
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    assert "%" in bar.get_ylabel()
    image = rows()[0]["images"][0]
    maps = [figures.attention(image, [[w]], most=0.4).images[1] for w in (0.1, 0.3)]
    assert [m.get_clim() for m in maps] == [(0, 40), (0, 40)]


def test_patches_are_framed_in_blocks_and_padded():
    ax = figures.patches(Image.new("RGB", (6, 6)), 3, block=2)
    small = [box for box in ax.patches if box.get_width() == 1]
    assert len(small) == 16 and len(ax.patches) == 16 + 4
    assert sum(box.get_hatch() is not None for box in small) == 16 - 9
    assert tuple(ax.images[0].get_extent()) == (0, 3, 3, 0)
    assert ax.get_title() == "4 visual tokens"
    assert figures.patches(Image.new("RGB", (6, 6)), 3).get_title() == "9 visual tokens"


def test_bits_are_drawn_in_their_fields():
    ax = figures.bits({"fp16": ("0", "01011", "1001100110"), "tiny": ("1", "10", "1")})
    written = {}
    for text in ax.texts:
        x, y = text.get_position()
        written[y] = written.get(y, "") + text.get_text()
    assert written == {0: "0010111001100110", 1: "1101"}
    named = {box.get_label(): box for box in ax.patches if not box.get_label().startswith("_")}
    boxes = [box.get_fc() for box in ax.patches]
    counts = {name: boxes.count(box.get_fc()) for name, box in named.items()}
    assert counts == {"sign": 2, "exponent": 5 + 2, "fraction": 10 + 1}


# --- sizes ----------------------------------------------------------------------------------------


def test_bytes_are_stacked_by_component_in_megabytes():
    bf16 = {"vision_encoder": 2_000_000, "projector": 100_000, "language_model": 6_000_000}
    nf4 = bf16 | {"language_model": 1_500_000}
    ax = figures.bytes_by_component({"bf16": Has(by_component=bf16), "nf4": nf4})
    assert stacked(ax) == {
        "vision_encoder": [(0, 2.0), (0, 2.0)],
        "projector": [(2.0, pytest.approx(0.1))] * 2,
        "language_model": [(pytest.approx(2.1), 6.0), (pytest.approx(2.1), 1.5)],
    }
    for bars in ax.containers:
        color = figures.COMPONENT_COLORS[bars.get_label()].lower()
        assert {colors.to_hex(bar.get_facecolor()) for bar in bars} == {color}
    assert texts(ax.texts) == ["8.10 MB", "3.60 MB"]
    assert texts(ax.get_yticklabels()) == ["bf16", "nf4"]
    assert ax.yaxis_inverted()  # the first ledger on top
    assert "10^6 bytes" in ax.get_xlabel()
    ax = figures.bytes_by_component({"odd": {"projector": 1_000_000, None: 500_000}})
    assert list(stacked(ax)) == ["projector", "unknown"]


def test_parameters_are_drawn_as_shares_with_their_number():
    a = vk.anatomy(LLAMA)
    ax = figures.parameters_by_component({LLAMA: a, "other": {"projector": 3 * 10**6, None: 10**6}})
    widths = {label: [width for _, width in bars] for label, bars in stacked(ax).items()}
    for component in vk.COMPONENTS[:4]:
        assert widths[component][0] == pytest.approx(100 * a[component].parameters / a.total)
    assert widths["projector"][1] == pytest.approx(75)
    assert widths["unknown"] == [0, pytest.approx(25)]
    assert texts(ax.texts) == ["10.7 B", "4 M"]


def test_seconds_are_stacked_by_kind():
    ax = figures.seconds({"a": {"quantizing": 2.0, "rest": 0.5}, "b": {"rest": 1.0}})
    assert stacked(ax) == {"quantizing": [(0, 2.0), (0, 0)], "rest": [(2.0, 0.5), (0, 1.0)]}
    assert texts(ax.texts) == ["2.50 s", "1.00 s"] and ax.get_xlabel() == "seconds"


@pytest.mark.parametrize("name", ["pebble", LLAMA])
def test_an_architecture_is_drawn_with_areas_in_proportion(name):
    a = vk.anatomy(name)
    ax = figures.architecture(a)
    areas = {box.get_label(): box.get_width() * box.get_height() for box in ax.patches}
    assert set(areas) == set(a.by_component)
    inside = a["cross_attention"].parameters
    for component, count in a.by_component.items():
        shown = count + (inside if component == "language_model" else 0)
        assert areas[component] == pytest.approx(shown / a.total)
    words = "\n".join(texts(ax.texts))
    assert all(component in words for component in a.by_component)


def test_each_component_has_its_own_color():
    assert tuple(figures.COMPONENT_COLORS) == vk.COMPONENTS
    assert len(set(figures.COMPONENT_COLORS.values())) == len(vk.COMPONENTS)


# --- quality --------------------------------------------------------------------------------------


def test_accuracy_with_its_interval():
    given = {"bf16": Has(accuracy=0.9, interval=wilson(90, 100)), "nf4": (0.88, 0.8, 0.93)}
    ax = figures.accuracy(given)
    lines, points = ax.lines[::2], ax.lines[1::2]
    assert [dot.get_xydata().tolist() for dot in points] == [[[90, 0]], [[88, 1]]]
    assert list(lines[0].get_xdata()) == pytest.approx([100 * end for end in wilson(90, 100)])
    assert list(lines[1].get_xdata()) == pytest.approx([80, 93])
    assert texts(ax.get_yticklabels()) == ["bf16", "nf4"] and ax.yaxis_inverted()


def test_learning_is_a_mean_over_steps_against_seconds():
    curve = pd.DataFrame({"seconds": [1.0, 2.0, 4.0], "right": [0.0, 0.5, 1.0]})
    ax = figures.learning({"a": curve, "b": curve}, window=2)
    x, y = ax.lines[0].get_data()
    assert x.tolist() == [1, 2, 4]
    np.testing.assert_allclose(y, [np.nan, 25, 75])
    assert texts(ax.get_legend().get_texts()) == ["a", "b"]


def test_accuracy_by_tokens_has_a_line_for_each_connector():
    rows = [("a", 16, 0.5, 0.4, 0.7), ("a", 4, 0.2, 0.1, 0.3), ("b", 16, 0.9, 0.8, 1.0)]
    columns = ["connector", "visual_tokens", "accuracy", "low", "high"]
    ax = figures.accuracy_by_tokens(pd.DataFrame(rows, columns=columns))
    first, second = (bars.lines[0] for bars in ax.containers)
    assert (first.get_ydata() == [20, 50]).all() and (second.get_ydata() == [90]).all()
    assert first.get_xdata() == pytest.approx([4, 16], rel=0.1)
    assert interval(ax.containers[0], 1) == pytest.approx([40, 70])
    assert [bars.get_label() for bars in ax.containers] == ["a", "b"]
    assert texts(ax.get_xticklabels()) == ["4", "16"]


def test_accuracy_against_costs_has_a_panel_for_each_cost_and_task():
    def scores(**right):
        rows = [(task, hit) for task, hits in right.items() for hit in hits]
        return Scores(pd.DataFrame(rows, columns=["task", "correct"]))

    costs = pd.DataFrame({"tokens": {"a": 49, "b": 16}, "seconds": {"a": 2.0, "b": 2.0}})
    found = {"a": scores(vqa=[True, False], ocr=[True]), "b": scores(vqa=[True] * 2, ocr=[False])}
    axes = figures.accuracy_against(costs, found, {"best": scores(vqa=[True], ocr=[True])})
    assert axes.shape == (2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["vqa", "ocr"]
    assert [ax.get_xlabel() for ax in axes[:, 0]] == ["tokens", "seconds"]
    for ax, shares in zip(axes[0], ((50, 100), (100, 0)), strict=True):
        level, *points = [line for line in ax.lines if line.get_marker() != "_"]
        assert set(level.get_ydata()) == {100}
        assert [dot.get_ydata()[0] for dot in points[:2]] == pytest.approx(shares)
        assert points[0].get_xdata()[0] == pytest.approx(49, abs=1)
    ends = [100 * share for share in wilson(1, 2)]
    assert interval(axes[0, 0].containers[0], 0) == pytest.approx(ends)
    # Where both cost the same, one does not hide the other.
    first, second = (bars.lines[0].get_xdata()[0] for bars in axes[1, 0].containers)
    assert first != second
    points = [bars.lines[0].get_xdata()[0] for bars in axes[0, 0].containers]
    assert points == [49, 16]  # where the costs differ, nothing moves


def plans():
    rows = [("uniform", "uniform int8", 4, 0.0, 0.9), ("uniform", "uniform int2", 1, 2.0, 0.1)]
    rows += [("uniform", "uniform int8, head too", 3.5, 0.1, 0.9)]
    rows += [("planned", "planned", 2, 0.2, 1)]
    table = pd.DataFrame(rows, columns=["kind", "plan", "bytes", "kl", "accuracy"])
    table["bytes"] = (10**6 * table["bytes"]).astype(int)
    table["low"], table["high"] = table["accuracy"] - 0.05, (table["accuracy"] + 0.02).clip(upper=1)
    return table.assign(kl_low=table["kl"] / 2, kl_high=table["kl"] * 2)


def test_a_frontier_has_planned_and_uniform_plans_by_size():
    ax = figures.frontier(plans())
    drawn = {bars.get_label(): bars for bars in ax.containers}
    assert {name: bars.lines[0].get_xydata().tolist() for name, bars in drawn.items()} == {
        "uniform": [[1, 10], [4, 90]],
        "uniform, head too": [[3.5, 90]],
        "planned": [[2, 100]],
    }
    assert interval(drawn["uniform"], 1) == pytest.approx([85, 92])
    assert set(texts(ax.texts)) == {"int8", "int2"} and "MB" in ax.get_xlabel()
    as_good = plans().assign(high=lambda table: table["high"].where(table["bytes"] < 2e6, 1))
    assert texts(figures.frontier(as_good).texts) == ["int2"]
    ax = figures.frontier(plans(), "kl")
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in ax.containers}
    assert drawn["uniform"] == [[1, 2.0]] and drawn["planned"] == [[2, 0.2]]  # not the 0
    assert ax.get_yscale() == "log"


def test_error_by_bits_has_dots_and_lines():
    ax = figures.error_by_bits({"int": [(3.5, 14.0), (4.5, 21.0)], "nf4": (4.5, 20.7)})
    line, dot = ax.lines
    assert line.get_xydata().tolist() == [[3.5, 14.0], [4.5, 21.0]]
    assert dot.get_xydata().tolist() == [[4.5, 20.7]]
    assert texts(ax.texts) == ["nf4"]
    assert "dB" in ax.get_ylabel() and "bits" in ax.get_xlabel()


# --- damage ---------------------------------------------------------------------------------------


def losses():
    rows = [("a", "int4", 0.004, -0.004, 0.012, 4, 6), ("a", "int2", -0.25, -0.3, -0.2, 125, 0)]
    rows += [("b", "int4", 0.0, 0.0, 0.0, 0, 0)]
    columns = ["scope", "format", "difference", "low", "high", "regressions", "fixes"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(bytes_saved=[2 * 10**6, 3 * 10**6, 10**5])


def test_damage_is_a_cell_for_each_scope_and_format():
    ax = figures.damage(losses())
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[0, 25], [0, np.nan]])  # one cell is not in the table
    assert texts(ax.get_xticklabels()) == ["int4", "int2"]
    assert texts(ax.get_yticklabels()) == ["a", "b"]
    written = ["+0.4", "[−0.4, +1.2]", "−25.0", "[−30.0, −20.0]", "0.0", "[0.0, 0.0]"]
    assert texts(ax.texts) == written
    (frame,) = ax.patches  # the cell that changed more than chance would do
    assert frame.contains_point(ax.transData.transform((1, 0)))
    bold = [text.get_text() for text in ax.texts if text.get_weight() == "bold"]
    assert bold == written[2:4]


def test_damage_of_several_maps_is_on_one_scale():
    assert figures.damage(losses()).images[0].norm.vmax == 25
    assert figures.damage(losses(), worst=60).images[0].norm.vmax == 60
    unhurt = losses()[::2]
    assert figures.damage(unhurt).images[0].norm.vmax == 1  # a scale needs two ends


def test_damage_by_bytes_is_a_line_for_each_scope():
    ax = figures.damage_by_bytes(losses())
    first, second = (bars.lines[0] for bars in ax.containers)
    np.testing.assert_allclose(first.get_xydata(), [[2, 0.4], [3, -25]])
    np.testing.assert_allclose(second.get_xydata(), [[0.1, 0]])
    assert interval(ax.containers[0], 1) == pytest.approx([-30, -20])
    assert texts(ax.get_legend().get_texts()) == ["int4", "int2", "a", "b"]
    shapes = {tuple(d.get_xydata()[0].round(3)): d.get_marker() for d in dots(ax, ("o", "^"))}
    assert shapes == {(2, 0.4): "o", (3, -25): "^", (0.1, 0): "o"}
    assert "MB" in ax.get_xlabel() and ax.get_xscale() == "log"


def test_layers_are_drawn_in_the_color_of_their_component():
    rows = [("vision_encoder:0", "int3", 0.01, 0.0), ("vision_encoder:0", "int2", 0.5, -0.425)]
    rows += [("projector", "int3", 0.0, 0.0), ("projector", "int2", 0.02, -0.01)]
    table = pd.DataFrame(rows, columns=["scope", "format", "kl", "difference"])
    ax = figures.layer_damage(table)
    points = dots(ax, ("o", "s", "^"))
    assert [dot.get_xydata()[0].tolist() for dot in points] == [[0.01, 0], [0.5, 0], [0.02, 1]]
    assert [dot.get_marker() for dot in points] == ["o", "s", "s"]  # a shape for each format
    owner = ["vision_encoder"] * 2 + ["projector"]
    assert [dot.get_color() for dot in points] == [figures.COMPONENT_COLORS[c] for c in owner]
    assert texts(ax.texts) == ["−42.5 points", "−1.0 points"]
    assert texts(ax.get_yticklabels()) == ["vision_encoder:0", "projector"]
    assert texts(ax.get_legend().get_texts()) == ["int3", "int2"]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()


def test_scores_have_a_panel_each_with_their_correlation():
    table = pd.DataFrame({"scope": ["model.tower.0", "model.layers.1"], "sqnr": [3.0, 9.0]})
    table = table.assign(component=["vision_encoder", "language_model"], fisher=[0.1, 0.001])
    table = table.assign(kl_true=[0.5, 0.02])
    found = pd.DataFrame({"score": ["sqnr", "fisher"], "spearman": [-0.5, 0.9]})
    found = found.assign(low=[-0.8, 0.7], high=[0, 1.0])
    axes = figures.scores_against_damage(table, found)
    titles = ["Spearman −0.50 [−0.80, 0.00]", "Spearman 0.90 [0.70, 1.00]"]
    assert [ax.get_title() for ax in axes] == titles
    for ax, score in zip(axes, ("sqnr", "fisher"), strict=True):
        points = [line.get_xydata()[0].tolist() for line in ax.lines]
        assert points == table[[score, "kl_true"]].to_numpy().tolist()
        assert ax.lines[0].get_color() == figures.COMPONENT_COLORS["vision_encoder"]
    assert axes[0].xaxis_inverted() and not axes[1].xaxis_inverted()
    (legend,) = axes[0].figure.legends
    assert texts(legend.get_texts()) == ["vision_encoder", "language_model"]


# --- any figure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "data"),
    [
        (figures.questions, rows()),
        (figures.bytes_by_component, {"a": {"projector": 1}}),
        (figures.accuracy, {"a": (0.5, 0.4, 0.6)}),
        (figures.bits, {"a": ("0", "1", "1")}),
        (figures.damage, losses()),
        (lambda weights, ax: figures.attention(rows()[0]["images"][0], weights, ax=ax), [[0.5]]),
    ],
)
def test_an_axes_given_is_the_axes_drawn_into(draw, data):
    figure, ax = plt.subplots()
    assert draw(data, ax=ax) is ax
    assert plt.get_fignums() == [figure.number]
