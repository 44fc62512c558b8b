"""Chat templates of all makes: the right tokens are learnt, or an error says what is wrong."""

import copy
import threading
import time

import pytest
import tiny
from PIL import Image

import vlmkit as vk
from vlmkit.errors import FinetuningError, VlmkitError
from vlmkit.evaluation import prompts, templates
from vlmkit.evaluation.asking import Answer, prepared, texts_of
from vlmkit.evaluation.prompts import after_thoughts
from vlmkit.finetuning import Collator
from vlmkit.finetuning.collating import IGNORED
from vlmkit.loading.processors import load_processor

pytestmark = pytest.mark.usefixtures("one_thread")

ROW = {"images": [Image.new("RGB", (24, 24), "red")], "question": "Which?", "answer": "red"}
TALK = [
    {"role": "user", "content": [{"type": "image"}, "Which?"]},
    {"role": "assistant", "content": "<think>red, or blue</think>red"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "<think>hm</think>e"},
]
OPENS = tiny.TEMPLATE.replace("assistant: {% endif", "assistant: <think>\n{% endif")
# As Qwen3's: thoughts only in the last answer
THINKS = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif message['role'] == 'assistant' %}"
    "{% set thought = '' %}{% set text = part['text'] %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "{% if loop.last and message == messages[-1] %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ text }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXTS = (  # takes texts, and no lists of parts
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PRINTS = TEXTS.replace(" + ", " ~ ")  # of a list of parts it would print the list
# LLaVA-1.5's: no special token between turns
WORDS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}"
    "{% endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_processor(tiny.llava(tmp_path_factory.mktemp("llava")))


def with_template(base, template, where="processor"):
    processor = copy.deepcopy(base)
    processor.chat_template = processor.tokenizer.chat_template = None
    owner = processor if where == "processor" else processor.tokenizer
    owner.chat_template = template
    return processor


def learnt(processor, row=ROW):
    batch = Collator(processor)([row])
    return processor.tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != IGNORED])


@pytest.mark.parametrize("where", ["processor", "tokenizer"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (tiny.TEMPLATE, "red<end>"),
        (TEXTS, "red<end>"),
        (PRINTS, "red<end>"),
        (WORDS, " red<end>"),
        (THINKS, "<think>\n\n</think>\n\nred<end>"),
        ({"default": tiny.TEMPLATE, "tool_use": "x"}, "red<end>"),
        (
            tiny.TEMPLATE.replace("{% if add_generation_prompt %}assistant: {% endif %}", ""),
            "red<end>",
        ),
        (OPENS.replace("<think>\n", "<think>\n\n</think>\n\n"), "red<end>"),
        (tiny.TEMPLATE.replace("<end>\n", "\n"), "red<end>"),
    ],
)
def test_the_answer_is_learnt_behind_the_prompt_of_asking(base, template, expected, where):
    processor = with_template(base, template, where)
    batch = Collator(processor)([ROW])
    ids = batch["input_ids"][0]
    assert processor.tokenizer.decode(ids[batch["labels"][0] != IGNORED]) == expected
    asked = prompts.question_inputs(processor, [ROW["images"]], [ROW["question"]])["input_ids"][0]
    assert (asked == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 4
    assert ids[: len(asked)].equal(asked)
    assert (batch["labels"][0][: len(asked)] == IGNORED).all()
    assert (batch["labels"][0][len(asked) :] != IGNORED).all()


def test_a_prompt_that_training_would_not_see_is_an_error(base):
    with pytest.raises(FinetuningError, match="another prompt than it is asked with"):
        learnt(with_template(base, OPENS))
    row = ROW | {"answer": "<think>\nhm\n</think>\n\nred"}
    assert learnt(with_template(base, OPENS), row) == "hm\n</think>\n\nred<end>"
    with pytest.raises(FinetuningError, match="another prompt"):
        learnt(with_template(base, OPENS.replace("assistant: <think>\n", "ASSISTANT: ")))


def test_answers_of_a_conversation(base):
    row = {"images": ROW["images"], "messages": TALK}
    plain = [turn | {"content": after_thoughts(turn["content"])} for turn in TALK[1::2]]
    short = row | {"messages": [TALK[0], plain[0], TALK[2], plain[1]]}
    assert learnt(with_template(base, tiny.TEMPLATE), short) == "red<end>e<end>"
    assert learnt(with_template(base, TEXTS), short) == "red<end>e<end>"
    assert learnt(with_template(base, WORDS), short) == " red e<end>"
    both = "<think>red, or blue</think>red<end><think>hm</think>e<end>"
    assert learnt(with_template(base, tiny.TEMPLATE), row) == both
    with pytest.warns(UserWarning, match="leaves out the thoughts"):
        found = learnt(with_template(base, THINKS), row)
    assert found == "red<end><think>\nhm\n</think>\n\ne<end>"
    thinking = dict(TALK[1], content="red", reasoning_content="hm")
    row = row | {"messages": [TALK[0], thinking]}
    assert learnt(with_template(base, THINKS), row) == "<think>\nhm\n</think>\n\nred<end>"


BROKEN = {
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError"),
    "undefined": ("{{ messages[0].foo.bar }}", "UndefinedError"),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
    "raises": ("{{ raise_exception('not so') }}", "not so"),
    "unsafe": ("{{ ''.__class__.__mro__ }}x", "chat template"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "constant": ("hello", "leaves out the question"),
    "no picture": (tiny.TEMPLATE.replace("<image>", ""), "leaves out the picture"),
    "a number": (7, "is no text but a int"),
    "no default": ({"tool_use": "x"}, "none is called default"),
    "memory": ("{{ 'a' * 10**10 }}", "memory"),
    "memory by filter": ("{{ 'a'|center(10**11) }}", "memory"),
    "memory by doubling": (
        "{% set n = namespace(x='a') %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "memory|not done after",
    ),
    "loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "not done after",
    ),
    "number": ("{{ 10**10**10 }}", "chat template"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_template_is_an_error_and_no_hang(base, kind, monkeypatch):
    if kind in ("loop", "memory by doubling"):
        monkeypatch.setattr(templates, "SECONDS", 0.4)
    template, says = BROKEN[kind]
    start = time.monotonic()
    with pytest.raises(VlmkitError, match=says):
        prompts.prompts(with_template(base, template), [ROW["images"]], ["Which?"])
    assert time.monotonic() - start < 10


def test_a_loop_that_begins_later_is_stopped_in_any_thread(base, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.4)
    loop = BROKEN["loop"][0]
    slow = tiny.TEMPLATE + f"{{% if messages|length > 1 %}}{loop}{{% endif %}}"
    processor, errors = with_template(base, slow), []

    def train():
        try:
            Collator(processor)([ROW])
        except VlmkitError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert len(errors) == 2 and all("not done after" in error for error in errors)


def test_a_template_that_leaves_out_what_is_said(base):
    only_user = tiny.TEMPLATE.replace(
        "{{ part['text'] }}", "{% if message['role'] != 'assistant' %}{{ part['text'] }}{% endif %}"
    )
    with pytest.raises(FinetuningError, match="leaves out what the assistant says: 'red'"):
        learnt(with_template(base, only_user))
    no_system = tiny.TEMPLATE.replace(
        "{% for message in messages %}",
        "{% for message in messages if message['role'] != 'system' %}",
    )
    row = {"messages": [{"role": "system", "content": "Be brief."}, *TALK], "images": ROW["images"]}
    with pytest.raises(FinetuningError, match="leaves out what the system says: 'Be brief"):
        learnt(with_template(base, no_system), row)


# --- answers of models that think -----------------------------------------------------------------


def test_thoughts_are_no_part_of_an_answer():
    for text in ("<think>It is blue.</think>\n\nred", "blue?</think>red", "[THINK]x[/THINK]red"):
        assert after_thoughts(text) == "red"
    assert after_thoughts(" red ") == "red" and after_thoughts("<think>so") == "<think>so"


def test_tokens_of_thoughts_are_kept_in_the_text(base):
    processor = copy.deepcopy(base)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokens = processor.tokenizer(["<think>a<end></think> red<end>"], return_tensors="pt")
    (text,) = texts_of(processor, {"input_ids": tokens["input_ids"][:, :0]}, tokens["input_ids"])
    assert text == "<think>a</think> red" and after_thoughts(text) == "red"
    assert learnt(processor, ROW | {"answer": text}) == text + "<end>"


def test_answers_after_thoughts_are_scored_and_those_at_the_limit_counted(monkeypatch):
    cut = Answer("<think>It is")
    cut.at_limit = True
    replies = [Answer("<think>Blue? No.</think> Red."), cut, Answer("red")]
    monkeypatch.setattr("vlmkit.evaluation.answers", lambda *_, **__: replies)
    rows = [{"images": [], "question": f"Which {i}?", "answer": "red"} for i in range(3)]
    scores = vk.evaluate(None, vk.load("pebble")[1], rows)
    assert scores.answers["correct"].tolist() == [True, False, True]
    assert scores.at_limit == 1 and "1 ended at the limit" in repr(scores)


def test_an_answer_knows_that_it_ended_at_the_limit():
    model, processor = vk.load("pebble")
    row = vk.tasks.dataset("vqa", 1)[0]
    whole = vk.ask(model, processor, row["images"], row["question"])
    assert whole == row["answer"] and not whole.at_limit
    inputs = prepared(model, processor, [row["images"]], [row["question"]], 1)
    assert inputs["input_ids"].shape[0] == 1
    cut = vk.ask(model, processor, row["images"], "Describe the picture.", max_new_tokens=1)
    assert cut.at_limit
