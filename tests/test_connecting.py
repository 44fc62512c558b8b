"""Another connector in pebble: the same questions, the same kind of model, the same score."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vlmkit as vk
from vlmkit import tasks
from vlmkit.models.pebble import batches, connecting, recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")


class Pool(nn.Module):
    """The mean of a rectangle of patches, as wide as the language model: side² tokens."""

    def __init__(self, side):
        super().__init__()
        self.side = side
        self.linear = nn.Linear(128, 192)

    def forward(self, features):
        grid = features.unflatten(1, (7, 7)).permute(0, 3, 1, 2)
        return self.linear(F.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def pebble():
    return vk.load("pebble", vk.Plan.uniform("fp32"))


def with_pool(pebble, side):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pool = Pool(side)
    return *connecting.connect(*pebble, pool, side**2), pool


@pytest.mark.parametrize("group", train.GROUPS, ids=lambda group: group.name)
def test_the_questions_are_the_same_for_any_number_of_visual_tokens(group, pebble):
    tokenizer, small = pebble[1].tokenizer, train.Group(group.name, group.tasks, 3, 2)
    image = tokenizer.convert_tokens_to_ids(recipe.IMAGE)
    usual, few = (
        batches.question_batch(small, tokenizer, "test", 0, visual_tokens=n)
        for n in (batches.PATCHES, 16)
    )
    assert usual["kinds"] == few["kinds"]
    assert torch.equal(usual["pixel_values"], few["pixel_values"])
    text = []
    for batch, tokens in (usual, batches.PATCHES), (few, 16):
        ids = batch["input_ids"]
        assert (ids == image).sum() == len(usual["pixel_values"]) * tokens
        kept = (ids != image) & (ids != tokenizer.pad_token_id)
        text.append(torch.stack([ids[kept], batch["labels"][kept]]))
    assert torch.equal(*text)


def test_another_connector_answers_as_any_model_does(pebble):
    model, processor, _ = with_pool(pebble, side=4)
    row = tasks.example("vqa", 0, seed=1)
    assert type(model) is type(pebble[0])
    trace = vk.trace(model, processor, row["images"], row["question"])
    assert trace.visual_tokens == 16
    assert trace["projected tokens"].shape[-2:] == (16, 192)
    assert isinstance(vk.ask(model, processor, row["images"], row["question"]), str)
    assert vk.anatomy(model)["projector"].parameters == 128 * 192 + 192
    # The model that it was made from still has its own projector.
    assert vk.trace(*pebble, row["images"], row["question"]).visual_tokens == batches.PATCHES
    assert pebble[0].config.image_seq_length == batches.PATCHES


@pytest.mark.parametrize("side", range(1, 8))
def test_processor_and_connector_agree_on_any_square_number(pebble, side):
    _, processor, _ = with_pool(pebble, side)
    row = tasks.example("chart", 0, seed=1)
    inputs = processor(images=row["images"], text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == pebble[0].config.image_token_id).sum() == side**2


def test_a_connector_that_does_not_fit_is_refused(pebble):
    for impossible in (10, 0, -1, 121):
        with pytest.raises(vk.VlmkitError, match="Possible are 1, 4, 9, 16, 25, 36, 49"):
            connecting.connect(*pebble, Pool(4), impossible)
    with pytest.raises(vk.VlmkitError, match=r"\(1, 16, 192\); .* \(1, 25, 192\)"):
        connecting.connect(*pebble, Pool(4), 25)
    with pytest.raises(vk.VlmkitError, match=r"\(1, 49, 128\); "):
        connecting.connect(*pebble, nn.Identity(), 49)


def test_only_the_connector_learns(pebble):
    model, processor, pool = with_pool(pebble, side=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = (train.Group("charts", ("chart",), 4, 3), train.Group("signs", ("ocr",), 4, 1))
    stage = train.Stage("test", 30, 1e-2, ("multi_modal_projector",), groups)
    curve = connecting.fit(model, processor.tokenizer, stage, visual_tokens=16)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"model.multi_modal_projector.linear.{n}" for n in ("weight", "bias")}
    assert model.model.multi_modal_projector is pool
    assert len(curve) == 30 and curve["seconds"].is_monotonic_increasing
    assert curve["loss"].tail(6).mean() < 0.8 * curve["loss"].head(6).mean()
    assert curve["right"].between(0, 1).all()


def test_a_connectors_tokens_become_as_large_as_pebbles_own(pebble):
    row = tasks.example("chart", 0, seed=1)
    inputs = pebble[1](images=row["images"], text="<image>", return_tensors="pt")

    def tokens(model):
        with torch.no_grad():
            return torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)

    model, _, pool = with_pool(pebble, side=4)
    before, own = tokens(model), tokens(pebble[0])
    connecting.match_size(pool, pebble[0])
    after = tokens(model)
    assert before.square().mean() < 0.5 * own.square().mean()
    torch.testing.assert_close(after.square().mean(), own.square().mean(), rtol=0.2, atol=0)
    torch.testing.assert_close(F.normalize(after, dim=-1), F.normalize(before, dim=-1))


def test_the_fast_score_is_that_of_evaluate(pebble):
    """Question by question, on right answers, wrong ones, and ones that are too long or short."""
    model, processor = pebble
    rows = list(vk.tasks.dataset("all", n=36, seed=5))
    for row in rows[::3]:
        row["answer"] = {"yes": "no", "no": "yes"}.get(row["answer"], f"{row['answer']}s")
    rows[1]["answer"] = rows[1]["answer"][:-1] or "nothing"
    fast = connecting.score(model, processor.tokenizer, rows, batches.PATCHES, batch_size=10)
    slow = vk.evaluate(model, processor, rows)
    right, said = fast.answers["correct"], fast.answers["predicted"]
    assert right.tolist() == slow.answers["correct"].tolist()
    assert 0.4 < fast.accuracy < 0.7
    assert fast.by_task.equals(slow.by_task)
    assert (said[right] == slow.answers["predicted"][right]).all() and said[~right].isna().all()
