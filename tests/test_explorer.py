"""The explorers without a browser: set the controls, look at what is drawn."""

import base64
import importlib.util
import re
import sys
from html.parser import HTMLParser

import pytest

import vlmkit as vk
from vlmkit.course import explorer as explorers
from vlmkit.course.explorer import WIDGET, MemoryExplorer, parts_of, words_of
from vlmkit.errors import CheckpointError, SizeError
from vlmkit.memory.fitting import room_on


def drawn(explorer):
    """{bar: {component: MB}}, read from the Axes."""
    axes, found = explorer.axes, {}
    for y, label in enumerate(axes.get_yticklabels()):
        widths = {bars.get_label(): bars.patches[y].get_width() for bars in axes.containers}
        found[label.get_text()] = {name: width for name, width in widths.items() if width}
    return found


def megabytes(ledger):
    return pytest.approx({c: size / 10**6 for c, size in ledger.by_component.items() if size})


@pytest.fixture
def explorer():
    return vk.course.explorer.memory("pebble")


def test_it_begins_with_the_recommended_plan_and_follows_the_plan(explorer):
    assert isinstance(explorer, MemoryExplorer)
    recommended = {"vision_encoder": "bf16", "projector": "bf16", "language_model": "nf4"}
    assert {c: control.value for c, control in explorer.plan.items()} == recommended
    bars = drawn(explorer)
    assert list(bars) == ["all in bf16", "all, as chosen"]
    assert bars["all in bf16"] == megabytes(vk.memory.predict("pebble", "bf16"))
    assert bars["all, as chosen"] == megabytes(vk.memory.predict("pebble"))
    explorer.plan["vision_encoder"].value = "int8"
    explorer.plan["language_model"].value = "fp32"
    plan = vk.Plan(vision_encoder="int8", language_model="fp32")
    assert explorer.ledger.total == vk.memory.predict("pebble", plan).total
    assert drawn(explorer)["all, as chosen"] == megabytes(vk.memory.predict("pebble", plan))


def test_the_bars_follow_images_tokens_and_rank(explorer):
    explorer.images.value, explorer.tokens.value = 2, 64
    use = {"images": 2, "tokens": 64}
    bars = drawn(explorer)
    assert bars["all, as chosen"] == megabytes(vk.memory.predict("pebble", **use))
    assert list(bars)[2:] == ["weights", "kv cache", "activations"]
    explorer.rank.value = 8
    use["training"] = {"language_model": vk.LoRA(r=8)}
    found, bars = vk.memory.predict("pebble", **use), drawn(explorer)
    assert bars["all, as chosen"] == megabytes(found)
    assert sum(bars["adapters and training"].values()) > 0
    parts = parts_of(found)
    assert sum(sum(sizes.values()) for sizes in parts.values()) == found.total
    for part, sizes in parts.items():
        assert sum(bars.get(part, {}).values()) == pytest.approx(sum(sizes.values()) / 10**6)


def test_it_says_whether_the_model_fits_on_a_card():
    name = "Qwen/Qwen2-VL-2B-Instruct"
    explorer = vk.course.explorer.memory(name)
    assert explorer.verdict == ""
    explorer.card.value, room = "RTX 4060", room_on("RTX 4060")
    left = room - vk.memory.predict(name, allocator="cuda").total
    assert f"fits on RTX 4060: {left / 1e9:.1f} GB" in explorer.verdict
    explorer.plan["language_model"].value = "fp32"
    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model="fp32")
    over = vk.memory.predict(name, plan, allocator="cuda").total - room
    assert over > 0 and f"does not fit on RTX 4060: {over / 1e9:.1f} GB" in explorer.verdict


def test_it_is_a_widget_whose_picture_says_in_words_what_it_shows(explorer):
    shown = re.search(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', explorer._picture.value)
    assert f"all, as chosen: {explorer.ledger.total / 10**6:,.2f} MB" in shown[1]
    assert base64.b64decode(shown[2]).startswith(b"\x89PNG")
    assert repr(explorer) == "MemoryExplorer('pebble')"


def test_a_reader_gets_the_widget_and_a_page_gets_pictures_and_tables(explorer, monkeypatch):
    """nbclient runs cells for nobody: what it stores has to show something on every page."""
    assert set(explorer._repr_mimebundle_()) == {"text/plain", "text/html", WIDGET}
    monkeypatch.setattr(explorers, "widgets_move", lambda: False)
    still = vk.course.explorer.memory("pebble")
    assert still.widget is None
    assert set(still._repr_mimebundle_()) == {"text/plain", "text/html"}
    table = cells(still._repr_mimebundle_()["text/html"])
    assert table[0] == ["MB", "vision_encoder", "projector", "language_model", "total"]
    total = vk.memory.predict("pebble").total / 10**6
    assert table[2] == ["all, as chosen", *table[2][1:4], f"{total:.2f}"]
    still.plan["language_model"].value = "fp32"  # code can still do it
    assert cells(still.still())[2] != table[2]


def cells(page):
    """The cells of the tables of a page, row by row."""
    rows = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append("")

        def handle_data(self, data):
            if rows and rows[-1]:
                rows[-1][-1] += data

    Reader().feed(page)
    return rows


def test_an_error_is_shown_and_the_last_picture_stays():
    """PaliGemma's projector is one Linear layer, Gemma 3's a bare parameter."""
    from transformers import CONFIG_MAPPING

    explorer = vk.course.explorer.memory(CONFIG_MAPPING["gemma3"]())
    before = explorer._picture.value
    explorer.plan["projector"].value = "nf4"
    assert "projector" in explorer.message
    assert explorer._picture.value == before
    explorer.plan["projector"].value = "fp32"
    assert explorer.message == "" and explorer._picture.value != before


@pytest.mark.parametrize("use", [{"images": -1}, {"tokens": 1.5}, {"tokens": 10**6}])
def test_impossible_numbers_and_models(use):
    with pytest.raises(SizeError):
        vk.course.explorer.memory("pebble", **use)
    with pytest.raises(CheckpointError, match="nowhere"):
        vk.course.explorer.memory("nowhere")
    assert vk.course.explorer.memory("pebble", images=17).images.value == 17


# --- bits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pebble():
    return vk.load("pebble", plan="bf16")


@pytest.fixture(scope="module")
def rows():
    return vk.tasks.dataset("vqa", 3, seed=41)


def test_sliders_of_bits_change_answers_and_bytes_and_leave_the_model_as_it_was(pebble, rows):
    shown = vk.course.explorer.bits("pebble", rows)
    assert set(shown.bits) == {"vision_encoder", "projector", "language_model"}
    before = {name: p.clone() for name, p in shown.model.named_parameters()}
    unrounded = vk.memory.predict("pebble", "bf16").by_component
    assert shown.bytes == unrounded
    assert shown.answers == vk.evaluate(*pebble, rows).answers["predicted"].tolist()

    for slider in shown.bits.values():
        slider.value = 2
    with vk.sensitivity.quantized(pebble[0], "vision_encoder", "int2") as rounded:
        assert shown.bytes["vision_encoder"] == unrounded["vision_encoder"] - rounded.bytes_saved
    with vk.sensitivity.quantized(
        pebble[0], ["vision_encoder", "projector", "language_model"], "int2"
    ):
        assert shown.answers == vk.evaluate(*pebble, rows).answers["predicted"].tolist()
    assert f"{sum(shown.bytes.values()) / 10**6:.2f} MB" in shown._picture.value
    assert all((p == before[name]).all() for name, p in shown.model.named_parameters())


def test_a_page_shows_each_component_at_each_number_of_bits(rows):
    shown = vk.course.explorer.bits("pebble", rows)
    head, *table = cells(shown.still())
    assert head == ["", "MB", "right", *(row["question"] for row in rows)]
    labels = [row[0] for row in table]
    assert labels == ["all in bf16"] + [f"{c} in {n} bits" for c in shown.bits for n in (4, 3, 2)]
    for label, _, right, *answers in table:
        assert int(right) == sum(answer.startswith("✓") for answer in answers), label
    sizes = [float(row[1]) for row in table]
    assert all(size < sizes[0] for size in sizes[1:])


# --- words ---------------------------------------------------------------------------------------


def test_a_click_on_a_word_shows_where_the_model_looked(pebble):
    row = vk.tasks.dataset("caption", 1, seed=5)[0]
    shown = vk.course.explorer.words(*pebble, row["images"][0], row["question"])
    found = vk.attention.over_patches(*pebble, row["images"], row["question"])
    assert " ".join(shown.words) == found.answer
    assert (shown.maps[1] == found.mean(token=1)).all()
    before = shown._picture.value
    shown.word.value = 1
    assert shown._picture.value != before
    assert f"{shown.words[1]}: most attention" in shown._picture.value
    assert shown.still().count("most attention") == len(shown.words)


def test_tokens_become_words():
    tokens = [" a", " blue", " di", "amond", ",", " a", "<|end|>"]
    assert words_of(tokens, ["<|end|>"]) == [
        ("a", [0]),
        ("blue", [1]),
        ("diamond,", [2, 3, 4]),
        ("a", [5]),
    ]
    assert words_of(["A", " ", "cat"]) == [("A", [0]), ("cat", [2])]
    assert words_of(["A", "cat"]) == [("A", [0]), ("cat", [1])]  # of a tokenizer that hides spaces


def test_without_ipywidgets_the_same_is_shown_and_nothing_moves(monkeypatch):
    find = importlib.util.find_spec
    without = lambda name, *more: None if name == "ipywidgets" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # an import of it would fail
    shown = vk.course.explorer.memory("pebble", tokens=64)
    assert shown.widget is None and "kv cache" in shown.still()
    assert set(shown._repr_mimebundle_()) == {"text/plain", "text/html"}
