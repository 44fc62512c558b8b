"""What fits on which card: needed as predicted, usable as stated."""

import json
from functools import partial

import matplotlib

matplotlib.use("agg")

import pandas as pd
import pytest
from matplotlib import colors
from matplotlib import pyplot as plt

import vlmkit as vk
import vlmkit.environment as doctor
from vlmkit import figures
from vlmkit.catalog.gpus import GPUS
from vlmkit.cli import main
from vlmkit.course import explorer
from vlmkit.errors import FinetuningError, PlanError, SizeError
from vlmkit.memory.fitting import PLANS, fit, room_on, summary

WEIGHTS = {"tokens": 0, "images": 0}
predict = partial(vk.memory.predict, allocator="cuda")
QWEN, SMOL = "Qwen/Qwen2-VL-2B-Instruct", "HuggingFaceTB/SmolVLM-256M-Instruct"


@pytest.fixture(scope="module")
def table():
    return fit([QWEN, SMOL], **WEIGHTS)


def test_a_row_for_each_model_plan_and_card(table):
    assert len(table) == 2 * len(PLANS) * len(GPUS)
    for (model, plan), own in table.groupby(["model", "plan"]):
        assert set(own["needed"]) == {predict(model, PLANS[plan]).total}
        assert list(own["gpu"]) == list(GPUS)
    assert (table["memory"] == [GPUS[gpu].bytes for gpu in table["gpu"]]).all()
    assert (table["usable"] == table["memory"] - 10**9).all()
    assert (table["headroom"] == table["usable"] - table["needed"]).all()
    assert (table["fits"] == (table["needed"] <= table["usable"])).all()


def test_it_fits_to_the_byte():
    needed = predict("pebble", "bf16").total
    found = fit(
        ["pebble"], ["bf16"], [needed + 10**6, needed + 10**6 - 1], reserved="1 MB", **WEIGHTS
    )
    assert found["headroom"].tolist() == [0, -1] and found["fits"].tolist() == [True, False]


def test_configs_plans_and_sizes_of_ones_own():
    config = vk.checkpoints.read_config(vk.models.pebble.path())
    plans = {"mine": vk.Plan(language_model="int8"), "other": "nf4-dq"}
    found = fit({"my model": config}, plans, ["12 GB", "12 GiB", 12 * 10**9], **WEIGHTS)
    assert set(found["model"]) == {"my model"} and list(dict.fromkeys(found["plan"])) == [*plans]
    assert found["memory"].tolist() == [12 * 10**9, 12 * 2**30, 12 * 10**9] * 2
    assert found["needed"].iloc[0] == predict(config, plans["mine"]).total


def test_what_the_model_is_to_do_counts():
    use = {"tokens": 64, "images": 2, "training": {"projector": "full"}}
    found = fit(["pebble"], ["bf16"], ["8 GB"], **use)
    assert found["needed"].item() == predict("pebble", "bf16", **use).total


def test_a_model_without_room_for_so_many_tokens_is_said_to_have_none():
    found = fit([SMOL, QWEN], ["bf16"], ["8 GB"], tokens=9000, images=0)  # SmolVLM's has 8,192
    smol, qwen = found.itertuples()
    assert pd.isna(smol.needed) and not smol.fits and "9,000" in smol.why
    assert qwen.fits and qwen.why == ""
    assert summary(found).loc[(SMOL, "bf16")].tolist() == ["too long", "-"]
    ax = figures.what_fits(found)
    assert [label.get_text() for label in ax.get_yticklabels()] == [QWEN.partition("/")[2]]
    plt.close("all")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"gpus": ["RTX4090"]}, SizeError, "Did you mean 'RTX 4090'"),
        ({"gpus": ["12 apples"]}, SizeError, "nor a size"),
        ({"plans": ["nf5"]}, PlanError, "'nf4'"),
        ({"reserved": "much"}, SizeError, "'much'"),
        ({"tokens": -1}, SizeError, "tokens"),
        ({"tokens": 10**6}, SizeError, "do not fit"),
        ({"training": "none"}, FinetuningError, "'none'"),
    ],
)
def test_mistakes(arguments, error, says):
    with pytest.raises(error, match=says):
        fit(["pebble"], **{**WEIGHTS, **arguments})


def test_cards_have_what_the_driver_shows_and_a_source():
    sizes = [gpu.bytes for gpu in GPUS.values()]
    assert sizes == sorted(sizes) and GPUS["RTX 4090"].bytes == 24_564 * 2**20
    assert {8, 16, 24, 80} <= {gpu.gigabytes for gpu in GPUS.values()}
    assert all(name == gpu.name and gpu.source for name, gpu in GPUS.items())
    for gpu in GPUS.values():  # between 4% under and 8% over a GB of 10^9 bytes
        assert 0.96 < gpu.bytes / (gpu.gigabytes * 10**9) < 1.08


def test_one_reserve_everywhere_and_a_size_is_what_it_says(capsys):
    """A card is the same for `vlmkit memory --budget`, `vlmkit fit`, `largest`, and the table."""
    room = 24_564 * 2**20 - 10**9
    assert room_on("RTX 4090") == room
    assert fit(["pebble"], ["bf16"], ["RTX 4090"], **WEIGHTS)["usable"].item() == room
    assert vk.memory.largest("pebble", "RTX 4090", uses=["load"]).room == room
    budget = ["memory", "pebble", "--json", "--budget"]
    for text, size in {"RTX 4090": room, "24 GB": 24 * 10**9, "24 GiB": 24 * 2**30}.items():
        assert main([*budget, text]) == 0
        assert json.loads(capsys.readouterr().out)["budget"] == size
    assert explorer.room_on is room_on and doctor.RESERVED == 10**9


def test_a_refusal_names_checkpointing_where_it_would_fit(capsys):
    step = ["memory", "pebble", "--tokens", "512", "--train", "lora", "--budget", "38 MB"]
    assert main(step) == 1
    said = capsys.readouterr().out
    assert "--gradient-checkpointing" in said and "which fits" in said
    assert main([*step, "--gradient-checkpointing"]) == 0


def test_summary_says_what_is_left(table):
    wide = summary(table)
    sizes = dict.fromkeys(f"{round(gpu.bytes / 10**9, 1):g}" for gpu in GPUS.values())
    assert list(wide.columns) == ["needs", *sizes]
    needed = predict(QWEN, "bf16").total / 10**9
    assert wide.loc[(QWEN, "bf16"), "needs"] == f"{needed:.1f}"
    assert wide.loc[(QWEN, "bf16"), "8.6"] == f"{8188 * 2**20 / 10**9 - 1 - needed:.1f}"
    small = summary(fit([QWEN], ["bf16"], ["4 GB"], **WEIGHTS))
    assert small["4"].tolist() == ["-"]


def test_the_figure_shows_what_is_needed_and_where_cards_end(table):
    ax = figures.what_fits(table)
    marks = {line.get_label(): line for line in ax.lines if line.get_label() in PLANS}
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "SmolVLM-256M-Instruct",
        "Qwen2-VL-2B-Instruct",
    ]
    for plan, line in marks.items():
        needed = [predict(name, PLANS[plan]).total / 10**9 for name in (SMOL, QWEN)]
        assert list(line.get_xdata()) == pytest.approx(needed)
        assert list(line.get_ydata()) == [0, 1]
    looks = {(line.get_marker(), colors.to_hex(line.get_color())) for line in marks.values()}
    assert len({marker for marker, _ in looks}) == len({color for _, color in looks}) == len(PLANS)
    dashed = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    smallest = [GPUS[name].bytes for name in ("RTX 4060", "T4", "L4", "H100")]
    assert dashed == pytest.approx([size / 10**9 - 1 for size in smallest])
    assert [text.get_text() for text in ax.texts] == ["8 GB", "16 GB", "24 GB", "80 GB"]
    assert ax.yaxis_inverted() and ax.get_xscale() == "log" and "10^9" in ax.get_xlabel()
    plt.close("all")


def test_the_figure_draws_into_the_axes_given(table):
    figure, ax = plt.subplots()
    assert figures.what_fits(table, ax=ax) is ax
    assert plt.get_fignums() == [figure.number]
    plt.close("all")
