"""Chapter 09: it runs on another family, and its claims about its own outputs are true."""

import chapters
import pytest
from chapters import cell, shown

import vlmkit as vk

LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct"


def whole(text):
    """The whole numbers of a text."""
    return [int(word.replace(",", "")) for word in text.split() if word[0].isdigit()]


def share(text):
    """[right, lowest, highest] of a share as the chapter writes it: "84 [74, 90]"."""
    return [int(n) for n in text.replace("[", "").replace("]", "").replace(",", "").split()]


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    chapters.replace(notebook, ("few, rows = 20", "few, rows = 2"))
    assert "Backwards:" in chapters.run(notebook, other_family, monkeypatch)


def test_claims_about_costs(notebook, states):
    tokens = shown(cell(notebook, 'for label in ("LLaVA'))
    _, page, _, video = zip(*(tokens[name] for name in tokens if "-" in name), strict=True)
    video = [whole(n)[0] for n in video]
    states(min(video) // 1000 * 1000, max(video) // 100_000 * 100_000)
    seen = {name: vk.memory.visual_tokens(name, (1024, 768)).tokens for name in (LLAVA, QWEN)}
    llava, qwen = (
        vk.memory.predict(name, "bf16", tokens=9, images=1, image_size=(1024, 768)).by_kind[
            "kv cache"
        ]
        / (seen[name] + 9)
        for name in (LLAVA, QWEN)
    )
    assert {"2,772", "576"} <= set(page)
    states(2772, 576)
    assert 0.5 < 2772 * qwen / (576 * llava) < 0.6  # half of what LLaVA's picture takes


def test_each_further_picture_adds_the_same_number_of_tokens(notebook, states):
    (out,) = cell(notebook, "for number in (1, 2, 4, 8)").outputs
    (_, one, held), (_, two, _), *more = map(whole, out.text.splitlines())
    assert len(more) == 2 and all(bytes * one == held * tokens for _, tokens, bytes in more)
    states(two - one, held // one)


def test_claims_about_looking(notebook, states):
    (out,) = cell(notebook, 'print(f"A page').outputs
    gray = int(out.text.partition("On gray: ")[2].partition("%")[0])
    assert 20 <= gray <= 30  # a quarter
    table = shown(cell(notebook, "def to_pic")).items()
    paid = {name: [int(n) for n in row] for name, row in table if name in vk.tasks.TASKS}
    assert len(paid) == 6 and len(set(paid["multi_image"])) == 1
    states(max(own - empty for own, empty in paid.values()))


def test_claims_about_changed_pictures(notebook):
    trials = shown(cell(notebook, "charts, none = "))
    trials = {name: [share(s) for s in row] for name, row in trials.items() if "[" in row[0]}
    assert all(changed[0] >= 90 for _, changed in list(trials.values())[:4])
    (before, backwards), (_, mixed) = trials["film backwards"], trials["frames 3, 1, 4, 2"]
    assert backwards[2] < before[1] and mixed[2] < 50


def test_claims_about_more_than_in_training(notebook):
    beyond = shown(cell(notebook, "n, pages = "))
    beyond = {name: share(row[0]) for name, row in beyond.items() if "[" in row[0]}
    assert beyond["page, squeezed"][2] < 15 and beyond["page, the tile with the sign"][1] > 80
    assert beyond["page, all four tiles"][2] < 20
    assert beyond["6 letters"][0] == beyond["7 objects"][0] == 0
    assert beyond["5 letters"][1] > 85 and beyond["6 objects"][1] > 85


def test_claims_about_questions_without_an_answer(notebook):
    vain = shown(cell(notebook, "vain = {}"))
    none = {n: share(row[1])[0] for n, row in vain.items() if len(row) == 2 and "[" in row[1]}
    assert all(said > 95 for name, said in none.items() if "as in training" in name)
    made_up = {name: 100 - said for name, said in none.items() if "questions," in name}
    charts = [n for name, n in made_up.items() if "chart q" in name]
    signs = [n for name, n in made_up.items() if "ocr q" in name]
    assert charts == [pytest.approx(77, abs=5)] * len(charts) and charts  # three in four
    assert signs == [pytest.approx(93, abs=5)] * len(signs) and signs  # nine in ten
