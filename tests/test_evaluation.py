"""Asking and scoring, on small random models of several families: no test depends on weights."""

import logging
import runpy
import warnings
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from processors import PROCESSORS
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vlmkit as vk
from vlmkit.anatomy import vision_dtype
from vlmkit.errors import ImageError, QuestionError, TaskError, VlmkitError
from vlmkit.evaluation import Scores, compared, normalize, wilson
from vlmkit.evaluation.prompts import question_inputs

PATCHES, CONTEXT = 4, 512  # of the tiny model: visual tokens an image, and tokens in all
TASKS = ["vqa", "multi_image", "video"]  # one, two and four pictures a question


@pytest.fixture(scope="module")
def processor(llava):
    return AutoProcessor.from_pretrained(llava)


@pytest.fixture(scope="module")
def model(llava):
    """Large weights, so that answers differ between questions. float32, so that they do not depend
    on rounding."""
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    return scramble(model)


def scramble(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.eval().parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def dataset():
    return vk.tasks.dataset(TASKS, 18, seed=5)


def red(size=(84, 84)):
    return Image.new("RGB", size, "red")


def test_ask_is_generate_on_the_chat_template(model, processor):
    """The same answer, written out with transformers alone."""
    content = [{"type": "image", "image": red()}, {"type": "text", "text": "What color is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert vk.ask(model, processor, red(), "What color is it?", max_new_tokens=9) == answer.strip()


def test_every_form_of_image_gives_the_same_answer(model, processor, tmp_path):
    path = tmp_path / "red.png"
    red().save(path)
    array = np.asarray(red())
    forms = [red(), path, str(path), array, array / 255.0, torch.tensor(array).permute(2, 0, 1)]
    forms += [[form] for form in forms]
    answers = {vk.ask(model, processor, form, "What?", max_new_tokens=4) for form in forms}
    assert len(answers) == 1 and answers != {""}


def test_images_of_odd_sizes_are_answered(model, processor):
    for size in ((1, 1), (3, 1), (1, 3), (20_000, 100)):
        assert isinstance(vk.ask(model, processor, red(size), "What?", max_new_tokens=2), str)


def test_several_images_keep_their_order(model, processor):
    blue = Image.new("RGB", (84, 84), "blue")
    first = vk.ask(model, processor, [red(), blue], "Same?", max_new_tokens=6)
    second = vk.ask(model, processor, [blue, red()], "Same?", max_new_tokens=6)
    assert first != second
    assert isinstance(vk.ask(model, processor, [], "No picture?", max_new_tokens=2), str)


def test_a_question_longer_than_the_context(model, processor):
    with pytest.raises(QuestionError, match="shorten the question") as caught:
        vk.ask(model, processor, red(), "What is it? " * 600, max_new_tokens=12)
    assert f"{PATCHES} for 1 image," in str(caught.value)
    assert "500 are available" in str(caught.value)


def test_more_images_than_the_context_holds(model, processor, monkeypatch):
    with pytest.raises(QuestionError, match="use fewer images") as caught:
        vk.ask(model, processor, [red()] * 300, "Which?", max_new_tokens=12)
    assert f"{300 * PATCHES:,} for 300 images" in str(caught.value)
    with pytest.raises(QuestionError, match="ask for a shorter answer"):
        vk.ask(model, processor, red(), "Which?", max_new_tokens=2000)
    # Exactly: the longest prompt that fits is answered, and one token more is an error.
    used = question_inputs(processor, [[red()]], ["Which?"])["input_ids"].shape[1]
    room = CONTEXT - used
    ends = list(range(len(processor.tokenizer)))  # any token ends the answer
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    assert isinstance(vk.ask(model, processor, red(), "Which?", max_new_tokens=room), str)
    with pytest.raises(QuestionError, match=f"{used} tokens"):
        vk.ask(model, processor, red(), "Which?", max_new_tokens=room + 1)


def test_special_tokens_in_a_question_are_only_text(model, processor):
    image_id = model.config.image_token_id
    for typed in ("<image>", "<image><image>", "<|end|>", "<ima<image>ge>", "<|assistant|> red"):
        inputs = question_inputs(processor, [[red()]], [f"What is {typed} here?"])
        plain = question_inputs(processor, [[red()]], ["What?"])
        for token in (image_id, *processor.tokenizer.all_special_ids):
            found, expected = ((i["input_ids"] == token).sum() for i in (inputs, plain))
            assert found == expected
        assert isinstance(vk.ask(model, processor, red(), typed, max_new_tokens=2), str)


def test_bad_input(model, processor, dataset):
    for question in ("", " \n", None, 3):
        with pytest.raises(QuestionError):
            vk.ask(model, processor, red(), question)
    for most in (0, -1, 2.5, True):
        with pytest.raises(VlmkitError, match="max_new_tokens"):
            vk.ask(model, processor, red(), "What?", max_new_tokens=most)
    for nothing in (None, "pebble", model):
        with pytest.raises(VlmkitError, match="processor"):
            vk.ask(model, nothing, red(), "What?")
        with pytest.raises(VlmkitError, match="processor"):
            vk.evaluate(model, nothing, dataset)


def test_sampling_settings_of_a_checkpoint_are_neither_used_nor_warned_about(
    model, processor, caplog, monkeypatch
):
    config = model.generation_config
    expected = vk.ask(model, processor, red(), "What?", max_new_tokens=6)
    settings = {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "num_beams": 2}
    settings |= {"max_length": 20, "pad_token_id": None}
    for name, value in settings.items():
        monkeypatch.setattr(config, name, value)
    before = config.to_dict()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = {vk.ask(model, processor, red(), "What?", max_new_tokens=6) for _ in range(3)}
    assert answers == {expected}
    assert not caplog.records
    assert config.to_dict() == before


def test_modes_are_left_as_they_were(model, processor):
    model.train()
    frozen = model.model.vision_tower.eval()
    try:
        vk.ask(model, processor, red(), "What?", max_new_tokens=2)
        assert model.training and model.model.language_model.layers[0].mlp.training
        assert not frozen.training
    finally:
        model.eval()


@pytest.mark.parametrize("vision", [torch.float32, torch.bfloat16])
def test_pixels_come_in_the_vision_encoders_own_type(model, vision):
    parts = {"language_model": torch.bfloat16, "vision_tower": vision}
    mixed = LlavaForConditionalGeneration._from_config(model.config, dtype=torch.float16)
    for name, dtype in parts.items():
        getattr(mixed.model, name).to(dtype)
    assert vision_dtype(mixed) == vision


def test_a_batch_answers_as_one_by_one(model, processor, dataset):
    one_by_one = [
        vk.ask(model, processor, row["images"], row["question"], max_new_tokens=8)
        for row in dataset
    ]
    assert len(set(one_by_one)) > 9  # else the comparison would mean little
    for batch_size in (1, 4, 64):
        scores = vk.evaluate(model, processor, dataset, batch_size=batch_size, max_new_tokens=8)
        assert list(scores.answers["predicted"]) == one_by_one


def test_an_answer_that_ends_early_is_not_disturbed_by_its_batch(
    model, processor, dataset, monkeypatch
):
    """Every fifth token ends an answer here, so some answers end sooner than others."""
    free = vk.evaluate(model, processor, dataset, max_new_tokens=8).answers["predicted"]
    ends = list(range(0, len(processor.tokenizer), 5))
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    batched = vk.evaluate(model, processor, dataset, max_new_tokens=8).answers["predicted"]
    alone = vk.evaluate(model, processor, dataset, batch_size=1, max_new_tokens=8).answers
    assert list(batched) == list(alone["predicted"])
    assert 0 < (batched == free).sum() < len(free)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's
@pytest.mark.parametrize(
    ("name", "images"),
    [("paligemma", 2), ("blip2", 1), ("idefics3", 2), ("mllama", 1), ("qwen2_vl", 2)],
)
def test_other_families_alone_and_in_batches(family, name, images):
    model, _ = vk.load(family(name), "fp32", processor=False)
    processor = PROCESSORS[name]()
    scramble(model)
    rows = [
        {"images": [red((40, 30))] * images, "question": "What?", "answer": ""},
        {"images": [Image.new("L", (30, 30))] * images, "question": "A longer one?", "answer": ""},
    ]
    alone = [vk.ask(model, processor, r["images"], r["question"], max_new_tokens=5) for r in rows]
    assert len(set(alone)) == 2
    together = vk.evaluate(model, processor, rows, max_new_tokens=5)
    assert list(together.answers["predicted"]) == alone
    with pytest.raises(QuestionError, match="of which 5"):
        vk.ask(model, processor, red(), "?" * 5000, max_new_tokens=5)
    if name == "blip2":
        with pytest.raises(ImageError, match="one image"):
            vk.ask(model, processor, [red(), red()], "What?")


def test_a_processor_whose_prompt_is_unknown(model, processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", None)
    monkeypatch.setattr(processor.tokenizer, "chat_template", None)
    with pytest.raises(VlmkitError, match="LlavaProcessor has no chat template"):
        vk.ask(model, processor, red(), "What?")


def test_a_tokenizer_without_padding(model, llava, dataset):
    processor = AutoProcessor.from_pretrained(llava)
    processor.tokenizer.pad_token = None
    assert isinstance(vk.ask(model, processor, red(), "What?", max_new_tokens=1), str)
    with pytest.raises(VlmkitError, match="batch_size=1"):
        vk.evaluate(model, processor, dataset)


def test_scores_of_known_answers(model, processor, dataset, monkeypatch):
    rows = dataset.to_list()
    dataset = [{**row, "question": f"{i}"} for i, row in enumerate(dataset)]
    wrong = {0, 4, 7, 8}

    def known(model, processor, images, questions, *, max_new_tokens):
        assert len({len(pictures) for pictures in images}) == 1  # padding cannot do this
        rows = [int(question) for question in questions]
        return ["zebra" if i in wrong else f" {dataset[i]['answer'].upper()}. " for i in rows]

    monkeypatch.setattr("vlmkit.evaluation.answers", known)
    scores = vk.evaluate(model, processor, dataset, batch_size=5)
    right = [i not in wrong for i in range(len(rows))]
    assert list(scores.answers["correct"]) == right
    assert list(scores.answers["question"]) == [str(i) for i in range(len(rows))]
    assert scores.accuracy == sum(right) / len(rows)
    assert scores.interval == wilson(sum(right), len(rows))
    assert list(scores.by_task.index) == TASKS and list(scores.by_task["n"]) == [6, 6, 6]
    for task, row in scores.by_task.iterrows():
        of_task = [r for r, source in zip(right, rows, strict=True) if source["task"] == task]
        assert row["accuracy"] == pytest.approx(np.mean(of_task))
    assert scores.by_kind.index.names == ["task", "kind"]
    assert scores.by_kind["n"].sum() == len(rows)
    for text in (str(scores), scores._repr_html_()):
        assert f"{scores.accuracy:.1%}" in text and "multi_image" in text
    assert isinstance(scores, Scores)


def test_a_list_of_rows_without_task_and_kind(model, processor):
    rows = [{"images": [red()], "question": f"Number {i}?", "answer": "one"} for i in range(3)]
    rows[1]["images"] = red()
    scores = vk.evaluate(model, processor, rows)
    assert scores.n == 3 and list(scores.by_task.index) == ["all"]


def test_datasets_that_cannot_be_evaluated(model, processor, dataset):
    def check(data, error, says):
        with pytest.raises(error, match=says):
            vk.evaluate(model, processor, data)

    check(dataset.remove_columns(["answer", "images"]), TaskError, "no column images.*answer")
    check(dataset.select([]), TaskError, "no rows")
    check([], TaskError, "no rows")
    check(datasets.DatasetDict(test=dataset), TaskError, "'test'")
    check(iter([]), TaskError, "no length")
    row = {"images": [red()], "question": "What?", "answer": "red"}
    check([row, {**row, "question": " "}], QuestionError, "Row 1: .*empty")
    check([row, {**row, "images": ["nowhere.png"]}], ImageError, "Row 1: .*nowhere")
    check([row, {**row, "answer": None}], TaskError, "Row 1: ")
    check([row, {**row, "question": "Which? " * 900}], QuestionError, "Row 1: .*tokens")
    for size in (0, 1.5):
        with pytest.raises(TaskError, match="batch_size"):
            vk.evaluate(model, processor, dataset, batch_size=size)


def test_normalize():
    assert normalize(" Red. ") == normalize("red") == "red"
    assert normalize("A  red\ncircle!") == "a red circle"
    assert normalize("1.5") == "1.5" != normalize("15")


@pytest.mark.parametrize(("correct", "n"), [(81, 263), (15, 148), (1, 29), (0, 20), (20, 20)])
def test_wilson_ends_where_the_score_test_does(correct, n):
    """What defines it: the shares p from which the one found is 1.96 standard errors of p away."""
    share = correct / n
    low, high = wilson(correct, n)
    assert 0 <= low <= share <= high <= 1 and low < high
    for p in (low, high):
        if 0 < p < 1:  # at 0 and 1 the interval ends with the scale
            away = abs(share - p) / (p * (1 - p) / n) ** 0.5
            assert away == pytest.approx(1.959964, abs=1e-5)


def test_wilson_of_no_proportion():
    for correct, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError):
            wilson(correct, n)


@pytest.mark.slow
def test_the_benchmark_prints_and_writes_its_tables(llava, tmp_path, capsys, monkeypatch):
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "pebble.py"))["main"]
    monkeypatch.chdir(tmp_path)
    assert benchmark(["--model", str(llava), "--n", "6", "--plan", "bf16"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert benchmark(["--model", str(llava), "--n", "6", "--markdown", "card.md"]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "card.md").read_text()
    assert text in printed
    assert "| family | n | bf16 | recommended |" in text
    kinds = [(task, kind) for task in vk.tasks.TASKS for kind in vk.tasks.KINDS[task]]
    for row in (*vk.tasks.TASKS, *(f"{task} | {kind}" for task, kind in kinds)):
        assert text.count(f"\n| {row} | ") >= 1
    assert "| all | 36 | " in text
    assert benchmark(["--model", str(llava), "--plan", "nf5"]) == 2
    assert "nf5" in capsys.readouterr().err


def test_models_compared_by_task():
    right = pd.DataFrame({"task": ["vqa"] * 4 + ["ocr"], "correct": [True] * 3 + [False, True]})
    table = compared({"a": Scores(right), "b": Scores(right.assign(correct=False))})
    assert table.loc["a"].to_dict() == {"vqa": "75 [30, 95]", "ocr": "100 [21, 100]"}
    assert table.loc["b", "vqa"].startswith("0 [0, ")


# --- sampling -------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_answer(model, processor):
    def ask(**how):
        return vk.ask(model, processor, red(), "What?", max_new_tokens=6, **how)

    before = torch.random.get_rng_state()
    settings = {"do_sample": True, "temperature": 20, "top_k": 0, "top_p": 1}
    drawn = [ask(**settings, seed=seed) for seed in (*range(5), *range(5))]
    assert drawn[:5] == drawn[5:] and len(set(drawn)) > 1
    assert torch.equal(torch.random.get_rng_state(), before)
    likeliest = ask()
    for sharp in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.001}):
        assert ask(do_sample=True, seed=1, **sharp) == likeliest
    torch.manual_seed(3)
    free = ask(**settings)
    torch.manual_seed(3)
    assert ask(**settings) == free


def test_evaluation_is_greedy_whatever_a_checkpoint_says(model, processor, dataset, monkeypatch):
    rows = dataset.select(range(6))
    expected = vk.evaluate(model, processor, rows).answers["predicted"].tolist()
    for name, value in {"do_sample": True, "temperature": 50.0, "top_k": 0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    for _ in range(2):
        assert vk.evaluate(model, processor, rows).answers["predicted"].tolist() == expected


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"seed": 1, "top_p": 0.9},
        {"do_sample": 1},
        *({"do_sample": True, "temperature": t} for t in (0, -1, float("nan"), float("inf"), "1")),
        *({"do_sample": True, "top_p": p} for p in (0, 1.1, True)),
        *({"do_sample": True, "top_k": k} for k in (-1, 2.5, 10**12)),
        *({"do_sample": True, "seed": s} for s in (-1, 0.5, 2**32, "1")),
    ],
    ids=str,
)
def test_sampling_that_cannot_be(model, processor, given):
    with pytest.raises(VlmkitError, match=[*given][-1]):
        vk.ask(model, processor, red(), "What?", **given)


def test_rows_in_another_layout_are_read_by_from_dataset(model, processor):
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ],
            "images": [red()],
        }
    ]
    with pytest.raises(TaskError, match=r"has messages, images.*from_dataset\(dataset\)"):
        vk.evaluate(model, processor, rows)
    assert vk.evaluate(model, processor, vk.tasks.from_dataset(rows)).n == 1


def test_a_checkpoint_that_leaves_nothing_to_draw(model, processor, monkeypatch):
    """Qwen2-VL's own settings of sampling are greedy decoding by another name."""
    own = {"temperature": 0.01, "top_p": 0.001, "top_k": 1}
    for name, value in own.items():
        monkeypatch.setattr(model.generation_config, name, value)
    with pytest.raises(
        VlmkitError, match="temperature 0.01, top_p 0.001.*Give temperature and top_p "
    ):
        vk.ask(model, processor, red(), "What?", do_sample=True, top_k=50)
    drawn = {"do_sample": True, "temperature": 20.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
    assert len({vk.ask(model, processor, red(), "What?", seed=s, **drawn) for s in range(4)}) > 1


# --- two models on the same questions -------------------------------------------------------------


def test_paired_counts_what_changed_and_judges_by_the_exact_test():
    before = [True] * 300 + [False] * 300
    five, six = before.copy(), before.copy()
    five[:5], six[:6] = [False] * 5, [False] * 6
    found = vk.evaluation.paired(before, five)
    assert (found.lost, found.won, found.n, found.difference) == (5, 0, 600, -5 / 600)
    assert found.p == 2 / 2**5 and not found.differ and "chance alone could" in str(found)
    found = vk.evaluation.paired(before, six)
    assert found.p == 2 / 2**6 and found.differ and "p = 0.031, more than chance" in str(found)
    same = vk.evaluation.paired(before, before)
    assert same.p == 1 and not same.differ and same.interval == (0, 0)


def test_paired_is_for_the_same_questions():
    rows = [{"images": [], "question": str(n), "answer": "a"} for n in range(3)]
    right, wrong = vk.evaluation.scored(rows, ["a"] * 3), vk.evaluation.scored(rows, ["b"] * 3)
    assert vk.evaluation.paired(right, wrong).lost == 3
    turned = vk.evaluation.scored(rows[::-1], ["a"] * 3)
    for other in (turned, [True] * 2):
        with pytest.raises(TaskError, match="not the same questions"):
            vk.evaluation.paired(right, other)
