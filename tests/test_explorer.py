"""The explorer without a browser: turn the controls, look at what is drawn."""

import base64
import re
import subprocess
import sys

import pytest

import vlmkit as vk
from vlmkit.course.explorer import MemoryExplorer, parts_of
from vlmkit.errors import CheckpointError, SizeError
from vlmkit.finetuning import LoRA


def drawn(explorer):
    """{bar: {component: MB}} as it is in the Axes."""
    labels = [label.get_text() for label in explorer.axes.get_yticklabels()]
    return {
        label: {
            bars.get_label(): bars.patches[y].get_width()
            for bars in explorer.axes.containers
            if bars.patches[y].get_width()
        }
        for y, label in enumerate(labels)
    }


def megabytes(ledger):
    return pytest.approx({c: size / 10**6 for c, size in ledger.by_component.items() if size})


@pytest.fixture
def explorer():
    return vk.course.explorer.memory("pebble")


def test_it_begins_with_the_recommended_plan(explorer):
    assert isinstance(explorer, MemoryExplorer)
    assert {c: control.value for c, control in explorer.plan.items()} == {
        "vision_encoder": "bf16",
        "projector": "bf16",
        "language_model": "nf4",
    }
    bars = drawn(explorer)
    assert list(bars) == ["all in bf16", "all, as chosen"]
    assert bars["all in bf16"] == megabytes(vk.memory.predict("pebble", "bf16"))
    assert bars["all, as chosen"] == megabytes(vk.memory.predict("pebble"))


def test_the_bar_follows_the_plan(explorer):
    explorer.plan["vision_encoder"].value = "int8"
    explorer.plan["language_model"].value = "fp32"
    plan = vk.Plan(vision_encoder="int8", language_model="fp32")
    assert explorer.ledger.total == vk.memory.predict("pebble", plan).total
    assert drawn(explorer)["all, as chosen"] == megabytes(vk.memory.predict("pebble", plan))


def test_the_bars_follow_images_tokens_and_rank(explorer):
    explorer.images.value, explorer.tokens.value = 2, 64
    use = {"images": 2, "tokens": 64}
    found, bars = vk.memory.predict("pebble", **use), drawn(explorer)
    assert bars["all, as chosen"] == megabytes(found)
    assert list(bars)[2:] == ["weights", "kv cache", "activations"]
    before = explorer.ledger.total
    explorer.rank.value = 8
    use["training"] = {"language_model": LoRA(r=8)}
    found, bars = vk.memory.predict("pebble", **use), drawn(explorer)
    assert bars["all, as chosen"] == megabytes(found)
    assert explorer.ledger.total > before
    assert sum(bars["adapters and training"].values()) > 0
    parts = parts_of(found)
    assert sum(sum(sizes.values()) for sizes in parts.values()) == found.total
    for part, sizes in parts.items():
        assert sum(bars.get(part, {}).values()) == pytest.approx(sum(sizes.values()) / 10**6)


def test_the_picture_says_in_words_what_it_shows(explorer):
    text, data = re.search(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"',
                           explorer._picture.value).groups()  # fmt: skip
    assert f"all, as chosen: {explorer.ledger.total / 10**6:,.2f} MB" in text
    assert base64.b64decode(data).startswith(b"\x89PNG")


def test_what_cannot_be_is_said_and_the_last_picture_stays():
    """PaliGemma's projector is one Linear layer, Gemma 3's a bare parameter."""
    from transformers import CONFIG_MAPPING

    explorer = vk.course.explorer.memory(CONFIG_MAPPING["gemma3"]())
    before = explorer._picture.value
    explorer.plan["projector"].value = "nf4"
    assert "nothing in it can be quantized" in explorer.message
    assert explorer._picture.value == before
    explorer.plan["projector"].value = "fp32"
    assert explorer.message == "" and explorer._picture.value != before


def test_a_model_that_is_not_there():
    with pytest.raises(CheckpointError, match="nowhere"):
        vk.course.explorer.memory("nowhere")


@pytest.mark.parametrize("use", [{"images": -1}, {"tokens": 1.5}, {"tokens": 10**6}])
def test_numbers_that_cannot_be(use):
    with pytest.raises(SizeError):
        vk.course.explorer.memory("pebble", **use)
    assert vk.course.explorer.memory("pebble", images=17).images.value == 17


def test_it_is_a_widget_that_is_shown(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == "MemoryExplorer('pebble')"


def test_without_ipywidgets_it_says_what_to_install():
    code = "import sys; sys.modules['ipywidgets'] = None; import vlmkit.course.explorer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DependencyError" in done.stderr and ".[course]" in done.stderr
