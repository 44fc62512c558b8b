"""The bundled VLM: a real LlavaForConditionalGeneration, small enough to live in the package.

recipe.py      its architecture, tokenizer and processor, and the stages of its training
batches.py     pictures, text and questions made into tensors
train.py       `python -m vlmkit.models.pebble.train`: the stages, run, logged and resumable
connecting.py  another connector in the place of its projector: put in, trained, scored
states.py      it as it was at the end of its early stages; states/ has what that takes
checkpoint/    what `vk.load("pebble")` reads
MODEL_CARD.md  what it can and cannot do, measured
"""

from pathlib import Path


def path():
    """The folder of pebble's checkpoint, as `from_pretrained` takes it."""
    return Path(__file__).parent / "checkpoint"
