"""The bundled VLM: a real LlavaForConditionalGeneration, small enough to live in the package.

recipe.py      architecture, tokenizer and processor
batches.py     pictures, text and questions as tensors
train.py       `python -m vlmkit.models.pebble.train`: the stages of its training
connecting.py  another connector in place of the projector: inserted, trained, scored
states.py      pebble at the end of its early stages, from the weights in states/
checkpoint/    what `vk.load("pebble")` reads
MODEL_CARD.md  what pebble can and cannot do, measured
"""

from pathlib import Path


def path():
    """The folder of pebble's checkpoint, as `from_pretrained` takes it."""
    return Path(__file__).parent / "checkpoint"
