"""How cobble is made: pictures and text as tensors, instructions, stages; a killed run ends as an
unbroken one.

The stages are trained with a tiny language model on random pictures, for a few steps each.
"""

import copy
import dataclasses
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cobble import CONTENT, FETCHED, small_config, small_language_model

import vlmkit as vk
from vlmkit.errors import VlmkitError
from vlmkit.folders import cache_folder
from vlmkit.models.cobble import (
    arrays,
    conversations,
    fetching,
    loop,
    own_words,
    recipe,
    tensors,
    train,
    vision,
)
from vlmkit.models.cobble import instructions as ins
from vlmkit.tasks.real import DIGITS, THINGS, read_digits, read_easy_vqa

# --- pictures and text as tensors -----------------------------------------------------------------


def small_processor():
    return recipe.build_processor(recipe.with_image_token(small_language_model()[1]))


def learned_processor():
    """A processor whose tokenizer has merged letters into words, as the real one has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", recipe.UNUSED]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    texts = [recipe.CHAT_TEMPLATE, *ins.TEXT_PROMPTS, "\n\n\n a\n b\n\n"]
    backend.train_from_iterator([*texts, "user\nWhat", "assistant\nThis"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return recipe.build_processor(recipe.with_image_token(tokenizer))


def fetched_processor():
    return vk.load("cobble-bf16", "bf16")[1]


PROCESSORS = {"letters": small_processor, "learned": learned_processor}
if FETCHED:
    PROCESSORS["fetched"] = fetched_processor


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]()


def conversation(question, picture, answer=None):
    content = [{"type": "image"}] * picture + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def ids_of(processor, question, picture, answer=None):
    messages = conversation(question, picture, answer)
    text = processor.apply_chat_template(messages, add_generation_prompt=answer is None)
    images = [Image.new("RGB", (32, 32))] if picture else None
    return processor(images=images, text=text).input_ids[0]


def asked():
    """(question, answer) of every source that training has, and texts that it has not."""
    rng, rows = random.Random(0), []
    for label in range(10):
        rows += [ins.about_photograph(label, rng, kind) for kind in ins.USED]
        rows += [ins.about_digit(label, rng, kind) for kind in ins.DIGIT_QUESTIONS]
        rows += [(question, ins.FACTS[question](THINGS[label])) for question in ins.FACTS]
        rows += [tuple(row[1:]) for row in arrays.draw(label)[2]]
    rows += [(question, "It is a thing.") for question in ins.KNOWLEDGE]
    rows += [(question, "Paris.\n- is it?") for question in ins.TEXT_PROMPTS[::20]]
    odd = ("", " ", "\n", " \n what?", "\n\n\nx", "Où est le chat? 犬 🦊", "12 + 34 =", "a" * 500)
    return [*rows, *((text, "none") for text in odd)]


@pytest.mark.parametrize("picture", [True, False])
def test_prompts_are_those_of_the_processor(processor, picture):
    prompts = tensors.Prompts(processor.tokenizer)
    for question, _ in asked():
        assert prompts.prompt(question, picture) == ids_of(processor, question, picture), question


def test_a_batch_is_what_the_processor_makes_of_each_row(processor):
    rows = [(*pair, i % 3 > 0) for i, pair in enumerate(asked())]
    prompts = tensors.Prompts(processor.tokenizer)
    batch = prompts.training_batch(rows, torch.device("cpu"))
    assert {t.shape for t in batch.values()} == {(len(rows), batch["labels"].shape[1])}
    end = processor.tokenizer.encode("\n", add_special_tokens=False)
    for i, (question, answer, picture) in enumerate(rows):
        ids, mask, labels = (batch[key][i] for key in ("input_ids", "attention_mask", "labels"))
        whole = ids_of(processor, question, picture, answer)
        assert ids[mask == 1].tolist() + end == whole
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # the padding is on the right
        start = len(prompts.prompt(question, picture))
        learned = [*range(start, int(mask.sum()))]
        assert (labels != tensors.IGNORED).nonzero().flatten().tolist() == learned
        assert labels[learned].tolist() == ids[learned].tolist()
        text = processor.tokenizer.decode(labels[learned].tolist(), skip_special_tokens=False)
        assert text == answer + recipe.END


@pytest.mark.parametrize(
    ("kind", "most", "by_one", "by_more"),
    [
        ("muted", 2, 0.006, 2e-5),
        ("drawings", 0, 0, 0),
        ("digits", 2, 0.008, 2e-4),
        ("easy_vqa", 1, 0.001, 0),
    ],
)
def test_pixel_values_are_nearly_those_of_the_processor(kind, most, by_one, by_more):
    """Pillow computes with whole numbers, so a few values differ by a step or two of 255."""
    rng = np.random.default_rng(0)
    if kind == "muted":
        pictures = rng.integers(70, 186, (20, 32, 32, 3), dtype=np.uint8)
    elif kind == "drawings":  # they have 84 x 84 pixels already
        pictures = np.stack([arrays.draw(i)[0] for i in range(3)])
    elif kind == "digits":
        pictures = read_digits("test")[0][:100]
    else:
        pytest.importorskip("easy_vqa")
        pictures = read_easy_vqa("test")[0][:50]
    processor = small_processor().image_processor
    images = [Image.fromarray(picture) for picture in pictures]
    theirs = processor(images, return_tensors="pt").pixel_values
    ours = tensors.pixel_values(torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2))
    steps = ((ours - theirs) * 127.5).round().abs()
    assert steps.max() <= most
    assert (steps > 0).float().mean() <= by_one
    assert (steps > 1).float().mean() <= by_more


def test_varied_pictures_stay_pictures():
    torch.manual_seed(0)
    photographs = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    varied = tensors.varied_photographs(photographs)
    assert varied.shape == photographs.shape
    assert varied.min() >= 0 and varied.max() <= 255
    assert not torch.equal(varied, tensors.varied_photographs(photographs))
    digits = torch.from_numpy(read_digits("train")[0][:64].transpose(0, 3, 1, 2).copy())
    moved = tensors.varied_digits(digits)
    assert moved.shape == (64, 3, 84, 84)
    assert moved.abs().max() <= 1
    assert moved[:, :, 0, 0].median() == 1  # white paper


def tiny_model(monkeypatch):
    monkeypatch.setattr(recipe, "build_config", small_config)
    language_model, tokenizer = small_language_model()
    return recipe.build_model(language_model).bfloat16(), recipe.with_image_token(tokenizer)


def test_the_loss_is_that_of_transformers_over_the_answers(monkeypatch):
    model, tokenizer = tiny_model(monkeypatch)
    model.float()
    rows = [("What is this?", "a cat", True), ("Is it a dog?", "no", True)]
    batch = tensors.Prompts(tokenizer).training_batch(rows, torch.device("cpu"))
    pixels = torch.rand(2, 3, 84, 84)
    with torch.no_grad():
        loss, right = tensors.answer_loss(model, batch, pixels)
        theirs = model(**batch, pixel_values=pixels)
    torch.testing.assert_close(loss, theirs.loss)
    found = theirs.logits.argmax(-1)[:, :-1]
    labels = batch["labels"][:, 1:]
    whole = ((found == labels) | (labels == tensors.IGNORED)).all(1)
    assert right == whole.float().mean()


def test_answers_do_not_depend_on_the_batch(monkeypatch):
    model, tokenizer = tiny_model(monkeypatch)
    model.float()
    questions = ["What is this?", "Is this a very long question about a picture?", "Why?"]
    pixels = torch.rand(3, 3, 84, 84)
    together = tensors.answers(model, tokenizer, questions, pixels, max_new_tokens=4)
    alone = [
        tensors.answers(model, tokenizer, [q], pixels[i : i + 1], max_new_tokens=4)[0]
        for i, q in enumerate(questions)
    ]
    assert together == alone
    assert together == tensors.answers(
        model, tokenizer, questions, pixels, max_new_tokens=4, batch_size=2
    )


# --- instructions ---------------------------------------------------------------------------------


def test_training_never_asks_the_unseen_questions():
    used = {
        q for phrasings in (ins.USED, ins.DIGIT_QUESTIONS) for qs in phrasings.values() for q in qs
    }
    used |= {*ins.KNOWLEDGE, *ins.FACTS, *ins.TEXT_PROMPTS}
    unseen = {q for qs in ins.UNSEEN.values() for q in qs}
    assert not used & unseen
    assert ins.UNSEEN.keys() == ins.USED.keys()
    assert all(len(set(qs)) == len(qs) for p in (ins.USED, ins.UNSEEN) for qs in p.values())
    rng = random.Random(0)
    # Filled in with a name, two phrasings could still become the same question.
    asked_in_training = {ins.about_photograph(i % 10, rng)[0] for i in range(4000)}
    asked_later = {ins.about_photograph(i % 10, rng, phrasings=ins.UNSEEN)[0] for i in range(2000)}
    assert not asked_in_training & asked_later


@pytest.mark.parametrize("phrasings", [ins.USED, ins.UNSEEN], ids=["used", "unseen"])
@pytest.mark.parametrize("label", range(10), ids=THINGS)
def test_answers_about_photographs_are_right(label, phrasings):
    rng = random.Random(label)
    for kind in phrasings:
        for _ in range(30):
            question, answer = ins.about_photograph(label, rng, kind, phrasings)
            if kind in (ins.YES_NO, ins.YES_NO_WORD):
                named = [t for t in THINGS if re.search(rf"\b{t}\b", question)]
                assert ins.says_yes(answer) is (named == [THINGS[label]])
                assert len(named) == 1
            else:
                assert ins.is_right(answer, THINGS[label])
            one_word = kind in (ins.WORD, ins.YES_NO_WORD)
            assert one_word == (len(answer.split()) == 1)


@pytest.mark.parametrize("label", range(10))
def test_answers_about_digits_are_right(label):
    rng = random.Random(label)
    for kind in ins.DIGIT_QUESTIONS:
        for _ in range(20):
            question, answer = ins.about_digit(label, rng, kind)
            if kind in (ins.YES_NO, ins.YES_NO_WORD):
                assert ins.says_yes(answer) is (str(label) in question)
            else:
                assert ins.is_right(answer, DIGITS[label], DIGITS)


@pytest.mark.parametrize("about", [ins.about_photograph, ins.about_digit])
def test_yes_and_no_are_equally_frequent(about):
    rng = random.Random(0)
    for label in range(10):
        yes = sum(ins.says_yes(about(label, rng, ins.YES_NO)[1]) for _ in range(1000))
        assert 430 < yes < 570  # 4.4 standard deviations
    wrong = [about(0, rng, ins.YES_NO)[0] for _ in range(4000)]
    names = [name for name in (*THINGS, *DIGITS) if any(f" {name}" in q for q in wrong)]
    assert len(names) == 10  # every other name is asked about


RIGHT = ["a cat", "Cat.", "CATS", "This is a cat.", "It's a cat, of course", "cat, cat, cat"]
WRONG = [
    "a cat and a dog",
    "a catalog",
    "It is not a dog, it is a cat",
    "tomcat",
    "",
    "a bird",
    "It is in the category of cats and dogs",
    "c a t",
]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers(answer):
    assert ins.is_right(answer, "cat")


@pytest.mark.parametrize("answer", WRONG)
def test_wrong_answers(answer):
    assert not ins.is_right(answer, "cat")


def test_digits_in_answers():
    assert ins.is_right("The digit is 7.", "7", DIGITS)
    assert ins.is_right("7", "7", DIGITS)
    for answer in ("17", "7 or 1", "seven", "It is 71.", "3"):
        assert not ins.is_right(answer, "7", DIGITS)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, this is a cat.", True),
        ("yes", True),
        (" YES!", True),
        ("No, this is a dog.", False),
        ("no.", False),
        ("Nothing", None),
        ("Yesterday", None),
        ("None", None),
        ("This is a cat. Yes.", None),
        ("", None),
    ],
)
def test_yes_and_no(answer, yes):
    assert ins.says_yes(answer) is yes


def test_facts_come_from_the_language_model_or_from_the_table():
    answers = {question: f"about {question}" for question in ins.knowledge_prompts()}
    rng = random.Random(0)
    for label, thing in enumerate(THINGS):
        for _ in range(50):
            question, answer = ins.about_facts(label, rng, answers)
            if question in ins.FACTS:
                assert answer == ins.FACTS[question](thing)
            else:
                assert re.search(rf"\b{thing}s?\b", answer)


# --- the language model's own words ---------------------------------------------------------------


@pytest.fixture
def words(tmp_path, monkeypatch):
    """(model, its own words, its tokenizer), with a tiny language model."""
    monkeypatch.setattr(own_words, "TEXTS", 5)
    monkeypatch.setattr(ins, "TEXT_PROMPTS", ins.TEXT_PROMPTS[:3])
    monkeypatch.setattr(ins, "KNOWLEDGE", dict([*ins.KNOWLEDGE.items()][:1]))
    model, tokenizer = tiny_model(monkeypatch)
    answers = own_words.own_answers(tmp_path / "answers.json", model, tokenizer)
    texts = own_words.own_texts(tmp_path / "texts.pt", model)
    reference = copy.deepcopy(model.model.language_model)
    return model, own_words.OwnWords(reference, tokenizer, answers, texts, 64), tokenizer


def test_own_texts_are_drawn_once(words, tmp_path):
    model, own, _ = words
    assert own.texts.shape == (5, own_words.LENGTH)
    assert (own.texts[:, 0] == own_words.NEW_DOCUMENT).all()
    assert len({tuple(row) for row in own.texts.tolist()}) == 5
    torch.manual_seed(7)  # neither the state of the generator nor a second call changes them
    assert torch.equal(own_words.own_texts(tmp_path / "texts.pt", None), own.texts)
    assert torch.equal(own_words.own_texts(tmp_path / "again.pt", model), own.texts)


def test_the_loss_on_own_words_is_the_divergence_of_the_next_tokens(words):
    """Row by row, through transformers' own logits, without padding."""
    model, own, _ = words
    device = torch.device("cpu")
    model.float(), own.reference.float()
    assert own.loss(model, random.Random(0), device).abs() < 1e-6
    with torch.no_grad():
        for weight in model.model.language_model.layers[0].parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    found = own.loss(model, random.Random(0), device)
    ids, filled = own.batch(random.Random(0), device)
    assert ids.shape[0] == sum(own.sizes.values()) == 12
    total = 0
    changed = model.model.language_model
    for row, there in zip(ids, filled, strict=True):
        logits = []
        for language_model in (own.reference, changed):
            model.model.language_model = language_model
            logits.append(model(input_ids=row[there][None]).logits[0].log_softmax(-1))
        total += (logits[0].exp() * (logits[0] - logits[1])).sum()
    assert total > 0.1
    torch.testing.assert_close(found, total / filled.sum())


def test_own_words_change_what_learns_and_leave_the_reference(words):
    model, own, _ = words
    model.requires_grad_(False)
    layer = model.model.language_model.layers[0].self_attn.q_proj.requires_grad_(True)
    with torch.no_grad():
        layer.weight += 0.1
    own.loss(model, random.Random(0), torch.device("cpu")).backward()
    assert layer.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in own.reference.parameters())


# --- rounding -------------------------------------------------------------------------------------


def computes_with(layer):
    """The weights with which a quantized layer of bitsandbytes computes, in bf16."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        weight = layer.weight
        return bnb.functional.int8_vectorwise_dequant(weight.CB, weight.SCB).bfloat16()
    state = layer.weight.quant_state
    return bnb.functional.dequantize_4bit(layer.weight.data, state).bfloat16()


@pytest.mark.parametrize("format", ["nf4", "nf4-dq", "int8"])
def test_rounded_weights_are_those_of_a_model_loaded_in_the_format(format):
    plan = vk.Plan(vision_encoder="bf16", projector="bf16", language_model=format)
    loaded, _ = vk.load("pebble", plan)
    model, _ = vk.load("pebble", "bf16")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    conversations.round_linear_layers(model.model.language_model, format)
    layers, rounded = dict(loaded.named_modules()), []
    for name, layer in model.model.language_model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            same = layers[f"model.language_model.{name}"]
            assert type(same) is not torch.nn.Linear
            assert torch.equal(layer.weight, computes_with(same).reshape(layer.weight.shape)), name
            rounded.append(f"model.language_model.{name}.weight")
    assert rounded
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in rounded)


# --- stages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Random pictures in ten folders."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, n in (("train", 3), ("test", 1)):
        for thing in THINGS:
            (folder / split / thing).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / thing / f"{i}.png")
    return folder


TINY = {
    name: dataclasses.replace(settings, max_steps=3, batch_size=4, warmup_steps=2)
    for name, settings in train.SETTINGS.items()
}
TINY["vision_encoder"] = dataclasses.replace(TINY["vision_encoder"], batch_size=48)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Within this module, training takes seconds. Returns a file for the language model."""
    file = tmp_path_factory.mktemp("language_model") / fetching.GGUF
    file.write_bytes(CONTENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "build_config", small_config)
        patch.setattr(recipe, "read_language_model", small_language_model)
        patch.setattr(fetching, "is_language_model", lambda file: file.read_bytes() == CONTENT)
        patch.setattr(arrays, "DRAWINGS", 12)
        patch.setattr(loop, "CHUNK", 2)
        patch.setattr(train, "SETTINGS", TINY)
        patch.setattr(own_words, "TEXTS", 5)
        patch.setattr(ins, "TEXT_PROMPTS", ins.TEXT_PROMPTS[:3])
        patch.setattr(ins, "KNOWLEDGE", dict([*ins.KNOWLEDGE.items()][:1]))
        yield file


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHORT = ("pictures", "teacher", "vision_encoder", "projector-nf4", "chat")


@pytest.fixture(scope="module")
def unbroken(tiny, photographs, tmp_path_factory):
    """The folder of a run of SHORT that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    train.train(folder, photographs, tiny, stages=SHORT)
    return folder


def weights(folder):
    """{file: {name: tensor}} of what a run has learned."""
    found = {path.name: load_file(path) for path in folder.rglob("*.safetensors")}
    return found | {"teacher": torch.load(folder / "teacher.pt")}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for file in a:
        assert a[file].keys() == b[file].keys()
        for name in a[file]:
            assert torch.equal(a[file][name], b[file][name]), (file, name)


class Killed(BaseException):
    """What ends a process, and no code of the package catches."""


def kill_at(monkeypatch, steps):
    """Make the run die in the loss of these steps of a stage: {stage: step}."""
    waiting, learn = dict(steps), loop.learn

    def learn_until(name, folder, modules, parameters, settings, loss_of, device, seed=0):
        def loss_or_death(step):
            if waiting.get(name) == step:
                del waiting[name]
                raise Killed(name)
            return loss_of(step)

        learn(name, folder, modules, parameters, settings, loss_or_death, device, seed)

    for module in (vision, conversations):
        monkeypatch.setattr(module, "learn", learn_until)
    return waiting


def test_a_run_that_was_killed_ends_as_an_unbroken_one(
    unbroken, tiny, photographs, tmp_path, monkeypatch
):
    steps = {"teacher": 2, "vision_encoder": 1, "projector-nf4": 2, "chat": 2}
    waiting, deaths = kill_at(monkeypatch, steps), 0
    while waiting:
        torch.manual_seed(deaths)  # another process begins with other random numbers
        with pytest.raises(Killed):
            train.train(tmp_path, photographs, tiny, stages=SHORT)
        deaths += 1
    train.train(tmp_path, photographs, tiny, stages=SHORT)
    assert deaths == len(steps)
    assert_same(weights(unbroken), weights(tmp_path))
    for stage in steps:
        log = (tmp_path / f"{stage}.csv").read_text().splitlines()
        before = (unbroken / f"{stage}.csv").read_text().splitlines()
        drop_seconds = [[row.split(",")[i] for i in (0, 1, 3, 4)] for row in log]
        assert drop_seconds == [[row.split(",")[i] for i in (0, 1, 3, 4)] for row in before]
        assert len(log) == 3


def test_what_is_finished_is_not_made_again(unbroken, tiny, photographs, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in unbroken.rglob("*")}
    for name in ("prepare_pictures", "train_teacher", "load_parts"):
        monkeypatch.setattr(train, name, None)
    train.train(unbroken, photographs, tiny, stages=SHORT)
    assert {p: p.stat().st_mtime_ns for p in unbroken.rglob("*")} == before


def test_each_stage_changes_its_own_parameters(unbroken):
    learned = weights(unbroken)
    adapters = learned["adapter_model.safetensors"]
    # The projector is among them a second time, where plain peft finds it.
    lora = [name for name in adapters if "multi_modal_projector" not in name]
    assert lora and all("lora_" in name and "language_model" in name for name in lora)
    assert any(weight.abs().max() > 0 for name, weight in adapters.items() if "lora_B" in name)
    chat = learned["trained_in_full.safetensors"]
    assert all("multi_modal_projector" in name for name in chat)
    projector = learned["projector-nf4.safetensors"]
    assert {name.split("multi_modal_projector.")[-1] for name in chat} == projector.keys()
    assert {w.dtype for file in (projector, learned["vision_encoder.safetensors"])
            for w in file.values()} == {torch.bfloat16}  # fmt: skip


@pytest.mark.parametrize("format", ["bf16", "int3"])
def test_projectors_of_other_formats(unbroken, tiny, photographs, tmp_path, format):
    """They begin alike, and learn from language models that differ."""
    for name in ("pictures", "vision_encoder.safetensors"):
        (tmp_path / name).symlink_to(unbroken / name)
    train.train(tmp_path, photographs, tiny, stages=[f"projector-{format}"])
    other = load_file(tmp_path / f"projector-{format}.safetensors")
    nf4 = load_file(unbroken / "projector-nf4.safetensors")
    assert other.keys() == nf4.keys()
    assert any(not torch.equal(other[name], nf4[name]) for name in nf4)
    torch.testing.assert_close(other["linear_1.weight"], nf4["linear_1.weight"], rtol=0, atol=0.1)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(loop, "CHUNK", 2)
    layer = torch.nn.Linear(2, 1)
    settings = loop.Schedule(6, 1, 1e-3)

    def loss_of(step):
        loss = layer(torch.ones(2)).pow(2).mean()
        if step == 3:
            # The square root has an infinite slope at zero, and zero times infinity is no number.
            loss = loss * torch.nan if broken == "loss" else loss + (layer.weight * 0).sum().sqrt()
        return loss, torch.tensor(0.0)

    given = ("s", tmp_path, {"layer": layer}, list(layer.parameters()), settings, loss_of)
    with pytest.raises(VlmkitError, match="The loss of the stage s is .*another --seed"):
        loop.learn(*given, torch.device("cpu"))
    saved = torch.load(tmp_path / "s.progress.pt")
    assert saved["step"] == 2
    assert all(weight.isfinite().all() for weight in saved["layer"].values())
    assert not (tmp_path / "s.csv").exists()


# --- what can be missing --------------------------------------------------------------------------


def test_pictures_are_written_whole_or_not_at_all(
    unbroken, tiny, photographs, tmp_path, monkeypatch
):
    (tmp_path / "pictures.part").mkdir()
    (tmp_path / "pictures.part" / "left-over.npy").write_bytes(b"of a kill")
    with monkeypatch.context() as patch:
        patch.setattr(arrays.real, "read_easy_vqa", killed)
        with pytest.raises(Killed):
            train.train(tmp_path, photographs, tiny, stages=["pictures"])
    assert not (tmp_path / "pictures").exists()
    with pytest.raises(VlmkitError, match="--stages pictures teacher"):
        train.train(tmp_path, photographs, tiny, stages=["teacher"])
    train.train(tmp_path, photographs, tiny, stages=["pictures"])
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]
    made, before = tmp_path / "pictures", unbroken / "pictures"
    assert {p.name for p in made.iterdir()} == {p.name for p in before.iterdir()}
    assert all(p.read_bytes() == (before / p.name).read_bytes() for p in made.iterdir())


def killed(*arguments):
    raise Killed


@pytest.mark.parametrize(
    ("there", "stage", "first"),
    [
        ((), "teacher", "pictures"),
        ((), "projector-int3", "pictures"),
        (("pictures",), "projector-int3", "vision_encoder"),
        (("pictures", "vision_encoder"), "chat", "projector-nf4"),
        (("pictures", "projector-nf4"), "chat", "vision_encoder"),
    ],
)
def test_an_earlier_stage_is_missing(unbroken, tiny, tmp_path, there, stage, first):
    for name in there:
        (tmp_path / train.RESULTS[name]).symlink_to(unbroken / train.RESULTS[name])
    with pytest.raises(VlmkitError, match=f"The stage {stage} needs .*--stages {first} {stage}"):
        train.train(tmp_path, "nowhere", tiny, stages=[stage])
    assert {p.name for p in tmp_path.iterdir()} == {train.RESULTS[name] for name in there}


def said(capsys, *words):
    """(exit status, what the command line says about these words)."""
    status = train.main([str(word) for word in words])
    return status, capsys.readouterr().err


def test_the_command_line_says_in_one_sentence_what_is_wrong(
    unbroken, tiny, photographs, tmp_path, capsys, monkeypatch
):
    for name in ("pictures", "vision_encoder.safetensors"):
        (tmp_path / name).symlink_to(unbroken / name)
    monkeypatch.setenv("VLMKIT_CACHE", str(tmp_path / "cache"))
    projector = ("--output", tmp_path, "--device", "cpu", "--stages", "projector-bf16")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF of another language model")
    elsewhere = ("--output", tmp_path / "new", "--device", "cpu", "--photographs")
    fetched = cache_folder() / fetching.GGUF
    for words, expected in (
        (projector, f"no language model {re.escape(str(fetched))}. Run `vlmkit fetch cobble`"),
        ((*projector, "--language-model", other), "is not the language model that cobble"),
        ((*elsewhere, tmp_path / "gone", "--stages", "pictures"), "gone is not a folder"),
        ((*elsewhere, tmp_path, "--stages", "pictures"), "neither a folder 'train'"),
        ((*projector[:2], "--device", "toaster"), "device 'toaster' cannot be used"),
        (("--output", other, "--device", "cpu", "--stages", "pictures"), "cannot be written"),
    ):
        status, text = said(capsys, *words)
        assert status == 1
        assert re.search(expected, text), text
        assert text.count("\n") == 1


def test_the_fetched_language_model_is_the_default(unbroken, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLMKIT_CACHE", str(tiny.parent))
    for name in ("pictures", "vision_encoder.safetensors"):
        (tmp_path / name).symlink_to(unbroken / name)
    status = train.main(["--output", str(tmp_path), "--device", "cpu", "--stages", "projector-nf4"])
    assert status == 0
    assert "of 10 test photographs named" in capsys.readouterr().out
    assert_same(
        {"": load_file(tmp_path / "projector-nf4.safetensors")},
        {"": load_file(unbroken / "projector-nf4.safetensors")},
    )
