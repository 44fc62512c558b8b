"""Questions that suit the model that a chapter runs on, so that every chapter ends in minutes.

    name = vk.default_model()
    questions = vk.course.questions(name, n=360, seed=5)
    questions = vk.course.in_its_words(model, processor, questions)

The chapters were written for pebble, which answers hundreds of drawn questions a second. A model of
a hundred million parameters answers a few a second on a CPU, and cobble reads handwriting and not
drawings. For pebble these functions change nothing.
"""

import functools

from vlmkit.errors import VlmkitError

SMALL = 5_000_000
"""A model with more parameters gets fewer questions on a CPU, in inverse proportion. With this
number, no chapter takes more than about five minutes with cobble on two cores."""

FEWEST = 12
"""Fewer questions than this say nothing, unless a chapter asks for each of many kinds or layers."""

ENDS_WITHIN = 24
"""Tokens. An answer that is longer cannot stand for the right one: it would be cut off."""


def number(name, n, least=FEWEST):
    """How many questions a chapter asks of the model `name` where it asks `n` of pebble.

    name: as `vk.anatomy` takes it, with its errors. All `n`, if the model has up to `SMALL`
    parameters or if there is a GPU; otherwise as many fewer as the model has more parameters, but
    at least `least`.
    """
    import torch

    from vlmkit import anatomy

    if torch.cuda.is_available():
        return n
    return max(min(n, least), min(n, n * SMALL // anatomy(name).total))


def questions(name, n, seed, least=FEWEST):
    """The questions that a chapter asks of the model `name`: a `datasets.Dataset`.

    `n` drawn ones of all tasks (`vk.tasks.dataset`), or as many as `number` says. For cobble, which
    was not trained on drawings, they are about handwriting (`vk.tasks.handwriting`, with its
    errors), of which there are 597.
    """
    from vlmkit import tasks
    from vlmkit.tasks.real import DIGITS_HELD_OUT

    n = number(name, n, least)
    if reads_handwriting(name):
        return tasks.handwriting(min(n, DIGITS_HELD_OUT), seed)
    return tasks.dataset("all", n, seed)


def reads_handwriting(name):
    """Whether the model `name` is cobble, in any state, or was made from it."""
    from vlmkit import checkpoints

    config = checkpoints.read_config(checkpoints.find(name, weights=False))
    return hasattr(config, "projector_trained_with")  # of all models, only cobble's configs say it


def in_its_words(model, processor, questions):
    """The same questions, which `model` can answer in the expected words.

    Where it gives less than a third of the expected answers, such as "7" where it says "This is the
    digit 7.", its own answers take their place, and a sentence says so. Then "right" means
    "unchanged", which is what a comparison of a model with itself needs. Questions to which its
    answer has more than `ENDS_WITHIN` tokens, or none, are left out. Raises VlmkitError if none
    are left.
    """
    from vlmkit.evaluation import evaluate

    asked = evaluate(model, processor, questions)
    if asked.accuracy >= 1 / 3:
        return questions
    longer = evaluate(model, processor, questions, max_new_tokens=ENDS_WITHIN + 1)
    said = longer.answers["predicted"].tolist()
    lengths = map(len, processor.tokenizer(said, add_special_tokens=False)["input_ids"])
    kept = [row for row, length in enumerate(lengths) if 0 < length <= ENDS_WITHIN]
    if not kept:
        raise VlmkitError(
            f"The model answers {asked.accuracy:.0%} of the questions as expected, and none of its "
            f"own answers ends within {ENDS_WITHIN} tokens, so nothing can be compared. Was the "
            "model trained to answer questions? The first answer begins "
            f"{said[0][:60]!r}."
        )
    print(
        f"The model gives {asked.accuracy:.0%} of the expected answers. From here on its own "
        f"answers to {len(kept)} of the {len(questions)} questions count as right, such as "
        f"{said[kept[0]]!r}: a wrong answer is one that has changed."
    )
    own = [said[row] for row in kept]
    return questions.select(kept).remove_columns("answer").add_column("answer", own)


def without_adapters(model):
    """The model itself, or of a PeftModel the model without its adapters, as `model.unload()` makes
    it. The first time, a sentence says so."""
    if not hasattr(model, "peft_config"):
        return model
    _say_once(
        "This model has adapters already. What is done here needs a model without them, so they "
        "are taken off: model.unload()."
    )
    model = model.unload()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # peft froze what `vk.load` leaves free
    return model


@functools.cache
def _say_once(sentence):
    print(sentence)
