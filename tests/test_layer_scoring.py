"""Layer scores: each against its definition written out, and nothing left behind in the model."""

import math

import families
import pandas as pd
import pytest
import torch

import vlmkit as vk
from vlmkit.errors import SensitivityError
from vlmkit.formats import rounding
from vlmkit.sensitivity.layer_scoring import answer_tokens
from vlmkit.sensitivity.scopes import weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def questions():
    return vk.tasks.dataset(["vqa", "ocr"], n=4, seed=3)


@pytest.fixture
def tiny(llava):
    return vk.load(llava, "fp32")


def test_scores_are_their_definitions(tiny, questions):
    model, processor = tiny
    scopes = ["projector", "language_model:1"]
    table = vk.sensitivity.layer_scores(
        model, processor, questions, ["int3", "int2"], scopes=scopes, max_new_tokens=4
    ).set_index(["scope", "format"])

    passes = [_gradients_and_inputs(model, processor, row) for row in questions]
    for scope in scopes:
        own = vk.sensitivity.select(model, scope).weights
        for name in ("int3", "int2"):
            change = {
                w.name: (rounding(name).rounded(w.parameter) - w.parameter).detach() for w in own
            }
            fisher = sum(
                (g[w.name] ** 2 * change[w.name] ** 2).sum() / count
                for g, _, count in passes
                for w in own
            )
            lost = sum(c.square().sum() for c in change.values())
            there = sum(w.parameter.detach().square().sum() for w in own)
            shares = [
                sum((x[w.name] @ change[w.name].T).square().sum() for _, x, _ in passes)
                / sum((x[w.name] @ w.parameter.detach().T).square().sum() for _, x, _ in passes)
                for w in own
            ]
            found = table.loc[scope, name]
            assert found.fisher == pytest.approx(float(fisher) / len(passes) / 2, rel=1e-3)
            assert found.weight_error == pytest.approx(math.sqrt(lost / there), rel=1e-4)
            assert found.sqnr == pytest.approx(
                -10 * math.log10(sum(shares) / len(shares)), abs=1e-2
            )


def _gradients_and_inputs(model, processor, row):
    """({weight: gradient of the answer's summed loss}, {weight: inputs (tokens, features)}, tokens)
    written out for a LLaVA: prompt and answer in one go, loss on the answer alone."""
    from vlmkit.evaluation.asking import prepared

    inputs = prepared(model, processor, [row["images"]], [row["question"]], 4)
    answer = answer_tokens(model, processor, row["images"], row["question"], row["answer"])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    seen, hooks = {}, []
    for w in weights_of(model):
        if w.kind == "linear":
            hooks.append(
                w.layer.register_forward_hook(
                    lambda m, i, o, name=w.name: seen.update({name: i[0].detach().flatten(0, -2)})
                )
            )
    logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    for hook in hooks:
        hook.remove()
    count = answer.shape[1]
    torch.nn.functional.cross_entropy(
        logits[0, -count - 1 : -1], answer[0], reduction="sum"
    ).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients, seen, count


def test_nothing_is_left_in_the_model(tiny, questions, monkeypatch):
    model, processor = tiny
    parameter = next(model.parameters())
    parameter.requires_grad_(False)
    model.model.language_model.train()
    before, wanted = families.state(model), [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    vk.evaluate(model, processor, questions, max_new_tokens=4)  # transformers adds some at first
    hooks_before = hooks()

    def left_alone():
        assert not families.differing(before, families.state(model))
        assert [p.requires_grad for p in model.parameters()] == wanted
        assert [module.training for module in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
        assert hooks() == hooks_before

    vk.sensitivity.layer_scores(
        model, processor, questions, ["int2"], scopes=["projector"], max_new_tokens=4
    )
    left_alone()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmkit.sensitivity.layer_scoring.answer_tokens", stop)
    with pytest.raises(KeyboardInterrupt):
        vk.sensitivity.layer_scores(
            model, processor, questions, ["int2"], scopes=["projector"], max_new_tokens=4
        )
    left_alone()


def test_the_divergence_is_that_of_a_sweep():
    model, processor = vk.load("pebble", "bf16")
    questions = vk.tasks.dataset("vqa", n=8, seed=12)
    scopes = ["projector", "vision_encoder:0"]
    scores = vk.sensitivity.layer_scores(model, processor, questions, ["int2"], scopes=scopes)
    swept = vk.sensitivity.sweep(model, processor, questions, ["int2"], scopes, progress=False)
    assert scores.kl.tolist() == pytest.approx(swept.kl.tolist(), rel=1e-6)
    assert scores.bits.tolist() == swept.bits.tolist()


def test_answer_tokens_are_those_that_the_model_generates():
    model, processor = vk.load("pebble", "bf16")
    questions = vk.tasks.dataset("all", n=12, seed=11)
    right = vk.evaluate(model, processor, questions).answers["correct"]
    checked = 0
    for row, good in zip(questions, right, strict=True):
        tokens = answer_tokens(model, processor, row["images"], row["question"], row["answer"])
        assert tokens[0, -1] == model.generation_config.eos_token_id
        if good:
            inputs = processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [
                            *({"type": "image", "image": image} for image in row["images"]),
                            {"type": "text", "text": row["question"]},
                        ],
                    }
                ],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(torch.bfloat16)
            made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            assert made[:, inputs["input_ids"].shape[1] :].equal(tokens)
            checked += 1
    assert checked


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "mllama", "idefics2", "blip2", "glm4v"])
@pytest.mark.parametrize("by", ["component", "layer", "linear"])
def test_scopes_take_the_linear_layers_apart(family, name, by):
    model, _ = vk.load(family(name), "bf16", processor=False)
    scopes = vk.sensitivity.every(model, by)
    found = [w.name for scope in scopes for w in vk.sensitivity.select(model, scope).weights]
    assert len(found) == len(set(found))
    assert set(found) == {w.name for w in weights_of(model) if w.kind == "linear"}
    if by == "linear":
        assert len(scopes) == len(found)
    if name == "mllama" and by == "component":
        assert "cross_attention" in scopes


def test_correlation_of_what_is_known():
    scopes = [f"layer {i}" for i in range(12)]
    damage = pd.DataFrame({"scope": scopes, "format": "int2", "kl": range(12)})
    scores = pd.DataFrame(
        {
            "scope": scopes,
            "format": "int2",
            "weight_error": range(12),
            "sqnr": [-float(i**3) for i in range(12)],
            "fisher": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8],
            "kl": [-i for i in range(12)],
        }
    )
    table = vk.sensitivity.correlation(scores, damage, draws=400).set_index("score")
    assert table.loc["weight_error", ["spearman", "low", "high"]].tolist() == [1, 1, 1]
    assert table.loc["sqnr", "spearman"] == 1
    assert table.loc["kl", "spearman"] == -1
    from scipy.stats import spearmanr

    expected = spearmanr(scores.fisher, damage.kl).statistic
    fisher = table.loc["fisher"]
    assert fisher.spearman == pytest.approx(expected)
    assert fisher.low < expected < fisher.high and fisher.high - fisher.low > 0.2
    fell = damage.assign(difference=-damage.kl)
    assert (
        vk.sensitivity.correlation(scores, fell, column="difference", draws=10).spearman.tolist()
        == table.spearman.tolist()
    )


def test_bad_input(tiny, questions):
    model, processor = tiny
    few = pd.DataFrame({"scope": ["a", "b"], "format": "int2", "kl": [1, 2]})
    scores = few.assign(weight_error=1, sqnr=1, fisher=1)
    with pytest.raises(SensitivityError, match="needs at least three"):
        vk.sensitivity.correlation(scores, few)
    with pytest.raises(SensitivityError, match="has no column 'accuracy'"):
        vk.sensitivity.correlation(scores, few, column="accuracy")
    with pytest.raises(SensitivityError, match="activations"):
        vk.sensitivity.layer_scores(
            model, processor, questions, ["int8-act-token"], scopes=["projector"]
        )
    with pytest.raises(SensitivityError, match="whole weights"):
        drawn = vk.sensitivity.random_weights(like="projector", of="language_model")
        vk.sensitivity.layer_scores(model, processor, questions, ["int2"], scopes=[drawn])
    with pytest.raises(SensitivityError, match="go by component, layer, linear"):
        vk.sensitivity.every(model, "head")
