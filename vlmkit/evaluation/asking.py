"""Asks a model: the inputs of a question and its pictures, and the text of the answer.

All of it goes the way that a user of transformers takes: the chat template of the processor writes
the prompt, the processor makes the tensors, and `generate` makes the answer. Prompts are padded on
the left, so that every answer begins right after its question.
"""

import contextlib
import inspect

from vlmkit.anatomy import vision_dtype
from vlmkit.errors import QuestionError, VlmkitError, public, shown
from vlmkit.evaluation.prompts import THOUGHTS, question_inputs
from vlmkit.images import read_all


@public
def ask(
    model,
    processor,
    images,
    question,
    *,
    max_new_tokens=64,
    do_sample=False,
    temperature=None,
    top_p=None,
    top_k=None,
    seed=None,
):
    """The model's answer to a question about an image or several, as text.

    images: a PIL image, a path or an array (see `vlmkit.images.read`), or a list of them, in the
    order in which the model sees them. An empty list asks without an image.

    Decoding is greedy, whatever the checkpoint's generation_config.json says: the most probable
    token each time, until the model ends its answer or `max_new_tokens` are reached: the attribute
    at_limit of the answer says which. With do_sample=True tokens are drawn at random. Then
    temperature (0.001 to 1000), top_p (above 0, at most 1) and top_k (0 is off) are those of
    transformers. One that is left out is the checkpoint's, or transformers' default; a checkpoint's
    that leaves nothing to draw is an error. seed: a number
    that decides the draws: the answer is then the same each time, on the same machine. PyTorch's
    own random numbers stay as they were.

    The thoughts of a model that thinks first are a part of the text. The model's training mode and
    its generation settings do not change.

    Raises `ImageError` for an image that cannot be read, `QuestionError` for an empty question and
    for one that, with its images, is too long for the model's context, and `VlmkitError` if there
    is no processor and for settings of sampling that cannot be or have no effect.
    """
    check_processor(processor)
    check_question(question)
    sampling = sampling_of(do_sample, temperature, top_p, top_k, seed)
    if do_sample:
        _require_draws(model.generation_config, sampling)
    images, questions = [read_all(images)], [question]
    with _seeded(seed):
        return answers(
            model, processor, images, questions, max_new_tokens=max_new_tokens, **sampling
        )[0]


def sampling_of(do_sample=False, temperature=None, top_p=None, top_k=None, seed=None):
    """What `generate` is told about sampling: a dictionary. Raises VlmkitError for values that
    cannot be, and for values without do_sample, which would have no effect."""
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(do_sample, bool):
        raise VlmkitError(f"do_sample is True or False, not {shown(do_sample)}.")
    if not do_sample:
        if named := [*given, *(["seed"] if seed is not None else [])]:
            raise VlmkitError(
                f"Decoding is greedy, so that {' and '.join(named)} would have no effect. To draw "
                "tokens at random, add do_sample=True (--do-sample on the command line)."
            )
        return {}
    for name, value in (given | ({} if seed is None else {"seed": seed})).items():
        kind, least, most, says = _SAMPLING[name]
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            raise VlmkitError(f"{name} is {says}, not {shown(value)}.")
    return {"do_sample": True, **{name: _SAMPLING[name][0](given[name]) for name in given}}


_SAMPLING = {
    "temperature": (float, 1e-3, 1e3, "a number from 0.001 to 1000 (greedy: without do_sample)"),
    "top_p": (float, 1e-9, 1, "a number above 0, at most 1"),
    "top_k": (int, 0, 10**9, "a whole number from 0 (0 is off)"),
    "seed": (int, 0, 2**32 - 1, "a whole number from 0 to 2^32 - 1"),
}
"""{setting: (its type, the least, the most, what it is in words)}."""


def _require_draws(own, sampling):
    """Raise VlmkitError if a checkpoint's own settings, where the caller gave none, leave nothing
    to draw: Qwen2-VL's are temperature 0.01, top_p 0.001 and top_k 1."""
    greedy = {"temperature": 0.1, "top_p": 0.1, "top_k": 1}  # at most: the likeliest token wins
    own = {name: getattr(own, name, None) for name in greedy if name not in sampling}
    own = {n: v for n, v in own.items() if v is not None and (v or n != "top_k") and v <= greedy[n]}
    if own:
        raise VlmkitError(
            f"The checkpoint's generation_config.json has {', '.join(f'{n} {own[n]}' for n in own)}"
            f", with which the most probable token is drawn each time. Give {' and '.join(own)} "
            "too. transformers' defaults are temperature 1, top_p 1 and top_k 50."
        )


@contextlib.contextmanager
def _seeded(seed):
    """PyTorch's random numbers follow from `seed` here, and afterwards go on as before."""
    import torch

    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


class Answer(str):
    """The text of an answer. at_limit: whether it ended because there were no more new tokens, and
    not because the model was done."""

    at_limit = False


class TooLong(QuestionError):
    """A prompt that is too long for the model's context; `prompt` is its number in the batch."""

    def __init__(self, message, prompt):
        super().__init__(message)
        self.prompt = prompt


def answers(model, processor, images, questions, *, max_new_tokens, **sampling):
    """The answers to a batch. images[i] is the list of RGB images of questions[i]; all these lists
    have the same length. sampling: what `sampling_of` returned; greedy without it.

    Raises the errors of `ask`, and `TooLong` with the number of the prompt that is too long.
    """
    inputs = prepared(model, processor, images, questions, max_new_tokens)
    made = generated(model, processor, inputs, max_new_tokens, **sampling)
    tokens = _new_tokens(inputs, made)
    found = [Answer(text) for text in _texts(processor, tokens)]
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
    for answer, row in zip(found, tokens.tolist(), strict=True):
        answer.at_limit = len(row) >= max_new_tokens and not ends.intersection(row)
    return found


def inputs_of(model, processor, images, question, max_new_tokens):
    """The prepared inputs of one question. Arguments and errors are those of `ask`."""
    check_processor(processor)
    check_question(question)
    return prepared(model, processor, [read_all(images)], [question], max_new_tokens)


def texts_of(processor, inputs, tokens):
    """The answers as text, from the tokens that `generate` returned for `inputs`."""
    return _texts(processor, _new_tokens(inputs, tokens))


def _new_tokens(inputs, tokens):
    """The tokens that `generate` has added to a prompt."""
    # The output of a decoder begins with the prompt, that of an encoder-decoder does not.
    prompt = inputs["input_ids"]
    if tokens.shape[1] >= prompt.shape[1] and tokens[:, : prompt.shape[1]].equal(prompt):
        tokens = tokens[:, prompt.shape[1] :]
    return tokens


def _texts(processor, tokens):
    """The tokens as texts, without special tokens, except those that begin and end thoughts."""
    tokenizer = processor.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    marks = {i: t.content for i, t in added if t.special and THOUGHTS.fullmatch(t.content)}
    if not marks:
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]
    texts = []
    for row in tokens.tolist():
        text, piece = "", []
        for token in [*row, None]:
            if token is None or token in marks:
                text += tokenizer.decode(piece, skip_special_tokens=True) + marks.get(token, "")
                piece = []
            else:
                piece.append(token)
        texts.append(text.strip())
    return texts


def prepared(model, processor, images, questions, max_new_tokens):
    """The inputs of a batch for `model`: on its device, in its dtypes, and with room in its context
    for `max_new_tokens` more. Arguments and errors are those of `answers`."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise VlmkitError(f"max_new_tokens is a whole number from 1, and not {max_new_tokens!r}.")
    inputs = question_inputs(processor, images, questions)
    _check_context(model, inputs, len(images[0]), max_new_tokens)
    inputs = inputs.to(model.device, vision_dtype(model))
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        # Some tokenizers always make them, and generate refuses inputs that the model does not
        # take.
        inputs.pop("token_type_ids", None)
    inputs.pop("labels", None)  # PaliGemma's processor makes them, for training
    return inputs


def generated(model, processor, inputs, max_new_tokens, do_sample=False, **more):
    """What `model.generate` returns for prepared inputs, with greedy decoding unless `do_sample`.
    more: further arguments of `generate`."""
    pad = model.generation_config.pad_token_id
    with in_evaluation_mode(model):
        return model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            max_length=None,  # generate would warn about the checkpoint's own
            do_sample=do_sample,
            num_beams=1,
            pad_token_id=processor.tokenizer.pad_token_id if pad is None else pad,
            **more,
        )


def image_places(model, input_ids):
    """Which of `input_ids` are placeholders of visual tokens, as booleans of the same shape."""
    config = model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return input_ids == (-1 if token is None else token)


def image_tokens(model, input_ids):
    """How many of `input_ids` are placeholders of visual tokens."""
    return int(image_places(model, input_ids).sum())


def context_of(model):
    """How many tokens a model can take, with those of its answer; None if its config does not
    say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _check_context(model, inputs, images, max_new_tokens):
    context = context_of(model)
    if context is None:
        return
    needed = inputs["attention_mask"].sum(dim=1)
    prompt = int(needed.argmax())
    needed = int(needed[prompt])
    available = context - max_new_tokens
    if needed <= available:
        return
    for_images = image_tokens(model, inputs["input_ids"][prompt])
    for_text = needed - for_images
    if available < 1:
        remedy = "ask for a shorter answer"
    elif for_images <= for_text:
        remedy = "shorten the question"
    else:
        remedy = "use fewer images" if images > 1 else "use a smaller image"
    raise TooLong(
        f"The prompt needs {needed:,} tokens ({for_images:,} for {images} "
        f"image{'s' * (images != 1)}, {for_text:,} for the question and its template) and "
        f"{max(available, 0):,} are available: the model's context is {context:,}, of which "
        f"{max_new_tokens:,} are for the answer. To make it fit, {remedy}.",
        prompt,
    )


@contextlib.contextmanager
def in_evaluation_mode(model):
    """Evaluation mode in this context. Afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # not model.train(): frozen modules may have been in evaluation
            module.training = True


def check_processor(processor):
    """Raises VlmkitError if there is no processor of images and text."""
    if processor is None:
        raise VlmkitError(
            "There is no processor, which makes the model's inputs from pictures and questions. "
            "Load with processor=True, or give transformers' AutoProcessor of the same model."
        )
    template = getattr(processor, "apply_chat_template", None)
    if not (hasattr(processor, "tokenizer") and callable(template)):
        raise VlmkitError(
            f"A {type(processor).__name__} is not a processor of images and text. Give "
            "transformers' AutoProcessor of the same model."
        )


def check_question(question):
    """Raises QuestionError if the question is not text, or is empty."""
    if not isinstance(question, str):
        raise QuestionError(f"A question is text, and this is a {type(question).__name__}.")
    if not question.strip():
        raise QuestionError('The question is empty. Ask one, such as "What is in the picture?"')
