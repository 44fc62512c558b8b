"""Backend: every workaround around transformers, bitsandbytes and peft, each in one place.

A workaround says since which release it is needed, until when, and why.

boundaries.py      casts between components of different float formats
checkpointing.py   activations computed twice rather than kept, under both of its names
cpu.py             guards against bitsandbytes' traps on a CPU
mixed.py           several quantized formats in one model
optimizers.py      optimizers by name
passes.py          attention, precision and checks of a model's passes while it is trained
quantizing.py      4-bit quantization on a CPU, with bitsandbytes' bytes, in a tenth of its time
quiet.py           no progress bars and no advice from the libraries
storages.py        the tensors behind a quantized weight
validation.py      dataclasses that check names, with those of other libraries, and types
"""
