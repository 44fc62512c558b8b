"""A real language model with eyes: SmolLM2-135M-Instruct behind a vision encoder made here.

recipe.py        architecture, tokenizer, processor, and the states that load by name
fetching.py      `vlmkit fetch cobble`: the language model, and checkpoints put together from it
instructions.py  pictures with questions and answers, for training and for tests
tensors.py       pictures and text as tensors, for training
train.py         `python -m vlmkit.models.cobble.train`: the stages of its training, which are in
                 arrays.py (pictures), vision.py, conversations.py and own_words.py (text that keeps
                 the language model talking), with their loop in loop.py
weights/         vision encoder, projectors and adapters, all trained here
MODEL_CARD.md    where every weight comes from, what cobble can and cannot do, measured
"""


def fetch(file=None):
    """Put cobble together in vlmkit's cache. See `vlmkit.models.cobble.fetching.fetch`."""
    from vlmkit.models.cobble import fetching

    return fetching.fetch(file)


def path(name="cobble"):
    """The folder of the checkpoint of a state of cobble, as `from_pretrained` takes it. Raises
    CheckpointError if cobble was not fetched."""
    from vlmkit.catalog.bundled import BUNDLED

    return BUNDLED[name].find()
