"""The explorer without a browser: set the controls, look at what is drawn."""

import base64
import re
import subprocess
import sys

import pytest

import vlmkit as vk
from vlmkit.course.explorer import MemoryExplorer, parts_of
from vlmkit.errors import CheckpointError, SizeError


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
    explorer.card.value = "RTX 4060"
    left = 7e9 - vk.memory.predict(name, allocator="cuda").total
    assert f"fits on RTX 4060: {left / 1e9:.1f} GB" in explorer.verdict
    explorer.plan["language_model"].value = "fp32"
    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model="fp32")
    over = vk.memory.predict(name, plan, allocator="cuda").total - 7e9
    assert over > 0 and f"does not fit on RTX 4060: {over / 1e9:.1f} GB" in explorer.verdict


def test_it_is_a_widget_whose_picture_says_in_words_what_it_shows(explorer):
    shown = re.search(r'alt="([^"]+)" src="data:image/png;base64,([^"]+)"', explorer._picture.value)
    assert f"all, as chosen: {explorer.ledger.total / 10**6:,.2f} MB" in shown[1]
    bundle = explorer._repr_mimebundle_()
    assert bundle["image/png"] == shown[2]
    assert base64.b64decode(shown[2]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == "MemoryExplorer('pebble')"


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


def test_without_ipywidgets_it_says_what_to_install():
    code = "import sys; sys.modules['ipywidgets'] = None; import vlmkit.course.explorer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DependencyError" in done.stderr and ".[course]" in done.stderr
