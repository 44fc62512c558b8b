"""A question and its pictures made into a model's inputs, and its answer made into text.

Everything goes the way a user of transformers would take: the processor's chat template makes the
prompt, the processor its tensors, `generate` the answer. Prompts are padded on the left, so that
every answer starts right after its question.
"""

import contextlib
import inspect

from vlmkit import anatomy
from vlmkit.errors import QuestionError, VlmkitError
from vlmkit.evaluation.prompts import question_inputs
from vlmkit.images import read_all


def ask(model, processor, images, question, *, max_new_tokens=64):
    """The model's answer to a question about an image or several, as text.

    images: a PIL image, a path or an array, or a list of them, in the order in which the model is
    to see them (see `vlmkit.images.read`); an empty list asks without a picture. Greedy decoding:
    the most probable token each time, at most `max_new_tokens` of them, until the model ends its
    answer. The model's training mode and generation settings are left as they were.

    Raises `ImageError` for an image that cannot be read, `QuestionError` for an empty question and
    for one that does not fit the model's context together with its images, and `VlmkitError` where
    there is no processor.
    """
    check_processor(processor)
    check_question(question)
    return answers(model, processor, [read_all(images)], [question], max_new_tokens=max_new_tokens)[
        0
    ]


class TooLong(QuestionError):
    """A prompt of a batch that does not fit; `prompt` is its number in the batch."""

    def __init__(self, message, prompt):
        super().__init__(message)
        self.prompt = prompt


def answers(model, processor, images, questions, *, max_new_tokens):
    """The answers to a batch: images[i] is the list of RGB images of questions[i], all as long.

    Raises as `ask` does, and `TooLong` with the number of the prompt that does not fit.
    """
    inputs = prepared(model, processor, images, questions, max_new_tokens)
    return texts_of(processor, inputs, generated(model, processor, inputs, max_new_tokens))


def texts_of(processor, inputs, tokens):
    """The answers in what `generate` returned for `inputs`, as text."""
    # A decoder's output starts with its prompt, an encoder-decoder's does not.
    prompt = inputs["input_ids"]
    if tokens.shape[1] >= prompt.shape[1] and tokens[:, : prompt.shape[1]].equal(prompt):
        tokens = tokens[:, prompt.shape[1] :]
    texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def prepared(model, processor, images, questions, max_new_tokens):
    """The inputs of a batch as `model` takes them: on its device, in its types, and short enough to
    leave room for `max_new_tokens` more. Arguments and errors are those of `answers`."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise VlmkitError(f"max_new_tokens is a whole number from 1; it is {max_new_tokens!r}.")
    inputs = question_inputs(processor, images, questions)
    _check_context(model, inputs, len(images[0]), max_new_tokens)
    inputs = inputs.to(model.device, _vision_dtype(model))
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        # Some tokenizers give them whether or not the model has a use for them, and generate
        # refuses what the model does not take.
        inputs.pop("token_type_ids", None)
    inputs.pop("labels", None)  # PaliGemma's processor prepares for training
    return inputs


def generated(model, processor, inputs, max_new_tokens, **outputs):
    """What `model.generate` makes of prepared inputs, greedily; `outputs` asks it for more."""
    pad = model.generation_config.pad_token_id
    with in_evaluation_mode(model):
        return model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            max_length=None,  # a checkpoint's own would draw a warning
            do_sample=False,
            num_beams=1,
            pad_token_id=processor.tokenizer.pad_token_id if pad is None else pad,
            **outputs,
        )


def image_places(model, input_ids):
    """Which of `input_ids` are placeholders for visual tokens: booleans in the same shape."""
    config = model.config
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    return input_ids == (-1 if token is None else token)


def image_tokens(model, input_ids):
    """How many of `input_ids` are placeholders for visual tokens."""
    return int(image_places(model, input_ids).sum())


def _check_context(model, inputs, images, max_new_tokens):
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
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
        f"{max_new_tokens:,} are kept for the answer. To make it fit, {remedy}.",
        prompt,
    )


def _vision_dtype(model):
    """The floating-point type in which the vision encoder wants its pixels.

    Under a plan the components' types differ, and `model.dtype` is whichever comes first. Of a
    quantized encoder it is the type of what stayed unquantized, its patch embedding for one.
    """
    component_of = anatomy.component_finder(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and component_of(name) == "vision_encoder":
            return parameter.dtype
    return model.dtype


@contextlib.contextmanager
def in_evaluation_mode(model):
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # and not model.train(), which would wake what was frozen in eval
            module.training = True


def check_processor(processor):
    if processor is None:
        raise VlmkitError(
            "There is no processor, which turns pictures and questions into the model's inputs: "
            "load with processor=True, or pass transformers' AutoProcessor of the same model."
        )
    if not (
        hasattr(processor, "tokenizer")
        and callable(getattr(processor, "apply_chat_template", None))
    ):
        raise VlmkitError(
            f"A {type(processor).__name__} is not a processor of images and text; "
            "transformers' AutoProcessor of the same model is."
        )


def check_question(question):
    """Raises QuestionError for what is no question: not text, or empty."""
    if not isinstance(question, str):
        raise QuestionError(f"A question is text, and this is a {type(question).__name__}.")
    if not question.strip():
        raise QuestionError(
            'The question is empty: ask something, such as "What is in the picture?"'
        )
