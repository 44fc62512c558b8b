"""Dry runs: what a forward pass, a decoding step and a training step hold for a while.

A dry run is transformers' own forward pass, PyTorch's own autograd and peft's own adapters, on
tensors without data (`vlmkit.memory.tracker`).
"""

from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import convert_to_fp32
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from vlmkit.anatomy import component_finder, unwrapped, vision_dtype
from vlmkit.architectures import LANGUAGE
from vlmkit.backend.caching import cache_of, with_cache
from vlmkit.backend.losses import IGNORED, loss_of_answers
from vlmkit.backend.passes import attending, casting, training_attention
from vlmkit.errors import AnatomyError, SizeError, brief
from vlmkit.families import family_of, image_id, writes_apart
from vlmkit.memory.cache import places_of
from vlmkit.memory.layers import ALL, SkippedLayers
from vlmkit.memory.tracker import AllocationTracker, storage_of


class DryRun:
    """A model without data, and the tracker that it runs in.

    model: on the meta device, as `vlmkit.memory.parameters.as_loaded` makes it.
    last: how many layers of a kind are run at the end of a stack in training; ALL runs every layer.
    device: "cuda" for bitsandbytes' kernels on a GPU; None for those on a CPU.
    """

    def __init__(self, model, last=1, device=None):
        self.model = model
        self.config = unwrapped(model).config
        self.device = device
        self.tracker = self._tracker()
        self.skipped = None if last is ALL else SkippedLayers(self.tracker, model, last)
        self.tracker.watch(model, self._label_of())
        if last is ALL:
            self.tracker.empty(model)
        self.before = [
            (self._layer_of(name), place, dict(place))
            for name, part in model.named_modules()
            for place in (vars(part), part._buffers)
        ]
        self.listens = False

    def _tracker(self):
        return AllocationTracker(self.device)

    def _label_of(self):
        return component_finder(self.model)

    def _layer_of(self, name):
        return self.skipped and self.skipped.layer_of(name)

    def reset(self):
        """Make everything as it was before the first run, so that the next run is like it."""
        for parameter in self.parameters().values():
            parameter.grad = None
        never_ran = self.skipped.never_ran() if self.skipped else ()
        for layer, now, before in self.before:
            if layer in never_ran:
                continue
            for key, value in list(now.items()):
                if isinstance(value, torch.Tensor) and self.tracker.made(value):
                    del now[key]
                    now.update({key: before[key]} if key in before else {})
        if self.skipped:
            self.skipped.restart()
        self.tracker.forget()

    def renew(self):
        """Empty the tensors that the model has got since the last run, and listen to them."""
        if self.skipped:
            self.skipped.renew()
        else:
            self.tracker.empty(self.model)
        self.listens = False

    def parameters(self):
        """{full name: parameter}. A run replaces those of a layer that it is the first to need."""
        return dict(self.model.named_parameters())

    @property
    def complete(self):
        """Whether a training step saw every layer, or one like it, in both passes."""
        return self.skipped is None or self.skipped.complete

    @property
    def stand_ins(self):
        return self.skipped.stand_ins if self.skipped else {}

    @property
    def places(self):
        return places_of(self.model, self.stand_ins, self._label_of())

    def inputs(self, batch):
        """The tensors of `batch`. Pixels are float32, as processors make them, or have the dtype of
        the vision encoder where it takes no other."""
        casts = family_of(self.config).casts
        dtype = torch.float32 if casts else vision_dtype(self.model)
        return batch.inputs(lambda shape: self.tracker.tensor(shape, dtype))

    def prefill(self, inputs):
        """Run the prompt as `generate` does, with logits of the last position only.

        Returns (the cache, {component: bytes} at the peak, those of the cache included).
        """
        with_pictures = "pixel_values" in inputs
        model = self.model if with_pictures else family_of(self.config).decoder(self.model)
        if not hasattr(unwrapped(model), "_supports_logits_to_keep"):
            raise AnatomyError(f"{type(unwrapped(model)).__name__} does not write token by token.")
        last = {"logits_to_keep": 1} if unwrapped(model)._supports_logits_to_keep() else {}
        if writes_apart(self.config):
            last["decoder_input_ids"] = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long)
        cache, peak = self._forward(model, **inputs, use_cache=True, **last)
        if cache is None:  # as for Granite 4 Vision, which is always given one by `generate`
            last |= with_cache(DynamicCache(config=self.config))
            cache, peak = self._forward(model, **inputs, use_cache=True, **last)
        return cache, peak

    def decode(self, cache, batch_size, length):
        """Run one more token after `length` positions, whose states `cache` holds."""
        family = family_of(self.config)
        token = torch.zeros(batch_size, 1, dtype=torch.long)
        mask = torch.ones(batch_size, length + 1, dtype=torch.long)
        inputs = {"input_ids": token, "attention_mask": mask}
        if writes_apart(self.config):
            seen = BaseModelOutput(last_hidden_state=self.encoded)
            mask = torch.ones(self.encoded.shape[:2], dtype=torch.long)
            inputs = {"decoder_input_ids": token, "attention_mask": mask, "encoder_outputs": seen}
        if family.three_axes(self.config):  # HunYuan has four
            rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
            axes = len(rope.get("mrope_section", "thw"))
            inputs["position_ids"] = torch.zeros(axes, batch_size, 1, dtype=torch.long)
        model = family.decoder(self.model)
        return self._forward(model, **inputs, **with_cache(cache), use_cache=True)

    def _forward(self, model, **inputs):
        self.model.eval()
        self._restart()
        with self.tracker, torch.no_grad():
            output = self._run(model, inputs)
        self.encoded = getattr(output, "encoder_last_hidden_state", None)
        return cache_of(output), self._peak()

    def _peak(self):
        return named(self.tracker.by_component)

    def _restart(self):
        if self.skipped:
            self.skipped.restart()
        self.tracker.restart()

    def _run(self, model, inputs):
        for value in inputs.values():
            if isinstance(value, torch.Tensor):
                self.tracker.know(value)
        try:
            return model(**inputs)
        except Exception as error:  # an architecture that looks at values in ways of its own
            raise AnatomyError(
                f"{type(unwrapped(self.model)).__name__} cannot be run without data, so that its "
                f"cache and activations cannot be predicted: {brief(error)}. Its weights can be, "
                "without tokens, pictures and training."
            ) from error

    def train(self, inputs, bf16):
        """Run a forward and a backward pass as `vk.finetuning.train` does. Every token that stands
        for no picture is in the loss.

        Returns {parameter name: bytes of its gradient}, {component: bytes} at the peak (those of
        gradients under ("gradient", component)), and the bytes that are live at the end.
        """
        if (
            "pixel_values" not in inputs
            and family_of(self.config).decoder(self.model) != self.model
        ):
            raise SizeError(
                f"{self.config.model_type} takes no training step without a picture: give images."
            )
        if not self.listens:
            component_of = component_finder(self.model)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    owner = "gradient", component_of(name)
                    parameter.register_post_accumulate_grad_hook(self._labelling(owner))
            self.listens = True
        self.model.train()
        self._restart()
        attention = training_attention(self.model, bf16, self.device or "cpu")
        with attending(self.model, attention), casting(self.model, not bf16), self.tracker:
            loss = self._loss(inputs, bf16)
            self.tracker.component = LANGUAGE
            loss.backward()
            self.tracker.component = None
            self._end()
        return self._gradients(), self._peak(), self.tracker.live

    def _end(self):
        """What happens at the end of a backward pass: nothing, where one card has the model."""

    def _loss(self, inputs, bf16):
        ids, pictures = inputs["input_ids"], image_id(self.config)
        labels = ids if pictures is None else ids.masked_fill(ids == pictures, IGNORED)
        inputs = {**inputs, "use_cache": False}
        if writes_apart(self.config):  # its decoder reads the labels
            inputs["labels"] = labels
        outputs = self._outputs(inputs, bf16)
        return outputs.loss if "labels" in inputs else loss_of_answers(outputs, labels)

    def _outputs(self, inputs, bf16):
        with _autocast(self.device) if bf16 else nullcontext():
            outputs = self._run(self.model, inputs)
        if bf16 and "labels" not in inputs:  # as accelerate does for a model that it prepares
            outputs = convert_to_fp32(outputs)
        return outputs

    def _labelling(self, owner):
        return lambda parameter: self.tracker.relabel(parameter.grad, owner)

    def _gradients(self):
        parameters, found = self.parameters(), {}
        for name in parameters:
            gradient = parameters[self._stand_in(name)].grad
            if gradient is not None:
                found[name] = storage_of(gradient).nbytes()
        return found

    def _stand_in(self, name):
        """The parameter that shows what the parameter `name` does: its own name, or in a layer that
        was skipped that of the layer like it."""
        layer = self._layer_of(name)
        return self.stand_ins[layer] + name[len(layer) :] if layer in self.stand_ins else name


@contextmanager
def _autocast(device):
    """Autocast in bf16. The tensors of a dry run say that they are on the CPU. peft asks whether
    autocast is on, by which PyTorch means that of a GPU, and casts otherwise.

    Autocast's cache would hold the adapters in bf16 until the end of the forward pass, and a layer
    that stands for others would seem to hold them longer. What the backward pass needs of them is
    kept without it."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", device == "cuda")
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def named(parts):
    """Bytes by component. What is made between components (the merging of pictures and words, the
    loss) counts as the language model's."""
    named = {}
    for component, size in parts.items():
        named[component or LANGUAGE] = named.get(component or LANGUAGE, 0) + size
    return named
