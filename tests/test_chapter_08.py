"""Chapter 08: runs on a model of another family as well, and says what is so.

That it runs on pebble and prints what is stored in it is nbval's part (`make test`). What it says
of its own outputs is held against them here.
"""

import chapters
import pytest
from chapters import shown

import vlmkit as vk


@pytest.fixture
def notebook():
    return chapters.read("08_uses.ipynb")


def cell(notebook, start):
    """The code cell that begins with `start`."""
    (found,) = (c for c in notebook.cells if c.cell_type == "code" and c.source.startswith(start))
    return found


def share(text):
    """(right, lowest, highest) of a share as the chapter writes it: "84 [74, 90]"."""
    return tuple(int(n) for n in text.replace("[", "").replace("]", "").replace(",", "").split())


@pytest.mark.slow  # chapters 00, 01 and 03 are run so each time
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    start = cell(notebook, "few, rows = ")
    start.source = start.source.replace("few, rows = 20", "few, rows = 2")
    output = chapters.run(notebook, other_family, monkeypatch)
    assert "Backwards:" in output


def test_keeps_to_the_measure_of_a_chapter(notebook):
    # Four ways from a picture to tokens, each written out, come on top of the usual measure.
    chapters.check_measure(notebook, middle=10, lines=150 + 60)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_what_is_said_of_costs_is_so(notebook, said):
    tokens = shown(cell(notebook, 'for label in ("LLaVA'))
    _, page, _, video = zip(*(tokens[name] for name in tokens if "-" in name), strict=True)
    video = [int(n.replace(",", "")) for n in video]
    assert "A minute of video is 5,000 tokens in SmolVLM2" in said and min(video) // 1000 == 5
    assert "over 100,000 in LLaVA-NeXT" in said and max(video) > 100_000
    assert "its page of 2,772 tokens takes half of what LLaVA-1.5's 576 take" in said
    assert {"2,772", "576"} <= set(page)
    kept = {
        which: vk.memory.predict(which, "bf16", tokens=9, images=1, image_size=(1024, 768))
        for which in ("llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2.5-VL-7B-Instruct")
    }
    seen = {which: vk.memory.visual_tokens(which, (1024, 768)).tokens for which in kept}
    llava, qwen = (kept[w].by_kind["kv cache"] / (seen[w] + 9) for w in kept)
    assert 0.5 < 2772 * qwen / (576 * llava) < 0.6
    (out,) = cell(notebook, "for number in (1, 2, 4, 8)").outputs
    counts = [[int(n.replace(",", "")) for n in row.split()[::2]] for row in out.text.splitlines()]
    assert "Each further picture adds 50 tokens" in said and "each token 9,216 bytes" in said
    found = [
        tuple(int(w.replace(",", "")) for w in r.split() if w[0].isdigit())
        for r in out.text.splitlines()
    ]
    assert len(counts) == len(found) == 4
    assert all(held == 9216 * tokens for _, tokens, held in found)
    assert found[1][1] - found[0][1] == 50


def test_what_is_said_of_looking_is_so(notebook, said):
    (out,) = cell(notebook, 'print(f"A page').outputs
    gray = int(out.text.partition("On gray: ")[2].partition("%")[0])
    assert "on gray a quarter" in said and 20 <= gray <= 30
    paid = {
        name: [int(n) for n in row]
        for name, row in shown(cell(notebook, "def to_pic")).items()
        if name in vk.tasks.TASKS
    }
    assert len(paid) == 6 and "falls by eleven points at most" in said
    assert max(own - empty for own, empty in paid.values()) == 11
    assert "about two pictures not at all" in said and len(set(paid["multi_image"])) == 1


def test_what_is_said_of_changed_pictures_is_so(notebook, said):
    trials = shown(cell(notebook, "charts, none = "))
    trials = {name: [share(s) for s in row] for name, row in trials.items() if "[" in row[0]}
    assert "pebble looks at the very bar, at the order of two pictures, and sees" in said
    for name in list(trials)[:4]:
        assert trials[name][1][0] >= 90, name
    (before, backwards), (_, mixed) = trials["film backwards"], trials["frames 3, 1, 4, 2"]
    assert "Backwards it is right less often than forwards" in said
    assert backwards[2] < before[1]
    assert "Mixed frames break it" in said and mixed[2] < 50


def test_what_is_said_of_more_than_in_training_is_so(notebook, said):
    beyond = shown(cell(notebook, "n, pages = "))
    beyond = {name: share(row[0]) for name, row in beyond.items() if "[" in row[0]}
    assert "Squeezed, a page cannot be read; the tile with the sign can" in said
    assert beyond["page, squeezed"][2] < 15 and beyond["page, the tile with the sign"][1] > 80
    assert "All four tiles cannot" in said and beyond["page, all four tiles"][2] < 20
    assert "A sixth letter or a seventh object" in said and "nothing is right at all" in said
    assert beyond["6 letters"][0] == beyond["7 objects"][0] == 0
    assert beyond["5 letters"][1] > 85 and beyond["6 objects"][1] > 85
    vain = shown(cell(notebook, "vain = {}"))
    vain = {name: share(row[1]) for name, row in vain.items() if len(row) == 2 and "[" in row[1]}
    assert "As in training, it says *none* nearly always" in said
    assert all(found[0] > 95 for name, found in vain.items() if "as in training" in name)
    made_up = {name: 100 - found[0] for name, found in vain.items() if "questions," in name}
    assert "makes up an answer three times in four, about a sign where there is none nine" in said
    assert all(n == pytest.approx(77, abs=5) for name, n in made_up.items() if "chart q" in name)
    assert all(n == pytest.approx(93, abs=5) for name, n in made_up.items() if "ocr q" in name)
