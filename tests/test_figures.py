"""What is drawn is what was given."""

import matplotlib

matplotlib.use("agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt
from PIL import Image

import vlmkit
from vlmkit import figures
from vlmkit.evaluation import Scores, wilson


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


def test_questions_show_each_picture_with_its_caption():
    ax = figures.questions(rows())
    drawn = [np.asarray(image.get_array())[0, 0, :3].tolist() for image in ax.images]
    assert drawn == [[255, 0, 0], [255, 0, 0], [0, 0, 255]]
    assert [text.get_text() for text in ax.texts] == [
        "What color is it?\n→ red",
        "Same color?\n→ no",
    ]
    first, second, third = (image.get_extent()[:2] for image in ax.images)
    assert first[1] < second[0] < second[1] <= third[0]
    assert first[0] < ax.texts[0].get_position()[0] < first[1]
    assert second[0] < ax.texts[1].get_position()[0] < third[1]


def test_questions_with_a_models_answers():
    ax = figures.questions(rows(), answers=["green", "yes"])
    assert [text.get_text().rpartition(" ")[2] for text in ax.texts] == ["green", "yes"]
    with pytest.raises(ValueError):
        figures.questions(rows(), answers=["green"])


def test_attention_lies_over_the_whole_picture_in_percent():
    weights = np.array([[0.1, 0.0], [0.25, 0.05]])
    ax = figures.attention(Image.new("RGB", (8, 4), "white"), weights)
    picture, laid_over = ax.images
    assert picture.get_extent() == laid_over.get_extent() == [0, 8, 4, 0]
    assert np.asarray(picture.get_array()).tolist() == [[255] * 8] * 4
    np.testing.assert_allclose(laid_over.get_array(), 100 * weights)
    assert laid_over.get_clim() == (0, 25)
    assert 0 < laid_over.get_alpha() < 1  # the picture shows through
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    assert "%" in bar.get_ylabel()


def test_two_maps_of_attention_can_share_a_scale():
    image = rows()[0]["images"][0]
    maps = [figures.attention(image, [[w]], most=0.4).images[1] for w in (0.1, 0.3)]
    assert [m.get_clim() for m in maps] == [(0, 40), (0, 40)]


def test_bytes_are_stacked_by_component_in_megabytes():
    bf16 = {"vision_encoder": 2_000_000, "projector": 100_000, "language_model": 6_000_000}
    nf4 = {"vision_encoder": 2_000_000, "projector": 100_000, "language_model": 1_500_000}
    ax = figures.bytes_by_component({"bf16": Has(by_component=bf16), "nf4": nf4})
    drawn = {}
    for bars in ax.containers:
        color = figures.COMPONENT_COLORS[bars.get_label()]
        for y, bar in enumerate(bars):
            assert colors.to_hex(bar.get_facecolor()) == color.lower()
            drawn[y, bars.get_label()] = (bar.get_x(), bar.get_width())
    assert drawn == {
        (0, "vision_encoder"): (0, 2.0),
        (0, "projector"): (2.0, pytest.approx(0.1)),
        (0, "language_model"): (pytest.approx(2.1), 6.0),
        (1, "vision_encoder"): (0, 2.0),
        (1, "projector"): (2.0, pytest.approx(0.1)),
        (1, "language_model"): (pytest.approx(2.1), 1.5),
    }
    assert [text.get_text() for text in ax.texts] == ["8.10 MB", "3.60 MB"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["bf16", "nf4"]
    assert ax.yaxis_inverted()  # the first ledger on top
    assert "10^6 bytes" in ax.get_xlabel()


def test_unknown_bytes_are_shown():
    ax = figures.bytes_by_component({"odd": {"projector": 1_000_000, None: 500_000}})
    assert [bars.get_label() for bars in ax.containers] == ["projector", "unknown"]


def test_accuracy_with_its_interval():
    given = {"bf16": Has(accuracy=0.9, interval=wilson(90, 100)), "nf4": (0.88, 0.8, 0.93)}
    ax = figures.accuracy(given)
    lines, dots = ax.lines[::2], ax.lines[1::2]
    assert [dot.get_xydata().tolist() for dot in dots] == [[[90, 0]], [[88, 1]]]
    assert list(lines[0].get_xdata()) == pytest.approx([100 * end for end in wilson(90, 100)])
    assert list(lines[1].get_xdata()) == pytest.approx([80, 93])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["bf16", "nf4"]
    assert ax.yaxis_inverted()


@pytest.mark.parametrize(
    ("draw", "data"),
    [
        (figures.questions, rows()),
        (figures.bytes_by_component, {"a": {"projector": 1}}),
        (figures.accuracy, {"a": (0.5, 0.4, 0.6)}),
        (figures.seconds, {"a": {"reading": 1.0}}),
        (figures.bits, {"a": ("0", "1", "1")}),
        (figures.error_by_bits, {"a": (4.5, 20.0)}),
        (lambda weights, ax: figures.attention(rows()[0]["images"][0], weights, ax=ax), [[0.5]]),
    ],
)
def test_an_axes_given_is_the_axes_drawn_into(draw, data):
    figure, ax = plt.subplots()
    assert draw(data, ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_each_component_has_a_color_of_its_own():
    assert tuple(figures.COMPONENT_COLORS) == vlmkit.COMPONENTS
    assert len(set(figures.COMPONENT_COLORS.values())) == len(vlmkit.COMPONENTS)


def test_parameters_are_drawn_as_shares_with_their_number_behind():
    import vlmkit as vk

    name = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    a = vk.anatomy(name)
    ax = figures.parameters_by_component({name: a, "other": {"projector": 3_000_000, None: 10**6}})
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in ax.containers}
    for component in vk.COMPONENTS[:4]:
        assert widths[component][0] == pytest.approx(100 * a[component].parameters / a.total)
    assert widths["projector"][1] == pytest.approx(75)
    assert widths["unknown"] == [0, pytest.approx(25)]
    assert [text.get_text() for text in ax.texts] == ["10.7 B", "4 M"]


@pytest.mark.parametrize("name", ["pebble", "meta-llama/Llama-3.2-11B-Vision-Instruct"])
def test_an_architecture_is_drawn_with_areas_in_proportion(name):
    import vlmkit as vk

    a = vk.anatomy(name)
    ax = figures.architecture(a)
    areas = {box.get_label(): box.get_width() * box.get_height() for box in ax.patches}
    assert set(areas) == set(a.by_component)
    inside = a["cross_attention"].parameters
    for component, count in a.by_component.items():
        shown = count + (inside if component == "language_model" else 0)
        assert areas[component] == pytest.approx(shown / a.total)
    words = "\n".join(text.get_text() for text in ax.texts)
    assert all(component in words for component in a.by_component)


def test_seconds_are_stacked_by_what_they_went_on():
    ax = figures.seconds({"a": {"quantizing": 2.0, "rest": 0.5}, "b": {"rest": 1.0}})
    drawn = {bars.get_label(): [(b.get_x(), b.get_width()) for b in bars] for bars in ax.containers}
    assert drawn == {"quantizing": [(0, 2.0), (0, 0)], "rest": [(2.0, 0.5), (0, 1.0)]}
    assert [text.get_text() for text in ax.texts] == ["2.50 s", "1.00 s"]
    assert ax.get_xlabel() == "seconds"


def test_bits_are_drawn_in_their_fields():
    ax = figures.bits({"fp16": ("0", "01011", "1001100110"), "tiny": ("1", "10", "1")})
    written = {}
    for text in ax.texts:
        x, y = text.get_position()
        written[y] = written.get(y, "") + text.get_text()
    assert written == {0: "0010111001100110", 1: "1101"}
    named = {box.get_label(): box for box in ax.patches if not box.get_label().startswith("_")}
    assert list(named) == ["sign", "exponent", "fraction"]
    like = {
        name: sum(b.get_fc() == box.get_fc() for b in ax.patches) for name, box in named.items()
    }
    assert like == {"sign": 2, "exponent": 5 + 2, "fraction": 10 + 1}


def test_error_by_bits_has_dots_and_lines():
    ax = figures.error_by_bits({"int": [(3.5, 14.0), (4.5, 21.0)], "nf4": (4.5, 20.7)})
    line, dot = ax.lines
    assert line.get_xydata().tolist() == [[3.5, 14.0], [4.5, 21.0]]
    assert dot.get_xydata().tolist() == [[4.5, 20.7]]
    assert [text.get_text() for text in ax.texts] == ["nf4"]
    assert "dB" in ax.get_ylabel() and "bits" in ax.get_xlabel()


def test_patches_are_framed_in_blocks_and_filled_up():
    ax = figures.patches(Image.new("RGB", (6, 6)), 3, block=2)
    small = [box for box in ax.patches if box.get_width() == 1]
    large = [box for box in ax.patches if box.get_width() == 2]
    assert len(small) == 16 and len(large) == 4
    assert sum(box.get_hatch() is not None for box in small) == 16 - 9
    assert tuple(ax.images[0].get_extent()) == (0, 3, 3, 0)
    assert ax.get_title() == "4 visual tokens"
    assert figures.patches(Image.new("RGB", (6, 6)), 3).get_title() == "9 visual tokens"


def test_learning_is_a_mean_over_steps_against_seconds():
    curve = pd.DataFrame({"seconds": [1.0, 2.0, 4.0], "right": [0.0, 0.5, 1.0]})
    ax = figures.learning({"a": curve, "b": curve}, window=2)
    x, y = ax.lines[0].get_data()
    assert x.tolist() == [1, 2, 4]
    np.testing.assert_allclose(y, [np.nan, 25, 75])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


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
        level, *dots = [line for line in ax.lines if line.get_marker() != "_"]
        assert set(level.get_ydata()) == {100}
        assert [dot.get_ydata()[0] for dot in dots[:2]] == pytest.approx(shares)
        assert dots[0].get_xdata()[0] == pytest.approx(49, abs=1)
    low, high = (100 * share for share in wilson(1, 2))
    (line,) = axes[0, 0].containers[0].lines[2]
    assert line.get_segments()[0][:, 1] == pytest.approx([low, high])
    # Where both cost the same, one does not hide the other.
    first, second = (bars.lines[0].get_xdata()[0] for bars in axes[1, 0].containers)
    assert first != second


def test_accuracy_by_tokens_has_a_line_for_each_connector():
    rows = [("a", 16, 0.5, 0.4, 0.7), ("a", 4, 0.2, 0.1, 0.3), ("b", 16, 0.9, 0.8, 1.0)]
    columns = ["connector", "visual_tokens", "accuracy", "low", "high"]
    ax = figures.accuracy_by_tokens(pd.DataFrame(rows, columns=columns))
    first, second = (bars.lines[0] for bars in ax.containers)
    assert (first.get_ydata() == [20, 50]).all() and (second.get_ydata() == [90]).all()
    assert first.get_xdata() == pytest.approx([4, 16], rel=0.1)
    low, high = ax.containers[0].lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((40, 70))
    assert [bars.get_label() for bars in ax.containers] == ["a", "b"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["4", "16"]


def losses():
    rows = [("a", "int4", 0.004, -0.004, 0.012), ("a", "int2", -0.25, -0.3, -0.2)]
    rows += [("b", "int4", 0.0, 0.0, 0.0)]
    table = pd.DataFrame(rows, columns=["scope", "format", "difference", "low", "high"])
    return table.assign(bytes_saved=[2 * 10**6, 3 * 10**6, 10**5])


def test_damage_is_a_cell_for_each_scope_and_format():
    ax = figures.damage(losses())
    shown = ax.images[0].get_array()
    assert np.ma.filled(shown, np.nan).tolist()[0] == pytest.approx([0, 25])
    assert shown[1, 0] == 0 and np.isnan(np.ma.filled(shown, np.nan)[1, 1])  # not in the table
    assert [label.get_text() for label in ax.get_xticklabels()] == ["int4", "int2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    written = [text.get_text() for text in ax.texts]
    assert written[:4] == ["+0.4", "[−0.4, +1.2]", "−25.0", "[−30.0, −20.0]"]
    assert written[4:] == ["0.0", "[0.0, 0.0]"]
    (frame,) = ax.patches  # the one whose interval leaves zero out
    assert frame.contains_point(ax.transData.transform((1, 0)))
    assert [text.get_weight() == "bold" for text in ax.texts] == [False] * 2 + [True] * 2 + [
        False
    ] * 2


def test_damage_of_several_maps_is_on_one_scale():
    assert figures.damage(losses()).images[0].norm.vmax == 25
    assert figures.damage(losses(), worst=60).images[0].norm.vmax == 60
    unhurt = losses()[::2]
    assert figures.damage(unhurt).images[0].norm.vmax == 1  # not a scale from nothing to nothing


def test_damage_by_bytes_is_a_line_for_each_scope():
    ax = figures.damage_by_bytes(losses())
    first, second = (bars.lines[0] for bars in ax.containers)
    np.testing.assert_allclose(first.get_xydata(), [[2, 0.4], [3, -25]])
    np.testing.assert_allclose(second.get_xydata(), [[0.1, 0]])
    low, high = ax.containers[0].lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((-30, -20))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["int4", "int2", "a", "b"]
    dots = [line for line in ax.lines if line.get_marker() in ("o", "^") and len(line.get_xdata())]
    shapes = {tuple(dot.get_xydata()[0].round(3)): dot.get_marker() for dot in dots}
    assert shapes == {(2, 0.4): "o", (3, -25): "^", (0.1, 0): "o"}
    assert "MB" in ax.get_xlabel() and ax.get_xscale() == "log"


def test_layers_are_drawn_in_the_color_of_their_component():
    rows = [("vision_encoder:0", "int3", 0.01, 0.0), ("vision_encoder:0", "int2", 0.5, -0.425)]
    rows += [("projector", "int3", 0.0, 0.0), ("projector", "int2", 0.02, -0.01)]
    table = pd.DataFrame(rows, columns=["scope", "format", "kl", "difference"])
    ax = figures.layer_damage(table)
    dots = [line for line in ax.lines if line.get_marker() in "os^" and len(line.get_xdata())]
    assert [dot.get_xydata()[0].tolist() for dot in dots] == [[0.01, 0], [0.5, 0], [0.02, 1]]
    assert [dot.get_marker() for dot in dots] == ["o", "s", "s"]  # a shape for each format
    owner = ["vision_encoder"] * 2 + ["projector"]
    assert [dot.get_color() for dot in dots] == [figures.COMPONENT_COLORS[c] for c in owner]
    assert [text.get_text() for text in ax.texts] == ["−42.5 points", "−1.0 points"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["vision_encoder:0", "projector"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["int3", "int2"]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()


def test_scores_have_a_panel_each_with_their_correlation():
    table = pd.DataFrame(
        {
            "scope": ["model.tower.0", "model.layers.1"],
            "component": ["vision_encoder", "language_model"],
            "sqnr": [3.0, 9.0],
            "fisher": [0.1, 0.001],
            "kl_true": [0.5, 0.02],
        }
    )
    found = pd.DataFrame(
        {"score": ["sqnr", "fisher"], "spearman": [-0.5, 0.9], "low": [-0.8, 0.7], "high": [0, 1.0]}
    )
    axes = figures.scores_against_damage(table, found)
    assert [ax.get_title() for ax in axes] == [
        "Spearman −0.50 [−0.80, 0.00]",
        "Spearman 0.90 [0.70, 1.00]",
    ]
    for ax, score in zip(axes, ("sqnr", "fisher"), strict=True):
        dots = [line.get_xydata()[0].tolist() for line in ax.lines]
        assert dots == table[[score, "kl_true"]].to_numpy().tolist()
        assert ax.lines[0].get_color() == figures.COMPONENT_COLORS["vision_encoder"]
    assert axes[0].xaxis_inverted() and not axes[1].xaxis_inverted()
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["vision_encoder", "language_model"]


def plans():
    rows = [("uniform", "uniform int8", 4, 0.0, 0.9), ("uniform", "uniform int2", 1, 2.0, 0.1)]
    rows += [
        ("uniform", "uniform int8, head too", 3.5, 0.1, 0.9),
        ("planned", "planned", 2, 0.2, 1),
    ]
    table = pd.DataFrame(rows, columns=["kind", "plan", "bytes", "kl", "accuracy"])
    table["bytes"] = (10**6 * table["bytes"]).astype(int)
    table["low"], table["high"] = table["accuracy"] - 0.05, (table["accuracy"] + 0.02).clip(upper=1)
    return table.assign(kl_low=table["kl"] / 2, kl_high=table["kl"] * 2)


def test_a_frontier_has_planned_and_uniform_plans_by_size():
    ax = figures.frontier(plans())
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in ax.containers}
    assert drawn == {
        "uniform": [[1, 10], [4, 90]],
        "uniform, head too": [[3.5, 90]],
        "planned": [[2, 100]],
    }
    (uniform,) = (bars for bars in ax.containers if bars.get_label() == "uniform")
    low, high = uniform.lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((85, 92))
    assert {text.get_text() for text in ax.texts} == {"int8", "int2"}
    assert "MB" in ax.get_xlabel()


def test_a_frontier_of_divergences_leaves_out_none():
    ax = figures.frontier(plans(), "kl")
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in ax.containers}
    assert drawn["uniform"] == [[1, 2.0]] and drawn["planned"] == [[2, 0.2]]
    assert ax.get_yscale() == "log"
