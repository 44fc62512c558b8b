"""Tiny random checkpoints of seventeen families of vision-language models, and inputs for each.

    folder = FAMILIES["mllama"](tmp_path)                 # a checkpoint, in about 0.1 s
    FAMILIES["qwen2_vl"](tmp_path, tie=True, shards=True)
    model.generate(**inputs(model), max_new_tokens=3)     # ids, pixels and grids made by hand
    state(model)                                          # all that it holds, to compare

There are no processor files: load with processor=False. The weights are random, so the answers mean
nothing. The widths are awkward on purpose: 96, 100 and 160 are no multiples of 64, which is where
bitsandbytes' kernels for the CPU go wrong (see vlmkit/backend/cpu.py).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

VOCABULARY = 128
IMAGE, VIDEO, START, END = 5, 6, 7, 8  # ids of the special tokens
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 12,
}
FINE = {**VISION, "patch_size": 6}  # 4 × 4 patches, for projectors that merge neighbors
SIDE = VISION["image_size"]
MROPE = {"rope_type": "default", "mrope_section": [8, 8, 8]}  # half of a head's width
GRID = {  # the vision module of Qwen-VL and its kin, which reads patches in a grid
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Family:
    """model_type, the fields of its config, and its inputs.

    tied: whether the head of the published models shares the embeddings' weight.
    picture: a function of the config that returns how many image tokens a prompt needs, and the
        tensors that the model takes beside the ids and their mask.
    """

    model_type: str
    config: dict
    picture: object
    tied: bool = False


# --- pictures: (number of image tokens, tensors) -------------------------------------------------


def _pixels(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def _plain(tokens):
    return lambda config: (tokens, {"pixel_values": _pixels(1, 3, SIDE, SIDE)})


def _tiles(config):
    """A picture and one tile of it: 2 × 2 patches, and 2 × 2 with a separator at each row."""
    sizes = {"image_sizes": torch.tensor([[SIDE, SIDE]])}
    return 4 + 6, {"pixel_values": _pixels(1, 2, 3, SIDE, SIDE), **sizes}


def _sized(config):
    sizes = {"image_sizes": torch.tensor([[SIDE, SIDE]])}
    return 4, {"pixel_values": _pixels(1, 3, SIDE, SIDE), **sizes}


def _several(tokens):
    mask = torch.ones(1, 1, SIDE, SIDE, dtype=torch.long)
    tensors = {"pixel_values": _pixels(1, 1, 3, SIDE, SIDE), "pixel_attention_mask": mask}
    return lambda config: (tokens, tensors)


def _grid(config):
    """4 × 4 patches, flattened, which the merger makes 2 × 2."""
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return 4, {"pixel_values": _pixels(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _attended(config):
    """Llama 3.2 Vision: one image token, and cross-attention from all that follows it."""
    return 1, {
        "pixel_values": _pixels(1, 1, 4, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        "cross_attention_mask": torch.tensor([1, 0, 0, 0]).expand(1, 1 + len(WORDS), 1, 4),
    }


WORDS = (1, 20, 21, 22, 23)


def inputs(model):
    """Tensors for `model.generate` or `model(...)`: one picture and five words, a batch of one."""
    config = getattr(model, "get_base_model", lambda: model)().config
    family = next(f for f in _FAMILIES.values() if f.model_type == config.model_type)
    tokens, tensors = family.picture(config)
    bos, *words = WORDS
    ids = torch.tensor([[bos, *[IMAGE] * tokens, *words]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tensors}
    if family.picture is _grid:
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    if config.model_type in ("gemma3", "paligemma"):
        batch["token_type_ids"] = (ids == IMAGE).long()
    return batch


def state(model):
    """{name: copies of what `model` holds there}: each parameter with its quantization state (its
    tensors, and what else it knows), and each buffer."""
    from vlmkit.backend.storages import state_tensors

    held = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            tensors = (parameter, *state_tensors(module, parameter))
            parts = [tensor.detach().clone() for tensor in tensors]
            four = getattr(parameter, "quant_state", None)
            if four is not None:
                parts.append((four.dtype, four.shape, four.blocksize, four.quant_type, four.nested))
            held[f"{path}.{leaf}"] = parts
    held.update({name: [buffer.clone()] for name, buffer in model.named_buffers()})
    return held


def differing(one, other):
    """Names at which two results of `state` differ in a bit, a dtype or a shape."""

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return a == b

    return [
        name
        for name in {**one, **other}
        if len(one.get(name, ())) != len(other.get(name, ()))
        or not all(map(same, one[name], other[name]))
    ]


# --- families -------------------------------------------------------------------------------------

_TEXT_OF = {name: {**TEXT, "model_type": name} for name in ("llama", "mistral", "qwen2", "gemma")}
_CLIP = {**VISION, "model_type": "clip_vision_model"}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
_FINE_SIGLIP = {**_SIGLIP, "patch_size": 6}
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_TEXT = {**TEXT, "rope_parameters": MROPE}
del _QWEN_TEXT["head_dim"]
_QWEN3_TEXT = {**_QWEN_TEXT, "head_dim": 48}
_QWEN3_VISION = {
    **GRID,
    "intermediate_size": 100,
    "out_hidden_size": 96,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

_FAMILIES = {
    "llava": Family(
        "llava",
        {
            "text_config": _TEXT_OF["llama"],
            "vision_config": _CLIP,
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
        _plain(4),
    ),
    "llava_next": Family(
        "llava_next",
        {
            "text_config": _TEXT_OF["mistral"],
            "vision_config": _CLIP,
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [[SIDE, SIDE]],
        },
        _tiles,
    ),
    "llava_onevision": Family(
        "llava_onevision",
        {
            "text_config": _TEXT_OF["qwen2"],
            "vision_config": _SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[SIDE, SIDE]],
        },
        _tiles,
    ),
    "qwen2_vl": Family(
        "qwen2_vl",
        {
            "text_config": _QWEN_TEXT,
            "vision_config": {
                **{k: v for k, v in GRID.items() if k != "hidden_size"},
                "embed_dim": 64,
                "hidden_size": 96,  # of what it hands on
                "mlp_ratio": 2,
            },
            **_QWEN_IDS,
        },
        _grid,
        tied=True,
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        {
            "text_config": _QWEN_TEXT,
            "vision_config": {
                **GRID,
                "intermediate_size": 100,
                "out_hidden_size": 96,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_IDS,
        },
        _grid,
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {"text_config": _QWEN3_TEXT, "vision_config": _QWEN3_VISION, **_QWEN_IDS},
        _grid,
        tied=True,
    ),
    "qwen3_vl_moe": Family(
        "qwen3_vl_moe",
        {
            "text_config": {**_QWEN3_TEXT, **EXPERTS, "mlp_only_layers": [0]},
            "vision_config": _QWEN3_VISION,
            **_QWEN_IDS,
        },
        _grid,
    ),
    "mllama": Family(
        "mllama",
        {
            "text_config": {
                **{k: v for k, v in TEXT.items() if k != "head_dim"},
                "cross_attention_layers": [1],
            },
            "vision_config": {
                **{k: v for k, v in VISION.items() if k != "num_attention_heads"},
                "attention_heads": 2,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 128,
            },
            "image_token_index": IMAGE,
        },
        _attended,
    ),
    "idefics2": Family(
        "idefics2",
        {
            "text_config": _TEXT_OF["mistral"],
            "vision_config": VISION,
            "perceiver_config": {
                "hidden_size": 96,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 48,
                "num_key_value_heads": 1,
            },
            "image_token_id": IMAGE,
        },
        _several(3),
    ),
    "idefics3": Family(
        "idefics3",
        {
            "text_config": _TEXT_OF["llama"],
            "vision_config": FINE,
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        _several(4),
    ),
    "smolvlm": Family(
        "smolvlm",
        {
            "text_config": _TEXT_OF["llama"],
            "vision_config": FINE,
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        _several(4),
        tied=True,
    ),
    "paligemma": Family(
        "paligemma",
        {
            "text_config": _TEXT_OF["gemma"],
            "vision_config": _SIGLIP,
            "image_token_index": IMAGE,
            "projection_dim": 96,
            "hidden_size": 96,
            "vocab_size": VOCABULARY,
        },
        _plain(4),
        tied=True,
    ),
    "gemma3": Family(
        "gemma3",
        {
            "text_config": {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 48},
            "vision_config": _FINE_SIGLIP,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
            "mm_tokens_per_image": 4,
        },
        _plain(4),
        tied=True,
    ),
    "internvl": Family(
        "internvl",
        {
            "text_config": _TEXT_OF["qwen2"],
            "vision_config": FINE,
            "image_token_id": IMAGE,
            "image_seq_length": 4,
        },
        _plain(4),
    ),
    "blip2": Family(
        "blip-2",
        {
            "text_config": {
                "model_type": "opt",
                "vocab_size": VOCABULARY,
                "hidden_size": 96,
                "word_embed_proj_dim": 96,
                "ffn_dim": 160,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            "vision_config": VISION,
            "qformer_config": {
                "hidden_size": 96,
                "intermediate_size": 100,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "encoder_hidden_size": 64,
                "vocab_size": VOCABULARY,
            },
            "num_query_tokens": 3,
            "image_token_index": IMAGE,
        },
        _plain(3),
        tied=True,
    ),
    "mistral3": Family(
        "mistral3",
        {
            "text_config": _TEXT_OF["mistral"],
            "vision_config": {**FINE, "model_type": "pixtral"},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        _sized,
    ),
    "glm4v": Family(
        "glm4v",
        {
            "text_config": _QWEN_TEXT,
            "vision_config": {
                **GRID,
                "intermediate_size": 100,
                "out_hidden_size": 96,
                "image_size": 16,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
        },
        _grid,
    ),
}


def _make(name, folder, *, tie=None, shards=False, dtype=torch.bfloat16, seed=0):
    """Save a checkpoint of the family `name` in `folder` and return the folder, as a Path.

    tie: whether the head shares the embeddings' weight; None is as in the published models.
    shards: True saves several files and an index.
    """
    family = _FAMILIES[name]
    tie = family.tied if tie is None else tie
    text = {**family.config["text_config"], "tie_word_embeddings": tie}
    fields = {**family.config, "text_config": text, "tie_word_embeddings": tie}
    config = CONFIG_MAPPING[family.model_type](**fields)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # no zero biases: every weight must be loaded to match
            # and no gate that is shut: what it lets through must matter
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.numel() > 1 else 1))
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    return Path(folder)


FAMILIES = {name: partial(_make, name) for name in _FAMILIES}
"""Family name -> a function of a folder, and of the options of `_make`, that saves a checkpoint."""
