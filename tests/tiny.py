"""Tiny random checkpoints of real architectures, made on disk in a second or two.

    tiny.llava(folder)             # SigLIP tower, like pebble
    tiny.llava(folder, tower="clip", tie=True)
    tiny.other_family(folder)      # Idefics3: another tower, another connector, another processor
    tiny.qwen2_vl(folder)          # connector inside the vision module; no processor

Each returns the folder, as a pathlib.Path. The weights are random: the answers mean nothing.
"""

from pathlib import Path

import torch
from families import _FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Idefics3Config,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIALS = ["<pad>", "<end>", "<image>"]
VOCABULARY = 384
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 12,
}


def tokenizer(extra=()):
    """A byte-level tokenizer: 256 bytes and a few special tokens, no merges."""
    specials = SPECIALS + list(extra)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + letters)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=specials[2:],
        model_max_length=512,
        padding_side="left",
    )


def save_model(config, folder, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # no bias is zero: a match proves that it was loaded
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return Path(folder)


def llava(folder, *, tower="siglip", tie=False, dtype=torch.bfloat16, text=(), vision=()):
    """A LLaVA with a complete processor. `text` and `vision` change entries of their configs."""
    text, vision = {**TEXT, **dict(text)}, {**VISION, **dict(vision)}
    clip = tower == "clip"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision) if clip else _siglip(vision),
        text_config=LlamaConfig(**text, tie_word_embeddings=tie),
        image_token_id=SPECIALS.index("<image>"),
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        tie_word_embeddings=tie,
    )
    save_model(config, folder, dtype)
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    pictures = (
        CLIPImageProcessorPil(size=size, crop_size=size)
        if clip
        else SiglipImageProcessorPil(size=size)
    )
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(),
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(clip),  # CLIP's class token, which "default" drops
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return Path(folder)


def _siglip(vision):
    return SiglipVisionConfig(**vision, vision_use_head=False)


def other_family(folder):
    """An Idefics3 (SmolVLM's architecture) with a complete processor that needs no torchvision."""
    vision = {**VISION, "image_size": 48}
    config = Idefics3Config(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=SPECIALS.index("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    save_model(config, folder)
    extra = ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    extra += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 48}, max_image_size={"longest_edge": 48}, do_image_splitting=False
        ),
        tokenizer=tokenizer(extra),
        image_seq_len=(48 // 12) ** 2 // 2**2,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return Path(folder)


def qwen2_vl(folder, dtype=torch.bfloat16):
    """The Qwen2-VL of families.py in widths that are multiples of 64: the projector is inside the
    vision module, the embeddings are tied, and there is no processor."""
    fields = dict(_FAMILIES["qwen2_vl"].config)
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12]}
    text = {**TEXT, "bos_token_id": 2, "rope_parameters": rope, "tie_word_embeddings": True}
    vision = {**fields["vision_config"], "hidden_size": TEXT["hidden_size"]}
    fields |= {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    return save_model(Qwen2VLConfig(**fields), folder, dtype)
