"""One image followed through models that make tokens from it in five different ways."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    MllamaConfig,
    OPTConfig,
)

import vlmkit as vk
from vlmkit.errors import AnatomyError, QuestionError
from vlmkit.tracing import trace_inputs

from tiny import TEXT, VISION  # isort: skip (beside this file, not a package)

IMAGE = 2
"""The placeholder's token in the tiny models that are built here."""


def build(config):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def prompt(visual_tokens, words=4):
    ids = torch.tensor([[IMAGE] * visual_tokens + [10] * words])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_pebble_has_a_fixed_grid():
    model, processor = vk.load("pebble")
    row = vk.tasks.example("vqa", 0, seed=1)
    trace = vk.trace(model, processor, row["images"], row["question"])
    length = trace["merged sequence"].shape[1]
    assert [(s.name, s.shape, s.component) for s in trace.steps] == [
        ("pixels", (1, 3, 84, 84), ""),
        ("patches", (1, 128, 7, 7), "vision_encoder"),
        ("visual features", (1, 49, 128), "vision_encoder"),
        ("projected tokens", (1, 49, 192), "projector"),
        ("merged sequence", (1, length, 192), "language_model"),
        ("logits", (1, length, model.config.text_config.vocab_size), "language_model"),
    ]
    assert {step.dtype for step in trace.steps} == {"bfloat16"}
    assert (trace.strategy, trace.visual_tokens) == ("fixed grid", 49)
    assert "49 visual tokens (fixed grid)" in str(trace) and "<table" in trace._repr_html_()


def test_two_pictures_are_twice_as_many_tokens():
    model, processor = vk.load("pebble", "bf16")
    row = vk.tasks.example("multi_image", 0, seed=1)
    trace = vk.trace(model, processor, row["images"], row["question"])
    assert trace["pixels"].shape[0] == 2 and trace.visual_tokens == 98


def test_a_class_token_is_a_feature_and_no_visual_token(llava_clip):
    model, processor = vk.load(llava_clip, "bf16")
    trace = vk.trace(model, processor, torch.zeros(24, 24, 3, dtype=torch.uint8).numpy(), "Hi?")
    assert trace["projected tokens"].shape[-2] == trace.visual_tokens == 4


def test_smolvlm_and_llava_next_cut_tiles(other_family):
    model, processor = vk.load(other_family)
    picture = torch.zeros(24, 24, 3, dtype=torch.uint8).numpy()
    trace = vk.trace(model, processor, picture, "Hi?")
    # 16 patches, of which four by four are put behind one another
    assert trace["visual features"].shape[-2] == 16
    assert (trace.strategy, trace.visual_tokens) == ("tiles", 4)

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[24, 48], [48, 24]],
    )
    # the whole image, 2 × 2 patches, and two tiles side by side, 2 × 4 and a newline for each row
    tokens = 2 * 2 + 2 * (4 + 1)
    inputs = {"pixel_values": torch.zeros(1, 3, 3, 24, 24), "image_sizes": torch.tensor([[24, 48]])}
    trace = trace_inputs(build(config), prompt(tokens) | inputs)
    assert trace["projected tokens"].shape == (3, 4, 128)
    assert (trace.strategy, trace.visual_tokens) == ("tiles", tokens)


def test_qwen_keeps_the_resolution(qwen2_vl):
    model, _ = vk.load(qwen2_vl, processor=False)
    ids = torch.tensor([[7] + [5] * 6 + [8, 20, 21]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 5).int(),
        "pixel_values": torch.zeros(24, 3 * 2 * 4 * 4, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    trace = trace_inputs(model, inputs)
    # the merger makes one token of two by two patches
    assert trace["visual features"].shape == (24, 64)
    assert trace["projected tokens"].shape == (6, 128)
    assert (trace.strategy, trace.visual_tokens) == ("dynamic resolution", 6)


def test_llama_3_2_vision_reads_features_by_cross_attention():
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 24,
        "patch_size": 12,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 3 * 64,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    }
    text = {k: v for k, v in TEXT.items() if k != "bos_token_id"}
    text |= {"bos_token_id": 3, "cross_attention_layers": [1]}
    model = build(MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    inputs = {
        "pixel_values": torch.zeros(1, 1, 4, 3, 24, 24),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
        "cross_attention_mask": torch.ones(1, 5, 1, 4, dtype=torch.long),
    }
    trace = trace_inputs(model, prompt(1) | inputs)
    assert trace["merged sequence"].shape == (1, 5, 128)  # no visual token among the words
    assert trace["read by cross-attention"].shape[-2:] == (5, 128)
    # two of four tiles are real, and each has 2 × 2 patches and a class token
    assert (trace.strategy, trace.visual_tokens) == ("cross-attention", 2 * 5)


def test_blip_2_asks_with_queries():
    small = {"hidden_size": 64, "intermediate_size": 128}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = OPTConfig(
        vocab_size=384,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
    )
    config = Blip2Config(
        vision_config={**small, "image_size": 24, "patch_size": 12},
        qformer_config={**small, "encoder_hidden_size": 64, "vocab_size": 384},
        text_config=text.to_dict(),
        num_query_tokens=8,
        image_token_index=IMAGE,
    )
    trace = trace_inputs(build(config), prompt(8) | {"pixel_values": torch.zeros(1, 3, 24, 24)})
    assert trace["visual features"].shape == (1, 5, 64)
    assert trace["projected tokens"].shape == (1, 8, 128)
    assert (trace.strategy, trace.visual_tokens) == ("queries", 8)


def test_nothing_is_left_behind_even_after_an_error(llava):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model, processor = vk.load(llava)
    picture = torch.zeros(24, 24, 3, dtype=torch.uint8).numpy()
    vk.ask(model, processor, picture, "Hi?")  # transformers puts hooks of its own at a first pass
    before = hooks()
    model.train()
    vk.trace(model, processor, picture, "Hi?")
    assert model.training and hooks() == before
    with pytest.raises(ValueError, match="[Ii]mage"):
        trace_inputs(model, prompt(3) | {"pixel_values": torch.zeros(1, 3, 24, 24).bfloat16()})
    assert model.training and hooks() == before


def test_bad_input(llava):
    model, processor = vk.load(llava)
    with pytest.raises(QuestionError, match="empty"):
        vk.trace(model, processor, torch.zeros(9, 9, 3, dtype=torch.uint8).numpy(), " ")
    with pytest.raises(AnatomyError, match="no image"):
        vk.trace(model, processor, [], "What?")
    with pytest.raises(KeyError, match="not a step"):
        trace = vk.trace(model, processor, torch.zeros(9, 9, 3, dtype=torch.uint8).numpy(), "Hi?")
        trace["projector"]
