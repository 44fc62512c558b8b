"""One image followed through models that make tokens from it in five different ways."""

import families
import pytest
import torch

import vlmkit as vk
from vlmkit.errors import AnatomyError, QuestionError
from vlmkit.tracing import trace_inputs

PICTURE = torch.zeros(24, 24, 3, dtype=torch.uint8).numpy()


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
    trace = vk.trace(model, processor, PICTURE, "Hi?")
    assert trace["projected tokens"].shape[-2] == trace.visual_tokens == 4


def test_idefics3_cuts_tiles_and_puts_four_patches_into_one_token(other_family):
    trace = vk.trace(*vk.load(other_family), PICTURE, "Hi?")
    assert trace["visual features"].shape[-2] == 16
    assert (trace.strategy, trace.visual_tokens) == ("tiles", 4)


@pytest.mark.parametrize(
    ("name", "strategy", "visual_tokens", "shapes"),
    [
        # the whole image and one tile, 2 × 2 patches each, and a separator for each row of the tile
        ("llava_next", "tiles", 4 + 6, {"projected tokens": (2, 4, 96)}),
        # the merger makes one token of 2 × 2 patches
        (
            *("qwen2_vl", "dynamic resolution", 4),
            {"visual features": (16, 64), "projected tokens": (4, 96)},
        ),
        # no visual token among the words; of four tiles one is real: 2 × 2 patches, a class token
        (
            *("mllama", "cross-attention", 5),
            {"merged sequence": (1, 6, 96), "read by cross-attention": (4, 5, 96)},
        ),
        ("blip2", "queries", 3, {"visual features": (1, 5, 64), "projected tokens": (1, 3, 96)}),
    ],
)
def test_other_strategies(family, name, strategy, visual_tokens, shapes):
    model, _ = vk.load(family(name), "bf16", processor=False)
    trace = trace_inputs(model, families.inputs(model))
    assert (trace.strategy, trace.visual_tokens) == (strategy, visual_tokens)
    assert {step: trace[step].shape for step in shapes} == shapes


def test_nothing_is_left_behind_even_after_an_error(llava):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model, processor = vk.load(llava)
    vk.ask(model, processor, PICTURE, "Hi?")  # in its first pass transformers adds own hooks
    before = hooks()
    model.train()
    vk.trace(model, processor, PICTURE, "Hi?")
    assert model.training and hooks() == before
    with pytest.raises(ValueError, match="[Ii]mage"):
        ids = torch.tensor([[10, 11]])  # without a placeholder for the image
        pixels = torch.zeros(1, 3, 24, 24).bfloat16()
        trace_inputs(model, {"input_ids": ids, "pixel_values": pixels})
    assert model.training and hooks() == before


def test_bad_input(llava):
    model, processor = vk.load(llava)
    with pytest.raises(QuestionError, match="empty"):
        vk.trace(model, processor, PICTURE, " ")
    with pytest.raises(AnatomyError, match="no image"):
        vk.trace(model, processor, [], "What?")
    with pytest.raises(KeyError, match="not a step"):
        vk.trace(model, processor, PICTURE, "Hi?")["projector"]
