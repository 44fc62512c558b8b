"""A config for each entry of transformers' image-text-to-text mapping, from which it can be built.

Most build from their default config. `PATCHES` completes the defaults that do not, and says what
they lack; `NOT_BUILT` names what stays out, and why.
"""

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, CLIPVisionConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
LABELS = json.loads((Path(__file__).parent / "data" / "architectures.json").read_text("utf-8"))
"""model_type -> {"parameters": {component: count}, "paths": {path prefix: component}}, with "#" for
any number in a path. Written out from the rules and then checked by hand, against the forward pass
where a name leaves a doubt: they keep a later change of the rules from moving anything unseen."""

NOT_BUILT = {
    "evolla": "reads proteins, not pictures",
    "gemma3n": "its encoder is timm's MobileNet, and timm needs torchvision",
    "mistral4": "reads text alone",
}


def config_of(model_type):
    """A config of that `model_type` that builds: the default one, completed where it must be."""
    config = CONFIG_MAPPING[model_type](**KEYWORDS.get(model_type, {}))
    PATCHES.get(model_type, lambda config: None)(config)
    return config


# The default width of Aya's encoder is not a multiple of its default number of heads; Gemma 4
# describes no eyes and ears by default; timm is missing here, and any encoder takes its place.
KEYWORDS = {
    "aya_vision": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "num_attention_heads": 16,
        }
    },
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model"}},
    "gemma4": {"vision_config": {}, "audio_config": {}},
    "gemma4_unified": {"vision_config": {}, "audio_config": {}},
}


def _vocabulary(config):
    config.vocabulary_map = {"<image>": 5, "<|extra_200|>": 6}


def _rope_of_each_layer_type(config):
    kinds = set(config.text_config.layer_types)
    config.text_config.rope_parameters = {
        kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in kinds
    }


def _which_layers_have_experts(config):
    layers = config.text_config.num_hidden_layers
    config.text_config.mlp_layer_types = ["dense"] + ["sparse"] * (layers - 1)


def _experts(config):
    text = config.text_config
    text.num_experts, text.top_k_experts, text.moe_intermediate_size = 8, 2, 704


def _deep_layers(config):
    config.deepstack_layer_map, config.downsample_rate = [[-1, 0]], "1/2"


def _head_width(config):
    text = config.text_config
    text.head_dim = text.hidden_size // text.num_attention_heads


def _encoder_without_timm(config):
    config.vision_config = CLIPVisionConfig()
    config.vision_config.model_args = {"embed_dim": config.vision_config.hidden_size}


def _indexer(config):
    text = config.text_config
    text.indexer_n_heads, text.indexer_kv_heads, text.indexer_head_dim = 4, 1, 128
    text.indexer_budget, text.indexer_compress_ratio = 2048, 4
    text.output_gate_type = "sigmoid"


PATCHES = {
    "chameleon": _vocabulary,
    "cohere_compass": _rope_of_each_layer_type,
    "deepseek_ocr2": _which_layers_have_experts,
    "diffusion_gemma": _experts,
    "emu3": _vocabulary,
    "granite4_vision": _deep_layers,
    "hunyuan_vl": _head_width,
    "perception_lm": _encoder_without_timm,
    "qwen4_exp": _indexer,
}


def small_config_of(model_type):
    """A config of that `model_type` with few and narrow layers, of every kind that it has."""
    config = config_of(model_type)
    _shrink(config, {})
    SMALLER.get(model_type, lambda config: None)(config)
    return config


LAYERS = 6  # five layers with a window and one without, in Gemma 3
MOST = 512  # of the vocabulary
NARROW = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), MOST),
}


def _shrink(config, done):
    done[id(config)] = config
    depth = vars(config).get("num_hidden_layers")
    heads = vars(config).get("num_attention_heads")
    for name, value in list(vars(config).items()):
        most = NARROW.get(name, 128 if "intermediate_size" in name else None)
        if isinstance(value, PreTrainedConfig) and id(value) not in done:
            _shrink(value, done)
        elif isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:LAYERS])
        elif type(value) is not int:
            continue
        elif most is not None:
            setattr(config, name, min(value, most))
        elif name.endswith(("_id", "_index", "_ids")) and value >= MOST:
            setattr(config, name, MOST - 1)
    if type(heads) is int and heads > 4 and vars(config).get("hidden_size"):
        config.hidden_size = config.hidden_size // heads * 4
        config.num_attention_heads = 4
        kept = vars(config).get("num_key_value_heads")
        if kept:
            config.num_key_value_heads = max(1, kept * 4 // heads)


def _convolutions(config):
    text = config.text_config
    text.layer_types = ["conv", "conv", "full_attention"] * (text.num_hidden_layers // 3)


def _rotated(*sections, **more):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}

    def rotate(config):
        config.text_config.rope_parameters = rope

    return rotate


def _chosen(config):
    config.text_config.num_experts_per_tok = 1


def _omni(config):
    config.vision_start_token_id, config.audio_start_token_id = MOST - 2, MOST - 3
    config.text_config.hidden_size, config.text_config.head_dim = 512, 128
    _rotated(16, 24, 24)(config)


def _glm_moe(config):
    config.text_config.head_dim = 64
    _rotated(8, 12, 12)(config)


def _wide_indexer(config):
    config.text_config.indexer_head_dim = config.text_config.head_dim


def _window(config):
    config.text_config.sliding_window = 16


def _sparse(config):
    text = config.text_config
    text.layer_types = ["full_attention", "minimax_m3_sparse"] * (text.num_hidden_layers // 2)


def _tokens_of_pictures_and_sounds(config):
    config.vision_config.codebook_size = config.audio_config.codebook_size = MOST // 4
    config.image_token_offset, config.audio_token_offset = MOST // 2, MOST // 4 * 3


def _fitting_ends(config):
    config.vision_config.text_hidden_size = config.text_config.hidden_size
    config.text_config.unpadded_vocab_size = MOST - 8


def _loop(config):
    _fitting_ends(config)
    text = config.text_config
    text.n_layers_per_attn_res_block = text.loop_layer_index_start = 2
    text.loop_layer_index_end = 4


SMALLER = {
    "apertus1p5": _tokens_of_pictures_and_sounds,
    "inkling2": _fitting_ends,
    "inkling2_loop": _loop,
    "deepseek_ocr2": _chosen,
    "minimax_m3_vl": _sparse,
    "qwen4_exp": _wide_indexer,
    "step3p7": _window,
    **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _omni),
    **dict.fromkeys(("glm46v", "glm4v", "glmga"), _rotated(8, 12, 12, partial_rotary_factor=0.5)),
    "glm4v_moe": _glm_moe,
    "hunyuan_vl": _rotated(16, 16, 16, 16),
    "lfm2_vl": _convolutions,
    "lfm3_vl": _convolutions,
}
"""What small models need and the defaults of their configs lack, such as kinds of layers."""
