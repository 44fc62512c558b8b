"""Backend: every workaround around transformers, bitsandbytes and peft, each in one place.

A workaround says since which release it is needed, until when, and why. The oldest releases tried
are transformers 5.21, bitsandbytes 0.50 and peft 0.19.

boundaries.py      casts between components of different float formats
caching.py         the cache of a forward pass, under both of its names in transformers
checkpointing.py   gradient checkpointing, under both of its names in transformers
converting.py      what transformers quantizes, and how it is told to quantize something else
cpu.py             guards against bitsandbytes' bugs, on a CPU above all
dora.py            DoRA on int8 layers of a CPU, and on weights without data
llama4.py          a field that is missing in the output of Llama 4
mixed.py           several quantized formats in one model
optimizers.py      optimizers by name
passes.py          attention, precision and checks of a model's passes while it is trained
processes.py       how many processes a launch has, and whether this is the first
quantizing.py      4-bit quantization on a CPU: bitsandbytes' bytes in a tenth of its time
quiet.py           no progress bars and no advice from the libraries
sharding.py        a model in shards, each process with its own, from the file on
storages.py        the tensors behind a quantized weight
validation.py      dataclasses that check names, with those of other libraries, and types
"""

import logging

# On import, bitsandbytes notes that an optional kernel for products of one row is not installed.
# Nothing here uses this kernel (see vlmkit.backend.cpu), and a reader cannot act on the note.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
