"""Tiny random checkpoints of seventeen families of vision-language models, and inputs for each.

    folder = FAMILIES["mllama"](tmp_path)                 # a checkpoint, in about 0.1 s
    FAMILIES["qwen2_vl"](tmp_path, tie=True, shards=True)
    model.generate(**inputs(model), max_new_tokens=3)     # ids, pixels and grids made by hand
    state(model)                                          # all that it holds, to compare

There are no processor files: load with processor=False. The weights are random, so the answers mean
nothing. The widths 96, 100 and 160 are no multiples of 64 on purpose: this is where bitsandbytes'
kernels for the CPU are wrong (see vlmkit/backend/cpu.py).
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
    """4 × 4 patches, flattened. The merger turns them into 2 × 2."""
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return 4, {"pixel_values": _pixels(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _attended(config):
    """Llama 3.2 Vision: one image token, and cross-attention from all tokens after it."""
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


@torch.no_grad()
def logits(model):
    """What `model` computes of `inputs(model)`, in float32."""
    return model(**inputs(model)).logits.float()


def state(model):
    """{name: copies of what `model` holds}: each parameter with its quantization state (tensors and
    other values), and each buffer."""
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


def _family(model_type, text, vision, picture, tied=False, **fields):
    config = {"text_config": text, "vision_config": vision, **fields}
    return Family(model_type, config, picture, tied)


def _without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


_LLAMA, _MISTRAL, _QWEN2, _GEMMA = (
    {**TEXT, "model_type": name} for name in ("llama", "mistral", "qwen2", "gemma")
)
_CLIP = {**VISION, "model_type": "clip_vision_model"}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
_INDEX, _ID, _SHUFFLED = (
    {"image_token_index": IMAGE},
    {"image_token_id": IMAGE},
    {"image_token_id": IMAGE, "scale_factor": 2},
)
_QWEN_IDS = {
    **_ID,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_TEXT = {**_without(TEXT, "head_dim"), "rope_parameters": MROPE}
_QWEN3_TEXT = {**_QWEN_TEXT, "head_dim": 48}
_QWEN2_VISION = {  # its `hidden_size` is the width of what it hands on
    **GRID, "embed_dim": 64, "hidden_size": 96, "mlp_ratio": 2,
}  # fmt: skip
_GRID = {**GRID, "intermediate_size": 100, "out_hidden_size": 96}
_QWEN3_VISION = {**_GRID, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_PINPOINTS = {"image_grid_pinpoints": [[SIDE, SIDE]]}
_OPT = {
    **_without(TEXT, "intermediate_size", "num_key_value_heads", "head_dim"),
    "model_type": "opt",
    "word_embed_proj_dim": 96,
    "ffn_dim": 160,
}
_MLLAMA_VISION = {
    **_without(VISION, "num_attention_heads"),
    "attention_heads": 2,
    "num_global_layers": 1,
    "intermediate_layers_indices": [0],
    "vision_output_dim": 128,
}
_RESAMPLER = {
    "hidden_size": 96,
    "resampler_n_latents": 3,
    "resampler_depth": 1,
    "resampler_n_heads": 2,
    "resampler_head_dim": 48,
    "num_key_value_heads": 1,
}
_QFORMER = {
    **_without(VISION, "image_size", "patch_size"),
    "hidden_size": 96,
    "encoder_hidden_size": 64,
    "vocab_size": VOCABULARY,
}

_FAMILIES = {
    "llava": _family("llava", _LLAMA, _CLIP, _plain(4), **_INDEX, image_seq_length=4),
    "llava_next": _family("llava_next", _MISTRAL, _CLIP, _tiles, **_INDEX, **_PINPOINTS),
    "llava_onevision": _family(
        "llava_onevision", _QWEN2, _SIGLIP, _tiles, **_INDEX, video_token_index=VIDEO, **_PINPOINTS
    ),
    "qwen2_vl": _family("qwen2_vl", _QWEN_TEXT, _QWEN2_VISION, _grid, tied=True, **_QWEN_IDS),
    "qwen2_5_vl": _family(
        "qwen2_5_vl",
        _QWEN_TEXT,
        {**_GRID, "window_size": 16, "fullatt_block_indexes": [1]},
        _grid,
        **_QWEN_IDS,
    ),
    "qwen3_vl": _family("qwen3_vl", _QWEN3_TEXT, _QWEN3_VISION, _grid, tied=True, **_QWEN_IDS),
    "qwen3_vl_moe": _family(
        "qwen3_vl_moe",
        {**_QWEN3_TEXT, **EXPERTS, "mlp_only_layers": [0]},
        _QWEN3_VISION,
        _grid,
        **_QWEN_IDS,
    ),
    "mllama": _family(
        "mllama",
        {**_without(TEXT, "head_dim"), "cross_attention_layers": [1]},
        _MLLAMA_VISION,
        _attended,
        **_INDEX,
    ),
    "idefics2": _family(
        "idefics2", _MISTRAL, VISION, _several(3), **_ID, perceiver_config=_RESAMPLER
    ),
    "idefics3": _family("idefics3", _LLAMA, FINE, _several(4), **_SHUFFLED),
    "smolvlm": _family("smolvlm", _LLAMA, FINE, _several(4), tied=True, **_SHUFFLED),
    "paligemma": _family(
        "paligemma", _GEMMA, _SIGLIP, _plain(4), tied=True, **_INDEX,
        projection_dim=96, hidden_size=96, vocab_size=VOCABULARY,
    ),
    "gemma3": _family(
        "gemma3", {**TEXT, "sliding_window": 16, "query_pre_attn_scalar": 48},
        {**_SIGLIP, "patch_size": 6}, _plain(4), tied=True, **_INDEX,
        boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=4,
    ),
    "internvl": _family("internvl", _QWEN2, FINE, _plain(4), **_ID, image_seq_length=4),
    "blip2": _family(
        "blip-2", _OPT, VISION, _plain(3), tied=True, **_INDEX,
        qformer_config=_QFORMER, num_query_tokens=3,
    ),
    "mistral3": _family(
        "mistral3", _MISTRAL, {**FINE, "model_type": "pixtral"}, _sized, **_INDEX,
        spatial_merge_size=2,
    ),
    "glm4v": _family(
        "glm4v", _QWEN_TEXT, {**_GRID, "image_size": 16}, _grid, **_ID,
        video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
    ),
}  # fmt: skip


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
        # No bias is zero, so a match proves that it was loaded. No gate is shut, so what it lets
        # through matters.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.numel() > 1 else 1))
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    return Path(folder)


FAMILIES = {name: partial(_make, name) for name in _FAMILIES}
"""Family name -> a function of a folder, and of the options of `_make`, that saves a checkpoint."""
