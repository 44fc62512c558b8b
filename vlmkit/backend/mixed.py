"""Several quantized formats in one model, for transformers.

One BitsAndBytesConfig holds one format. A plan such as "vision_encoder=int8,language_model=nf4-dq"
needs two, so it becomes a MixedConfig: a list of BitsAndBytesConfigs, each of which skips what the
others quantize. Importing this module makes it known to transformers, through the registry that it
keeps for quantization methods of other packages:

    import vlmkit.backend.mixed
    AutoModelForImageTextToText.from_pretrained(folder)      # of a model saved with two formats

Nothing here quantizes: transformers' own quantizers do, one after another, and the layers are
bitsandbytes' own. So whatever knows those layers (PEFT, Trainer, generate) works as it does with
one format.
"""

from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "vlmkit"
"""What a config's `quant_method` says for a MixedConfig."""


@register_quantization_config(METHOD)
class MixedConfig(QuantizationConfigMixin):
    """The config of a model that holds several quantized formats.

    configs: a BitsAndBytesConfig (or its dictionary) for each format. A Linear layer gets the
        format of the one config whose `llm_int8_skip_modules` leave it.
    """

    def __init__(self, configs, **kwargs):
        self.quant_method = METHOD
        self.configs = [
            AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else config
            for config in configs
        ]

    def to_dict(self):
        return {
            "quant_method": METHOD,
            "configs": [config.to_dict() for config in self.configs],
        }


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
        for part in self.parts:  # each also marks the model as bitsandbytes', which it is
            part.preprocess_model(model, dtype=dtype, **kwargs)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for part in self.parts:
            part._process_model_after_weight_loading(model, **kwargs)
        return model

    def _part_of(self, model, name):
        """The quantizer of the layer that the parameter `name` is in, or None."""
        return next((p for p in self.parts if p.param_needs_quantization(model, name)), None)

    def param_needs_quantization(self, model, param_name, **kwargs):
        return self._part_of(model, param_name) is not None

    def param_element_size(self, model, param_name, param):
        part = self._part_of(model, param_name)
        return param.element_size() if part is None else part.quantized_element_size

    def get_quantize_ops(self):
        return _EachItsOwn(self, lambda part: part.get_quantize_ops())

    def get_load_operations(self):
        return {
            "deserialize": lambda _: _EachItsOwn(
                self, lambda part: part.get_load_operations()["deserialize"](part)
            )
        }

    def _dequantize(self, model, dtype=None):
        for part in {type(part): part for part in self.parts}.values():
            model = part._dequantize(model, dtype=dtype)
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


class _EachItsOwn(ConversionOps):
    """The operation of the quantizer that a layer belongs to."""

    def __init__(self, hf_quantizer, operation_of):
        self.hf_quantizer = hf_quantizer
        self.operation_of = operation_of

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        part = self.hf_quantizer._part_of(model, full_layer_name)
        if part is None:  # a weight that is not quantized has nothing to be made of
            return input_dict
        operation = self.operation_of(part)
        return operation.convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
