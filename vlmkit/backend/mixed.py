"""Several quantized formats in one model, for transformers.

Since transformers 5.21, until a BitsAndBytesConfig can hold two formats: it holds one. A plan such
as "vision_encoder=int8,language_model=nf4-dq" needs two, so it becomes a MixedConfig: a list of
BitsAndBytesConfigs, each of which skips what the others quantize. Importing this module registers
it with transformers, which has a registry for quantization methods of other packages:

    import vlmkit.backend.mixed
    AutoModelForImageTextToText.from_pretrained(folder)      # a model saved with two formats

transformers' own quantizers do the work, one after another, and the layers are bitsandbytes' own.
So everything that knows these layers (PEFT, Trainer, generate) works as with one format.
"""

from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "vlmkit"
"""The `quant_method` of a MixedConfig."""


@register_quantization_config(METHOD)
class MixedConfig(QuantizationConfigMixin):
    """The config of a model that holds several quantized formats.

    configs: a BitsAndBytesConfig (or its dictionary) for each format. A Linear layer gets the
        format of the one config that does not list it in `llm_int8_skip_modules`.
    """

    def __init__(self, configs, **kwargs):
        self.quant_method = METHOD
        self.configs = [
            AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else config
            for config in configs
        ]

    def to_dict(self):
        return {"quant_method": METHOD, "configs": [config.to_dict() for config in self.configs]}


@register_quantizer(METHOD)
class MixedQuantizer(HfQuantizer):
    """transformers' quantizer for each config of a MixedConfig, used together."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.parts = [
            AutoHfQuantizer.from_config(config, pre_quantized=self.pre_quantized)
            for config in quantization_config.configs
        ]
        names = [name for part in self.parts for name in part.serialized_names["weight"]]
        self.serialized_names = {"weight": list(dict.fromkeys(names))}

    def validate_environment(self, *args, **kwargs):
        for part in self.parts:
            part.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map):
        return self.parts[0].update_device_map(device_map)

    def adjust_max_memory(self, max_memory):
        return self.parts[0].adjust_max_memory(max_memory)

    def preprocess_model(self, model, dtype=None, **kwargs):
        for part in self.parts:  # each also marks the model as quantized by bitsandbytes
            part.preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for part in self.parts:
            part._process_model_after_weight_loading(model, **kwargs)
        return model

    def _part_of(self, model, name):
        """The quantizer of the layer that holds the parameter `name`, or None."""
        return next((p for p in self.parts if p.param_needs_quantization(model, name)), None)

    def param_needs_quantization(self, model, param_name, **kwargs):
        return self._part_of(model, param_name) is not None

    def param_element_size(self, model, param_name, param):
        part = self._part_of(model, param_name)
        if part is None:
            return param.element_size()
        return part.quantized_element_size / getattr(model, "shards", 1)

    def get_quantize_ops(self):
        return _OfItsLayer(self, lambda part: part.get_quantize_ops())

    def get_load_operations(self):
        def operation_of(part):
            return part.get_load_operations()["deserialize"](part)

        return {"deserialize": lambda _: _OfItsLayer(self, operation_of)}

    def _dequantize(self, model, dtype=None):
        for part in {type(part): part for part in self.parts}.values():
            model = part._dequantize(model, dtype=dtype)
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


class _OfItsLayer(ConversionOps):
    """Converts a weight by the operation of the quantizer that its layer belongs to."""

    def __init__(self, hf_quantizer, operation_of):
        self.hf_quantizer = hf_quantizer
        self.operation_of = operation_of

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        part = self.hf_quantizer._part_of(model, full_layer_name)
        if part is None:  # the weight is not quantized
            return input_dict
        operation = self.operation_of(part)
        weights = operation.convert(
            input_dict, full_layer_name=full_layer_name, model=model, **kwargs
        )
        return model.cut(weights) if hasattr(model, "cut") else weights  # see backend/sharding.py
