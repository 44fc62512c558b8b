"""Memory: the bytes that a model needs, predicted from a config, and measured.

vk.memory.predict("pebble", plan)     # a Ledger, without reading a weight
vk.memory.largest("pebble", "8 GB")   # the most that fits on a card, or on "2 x RTX 4090"
vk.memory.serving(name, "L40S")       # what vLLM would have left for its cache there
vk.memory.measure(model)              # a Ledger of what the model really holds
vk.memory.compare(predicted, measured)
vk.memory.stored(folder)              # what lies in weight files, whatever quantized them
"""

from vlmkit.backend.caching import cache_of
from vlmkit.memory.cards import Cards
from vlmkit.memory.ledger import BOUNDED, BUFFER, STATE, Ledger, compare
from vlmkit.memory.limits import largest
from vlmkit.memory.measuring import measure, measure_peak, storages_of
from vlmkit.memory.predicting import predict, visual_tokens
from vlmkit.memory.serving import serving
from vlmkit.memory.stored import stored
from vlmkit.units import MEGABYTE, Size, parse_size

__all__ = [
    "BOUNDED",
    "BUFFER",
    "MEGABYTE",
    "STATE",
    "Cards",
    "Ledger",
    "Size",
    "cache_of",
    "compare",
    "largest",
    "measure",
    "measure_peak",
    "parse_size",
    "predict",
    "serving",
    "storages_of",
    "stored",
    "visual_tokens",
]
