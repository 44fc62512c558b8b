"""Prompts: what a processor makes of a conversation with pictures, as text and as tensors.

A conversation is a list of turns: {"role": "system", "user" or "assistant", "content": [...]}, with
parts {"type": "text", "text": ...} and {"type": "image"} in their order. Its pictures are a list
beside it. The processor's own chat template writes the prompt, both for asking and for training, so
that a model is trained on the prompts that it will be asked with.
"""

import os.path
import re
import warnings

from vlmkit.errors import FinetuningError, ImageError, VlmkitError, brief
from vlmkit.evaluation.templates import MARK, Template

# Processors without a chat template, with the prompt that their models' documentation gives for a
# question. {images} is where the image placeholders go. BLIP-2's processor adds its own in front.
_PLAIN_PROMPTS = {
    # Google's page "PaliGemma prompt and system instructions": the images first, then this
    "PaliGemmaProcessor": "{images}answer en {question}",
    # the examples of transformers' Blip2ForConditionalGeneration
    "Blip2Processor": "Question: {question} Answer:",
}

THOUGHTS = re.compile(r"</?think(?:ing)?>|</?thoughts?>|\[/?THINK\]")
"""What begins and ends the thoughts of a model that thinks before it answers."""

_THOUGHTS_END = re.compile(r".*(?:</think(?:ing)?>|</thoughts?>|\[/THINK\])", re.DOTALL)


def turns_of(images, question, answer=None):
    """The conversation of one question about images, which come first, and its answer if given. A
    question that is a conversation already only gets its answer."""
    turns = list(question) if isinstance(question, (list, tuple)) else None
    if turns is None:
        text = {"type": "text", "text": question}
        turns = [{"role": "user", "content": [{"type": "image"} for _ in images] + [text]}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def text_of_turn(turn):
    """The text of a turn, without its pictures."""
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def after_thoughts(answer):
    """The answer without the thoughts before it, such as "red" of "<think>It is …</think>red"."""
    end = _THOUGHTS_END.match(answer)  # a search takes the square of the length
    return answer[end.end() if end else 0 :].strip()


def question_inputs(processor, images, questions):
    """The model's inputs for a batch of questions, padded on the left: token ids, attention mask,
    pixel values, and whatever else the processor makes. images[i]: the list of images of
    questions[i], which is a text, or a conversation that ends with the user's turn.

    Raises VlmkitError for a tokenizer that cannot pad, for a chat template that cannot be used and
    for an unknown processor without one; ImageError for more images than BLIP-2 takes.
    """
    return _tensors(processor, images, prompts(processor, images, questions), "left")


def answered_inputs(processor, images, conversations):
    """The inputs of whole conversations, padded on the right, and which of their tokens are learnt:
    booleans of the shape of input_ids. Learnt is every assistant turn, with its end-of-turn token.

    Raises the errors of `question_inputs`, and FinetuningError if a conversation does not end with
    an answer, if the chat template leaves out a part of it or if the prompt of an answer is not the
    one that the model will be asked with.
    """
    import torch

    for turns in conversations:
        if not turns or turns[-1]["role"] != "assistant":
            raise FinetuningError("A conversation to learn from ends with an answer.")
    plain = _as_data(processor, conversations)
    if type(processor).__name__ == "PaliGemmaProcessor" and Template(processor).source is None:
        # Its images may attend to the whole question, so its processor must say what is answer.
        asked = [_plain_prompt(processor, *both) for both in zip(images, plain, strict=True)]
        suffixes = [text_of_turn(turns[-1]) for turns in plain]
        inputs = _tensors(processor, images, asked, "right", suffix=suffixes)
        return inputs, inputs["labels"] != -100
    texts, spans = zip(*answered_texts(processor, images, plain), strict=True)
    inputs = _tensors(processor, images, list(texts), "right")
    learnt = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (text, places) in enumerate(zip(texts, spans, strict=True)):
        length = int(inputs["attention_mask"][row].sum())  # padding is on the right
        ids = inputs["input_ids"][row, :length].tolist()
        for begin, end in _tokens_of(processor, text, places, ids):
            learnt[row, begin:end] = True
    return inputs, learnt


def prompts(processor, images, questions):
    """The prompt of each question as text."""
    both = zip(images, questions, strict=True)
    conversations = _as_data(processor, [turns_of(*one) for one in both])
    template = Template(processor)
    if template.source is None:
        both = zip(images, conversations, strict=True)
        return [_plain_prompt(processor, pictures, turns) for pictures, turns in both]
    texts = template.render(conversations, generation=True)
    if template.opens:
        return texts
    # This template writes nothing before an answer when it is asked to: look where answers begin.
    marked = template.render([turns_of((), turns, MARK) for turns in conversations])
    return [_before(text) for text in marked]


def _before(marked):
    if MARK not in marked:
        raise VlmkitError(
            "The chat template leaves out the answer. Set processor.chat_template to a correct one."
        )
    return marked[: marked.index(MARK)]


# --- conversations with their answers -------------------------------------------------------------


def answered_texts(processor, images, conversations):
    """(text, [(begin, end) of each answer in it]) of each conversation."""
    template = Template(processor)
    if template.source is None:
        for pictures, turns in zip(images, conversations, strict=True):
            asked, answer = _plain_prompt(processor, pictures, turns), text_of_turn(turns[-1])
            text = f"{asked} {answer}{processor.tokenizer.eos_token or ''}"
            yield text, [(len(asked), len(text))]
        return
    wholes = template.render(conversations)
    # Without the end of the answer, training would teach the model never to stop. A line break that
    # a template puts behind the end is not a part of the answer.
    specials = tuple(token for token in processor.tokenizer.all_special_tokens if token)
    eos = processor.tokenizer.eos_token or ""
    for pictures, turns, whole in zip(images, conversations, wholes, strict=True):
        whole = whole.rstrip()
        yield _located(
            processor,
            template,
            pictures,
            turns,
            whole if whole.endswith(specials) else whole + eos,
        )


def _located(processor, template, pictures, turns, whole):
    """What `answered_texts` yields for one conversation. whole: its text."""
    numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    for role, text in (
        (t["role"], p["text"].strip()) for t in turns for p in t["content"] if p["type"] == "text"
    ):
        if (after_thoughts(text) if role == "assistant" else text) not in whole:
            raise FinetuningError(
                f"The chat template leaves out what the {role} says: {text[:80]!r}. Leave such "
                "turns out of the rows, or set processor.chat_template to a template that writes "
                "them."
            )
    asked = prompts(processor, [pictures] * len(numbers), [turns[:n] for n in numbers])
    spans = []
    for number, prompt in zip(numbers, asked, strict=True):
        answer, last = text_of_turn(turns[number]), number == numbers[-1]
        begin = len(prompt)
        if not whole.startswith(prompt):
            whole, begin = _continued(template, turns[:number], prompt, whole, last)
        end = len(whole) if last else _end(template, turns[: number + 1], whole, begin)
        learnt = whole[begin:end]
        if after_thoughts(answer) not in learnt:
            raise FinetuningError(
                f"vlmkit cannot find the answer {answer[:80]!r} in what the chat template writes: "
                f"{learnt[:80]!r} is in its place."
            )
        if THOUGHTS.search(answer) and answer.strip() not in learnt and not last:
            warnings.warn(
                "The chat template leaves out the thoughts of all answers but the last, so these "
                "are learnt without thoughts. To learn thoughts, end a row with each such answer.",
                stacklevel=2,
            )
        spans.append((begin, end))
    return whole, spans


def _continued(template, before, prompt, whole, last):
    """(text, where the answer begins) if `whole` does not begin with the prompt of its answer."""
    same = len(os.path.commonprefix([prompt, whole]))
    rest = prompt[same:]
    if not rest.strip():
        return whole, same
    head = _before(template.render([turns_of((), before, MARK)])[0])
    if last and _closed(rest) and whole.startswith(head) and same == len(head):
        # An empty block of thoughts: asked with it, the model is trained with it.
        return prompt + whole[same:], len(prompt)
    raise FinetuningError(
        f"The chat template asks with a prompt that ends with {prompt[-40:]!r}, and writes "
        f"{whole[same : same + 40]!r} for an answer after the same words: the model would be "
        "trained on another prompt than it is asked with. If the template opens a block of "
        "thoughts, give answers with thoughts (<think>…</think>answer), one answer a row; or set "
        "processor.chat_template to a template that asks without."
    )


def _closed(text):
    """Whether the text has blocks such as <think></think>, and all of them are closed."""
    open_tags, found = [], re.findall(r"[<\[](/?)(\w+)[>\]]", text)
    for closes, name in found:
        if not closes:
            open_tags.append(name)
        elif not open_tags or open_tags.pop() != name:
            return False
    return bool(found) and not open_tags


def _end(template, turns, whole, begin):
    """Where the last of `turns`, an answer in the middle of the text `whole`, ends."""
    alone, marked = template.render([turns, [*turns[:-1], *turns_of((), [], MARK)]])
    tail = marked[len(_before(marked)) + 1 :].rstrip()  # the end-of-turn token
    alone = alone.rstrip()
    content = alone[: len(alone) - len(tail)]
    if alone.endswith(tail) and whole.startswith(content):
        end = len(content)
    else:  # the template writes an answer in the middle in another way than one at the end
        answer = after_thoughts(text_of_turn(turns[-1]))
        end = whole.find(answer, begin) + len(answer)
    return end + len(os.path.commonprefix([tail, whole[end:]]))


def _tokens_of(processor, text, places, ids):
    """(begin, end) in `ids`, the tokens that the processor makes of `text` and its pictures, of the
    characters in each of `places`."""
    tokenizer = processor.tokenizer

    def tokens(part):
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    plain = tokens(text)
    pictures = _placeholders(processor)
    found, after = [], 0
    for begin, end in places:
        first = _shared(tokens(text[:begin]), plain)
        last = len(plain) if end == len(text) else _shared(tokens(text[:end]), plain)
        last = max(last, first + 1)
        # A processor puts many tokens in place of a picture's one, and tokens around them.
        start = len(ids) - (len(plain) - first)
        if pictures.intersection(plain[first:]):
            start = _search(ids, plain, first, last, pictures, after)
        after = start + last - first
        if start < 0 or ids[start:after] != plain[first:last]:
            raise FinetuningError(
                f"The tokens that a {type(processor).__name__} makes do not have those of the "
                f"answer in their place: expected {tokenizer.decode(plain[first:last])!r}, found "
                f"{tokenizer.decode(ids[max(start, 0) : after])!r}."
            )
        found.append((start, after))
    return found


def _search(ids, plain, first, last, pictures, after):
    """Where plain[first:last] is in `ids`, from `after` on, by the text that leads up to it from
    the picture before; -1 if it is nowhere."""
    leads = [n for n in range(first) if plain[n] in pictures]
    lead = leads[-1] + 1 if leads else 0
    for skip in range(min(4, first - lead) + 1):  # the first tokens may be joined with others
        needle = plain[lead + skip : last]
        for start in range(after, len(ids) - len(needle) + 1):
            if ids[start : start + len(needle)] == needle:
                return start + first - lead - skip
    return -1


def _placeholders(processor):
    """The ids of the tokens in whose place a processor puts a picture."""
    names = ("image", "boi", "fake_image", "start_image", "context_image", "image_start")
    owners = (processor, processor.tokenizer)
    texts = {getattr(owner, f"{name}_token", None) for owner in owners for name in names}
    ids = processor.tokenizer.convert_tokens_to_ids([t for t in map(_content, texts) if t])
    return set(ids) - {None}


def _content(token):
    return None if token is None or isinstance(token, int) else str(token)


def _shared(tokens, others):
    """How many tokens both begin with."""
    same = 0
    while same < min(len(tokens), len(others)) and tokens[same] == others[same]:
        same += 1
    return same


# --- processors without a chat template -----------------------------------------------------------


def _plain_prompt(processor, pictures, turns):
    """The prompt of a processor without a chat template. An answer in `turns` is left out."""
    name = type(processor).__name__
    if name not in _PLAIN_PROMPTS:
        raise VlmkitError(
            f"This {name} has no chat template, so vlmkit cannot know the prompt of its model. "
            "Give it one (processor.chat_template = ...). Without one, vlmkit only knows "
            f"{', '.join(_PLAIN_PROMPTS)}."
        )
    if [turn["role"] for turn in turns] not in (["user"], ["user", "assistant"]):
        raise VlmkitError(
            f"A {name} without a chat template takes one question and its answer, and this "
            f"conversation has {', '.join(turn['role'] for turn in turns)}."
        )
    require_pictures(processor, len(pictures))
    placeholder = str(getattr(processor, "image_token", ""))
    return _PLAIN_PROMPTS[name].format(
        images=placeholder * len(pictures), question=text_of_turn(turns[0])
    )


# --- tensors --------------------------------------------------------------------------------------


def _tensors(processor, images, texts, side, **more):
    if len(texts) > 1 and processor.tokenizer.pad_token is None:
        raise VlmkitError(
            "This tokenizer has no padding token, so a batch cannot hold several prompts. Set "
            "processor.tokenizer.pad_token, commonly to its eos_token, or use batch_size=1."
        )
    flat = [image for pictures in images for image in pictures]
    if Template(processor).source is not None:
        flat = flat and [list(pictures) for pictures in images]
        begin = processor.tokenizer.bos_token
        if begin is not None and texts[0].startswith(begin):
            more["add_special_tokens"] = False  # as in transformers' own apply_chat_template
    try:
        return processor(
            images=flat or None,
            text=texts,
            return_tensors="pt",
            padding=len(texts) > 1,
            padding_side=side,
            **more,
        )
    except VlmkitError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        counts = ", ".join(str(len(pictures)) for pictures in images[:8])
        raise VlmkitError(
            f"A {type(processor).__name__} cannot make tensors of these prompts, which have "
            f"{counts} pictures: {brief(error)}."
        ) from error


def _as_data(processor, conversations):
    """The conversations with a space inside everything that would become a special token.

    What people write is data: if a user types "<image>", it is not one more image, and an
    end-of-turn token does not end the user's turn. Only an answer may begin and end its thoughts.
    """
    special = {
        token.content
        for token in processor.tokenizer.added_tokens_decoder.values()
        if token.special
    }
    special |= {
        str(getattr(processor, f"{kind}_token", None) or "") for kind in ("image", "video", "audio")
    }
    special = sorted((one for one in special if len(one.strip()) > 1), key=len, reverse=True)
    in_answers = _any_of([token for token in special if not THOUGHTS.fullmatch(token)])
    in_questions = _any_of(special)

    def spaced(part, pattern):
        if part["type"] != "text" or not pattern:
            return part
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", part["text"])
        return {**part, "text": text}

    return [
        [
            {
                **turn,
                "content": [
                    spaced(part, in_answers if turn["role"] == "assistant" else in_questions)
                    for part in turn["content"]
                ],
            }
            for turn in turns
        ]
        for turns in conversations
    ]


def _any_of(tokens):
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def require_pictures(processor, number):
    """Raise ImageError if a prompt of `processor` cannot have so many pictures."""
    name = type(processor).__name__
    if name not in _PLAIN_PROMPTS or Template(processor).source is not None:
        return
    if name == "Blip2Processor" and number != 1:
        raise ImageError(f"BLIP-2 takes one image for each question, and here are {number}.")
    if name == "PaliGemmaProcessor" and not number:
        raise ImageError("PaliGemma takes no question without an image.")
