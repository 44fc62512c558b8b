"""The attention of an answer over the patches is that of the model, in the right places."""

import numpy as np
import pytest
import torch

import vlmkit as vk
from vlmkit.attention import answer_without, over_patches
from vlmkit.course.pictures import FIRST
from vlmkit.errors import AnatomyError, QuestionError, VlmkitError
from vlmkit.evaluation.asking import prepared
from vlmkit.images import read_all

PICTURE = torch.zeros(24, 24, 3, dtype=torch.uint8).numpy()


@pytest.fixture(scope="module")
def pebble():
    return vk.load("pebble", "fp32")


def own_weights(model, processor, images, question, tokens):
    """(tokens, layers, heads, placeholders), from one pass over the prompt and its answer."""
    inputs = prepared(model, processor, [read_all(images)], [question], 8)
    prompt = inputs.pop("input_ids")
    ids = torch.cat([prompt, torch.tensor([processor.tokenizer.convert_tokens_to_ids(tokens)])], 1)
    inputs["attention_mask"] = torch.ones_like(ids)
    implementation = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        layers = model(input_ids=ids, **inputs, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": implementation})
    weights = torch.stack(layers)[:, 0, :, prompt.shape[1] - 1 : -1].permute(2, 0, 1, 3)
    return weights[..., ids[0] == model.config.image_token_id]


def test_is_the_models_own_attention(pebble):
    model, processor = pebble
    found = over_patches(model, processor, FIRST.path, FIRST.question)
    assert found.answer == vk.ask(model, processor, FIRST.path, FIRST.question) == FIRST.answer
    assert found.tokens == (f" {FIRST.answer}", "<|end|>")
    (weights,) = found.weights
    assert weights.dtype == np.float32 and weights.shape == (2, 6, 6, 7, 7)
    expected = own_weights(
        model, processor, FIRST.path, FIRST.question, [f"Ġ{FIRST.answer}", "<|end|>"]
    )
    np.testing.assert_allclose(weights.reshape(2, 6, 6, 49), expected, atol=1e-5)
    np.testing.assert_allclose(found.mean(token=1), weights[1].mean((0, 1)))
    given = weights.sum((-2, -1))
    assert given.min() > 0 and given.max() < 1


def test_each_image_has_its_own_grid(pebble):
    model, processor = pebble
    row = vk.tasks.example("multi_image", 0, seed=1)
    found = over_patches(model, processor, row["images"], row["question"])
    tokens = [processor.tokenizer.tokenize(token)[0] for token in found.tokens]
    expected = own_weights(model, processor, row["images"], row["question"], tokens)
    together = np.concatenate([w.reshape(*w.shape[:3], 49) for w in found.weights], axis=-1)
    np.testing.assert_allclose(together, expected, atol=1e-5)


def test_a_token_stands_where_its_patch_is(pebble):
    """A change of the picture in row 2 and column 5 changes this token of the grid and no other."""
    model, _ = pebble
    pixels = torch.zeros(1, 3, 84, 84)
    changed = pixels.clone()
    changed[..., 2 * 12 : 3 * 12, 5 * 12 : 6 * 12] = 1
    with torch.no_grad():
        a, b = (model.model.vision_tower.embeddings(p)[0] for p in (pixels, changed))
    differs = (a != b).any(-1).reshape(7, 7)
    assert differs.nonzero().tolist() == [[2, 5]]


def test_a_class_token_is_no_patch(llava_clip):
    model, processor = vk.load(llava_clip, "bf16")
    found = over_patches(model, processor, PICTURE, "Hi?", max_new_tokens=2)
    assert [w.shape for w in found.weights] == [(len(found.tokens), 2, 2, 2, 2)]


def test_an_answer_without_patches_is_that_of_a_mask_over_them(pebble):
    """Against one forward pass, whose positions do not depend on the mask."""
    model, processor = pebble
    changed = 0
    for index in range(6):
        row = vk.tasks.example("vqa", index, seed=5)
        image, question = row["images"][0], row["question"]
        hidden = np.random.default_rng(index).permutation(49)[:30]
        inputs = prepared(model, processor, [[image]], [question], 1)
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        inputs["attention_mask"][0, places[hidden]] = 0
        with torch.no_grad():
            token = model(**inputs).logits[0, -1].argmax()
        answer = answer_without(model, processor, image, question, hidden, max_new_tokens=1)
        assert answer == processor.decode(token).strip()
        seen = vk.ask(model, processor, image, question)
        assert answer_without(model, processor, image, question, []) == seen
        changed += answer_without(model, processor, image, question, range(49)) != seen
    assert changed > 1  # of 6 questions, without any of the picture


def test_the_model_is_left_as_it_was(pebble):
    model, processor = pebble

    def state():
        configs = model.config, model.config.text_config, model.config.vision_config
        return model.training, [config._attn_implementation for config in configs]

    model.train()
    before = state()
    over_patches(model, processor, FIRST.path, FIRST.question)
    assert state() == before
    model.generation_config.cache_implementation = "static"  # keys beyond the prompt
    try:
        with pytest.raises(AnatomyError, match="does not return the attention weights"):
            over_patches(model, processor, FIRST.path, FIRST.question)
    finally:
        model.generation_config.cache_implementation = None
    assert state() == before
    model.eval()


def test_bad_input(pebble, other_family):
    model, processor = pebble
    with pytest.raises(QuestionError, match="empty"):
        over_patches(model, processor, PICTURE, " ")
    with pytest.raises(AnatomyError, match="no image"):
        over_patches(model, processor, [], "What?")
    with pytest.raises(VlmkitError, match="max_new_tokens"):
        over_patches(model, processor, PICTURE, "What?", max_new_tokens=0)
    with pytest.raises(AnatomyError, match="0 to 48"):
        answer_without(model, processor, PICTURE, "What?", [3, 49])
    with pytest.raises(AnatomyError, match="Idefics3.* by tiles"):
        over_patches(*vk.load(other_family), PICTURE, "Hi?")
