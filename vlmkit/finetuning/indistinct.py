"""Answers: which ones a model cannot learn, because its output head cannot tell their tokens apart.

The logit of a token is its row of the output head times the hidden state. Rows of tokens that a
model never had to produce are all pushed the same way in its training, and end up alike (Land and
Bartolo, 2024, arXiv 2405.05417). Their logits are alike too, whatever the layers before the head
learn: the model can learn "some such token", and not which.
"""

from vlmkit.anatomy import is_packed, unwrapped
from vlmkit.backend import sharding
from vlmkit.evaluation.prompts import answered_texts, turns_of

ALIKE = 0.1
"""The largest difference of two rows that are alike, as a share of their length. pebble's unused
rows differ by 0.02 from the nearest other row, its used rows by 0.4 and more."""

_FEW = 128  # dimensions that are compared first: most rows differ in these already
_MOST_ANSWERS, _MOST_TOKENS = 2_000, 4_096
_LONGEST = 1_000  # characters


def indistinct_tokens(model, ids):
    """The ids, of the list `ids`, whose row of the output head is alike another row, as a set.

    Empty where the head is trained, in full or by an adapter, or where there is none.
    """
    import torch

    head = unwrapped(model).get_output_embeddings()
    if head is None or any(parameter.requires_grad for parameter in head.parameters()):
        return set()
    weight = _weight_of(head)
    ids = sorted({number for number in ids if number < len(weight)})[:_MOST_TOKENS]
    found = set()
    with torch.no_grad():
        few = weight[:, :_FEW].float()
        for number in ids:
            row = weight[number].float()
            most = (ALIKE * row.norm()) ** 2
            near = ((few - few[number]).square().sum(dim=1) <= most).nonzero().flatten()
            distances = (weight[near].float() - row).square().sum(dim=1)
            if (distances <= most).sum() > 1:  # itself is one
                found.add(number)
    return found


def indistinct_answers(model, processor, answers):
    """{answer: a spelling whose tokens can be told apart, or None} for each of `answers`, texts,
    that has a token whose row of the output head is alike another. Of more than 2,000 different
    answers, the first 2,000 are looked at, and of long ones none: they have other tokens, too."""
    answers = (answer.strip() for answer in answers if len(answer) <= _LONGEST)
    answers = list(dict.fromkeys(filter(None, answers)))[:_MOST_ANSWERS]
    tokens = _tokens_of(processor, answers)
    wrong = indistinct_tokens(model, set().union(*tokens.values()))
    alike = [answer for answer in answers if wrong & tokens[answer]]
    spelled = {answer: [answer.upper(), answer.capitalize(), answer.lower()] for answer in alike}
    tokens = _tokens_of(processor, [text for texts in spelled.values() for text in texts])
    wrong = indistinct_tokens(model, set().union(*tokens.values()))
    return {
        answer: next((text for text in texts if not wrong & tokens[text]), None)
        for answer, texts in spelled.items()
    }


def _tokens_of(processor, answers):
    """{answer: the set of its token ids}, as it stands behind a question: a word there can be
    another token than the word alone."""
    if not answers:
        return {}
    tokenizer, pictures = processor.tokenizer, [[None]] * len(answers)
    told = answered_texts(
        processor, pictures, [turns_of([None], "?", answer) for answer in answers]
    )
    specials, found = set(tokenizer.all_special_ids), {}
    for answer, (text, places) in zip(answers, told, strict=True):
        start = tokenizer(text[: places[-1][0]], add_special_tokens=False)["input_ids"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        same = 0
        while same < min(len(start), len(ids)) and start[same] == ids[same]:
            same += 1
        found[answer] = set(ids[same:]) - specials
    return found


def warning_of(model, processor, answers):
    """The warning for answers that cannot be told apart, as text; None where there are none."""
    found = indistinct_answers(model, processor, answers)
    if not found:
        return None
    named = ", ".join(repr(answer[:40]) for answer in list(found)[:5])
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    spelled = {answer: text for answer, text in found.items() if text}
    ways = []
    if spelled:
        answer, text = next(iter(spelled.items()))
        ways.append(
            f"spell them in tokens that the model uses ({text[:40]!r} in place of {answer[:40]!r})"
        )
    base = unwrapped(model)
    if base.get_output_embeddings().weight is not base.get_input_embeddings().weight:
        ways.append("give the output head an adapter too: vk.LoRA(head=True) on language_model")
    ways = ways or ["choose other answers, or train the language model in full"]
    return (
        f"The output head cannot tell apart the tokens of {len(found)} answers: {named}{more}. "
        "Their rows of the head are alike, as of tokens that the model never had to write, and "
        f"the head is not trained, so these answers cannot be learnt. To change that, "
        f"{', or '.join(ways)}."
    )


def _weight_of(layer):
    """The weight of the head, (tokens, width), in a float format."""
    from peft.utils.integrations import dequantize_module_weight

    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = sharding.whole(layer.weight)
    return (dequantize_module_weight(layer) if is_packed(weight) else weight).detach()
