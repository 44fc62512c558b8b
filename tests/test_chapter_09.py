"""Chapter 09: it runs on another family, and its claims about its own outputs are true."""

import re

import chapters
import pytest
from chapters import cell, shown
from transformers import AutoConfig, LlavaNextConfig

import vlmkit as vk

LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"


def whole(text):
    """The whole numbers of a text."""
    return [int(word.replace(",", "")) for word in text.split() if word[0].isdigit()]


def share(text):
    """[right, lowest, highest] of a share as the chapter writes it: "84 [74, 90]"."""
    return [int(n) for n in text.replace("[", "").replace("]", "").replace(",", "").split()]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    chapters.replace(notebook, ("20, least=2", "2, least=2"))
    assert "Backwards:" in chapters.run(notebook, other_family, monkeypatch)


def test_the_counts_by_hand_are_the_packages(notebook, states):
    lines = printed(cell(notebook, "from transformers import LlavaNextConfig")).splitlines()
    assert len(lines) == 4
    for line in lines:
        by_hand, counted = re.findall(r"[\d,]+(?= tokens)|[\d,]+$", line)
        assert by_hand == counted
    still = printed(cell(notebook, "from transformers.models.qwen2_5_vl")).splitlines()
    assert 2 * whole(still[0])[0] == whole(still[1])[0]  # a film costs half


def test_sizes_that_the_text_states(notebook, states):
    """A4 and a letter of 10 points at 150 dots an inch; contexts; how many pictures pebble saw."""
    states(*(round(side / 25.4 * 150) for side in (210, 297)), round(10 / 72 * 150))
    names = {"__builtins__": {}}
    exec(cell(notebook, "# layers, width").source, names)
    names["shapes"].pop("LLaVA-NeXT-7B")  # no configuration of it is in the catalog
    smol = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
    for shape, which in zip(names["shapes"].values(), (LLAVA, smol, QWEN), strict=True):
        text = AutoConfig.from_pretrained(vk.catalog.folder_of(which)).get_text_config()
        size = text.hidden_size // text.num_attention_heads
        layers, heads = text.num_hidden_layers, text.num_key_value_heads
        assert shape[:2] == (layers, text.num_attention_heads * size)
        assert shape[2:] == (4 * layers * heads * size, text.max_position_embeddings)
    rows = (row for task in vk.tasks.TASKS for row in vk.tasks.dataset(task, n=8, seed=8))
    assert {len(row["images"]) for row in rows} == {1, 2, 4}
    states("1", "2", "4")


def test_a_page_is_cropped_by_llavas_processor(notebook, states):
    """15% of the page are lost above, and as many below."""
    lines = printed(cell(notebook, "from transformers.models.clip")).splitlines()
    top, bottom = (int(n) for n in re.findall(r"(\d+)%", lines[0]))
    states(top, 100 - bottom)
    lost = (1 - 1240 / 1754) / 2
    assert top == pytest.approx(100 * lost, abs=1) and 100 - bottom == pytest.approx(top, abs=1)


def test_claims_about_costs(notebook, states):
    tokens = shown(cell(notebook, 'uses = {"photograph"'))
    rows = {name: tokens[name] for name in tokens if "-" in name}
    _, page, four, video = zip(*rows.values(), strict=True)
    assert [n.endswith("*") for n in video] == [True, True, False, False]
    assert [n.endswith("*") for n in four] == [False, True, False, False]
    counts = [whole(n)[0] for n in video]
    states(*counts[:3], min(counts) // 1000 * 1000, max(counts) // 100_000 * 100_000)
    seen = {name: vk.memory.visual_tokens(name, (1024, 768)).tokens for name in (LLAVA, QWEN)}
    llava, qwen = (
        vk.memory.predict(name, "bf16", tokens=9, images=1, image_size=(1024, 768)).by_kind[
            "kv cache"
        ]
        / (seen[name] + 9)
        for name in (LLAVA, QWEN)
    )
    assert (llava, qwen) == (4 * 32 * 32 * 128, 4 * 28 * 4 * 128)  # bytes a token, by hand
    assert {"2,772", "576"} <= set(page)
    states(2772, 576)
    assert 0.5 < 2772 * qwen / (576 * llava) < 0.6  # half of what LLaVA's picture takes


def test_attention_is_more_work_than_the_weights_for_a_long_film(notebook, states):
    table = shown(cell(notebook, "parts = pd"))
    weights, attention = (int(n) for n in table["LLaVA-NeXT-7B"][:2])
    assert attention == round(32 * 4096 * 2 * 116_880**2 / 1e12) > 2 * weights
    own = vk.anatomy(LlavaNextConfig())["language_model"].parameters
    model = 2 * own * 116_880 / 1e12
    states(weights, attention, round(model))
    assert all(int(table[name][2]) < 10 for name in ("SmolVLM2-2.2B", "Qwen2.5-VL-7B"))


def test_each_further_picture_adds_the_same_number_of_tokens(notebook, states):
    (out,) = cell(notebook, "for number in (1, 2, 4, 8)").outputs
    (_, one, held), (_, two, _), *more = map(whole, out.text.splitlines())
    assert len(more) == 2 and all(bytes * one == held * tokens for _, tokens, bytes in more)
    states(two - one, held // one)


def test_claims_about_looking(notebook, states):
    (out,) = cell(notebook, 'print(f"A page').outputs
    gray = int(out.text.partition("On gray: ")[2].partition("%")[0])
    assert 20 <= gray <= 30  # a quarter
    table = shown(cell(notebook, "def shares")).items()
    paid = {name: [int(n) for n in row] for name, row in table if name in vk.tasks.TASKS}
    own, even, empty = zip(*paid.values(), strict=True)
    assert len(paid) == 6 and all(n < share for n, share in zip(own, even, strict=True))
    states(min(own), max(own), min(even), max(even))
    assert paid["multi_image"][0] == paid["multi_image"][2]
    states(max(n - m for n, m in zip(own, empty, strict=True)))


def test_claims_about_changed_pictures(notebook):
    trials = shown(cell(notebook, "def share("))
    trials = {name: [share(s) for s in row] for name, row in trials.items() if "[" in row[0]}
    assert all(changed[0] >= 90 for _, changed in list(trials.values())[:4])
    (before, backwards), (_, mixed) = trials["film backwards"], trials["frames 3, 1, 4, 2"]
    assert backwards[0] < before[0] - 10 and mixed[2] < 50


def test_claims_about_more_than_in_training(notebook):
    beyond = shown(cell(notebook, "pd.Series({label: share"))
    beyond = {name: share(row[0]) for name, row in beyond.items() if "[" in row[0]}
    assert beyond["page, squeezed"][2] < 15 and beyond["page, the tile with the sign"][1] > 80
    assert beyond["page, all four tiles"][2] < 20
    assert beyond["6 letters"] == beyond["7 objects"] == [0, 0, 6]
    assert beyond["5 letters"][1] > 85 and beyond["6 objects"][1] > 85


def test_claims_about_questions_without_an_answer(notebook):
    vain = shown(cell(notebook, "honest = {"))
    none = {n: share(row[1])[0] for n, row in vain.items() if len(row) == 2 and "[" in row[1]}
    assert all(said > 95 for name, said in none.items() if "as in training" in name)
    made_up = {name: 100 - said for name, said in none.items() if "questions," in name}
    charts = [n for name, n in made_up.items() if "chart q" in name]
    signs = [n for name, n in made_up.items() if "ocr q" in name]
    assert charts == [pytest.approx(77, abs=5)] * len(charts) and charts  # three in four
    assert signs == [pytest.approx(93, abs=5)] * len(signs) and signs  # nine in ten


def test_claims_about_empty_pictures(notebook):
    """One after its own costs nearly half of the answers, and three cost two thirds."""
    table = shown(cell(notebook, "found = []"))
    first, last = zip(*([int(n) for n in table[str(49 * n)]] for n in (1, 2, 4, 8)), strict=True)
    assert first[0] == last[0] > 90
    assert 1 - first[1] / first[0] == pytest.approx(0.45, abs=0.05)
    assert 1 - first[2] / first[0] == pytest.approx(2 / 3, abs=0.05)
    assert all(after < before for after, before in zip(first[1:], last[1:], strict=True))
