"""Training: what is asked is trained, a killed run ends where it would have, what is saved comes
back, and errors say what to do."""

import copy
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
import tiny
import torch
import transformers
from measuring import peak_of

import vlmkit as vk
from vlmkit.errors import CheckpointError, FinetuningError, ImageError, VlmkitError
from vlmkit.finetuning import Collator, Settings, gradient_report, runs, saved, trainer
from vlmkit.finetuning.continuing import last_checkpoint
from vlmkit.memory.batch import batch_of
from vlmkit.models import pebble

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]
LORA = vk.LoRA(r=4, lora_dropout=0.1)
NAN, INF = float("nan"), float("inf")
WITHOUT_DROPOUT = {"projector": "full", "language_model": vk.LoRA(r=4)}


@pytest.fixture(scope="module")
def rows():
    return vk.tasks.dataset("vqa", 24, split="train")


def adapted(plan=None, **training):
    model, processor = vk.load("pebble", plan)
    torch.manual_seed(0)
    training = training or {"projector": "full", "language_model": LORA}
    return vk.finetuning.add_adapters(model, **training), processor


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def train(folder, rows, *, plan=None, training=None, **settings):
    model, processor = adapted(plan, **(training or {}))
    settings = {"max_steps": 4, "per_device_train_batch_size": 4} | settings
    return vk.finetuning.train(model, processor, rows, folder, **settings)


def logits(model, rows):
    with torch.no_grad():
        return model.eval()(**Collator(vk.load("pebble")[1])(list(rows)[:4])).logits


# --- a run ----------------------------------------------------------------------------------------


def test_a_run(rows, tmp_path, capfd):
    model, processor = adapted()
    before = trained(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    asked = [row | {"task": "ab"[n % 2]} for n, row in enumerate(rows.select(range(6)))]
    run = vk.finetuning.train(
        model, processor, rows, tmp_path, eval_dataset=asked, max_steps=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_steps=2,
        learning_rate={"projector": 1e-4, "language_model": 1e-3},
    )  # fmt: skip
    assert run.curve["step"].tolist() == [1, 2, 3, 4] and run.curve.notna().all(axis=None)
    assert run.curve.columns.tolist() == ["step", "loss", "learning_rate", "grad_norm"]
    assert run.evaluations["step"].tolist() == [2, 4]
    assert (run.evaluations["low"] <= run.evaluations["accuracy"]).all()
    by_task = vk.evaluate(model, processor, asked).by_task["accuracy"].add_prefix("accuracy_")
    assert by_task.to_dict() == run.evaluations.iloc[-1].filter(like="accuracy_").to_dict()
    assert set(by_task.index) == {"accuracy_a", "accuracy_b"}
    assert run.no_gradient.empty and run.skipped == {} and run.model is model
    after = trained(model)
    assert all(not torch.equal(before[n], after[n]) for n in before if "lora_A" not in n)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in frozen.items())
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert "Casting" not in capfd.readouterr().err  # its own progress bar, and no other


def test_the_loss_is_that_of_a_bare_loop(rows, tmp_path):
    rows, ways = rows.select(range(4)), {"projector": "full"}
    run = train(tmp_path, rows, plan="fp32", training=ways, max_steps=1, bf16=False)
    model, processor = adapted("fp32", **ways)
    wanted = model(**Collator(processor)(list(rows))).loss.item()
    assert run.curve["loss"][0] == pytest.approx(wanted, rel=1e-3)


def test_a_model_that_is_trained_again_computes_in_the_same_formats(rows, tmp_path):
    """accelerate left autocast out of the second training of a model, and of a copy of it."""
    model, processor = adapted("fp32", **WITHOUT_DROPOUT)
    for place, bf16 in enumerate((True, True, False, True)):
        model, seen = copy.deepcopy(model) if place == 3 else model, []
        layer = next(m for name, m in model.named_modules() if name.endswith("lora_A.default"))
        hook = layer.register_forward_hook(lambda *given, seen=seen: seen.append(given[2].dtype))
        settings = {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": bf16}
        vk.finetuning.train(model, processor, rows, tmp_path / str(place), **settings)
        hook.remove()
        assert seen == [torch.bfloat16 if bf16 else torch.float32]


@pytest.mark.parametrize(("checkpointing", "within"), [(False, 0.002), (True, 0.06)])
@pytest.mark.parametrize("plan", ["bf16", "recommended"])
def test_a_step_holds_what_is_predicted(plan, checkpointing, within, rows, tmp_path, monkeypatch):
    """No cache of keys and values, which transformers leaves to the language model's own config,
    and no inputs of adapters in fp32, which autocast casts to bf16 again."""
    ways, size, peaks = {"language_model": vk.LoRA(r=8)}, 4, []
    model, processor = vk.load("pebble", plan)
    model = vk.finetuning.add_adapters(model, **ways)
    training_step, rows = trainer.Trainer.training_step, [rows[0]] * 2 * size

    def measured(self, *args, **kwargs):
        losses = []
        peaks.append(peak_of(lambda: losses.append(training_step(self, *args, **kwargs))))
        return losses[0]

    monkeypatch.setattr(trainer.Trainer, "training_step", measured)
    how = {"gradient_checkpointing": checkpointing}
    settings = {"max_steps": 2, "per_device_train_batch_size": size, **how}
    vk.finetuning.train(model, processor, rows, tmp_path, **settings)
    length = Collator(processor)(rows[:1])["input_ids"].shape[1]
    around = batch_of(model.config, pebble.path(), tokens=1, images=1).length - 1
    batch = {"tokens": length - around, "images": 1, "batch_size": size}
    kinds = vk.memory.predict("pebble", plan, training=ways, **batch, **how).by_kind
    assert peaks[1] == pytest.approx(kinds["activation"] + kinds["gradient"], rel=within)
    layers = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert layers and all(layer.cast_input_dtype_enabled for layer in layers)


def test_each_component_has_its_learning_rate(rows, tmp_path):
    with pytest.raises(FinetuningError, match="learning_rate names language_model, and trained"):
        train(tmp_path, rows, learning_rate={"language_model": 1e-3})
    rates = {"projector": 1e-9, "language_model": 1e-3}
    slow = train(tmp_path, rows, learning_rate=rates, max_steps=2)
    start = trained(adapted()[0])
    moved = {n: (p - start[n]).abs().max().item() for n, p in trained(slow.model).items()}
    assert max(v for n, v in moved.items() if "projector" in n) < 1e-5
    assert max(v for n, v in moved.items() if "lora_B" in n) > 1e-4


def test_a_projector_alone_beside_a_quantized_language_model(rows, tmp_path):
    run = train(tmp_path, rows, training={"projector": "full"})
    assert len(run.curve) == 4 and run.model.is_quantized
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(run.model)


def test_early_stopping_brings_the_best_weights_back(rows, tmp_path):
    model, processor = adapted()
    few = rows.select(range(4))
    run = vk.finetuning.train(
        model, processor, rows, tmp_path, eval_dataset=few, max_steps=40, learning_rate=3e-1,
        per_device_train_batch_size=4, eval_steps=1, early_stopping_patience=2, warmup_steps=0,
    )  # fmt: skip
    best = run.evaluations.loc[run.evaluations["accuracy"].idxmax(), "step"]
    assert run.evaluations["step"].max() == best + 2 < 40
    assert vk.evaluate(model, processor, few).accuracy == run.evaluations["accuracy"].max()


def test_adapters_without_a_gradient_are_named(tmp_path, rows):
    # read at the last layer but one: the last of the two feeds nothing
    folder = tiny.llava(tmp_path / "llava", tower="clip")
    model, processor = vk.load(folder, "bf16")
    model = vk.finetuning.add_adapters(model, vision_encoder=LORA, language_model=LORA)
    with pytest.warns(UserWarning, match="got no gradient.*vision_feature_layer is -2"):
        run = vk.finetuning.train(model, processor, rows, tmp_path / "run", max_steps=1)
    assert set(run.no_gradient["gradient"]) == {"none"}
    assert all(".layers.1." in name for name in run.no_gradient["parameter"])
    assert set(run.no_gradient["component"]) == {"vision_encoder"}


def test_a_first_gradient_that_is_zero_by_construction_is_not_reported(rows):
    model, processor = adapted()
    model(**Collator(processor)(list(rows)[:2])).loss.backward()
    assert not any(p.grad.any() for n, p in model.named_parameters() if "lora_A" in n)
    assert gradient_report(model).empty


def test_a_damaged_picture_in_a_file_of_ones_own_is_skipped_and_counted(rows, tmp_path):
    with open(tmp_path / "rows.jsonl", "w") as file:
        for number, row in enumerate(rows.select(range(8))):
            row["images"][0].save(tmp_path / f"{number}.png")
            told = {"image": f"{number}.png", "question": row["question"], "answer": row["answer"]}
            file.write(json.dumps(told) + "\n")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:100])
    own = vk.tasks.from_dataset(tmp_path / "rows.jsonl", decode=False)
    with pytest.raises(ImageError, match=r"3\.png is damaged"):
        train(tmp_path / "stops", own, max_steps=2)
    run = train(tmp_path / "goes on", own, max_steps=2, unreadable="skip")
    assert run.skipped == {"unreadable": 1}


def test_what_worker_processes_skip_is_counted(rows, tmp_path):
    some = [dict(row) for row in rows.select(range(12))]
    for number in (1, 6, 7):
        some[number]["answer"] = " "
    settings = {"max_steps": None, "per_device_train_batch_size": 2, "dataloader_num_workers": 2}
    run = train(tmp_path, some, unreadable="skip", **settings)
    assert run.skipped == {"unreadable": 3} and len(run.curve) == 6


@pytest.mark.parametrize("ways", [{"projector": "full"}, {"projector": vk.LoRA(r=4)}])
def test_the_model_is_evaluated_as_it_was_loaded(ways, rows, tmp_path, monkeypatch):
    asked, few = [], rows.select(range(2))

    def evaluate(model, processor, questions):
        asked.append((model.config._attn_implementation, logits(model, questions)))
        return vk.evaluate(model, processor, questions)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    more = {"max_steps": 1, "eval_dataset": few}
    model = train(tmp_path, rows, plan="fp32", training=ways, **more).model
    assert [kind for kind, _ in asked] == ["sdpa"] == [model.config._attn_implementation]
    assert torch.equal(asked[-1][1], logits(model, few))


def test_evaluating_changes_nothing_and_its_loss_is_that_of_every_answer_token(rows, tmp_path):
    answers = ("red", "no", "blue and red", "3", "a")
    few = [dict(rows[n]) | {"answer": answer} for n, answer in enumerate(answers)]
    more = {"plan": "fp32", "max_steps": 2, "bf16": False}
    alone = train(tmp_path / "alone", rows, **more)
    assert alone.evaluations.empty
    found = {}
    for size in (1, 4):
        asked = {"eval_dataset": few, "eval_steps": 1, "per_device_eval_batch_size": size}
        found[size] = train(tmp_path / str(size), rows, **more, **asked)
        assert found[size].curve.equals(alone.curve)
        for name, parameter in trained(alone.model).items():
            assert torch.equal(trained(found[size].model)[name], parameter), name
    one, four = (found[size].evaluations["loss"].tolist() for size in (1, 4))
    assert one == pytest.approx(four, rel=1e-5) and one[0] != one[1]
    total = number = 0
    for row in few:  # transformers' own loss is the mean over the answer tokens of a row
        batch = Collator(vk.load("pebble")[1])([row])
        tokens = (batch["labels"] != -100).sum().item()
        with torch.no_grad():
            total += alone.model.eval()(**batch).loss.item() * tokens
        number += tokens
    assert number > len(few) * 2 and one[1] == pytest.approx(total / number, rel=1e-4)


def test_a_loss_of_an_evaluation_that_is_not_finite_is_said(rows, tmp_path, monkeypatch):
    compute = trainer.loss_of_answers

    def poisoned_where_nothing_is_learnt(outputs, labels, num_items_in_batch=None):
        loss = compute(outputs, labels, num_items_in_batch)
        return loss + (0 if torch.is_grad_enabled() else NAN)

    monkeypatch.setattr(trainer, "loss_of_answers", poisoned_where_nothing_is_learnt)
    with pytest.warns(UserWarning, match="loss on eval_dataset is nan after step 1"):
        run = train(tmp_path, rows, max_steps=1, eval_dataset=rows.select(range(2)))
    assert run.evaluations["loss"].isna().all() and len(run.evaluations) == 1


def test_rows_to_evaluate_on_are_looked_at_before_the_first_step(rows, tmp_path):
    wrong = [dict(rows[0]), dict(rows[1]) | {"answer": " "}]
    with pytest.raises(VlmkitError, match="Row 1: .*answer.* is empty"):
        train(tmp_path, rows, eval_dataset=wrong)
    with pytest.raises(FinetuningError, match="evaluate by epoch, and there is no eval_dataset"):
        train(tmp_path, rows, eval_strategy="epoch")
    assert not list(tmp_path.glob("checkpoint-*"))


# --- the truth: what is not finite, what cannot be learnt -----------------------------------------


@pytest.mark.parametrize("place", ["frozen", "trained"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_saved(place, rows, tmp_path):
    """The losses were 0, 0, 0, 0 (trl #6702): transformers writes the mean of the losses before."""
    model, processor = adapted("fp32", **WITHOUT_DROPOUT)
    name = {"frozen": "model.language_model.layers.1.mlp.down_proj.base_layer.weight",
            "trained": "model.multi_modal_projector.linear_1.bias"}[place]  # fmt: skip
    with torch.no_grad():
        model.base_model.model.get_parameter(name).view(-1)[7] = float("nan")
    plain = name.replace(".base_layer", "")
    with pytest.raises(FinetuningError, match=rf"Step 1 .* loss is nan, and the weight {plain} is"):
        vk.finetuning.train(model, processor, rows, tmp_path, max_steps=4)
    assert last_checkpoint(tmp_path) is None


def poisoned(monkeypatch, step, value, what):
    """From `step` on, make the loss (or the gradient of one adapter) this value."""
    compute, steps = trainer.loss_of_answers, []

    def loss_of_answers(outputs, labels, num_items_in_batch=None):
        loss = compute(outputs, labels, num_items_in_batch)
        steps.append(1)
        if len(steps) < step:
            return loss
        if what == "loss":
            return loss + value
        loss.register_hook(lambda gradient: gradient * value)
        return loss

    monkeypatch.setattr(trainer, "loss_of_answers", loss_of_answers)


GRADIENT = r"Step 3 .* its loss is \d.*the gradient of .* is not finite"


@pytest.mark.parametrize(
    ("value", "what", "said", "clipped"),
    [
        (NAN, "gradient", GRADIENT, {}),
        (INF, "gradient", GRADIENT, {"max_grad_norm": 0}),
        (INF, "loss", "Step 3 .* its loss is inf. All weights are finite", {}),
    ],
)
def test_the_first_step_that_is_not_finite_stops(
    value, what, said, clipped, rows, tmp_path, monkeypatch
):
    poisoned(monkeypatch, 3, value, what)
    model, processor = adapted("fp32", **WITHOUT_DROPOUT)
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1} | clipped
    with pytest.raises(FinetuningError, match=said):
        vk.finetuning.train(model, processor, rows, tmp_path, **settings)
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert all(parameter.isfinite().all() for parameter in trained(model).values())


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(rows, tmp_path, monkeypatch):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("inf")

    monkeypatch.setattr(trainer.Progress, "on_optimizer_step", on_optimizer_step)
    with pytest.raises(FinetuningError, match="The weight .* is not finite after the last step"):
        train(tmp_path, rows, max_steps=1)
    assert last_checkpoint(tmp_path) is None


def spelled(rows, *answers):
    return [row | {"answer": answers[n % len(answers)]} for n, row in enumerate(list(rows)[:8])]


@pytest.fixture
def no_steps(monkeypatch):
    """A training ends before its first step."""
    monkeypatch.setattr(trainer.Trainer, "train", lambda self, **_: 1 / 0)
    return pytest.raises(VlmkitError, match="division by zero")


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_answers_that_the_head_cannot_tell_apart_are_warned_of(kind, rows, tmp_path, no_steps):
    told = spelled(rows, "hook", "wave", "red")
    told = told if kind == "list" else datasets.Dataset.from_list(told)
    says = "2 answers: 'hook', 'wave'.*'HOOK' in place of 'hook'.*head=True"
    with no_steps, pytest.warns(UserWarning, match=says):
        train(tmp_path, told, max_steps=1)


@pytest.mark.parametrize(
    ("answers", "ways"),
    [
        (["HOOK", "WAVE"], WITHOUT_DROPOUT),
        (["red", "yellow", "yes", "no", "7"], WITHOUT_DROPOUT),
        (["hook", "wave"], {"language_model": vk.LoRA(r=4, head=True)}),
    ],
)
def test_answers_that_can_be_learnt_give_no_warning(answers, ways, rows, tmp_path, no_steps):
    with no_steps, warnings.catch_warnings():
        warnings.filterwarnings("error", "The output head cannot")
        train(tmp_path, spelled(rows, *answers), training=ways, max_steps=1)


class Stream(torch.utils.data.IterableDataset):
    """Rows that can be read once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize(
    ("number", "said"), [(0, "gave no rows"), (4, "ended after 2 of 3 steps. Give more rows")]
)
def test_a_stream_that_ends_is_an_error(number, said, rows, tmp_path):
    stream = Stream(list(rows)[:number])
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "training": WITHOUT_DROPOUT}
    with pytest.raises(FinetuningError, match=said):
        train(tmp_path, stream, **settings)


def test_no_rows_are_an_error(rows, tmp_path):
    for nothing in ([], rows.select([])):
        with pytest.raises(FinetuningError, match="no rows"):
            train(tmp_path, nothing)


def test_checkpointing_leaves_no_hook_on_the_embeddings(rows, tmp_path):
    found = {}
    for wanted in (False, True):
        settings = {"gradient_checkpointing": wanted, "max_steps": 2, "bf16": False}
        run = train(tmp_path / str(wanted), rows, plan="fp32", training=WITHOUT_DROPOUT, **settings)
        found[wanted] = trained(run.model)
        embeddings = run.model.get_input_embeddings()
        assert not embeddings._forward_hooks
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[True])


# --- a full disk ---------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(rows, tmp_path, monkeypatch):
    write = saved.write

    def full(model, folder, tensors):
        write(model, folder, tensors)
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "write", full)
    with pytest.raises(FinetuningError, match=r"checkpoint-4 could not.*checkpoint-2\. Make room"):
        train(tmp_path, rows, save_steps=2)
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert len(train(tmp_path, rows, save_steps=2).curve) == 4


# --- saved, loaded, merged ------------------------------------------------------------------------


def test_what_was_trained_comes_back(rows, tmp_path):
    run = train(tmp_path / "run", rows, learning_rate=1e-2, max_steps=2)
    wanted = logits(run.model, rows)
    vk.finetuning.save(run.model, tmp_path / "kept")
    base, _ = vk.load("pebble")
    assert not torch.equal(logits(base, rows), wanted)
    again = vk.finetuning.load(base, tmp_path / "kept")
    assert torch.equal(logits(again, rows), wanted) and not trained(again)
    base, _ = vk.load("pebble")
    again = vk.finetuning.load(base, tmp_path / "kept", trainable=True)
    assert trained(again).keys() == trained(run.model).keys()


def test_merged_answers_are_the_adapters(rows, tmp_path):
    run = train(tmp_path, rows, plan="fp32", learning_rate=1e-2, max_steps=2)
    wanted = logits(run.model, rows)
    merged, report = vk.finetuning.merge(run.model)
    assert torch.allclose(logits(merged, rows), wanted, atol=1e-3)
    assert report["lost"].max() < 1e-5 and report["modules"].tolist() == [42]
    assert type(merged).__name__ == "LlavaForConditionalGeneration"


def test_merging_says_what_rounding_lost(rows, tmp_path):
    lost = {}
    for plan in ("bf16", None):
        run = train(tmp_path / str(plan), rows, plan=plan, training={"language_model": LORA})
        _, report = vk.finetuning.merge(run.model)
        lost[report["format"].item()] = report["lost"].item()
    assert 0.05 < lost["bf16"] < 1 < lost["nf4"]  # after four steps there is little to lose


def test_adapters_of_another_base_are_refused(tmp_path):
    model, _ = adapted(language_model=LORA)
    vk.finetuning.save(model, tmp_path / "kept")
    other, _ = vk.load(tiny.llava(tmp_path / "llava"), "bf16", processor=False)
    with pytest.raises(FinetuningError, match="trained on .*, and this model is another"):
        vk.finetuning.load(other, tmp_path / "kept")
    near, _ = vk.load("pebble")
    with torch.no_grad():
        near.model.language_model.layers[2].input_layernorm.weight.mul_(1.05)
    with pytest.raises(FinetuningError, match=r"layers\.2\.input_layernorm\.weight differs"):
        vk.finetuning.load(near, tmp_path / "kept")


def test_nothing_to_load_or_save(tmp_path):
    model, _ = vk.load("pebble")
    model.requires_grad_(False)
    with pytest.raises(FinetuningError, match="holds nothing that vk.finetuning.save wrote"):
        vk.finetuning.load(model, tmp_path)
    with pytest.raises((FinetuningError, CheckpointError), match="add_adapters"):
        vk.finetuning.save(model, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    with pytest.raises(FinetuningError, match="no adapters to merge"):
        vk.finetuning.merge(model)


# --- bad input ------------------------------------------------------------------------------------


def test_nothing_to_learn_from(tmp_path):
    model, processor = adapted()
    with pytest.raises(FinetuningError, match="no rows"):
        vk.finetuning.train(model, processor, [], tmp_path)
    with pytest.raises(FinetuningError, match="no column images and no column question.*has image"):
        vk.finetuning.train(model, processor, [{"image": None, "answer": "red"}], tmp_path)
    model.requires_grad_(False)
    with pytest.raises(FinetuningError, match="nothing in this model is trainable"):
        vk.finetuning.train(model, processor, [], tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_step": 3}, "Did you mean 'max_steps'"),
        ({"steps": 3}, "called 'max_steps' here"),
        ({"lr": 3}, "called 'learning_rate' here"),
        ({"batch_size": 4}, "'per_device_train_batch_size' here, which counts .* one process"),
        ({"warmup_ratio": 0.1}, "'warmup_steps' here, which below 1 is a share"),
        ({"evaluation": []}, "called 'eval_dataset' here"),
        ({"alpha": 16}, "The names are max_steps"),  # of a LoRA, so no hint
        ({"max_steps": 0}, "max_steps is a whole number from 1"),
        ({"max_steps": 4.0}, "max_steps is int or None, not 4.0"),
        ({"bf16": "yes"}, "bf16 is bool, not 'yes'"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
        ({"optim": "adamw_8bits"}, "Did you mean 'adamw_8bit'"),
        ({"optim": "paged_adamw"}, "Did you mean 'paged_adamw_32bit'"),
        ({"learning_rate": {"languge_model": 1e-3}}, "Did you mean 'language_model'"),
        ({"learning_rate": -1}, "between 0 and 10"),
        ({"learning_rate": 0}, "between 0 and 10"),
        ({"learning_rate": INF}, "between 0 and 10"),
        ({"learning_rate": NAN}, "between 0 and 10"),
        ({"learning_rate": {"projector": NAN}}, "between 0 and 10"),
        ({"weight_decay": NAN}, "weight_decay is a number from 0 to 10, not nan"),
        ({"weight_decay": -0.1}, "weight_decay is a number from 0"),
        ({"max_grad_norm": -1}, "max_grad_norm is a number from 0"),
        ({"max_grad_norm": INF}, "max_grad_norm is a number from 0"),
        ({"num_train_epochs": NAN}, "num_train_epochs is a number above 0"),
        ({"num_train_epochs": INF}, "num_train_epochs is a number above 0"),
        ({"num_train_epochs": 0}, "num_train_epochs is a number above 0"),
        ({"num_train_epochs": -1}, "num_train_epochs is a number above 0"),
        ({"num_train_epochs": True}, "num_train_epochs is .*not True"),
        ({"seed": -1}, "seed is a whole number from 0 to 4,294,967,295, not -1"),
        ({"seed": 2**32}, "seed is a whole number from 0"),
        ({"seed": 10**5000}, "seed is a whole number from 0 to .*, not this int"),
        ({"seed": "one"}, "seed is int, not 'one'"),
        ({"seed": None}, "seed is int, not None"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is a whole number from 0"),
        ({"dataloader_num_workers": 10**6}, "dataloader_num_workers is a whole number from 0"),
        ({"per_device_train_batch_size": 10**9}, "is a whole number from 1 to 1,000,000"),
        ({"gradient_accumulation_steps": 0}, "is a whole number from 1 to 1,000,000"),
        ({"max_steps": 10**18}, "max_steps is a whole number from 1 to 1,000,000,000"),
        ({"save_steps": -5}, "save_steps is a whole number from 1"),
        ({"warmup_steps": -1}, "warmup_steps is a number from 0"),
        ({"warmup_steps": 2.5}, "a share below 1 or a whole number"),
        ({"warmup_steps": 5, "max_steps": 4}, "warmup_steps is 5, and the training has 4 steps"),
        ({"lr_scheduler_type": "x" * 10**5}, "^.{1,300}$"),
        ({"early_stopping_patience": 2, "eval_steps": 3, "save_steps": 4}, "a multiple"),
        ({"early_stopping_patience": 2}, "give eval_steps"),
        ({"eval_strategy": "epochs"}, "Did you mean 'epoch'"),
        ({"eval_strategy": "steps"}, "'steps', and eval_steps is None"),
        ({"eval_strategy": "epoch", "eval_steps": 3}, "'epoch', and eval_steps is 3"),
        ({"per_device_eval_batch_size": 0}, "is a whole number from 1"),
        ({"report_to": "tensorbord"}, "not 'tensorbord'. Did you mean 'tensorboard'"),
        ({"report_to": ["none", "wand"]}, "report_to is one of none, all,"),
        ({"report_to": None}, "report_to is str or list, not None"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(FinetuningError, match=message):
        Settings(**given)


def test_what_the_limits_leave_open():
    Settings(learning_rate=9.9, weight_decay=0, max_grad_norm=0, num_train_epochs=0.5, seed=0)
    Settings(warmup_steps=4, max_steps=4, seed=2**32 - 1, dataloader_num_workers=8)
    Settings(early_stopping_patience=1, eval_steps=2, save_steps=4)
    Settings(early_stopping_patience=1, eval_strategy="epoch")
    by_epoch = Settings(eval_strategy="epoch", save_steps=4, early_stopping_patience=1)
    assert by_epoch.steps_between_evaluations(16) == 2 == Settings().steps(16)
    with pytest.raises(FinetuningError, match=r"save_steps \(4\) has to be a multiple .* \(3\)"):
        by_epoch.steps_between_evaluations(24)
    with pytest.raises(FinetuningError, match="without a length has no epochs"):
        by_epoch.steps_between_evaluations(None)


def test_a_library_that_is_not_installed_is_refused():
    from transformers.integrations import integration_utils as known

    missing = set(known.INTEGRATION_TO_CALLBACK) - set(known.get_available_reporting_integrations())
    assert {"mlflow", "swanlab"} <= missing
    for name in missing - {"flyte"}:  # whose callback only says so in a log
        with pytest.raises(FinetuningError, match=f"names {name}, .* pip install {name[:5]}"):
            Settings(report_to=[name])


def test_a_warmup_longer_than_the_epochs(rows, tmp_path):
    with pytest.raises(FinetuningError, match="warmup_steps is 7, and the training has 6 steps"):
        train(tmp_path, rows, max_steps=None, num_train_epochs=1, warmup_steps=7)


def test_the_number_of_steps_is_known_before(rows, tmp_path, monkeypatch):
    """As transformers counts them."""
    told, model, rows = [], adapted(**WITHOUT_DROPOUT), list(rows)
    monkeypatch.setattr(trainer.Trainer, "_prepare_for_training", lambda self, steps, *_: 1 / 0)
    counted = trainer.Trainer.set_initial_training_values
    monkeypatch.setattr(
        trainer.Trainer,
        "set_initial_training_values",
        lambda self, *given: told.append(counted(self, *given)) or told[-1],
    )
    for batch, parts, epochs in itertools.product([4, 5], [1, 2], [0.3, 1, 1.5]):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts}
        settings |= {"num_train_epochs": epochs}
        with pytest.raises(VlmkitError, match="division by zero"):
            vk.finetuning.train(*model, rows, tmp_path, **settings)
        assert told[-1][-1] == Settings(**settings).steps(len(rows)), settings


# --- several processes ----------------------------------------------------------------------------

HEAD = f"""
import json, os, sys, torch
sys.path[:0] = {sys.path!r}
torch.set_num_threads(1)
from pathlib import Path
from test_training import *
rows = vk.tasks.dataset("vqa", 24, split="train")
folder, ways = Path(sys.argv[1]), WITHOUT_DROPOUT
"""
SHARED = """
run = train(folder, rows, plan=eval(sys.argv[2]), training=ways, bf16=False,
            per_device_train_batch_size=2)
if os.environ["RANK"] == "0":
    (folder / "losses.json").write_text(json.dumps(run.curve["loss"].tolist()))
"""
# accelerate has FSDP on GPUs alone: its AcceleratorState does not look for it on several CPUs,
# where PyTorch has it. The script tells it that these are GPUs, and no more than that.
SHARDED = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
def arguments(*given, made=runs._arguments):
    made = made(*given)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made
runs._arguments = arguments
def run():
    return train(folder / "run", rows, plan=eval(sys.argv[2]), training=ways, bf16=False,
                 per_device_train_batch_size=2, save_steps=2, eval_steps=2,
                 eval_dataset=rows.select(range(2)))
first = run()
assert "DTensor" in {type(p).__name__ for p in first.model.parameters()}
vk.finetuning.save(first.model, folder / "kept")
torch.distributed.barrier()
if os.environ["RANK"] == "0":
    (folder / "run" / "checkpoint-4" / "trainer_state.json").unlink()  # as if it were cut off
torch.distributed.barrier()
again = run()
if os.environ["RANK"] == "0":
    both = [run.curve["loss"].tolist() for run in (first, again)]
    (folder / "losses.json").write_text(json.dumps([*both, first.evaluations["step"].tolist()]))
"""
# On CPUs `accelerate launch` starts several processes by this flag alone (or through MPI).
TWO_CPUS = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]

# NF4 computes in bf16, whose numbers are 0.4% apart: gradients differ in the third digit
ROUNDING = {"fp32": {"rel": 2e-3}, None: {"abs": 1e-3}}


def launched(options, *command):
    """What a command prints that accelerate launches on two processes."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", *options, *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses_of(options, script, plan, folder):
    (folder / "script.py").write_text(HEAD + script)
    launched(options, folder / "script.py", folder, repr(plan))
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fp32", None])
def test_two_processes_come_to_the_same_loss(plan, rows, tmp_path):
    alone = train(tmp_path / "alone", rows, plan=plan, bf16=False, training=WITHOUT_DROPOUT)
    losses = losses_of(TWO_CPUS, SHARED, plan, tmp_path)
    assert losses == pytest.approx(alone.curve["loss"].tolist(), **ROUNDING[plan])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fp32", None])
def test_sharded_by_fsdp_it_comes_to_the_same_loss(plan, rows, tmp_path):
    alone = train(tmp_path / "alone", rows, plan=plan, bf16=False, training=WITHOUT_DROPOUT)
    options = ["--config_file", str(Path(__file__).parent / "data" / "fsdp.yaml")]
    first, again, asked = losses_of(options, SHARDED, plan, tmp_path)
    assert first == pytest.approx(alone.curve["loss"].tolist(), **ROUNDING[plan])
    assert again == first and asked == [2, 4]
    kept = vk.finetuning.load(vk.load("pebble", plan)[0], tmp_path / "kept", trainable=True)
    for name, parameter in trained(kept).items():
        near = torch.allclose(parameter, trained(alone.model)[name], atol=1e-4)
        assert near or plan is None, name


def test_fsdp_that_would_not_be_is_an_error(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(FinetuningError, match="accelerate leaves it out on a CPU.*several GPUs"):
        train(tmp_path, rows)


def test_a_process_that_sees_two_gpus_uses_one(monkeypatch, tmp_path):
    """transformers would copy the model to both, with twice the batch: seen on two H200s."""
    from transformers import TrainingArguments

    def two_gpus(arguments):
        arguments._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    model, _ = adapted(language_model=vk.LoRA(r=2))
    settings = Settings(per_device_train_batch_size=4)
    arguments = runs._arguments(settings, model, tmp_path, False, 4)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4
