"""Questions that suit a model: the usual ones for pebble, few and about handwriting for cobble, and
in the model's own words where it has others. Every chapter runs to its end with cobble."""

import chapters
import pytest
import torch

import vlmkit as vk
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.course import suited

FETCHED = BUNDLED["cobble"].is_current
SAYS = {
    "00": "answers",
    "01": "projected tokens",
    "03": "model.vision_tower",
    "04": "bytes of keys and values, predicted and measured",
    "05": "int2: most is lost by",
    "07": "hurts most",
    "09": "Backwards:",
    "11": "predicted",
}
"""Chapters that load what VLMKIT_MODEL names, and a word of what they show at last."""

ADAPTED = ("03", "04", "05", "07", "11")
"""Those of them that have to say something about a model with adapters."""


def chapter(number):
    (path,) = chapters.FOLDER.glob(f"{number}_*.ipynb")
    return chapters.read(path.name)


def test_pebble_is_asked_what_it_was_always_asked():
    for n in (300, 48):
        asked = vk.course.questions("pebble", n, seed=2)
        drawn = vk.tasks.dataset("all", n=n, seed=2)
        assert asked._fingerprint == drawn._fingerprint and len(asked) == n
    assert vk.course.number("pebble", 20, least=2) == 20
    model, processor = vk.load("pebble")
    assert vk.course.in_its_words(model, processor, asked) is asked
    assert vk.course.without_adapters(model) is model


def test_a_large_model_is_asked_less_on_a_cpu(monkeypatch, other_family):
    llama = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    numbers = [vk.course.number(n, 600) for n in (other_family, "cobble", llama)]
    assert numbers == [600, 600 * suited.SMALL // BUNDLED["cobble"].parameters, suited.FEWEST]
    assert vk.course.number(llama, 5) == 5 and vk.course.number("cobble", 20, least=2) == 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert vk.course.number("cobble", 600) == 600
    assert len(vk.course.questions("cobble", 600, seed=1)) == 597  # there are no more


@pytest.mark.parametrize("name", ["cobble", "cobble-chat"])
def test_cobble_is_asked_about_handwriting(name, tmp_path):
    asked = vk.course.questions(name, 300, seed=1)
    assert set(asked["task"]) == {"handwriting"} and len(asked) == suited.FEWEST
    copied = tmp_path / "mine"
    copied.symlink_to(BUNDLED[name].config_folder)
    assert set(vk.course.questions(str(copied), 300, seed=1)["task"]) == {"handwriting"}


def test_own_words_count_as_right_where_the_expected_ones_are_never_said(capsys):
    """pebble knows its drawings. The expected answers are made into ones that it never gives."""
    model, processor = vk.load("pebble", "bf16")
    asked = vk.tasks.dataset("all", n=24, seed=3)
    said = vk.evaluate(model, processor, asked).answers["predicted"].tolist()
    wrong = asked.map(lambda row: {"answer": f"It is {row['answer']}."})
    own = vk.course.in_its_words(model, processor, wrong)
    assert own["answer"] == said and own["question"] == asked["question"]
    assert "0% of the expected answers" in capsys.readouterr().out
    assert vk.evaluate(model, processor, own).accuracy == 1
    few = wrong.select(range(12)).to_list() + asked.select(range(12, 24)).to_list()
    half = wrong.from_list(few, features=wrong.features)
    assert vk.course.in_its_words(model, processor, half) is half  # half of them is enough


def test_answers_that_are_cut_off_are_no_judge(monkeypatch):
    model, processor = vk.load("pebble", "bf16")
    asked = vk.tasks.dataset("caption", n=2, seed=3).map(lambda row: {"answer": "a"})
    monkeypatch.setattr(suited, "ENDS_WITHIN", 1)
    with pytest.raises(vk.VlmkitError, match="nothing can be compared"):
        vk.course.in_its_words(model, processor, asked)


def test_the_list_of_chapters_is_complete():
    """A chapter that loads its own model says so."""
    loads = set()
    for path in chapters.FOLDER.glob("*.ipynb"):
        if "vk.default_model()" in "\n".join(chapters.sources(chapters.read(path.name), "code")):
            loads.add(path.name[:2])
    assert loads == set(SAYS)


@pytest.mark.skipif(not FETCHED, reason="cobble is not in the cache: run vlmkit fetch cobble")
@pytest.mark.parametrize("model", ["cobble", "cobble-chat"])
def test_the_live_cell_of_chapter_11_with_cobble(model, monkeypatch):
    monkeypatch.setenv("VLMKIT_MODEL", model)
    names = {"vk": vk, "torch": torch}
    exec(chapters.cell(chapter("11"), "name, plan = ").source, names)
    assert names["given"] == names["expected"] > 1e8


def test_adapters_are_taken_off_and_nothing_else_is_left_of_them(capsys):
    plain, _ = vk.load("pebble", "nf4")
    wanted = {name: p.requires_grad for name, p in plain.named_parameters()}
    adapted = vk.finetuning.add_adapters(plain, language_model=vk.LoRA(r=2))
    suited._say_once.cache_clear()
    bare = vk.course.without_adapters(adapted)
    assert {name: p.requires_grad for name, p in bare.named_parameters()} == wanted
    assert capsys.readouterr().out.count("adapters already") == 1


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED, reason="cobble is not in the cache: run vlmkit fetch cobble")
@pytest.mark.parametrize("number", SAYS)
def test_a_chapter_runs_to_its_end_with_cobble(number, monkeypatch):
    assert SAYS[number] in chapters.run(chapter(number), "cobble", monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(not FETCHED, reason="cobble is not in the cache: run vlmkit fetch cobble")
@pytest.mark.parametrize("number", ADAPTED)
def test_a_chapter_runs_to_its_end_with_adapters(number, monkeypatch):
    shown = chapters.run(chapter(number), "cobble-chat", monkeypatch)
    assert SAYS[number] in shown and ("adapters already" in shown) == (number != "11")
