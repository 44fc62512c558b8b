"""Prompts: what a processor makes of pictures, questions and answers, as text and as tensors.

The processor's own chat template writes the prompt, both for asking and for training, so that a
model is trained on the prompts that it will be asked with.
"""

import re

from vlmkit.errors import FinetuningError, ImageError, VlmkitError

# Processors without a chat template, with the prompt that their models' documentation gives for a
# question. {images} is where the image placeholders go. BLIP-2's processor adds its own in front.
_PLAIN_PROMPTS = {
    # Google's page "PaliGemma prompt and system instructions": the images first, then this
    "PaliGemmaProcessor": "{images}answer en {question}",
    # the examples of transformers' Blip2ForConditionalGeneration
    "Blip2Processor": "Question: {question} Answer:",
}


def question_inputs(processor, images, questions):
    """The model's inputs for a batch of questions, padded on the left: token ids, attention mask,
    pixel values, and whatever else the processor makes. images[i]: the list of images of
    questions[i].

    Raises VlmkitError for a tokenizer that cannot pad, and for an unknown processor without a chat
    template; ImageError for more images than BLIP-2 takes.
    """
    return _tensors(processor, images, prompts(processor, images, questions), "left")


def answered_inputs(processor, images, questions, answers):
    """The inputs of questions with their answers, padded on the right; and for each answer the list
    of the token ids that end its row: the answer and its end-of-turn token.

    Raises the errors of `question_inputs`, and FinetuningError if the processor's tokens do not
    end with those of the answer.
    """
    asked = prompts(processor, images, questions)
    whole = prompts(processor, images, questions, answers)
    pairs = list(zip(asked, whole, strict=True))
    if type(processor).__name__ == "PaliGemmaProcessor":
        # Its images may attend to the whole question, so its processor must say what is answer.
        end = processor.tokenizer.eos_token
        suffixes = [text[len(prompt) :].removesuffix(end) for prompt, text in pairs]
        inputs = _tensors(processor, images, asked, "right", suffix=suffixes)
        ends = [row[row != -100].tolist() for row in inputs["labels"]]
    else:
        inputs = _tensors(processor, images, whole, "right")
        ends = [_tokens_after(processor.tokenizer, prompt, text) for prompt, text in pairs]
    for row, mask, end in zip(inputs["input_ids"], inputs["attention_mask"], ends, strict=True):
        found = row[mask.bool()][-len(end) :].tolist()
        if found != end:
            raise FinetuningError(
                f"The tokens that a {type(processor).__name__} makes do not end with those of the "
                f"answer: expected {processor.tokenizer.decode(end)!r}, found "
                f"{processor.tokenizer.decode(found)!r}."
            )
    return inputs, ends


def prompts(processor, images, questions, answers=None):
    """The prompt of each question as text, followed by its answer if `answers` are given."""
    questions = [plain_text(processor, question) for question in questions]
    if answers is not None:
        answers = [plain_text(processor, answer) for answer in answers]
    if not getattr(processor, "chat_template", None):
        return _plain_prompts(processor, images, questions, answers)
    texts = processor.apply_chat_template(
        [
            _conversation(pictures, question, answers and answers[number])
            for number, (pictures, question) in enumerate(zip(images, questions, strict=True))
        ],
        add_generation_prompt=answers is None,
        tokenize=False,
    )
    if answers is None:
        return texts
    # Without the end of the answer, training would teach the model never to stop. A line break that
    # a template puts behind the end is not a part of the answer.
    specials = tuple(token for token in processor.tokenizer.all_special_tokens if token)
    end = processor.tokenizer.eos_token or ""
    texts = [text.rstrip() for text in texts]
    return [text if text.endswith(specials) else text + end for text in texts]


def _plain_prompts(processor, images, questions, answers):
    """The prompts of a processor without a chat template."""
    name = type(processor).__name__
    if name not in _PLAIN_PROMPTS:
        raise VlmkitError(
            f"This {name} has no chat template, so vlmkit cannot know the prompt of its model. "
            "Give it one (processor.chat_template = ...). Without one, vlmkit only knows "
            f"{', '.join(_PLAIN_PROMPTS)}."
        )
    wrong = [len(pictures) for pictures in images if len(pictures) != 1]
    if name == "Blip2Processor" and wrong:
        raise ImageError(f"BLIP-2 takes one image for each question, and here are {wrong[0]}.")
    placeholder = str(getattr(processor, "image_token", ""))
    texts = [
        _PLAIN_PROMPTS[name].format(images=placeholder * len(pictures), question=question)
        for pictures, question in zip(images, questions, strict=True)
    ]
    if answers is None:
        return texts
    space = "" if name == "PaliGemmaProcessor" else " "  # PaliGemma's adds a line break itself
    end = processor.tokenizer.eos_token or ""
    return [f"{text}{space}{answer}{end}" for text, answer in zip(texts, answers, strict=True)]


def _conversation(pictures, question, answer=None):
    content = [{"type": "image", "image": picture} for picture in pictures]
    content.append({"type": "text", "text": question})
    turns = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def _tensors(processor, images, texts, side, **more):
    if len(texts) > 1 and processor.tokenizer.pad_token is None:
        raise VlmkitError(
            "This tokenizer has no padding token, so a batch cannot hold several prompts. Set "
            "processor.tokenizer.pad_token, commonly to its eos_token, or use batch_size=1."
        )
    flat = [image for pictures in images for image in pictures]
    if getattr(processor, "chat_template", None):
        flat = flat and [list(pictures) for pictures in images]
        begin = processor.tokenizer.bos_token
        if begin is not None and texts[0].startswith(begin):
            more["add_special_tokens"] = False  # as in transformers' own apply_chat_template
    return processor(
        images=flat or None,
        text=texts,
        return_tensors="pt",
        padding=len(texts) > 1,
        padding_side=side,
        **more,
    )


def _tokens_after(tokenizer, prompt, whole):
    """The tokens of `whole` after those that it shares with `prompt`."""
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    same = 0
    while same < min(len(asked), len(tokens)) and asked[same] == tokens[same]:
        same += 1
    return tokens[same:]


def plain_text(processor, text):
    """The text, with a space inside everything that would become a special token.

    A question is data: if a user types "<image>", it is not one more image, and an end-of-turn
    token does not end the user's turn.
    """
    special = {
        token.content
        for token in processor.tokenizer.added_tokens_decoder.values()
        if token.special
    }
    special |= {
        str(getattr(processor, f"{kind}_token", None) or "") for kind in ("image", "video", "audio")
    }
    tokens = sorted((token for token in special if len(token.strip()) > 1), key=len, reverse=True)
    if not tokens:
        return text
    pattern = "|".join(map(re.escape, tokens))
    return re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", text)
