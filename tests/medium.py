"""Checkpoints of the families of `families.py` that are large enough for activations to matter.

    folder = medium.save("qwen3_vl", tmp_path)       # six layers, 256 wide: 3 to 6 MB

The same architectures with more of everything, so that what a pass holds is made of the model's
tensors and not of the small change of kernels. The context is 4,096 tokens.
"""

import copy
from pathlib import Path

import torch
from families import _FAMILIES
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

LAYERS, SIDE = 6, 48
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "ffn_dim": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "word_embed_proj_dim": 256,
    "max_position_embeddings": 4096,
    "vocab_size": 1000,
    "sliding_window": 128,
    "query_pre_attn_scalar": 32,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
    "cross_attention_layers": [1, 3],
}
VISION = {"num_hidden_layers": LAYERS, "depth": LAYERS, "intermediate_size": 256}
ELSEWHERE = {
    "qformer_config": {"hidden_size": 128, "encoder_hidden_size": 128, "num_attention_heads": 4},
    "perceiver_config": {"hidden_size": 256, "resampler_n_heads": 4, "resampler_head_dim": 64},
}


def config_of(name, layers=LAYERS):
    """The config of the medium model of the family `name`, with a decoder of so many layers."""
    family = _FAMILIES[name]
    fields = copy.deepcopy(family.config)
    text, vision = fields["text_config"], fields["vision_config"]
    text |= {key: value for key, value in TEXT.items() if key in text}
    text["num_hidden_layers"] = layers
    vision |= {key: value for key, value in VISION.items() if key in vision}
    vision |= _widths(name, vision)
    if "image_size" in vision:
        vision["image_size"] = SIDE
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [1, 3]
    patches = (SIDE // vision["patch_size"]) ** 2
    if "image_seq_length" in fields:  # InternVL shuffles 2 x 2 patches into one
        fields["image_seq_length"] = patches if name == "llava" else patches // 4
    if "image_grid_pinpoints" in fields:
        sides = SIDE, 2 * SIDE
        fields["image_grid_pinpoints"] = [[h, w] for h in sides for w in sides]
    if name == "paligemma":
        fields |= {"projection_dim": 256, "hidden_size": 256}
    if "vocab_size" in fields:
        fields["vocab_size"] = TEXT["vocab_size"]
    for part, changes in ELSEWHERE.items():
        if part in fields:
            fields[part] |= changes
    text["tie_word_embeddings"] = fields["tie_word_embeddings"] = family.tied
    return CONFIG_MAPPING[family.model_type](**fields)


def _widths(name, vision):
    if name == "qwen2_vl":  # where `hidden_size` is of what it hands on
        return {"embed_dim": 128, "hidden_size": 256, "num_heads": 4}
    if "out_hidden_size" in vision:
        return {"hidden_size": 128, "out_hidden_size": 256, "num_heads": 4}
    heads = "attention_heads" if "attention_heads" in vision else "num_attention_heads"
    wide = {"vision_output_dim": 256} if "vision_output_dim" in vision else {}
    return {"hidden_size": 128, heads: 4, **wide}


def save(name, folder, layers=LAYERS):
    """Save a medium checkpoint of the family `name` in `folder`. Returns the folder, as a Path."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(name, layers), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return Path(folder)
