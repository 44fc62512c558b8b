"""Running: what a forward pass, a decoding step and a training step hold for a while.

Everything here happens in a rehearsal (`vlmkit.memory.shapes`): transformers' own forward,
PyTorch's own autograd, peft's own adapters, and no data.
"""

import logging

import torch

from vlmkit.anatomy import component_finder, unwrapped
from vlmkit.architectures import LANGUAGE
from vlmkit.errors import AnatomyError
from vlmkit.memory.cache import places_of
from vlmkit.memory.repeats import Shortened
from vlmkit.memory.shapes import Rehearsal


class Stage:
    """A model that has no data, and a rehearsal to run it in.

    model: on the meta device, as `vlmkit.memory.shadow` makes it. short: whether layers that are
        like one another are run once. device: "cuda" where bitsandbytes' kernels are to be those
        for a GPU; None for a CPU's.
    """

    def __init__(self, model, short=True, device=None):
        self.model = model
        self.rehearsal = Rehearsal(device)
        self.short = Shortened(self.rehearsal, model) if short else None
        self.rehearsal.watch(model)
        if not short:
            self.rehearsal.empty(model)

    @property
    def config(self):
        return unwrapped(self.model).config

    @property
    def complete(self):
        """Whether a training step went through every layer, or through one like it."""
        return self.short is None or self.short.complete

    @property
    def stand_ins(self):
        return self.short.stand_ins if self.short else {}

    @property
    def places(self):
        return places_of(self.model, self.stand_ins)

    def pixels(self, shape):
        """A picture's tensor, as a processor gives it."""
        return self.rehearsal.tensor(shape, torch.float32)

    def prefill(self, inputs):
        """Run the prompt, as `generate` does: logits of the last position only, and a cache.

        Returns (the cache, bytes by component at the peak, those of the cache with them).
        """
        last = {"logits_to_keep": 1} if unwrapped(self.model)._supports_logits_to_keep() else {}
        return self._forward(self.model, **inputs, use_cache=True, **last)

    def decode(self, cache, batch, length):
        """Run one more token after `length` positions, of which `cache` holds the states."""
        inputs = {
            "input_ids": torch.zeros(batch, 1, dtype=torch.long),
            "attention_mask": torch.ones(batch, length + 1, dtype=torch.long),
        }
        if self.config.model_type.startswith(("qwen", "glm")):
            inputs["position_ids"] = torch.zeros(3, batch, 1, dtype=torch.long)  # in three axes
        model = self.model
        if self.config.model_type == "blip-2":  # whose own forward wants a picture
            model = model.language_model
        return self._forward(model, **inputs, past_key_values=cache, use_cache=True)

    def _forward(self, model, **inputs):
        self.model.eval()
        self._restart()
        with self.rehearsal, torch.no_grad():
            output = self._run(model, inputs)
        # BLIP-2 hands on the output of its language model as it is.
        cache = getattr(output, "language_model_outputs", output).past_key_values
        return cache, _named(self.rehearsal.by_component)

    def _restart(self):
        if self.short:
            self.short.restart()
        self.rehearsal.restart()

    def _run(self, model, inputs):
        log = logging.getLogger("torch._subclasses.fake_tensor")
        level = log.level
        log.setLevel(logging.CRITICAL)  # what it reports is said below, in a sentence
        for value in inputs.values():
            if isinstance(value, torch.Tensor):
                self.rehearsal.know(value)
        try:
            return model(**inputs)
        except Exception as error:  # an architecture that looks at values, in ways of its own
            from vlmkit.errors import brief

            raise AnatomyError(
                f"{type(unwrapped(self.model)).__name__} cannot be run without data, so that its "
                f"cache and activations cannot be predicted: {brief(error)}"
            ) from error
        finally:
            log.setLevel(level)

    def train(self, inputs, labels):
        """Run a forward and a backward pass.

        Returns {parameter name: bytes of its gradient}, bytes by component at the peak (those of
        gradients under ("gradient", component)), and the bytes that are live in the end.
        """
        component_of = component_finder(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                owner = "gradient", component_of(name)
                parameter.register_post_accumulate_grad_hook(self._labelling(owner))
        self.model.train()
        self._restart()
        with self.rehearsal:
            loss = self._run(self.model, {**inputs, "labels": labels, "use_cache": False}).loss
            self.rehearsal.component = LANGUAGE
            loss.backward()
            self.rehearsal.component = None
        return self._learnt(), _named(self.rehearsal.by_component), self.rehearsal.live

    def _labelling(self, owner):
        return lambda parameter: self.rehearsal.relabel(parameter.grad, owner)

    def _learnt(self):
        parameters = dict(self.model.named_parameters())
        found = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        for left_out, shown in self.stand_ins.items():
            for name in parameters:
                if name.startswith(f"{left_out}."):
                    gradient = parameters[shown + name[len(left_out) :]].grad
                    if gradient is not None:
                        found[name] = gradient
        return {
            name: found[name].untyped_storage().nbytes() for name in parameters if name in found
        }


def _named(parts):
    """Bytes by component, where what is made between components (the merging of pictures and
    words, the loss) counts as the language model's."""
    named = {}
    for component, size in parts.items():
        named[component or LANGUAGE] = named.get(component or LANGUAGE, 0) + size
    return named
