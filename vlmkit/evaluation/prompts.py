"""Prompts: pictures, questions and answers as the text and the tensors that a processor makes.

The processor's own chat template writes the prompt, for asking and for training alike, so that a
model is trained on what it will be asked.
"""

import re

from vlmkit.errors import FinetuningError, ImageError, VlmkitError

# Processors without a chat template, and the prompt that their models' documentation gives for a
# question. `{images}` is where the image placeholders go; BLIP-2's processor puts its own in front.
_PLAIN_PROMPTS = {
    # Google's page "PaliGemma prompt and system instructions": the images first, then this
    "PaliGemmaProcessor": "{images}answer en {question}",
    # the examples of transformers' Blip2ForConditionalGeneration
    "Blip2Processor": "Question: {question} Answer:",
}


def question_inputs(processor, images, questions):
    """The model's inputs for a batch of questions, padded on the left: token ids, attention mask,
    pixel values and what else the processor makes. images[i] is the list of images of questions[i].

    Raises VlmkitError for a tokenizer that cannot pad, and for a processor without a chat template
    that is not known; ImageError for more images than BLIP-2 takes.
    """
    return _tensors(processor, images, prompts(processor, images, questions), "left")


def answered_inputs(processor, images, questions, answers):
    """The same for questions with their answers, padded on the right, and a list with the token ids
    of each answer, as they end its row: the answer, and the mark that ends it.

    Raises also FinetuningError where the processor makes something else of the answer's end.
    """
    asked = prompts(processor, images, questions)
    told = prompts(processor, images, questions, answers)
    ends = [
        _tokens_after(processor.tokenizer, prompt, whole)
        for prompt, whole in zip(asked, told, strict=True)
    ]
    if type(processor).__name__ == "PaliGemmaProcessor":
        # Where a picture may look at the whole question, only the processor can say what is answer.
        suffixes = [whole[len(prompt) :] for prompt, whole in zip(asked, told, strict=True)]
        suffixes = [s.removesuffix(processor.tokenizer.eos_token) for s in suffixes]
        inputs = _tensors(processor, images, asked, "right", suffix=suffixes)
        ends = [row[row != -100].tolist() for row in inputs["labels"]]
    else:
        inputs = _tensors(processor, images, told, "right")
    for row, mask, end in zip(inputs["input_ids"], inputs["attention_mask"], ends, strict=True):
        if row[mask.bool()][-len(end) :].tolist() != end:
            raise FinetuningError(
                f"A {type(processor).__name__} does not end its tokens with those of the answer: "
                f"expected {processor.tokenizer.decode(end)!r}, found "
                f"{processor.tokenizer.decode(row[mask.bool()][-len(end) :])!r}."
            )
    return inputs, ends


def prompts(processor, images, questions, answers=None):
    """The text of each question as the model is asked it, with its answer if there are answers."""
    questions = [plain_text(processor, question) for question in questions]
    if answers is not None:
        answers = [plain_text(processor, answer) for answer in answers]
    name, end = type(processor).__name__, processor.tokenizer.eos_token or ""
    if getattr(processor, "chat_template", None):
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
        # A template that leaves out the end of an answer would teach a model never to stop.
        specials = tuple(token for token in processor.tokenizer.all_special_tokens if token)
        # And a line break that comes behind it is nothing that the model has to say.
        texts = [text.rstrip() for text in texts]
        return [text if text.endswith(specials) else text + end for text in texts]
    if name not in _PLAIN_PROMPTS:
        raise VlmkitError(
            f"This {name} has no chat template, so there is no telling how its model wants to be "
            f"asked. Give it one (processor.chat_template = ...); only {', '.join(_PLAIN_PROMPTS)} "
            "are known to vlmkit without."
        )
    if name == "Blip2Processor" and any(len(pictures) != 1 for pictures in images):
        wrong = next(len(pictures) for pictures in images if len(pictures) != 1)
        raise ImageError(f"BLIP-2 takes one image a question, and there are {wrong}.")
    texts = [
        _PLAIN_PROMPTS[name].format(
            images=str(getattr(processor, "image_token", "")) * len(pictures), question=question
        )
        for pictures, question in zip(images, questions, strict=True)
    ]
    if answers is None:
        return texts
    space = "" if name == "PaliGemmaProcessor" else " "  # which puts a line break of its own there
    return [f"{text}{space}{a}{end}" for text, a in zip(texts, answers, strict=True)]


def _conversation(pictures, question, answer=None):
    said = [{"type": "image", "image": picture} for picture in pictures]
    said.append({"type": "text", "text": question})
    turns = [{"role": "user", "content": said}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns


def _tensors(processor, images, texts, side, **more):
    if len(texts) > 1 and processor.tokenizer.pad_token is None:
        raise VlmkitError(
            "This tokenizer has no padding token, so several prompts cannot share a batch: set "
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
    told = tokenizer(whole, add_special_tokens=False)["input_ids"]
    same = 0
    while same < min(len(asked), len(told)) and asked[same] == told[same]:
        same += 1
    return told[same:]


def plain_text(processor, text):
    """The text with a space inside whatever would become a special token.

    A question is data: "<image>" typed in it is not another image, and an end-of-turn mark does
    not end the user's turn.
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
