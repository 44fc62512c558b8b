"""Training: what is asked is trained, a killed run ends where it would have, what is saved comes
back, and errors say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import vlmkit as vk
from vlmkit.errors import CheckpointError, FinetuningError, ImageError
from vlmkit.finetuning import Collator, Settings, gradient_report, training
from vlmkit.finetuning.trainer import last_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]
LORA = vk.LoRA(r=4, dropout=0.1)


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
    settings = {"steps": 4, "batch_size": 4} | settings
    return vk.finetuning.train(model, processor, rows, folder, **settings)


# --- a run ----------------------------------------------------------------------------------------


def test_a_run(rows, tmp_path):
    model, processor = adapted()
    before = trained(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    run = vk.finetuning.train(
        model, processor, rows, tmp_path, evaluation=rows.select(range(6)), steps=6,
        batch_size=4, accumulation=2, evaluate_every=3, save_every=3,
        rate={"projector": 1e-4, "language_model": 1e-3},
    )  # fmt: skip
    assert run.curve["step"].tolist() == [1, 2, 3, 4, 5, 6] and run.curve["loss"].notna().all()
    assert run.evaluations["step"].tolist() == [3, 6]
    assert (run.evaluations["low"] <= run.evaluations["accuracy"]).all()
    assert run.silent.empty and run.skipped == {} and run.model is model
    after = trained(model)
    assert all(not torch.equal(before[n], after[n]) for n in before if "lora_A" not in n)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in frozen.items())
    assert last_checkpoint(tmp_path).name == "checkpoint-6"


def test_the_loss_is_that_of_a_bare_loop(rows, tmp_path):
    run = train(
        tmp_path, rows.select(range(4)), plan="fp32", training={"projector": "full"},
        steps=1, precision="fp32",
    )  # fmt: skip
    model, processor = adapted("fp32", projector="full")
    batch = Collator(processor)(list(rows.select(range(4))))
    assert run.curve["loss"][0] == pytest.approx(model(**batch).loss.item(), rel=1e-3)


def test_rates_are_those_of_the_components(rows, tmp_path):
    with pytest.raises(FinetuningError, match="rate names language_model, and trained are"):
        train(tmp_path, rows, rate={"language_model": 1e-3})
    slow = train(tmp_path / "a", rows, rate={"projector": 1e-9, "language_model": 1e-3})
    start = trained(adapted()[0])
    moved = {n: (p - start[n]).abs().max().item() for n, p in trained(slow.model).items()}
    assert max(v for n, v in moved.items() if "projector" in n) < 1e-5
    assert max(v for n, v in moved.items() if "lora_B" in n) > 1e-4


def test_a_projector_alone_beside_a_quantized_language_model(rows, tmp_path):
    run = train(tmp_path, rows, training={"projector": "full"})
    assert len(run.curve) == 4 and run.model.is_quantized


def test_early_stopping_brings_the_best_weights_back(rows, tmp_path):
    model, processor = adapted()
    run = vk.finetuning.train(
        model, processor, rows, tmp_path, evaluation=rows.select(range(8)), steps=40,
        batch_size=4, rate=3e-1, evaluate_every=1, patience=2, warmup=0.0,
    )  # fmt: skip
    best = run.evaluations.loc[run.evaluations["accuracy"].idxmax(), "step"]
    assert run.evaluations["step"].max() == best + 2 < 40
    scores = vk.evaluate(model, processor, rows.select(range(8)))
    assert scores.accuracy == run.evaluations["accuracy"].max()


def test_adapters_without_a_gradient_are_named(tmp_path, rows):
    # read at the last layer but one: the last of the two feeds nothing
    folder = tiny.llava(tmp_path / "llava", tower="clip")
    model, processor = vk.load(folder, "bf16")
    model = vk.finetuning.add_adapters(model, vision_encoder=LORA, language_model=LORA)
    with pytest.warns(UserWarning, match="got no gradient.*vision_feature_layer is -2"):
        run = vk.finetuning.train(model, processor, rows, tmp_path / "run", steps=1, batch_size=2)
    assert set(run.silent["gradient"]) == {"none"}
    assert all(".layers.1." in name for name in run.silent["parameter"])
    assert set(run.silent["component"]) == {"vision_encoder"}


def test_a_first_gradient_of_zero_by_construction_is_no_news(rows):
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
        train(tmp_path / "stops", own, steps=2)
    assert train(tmp_path / "goes on", own, steps=2, unreadable="skip").skipped == {"unreadable": 1}


def test_what_worker_processes_skip_is_counted(rows, tmp_path):
    some = [dict(row) for row in rows.select(range(12))]
    for number in (1, 6, 7):
        some[number]["answer"] = " "
    run = train(tmp_path, some, steps=None, workers=2, batch_size=2, unreadable="skip")
    assert run.skipped == {"unreadable": 3} and len(run.curve) == 6


@pytest.mark.parametrize("training", [{"projector": "full"}, {"projector": vk.LoRA(r=4)}])
def test_questions_in_between_are_asked_of_the_model_as_it_was_loaded(
    training, rows, tmp_path, monkeypatch
):
    from vlmkit.finetuning import trainer

    asked = []

    def evaluate(model, processor, questions):
        batch = Collator(processor)(list(questions))
        with torch.no_grad():
            asked.append((model.config._attn_implementation, model(**batch).logits))
        return vk.evaluate(model, processor, questions)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    model, processor = adapted("fp32", **training)
    few = rows.select(range(4))
    vk.finetuning.train(
        model, processor, rows, tmp_path, evaluation=few, steps=2, batch_size=2, evaluate_every=1
    )
    with torch.no_grad():
        after = model(**Collator(processor)(list(few))).logits
    assert [kind for kind, _ in asked] == ["sdpa"] * 2 == [model.config._attn_implementation] * 2
    assert torch.equal(asked[-1][1], after)


def test_a_training_shows_its_own_bar_and_no_other(rows, tmp_path, capfd):
    train(tmp_path, rows, steps=1)
    assert "Casting" not in capfd.readouterr().err


# --- killed, and continued ------------------------------------------------------------------------

KILLED = """
import os, sys, torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from pathlib import Path
from test_training import train
import vlmkit as vk
from vlmkit.finetuning import trainer
class Kills(trainer.Progress):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os._exit(9)
trainer.Progress = Kills
train(Path({folder!r}), vk.tasks.dataset("vqa", 24, split="train"), steps=8, save_every=2)
"""


def test_killed_and_continued_as_if_it_had_not_been(rows, tmp_path):
    whole = train(tmp_path / "whole", rows, steps=8, save_every=2)
    script = KILLED.format(path=sys.path, folder=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    again = train(tmp_path / "killed", rows, steps=8, save_every=2)
    assert again.curve["loss"].tolist() == whole.curve["loss"].tolist()
    for name, parameter in trained(again.model).items():
        assert torch.equal(parameter, trained(whole.model)[name]), name


def test_another_training_is_not_continued(rows, tmp_path):
    train(tmp_path, rows, save_every=2)
    with pytest.raises(FinetuningError, match=r"other settings \(batch_size was 4, is 2"):
        train(tmp_path, rows, save_every=2, batch_size=2)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(rows, tmp_path, monkeypatch):
    from vlmkit.finetuning import saving

    write = saving.write

    def full(model, folder, tensors):
        write(model, folder, tensors)
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write", full)
    with pytest.raises(FinetuningError, match="checkpoint-4 could not.*checkpoint-2.*make room"):
        train(tmp_path, rows, save_every=2)
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert len(train(tmp_path, rows, save_every=2).curve) == 4


# --- saved, loaded, merged ------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["bf16", None])
def test_what_was_trained_comes_back(plan, rows, tmp_path):
    run = train(tmp_path / "run", rows, plan=plan, rate=1e-2)
    batch = Collator(adapted()[1])(list(rows)[:4])
    with torch.no_grad():
        wanted = run.model.eval()(**batch).logits
    vk.finetuning.save(run.model, tmp_path / "kept")
    base, _ = vk.load("pebble", plan)
    with torch.no_grad():
        assert not torch.equal(base(**batch).logits, wanted)
        again = vk.finetuning.load(base, tmp_path / "kept")
        assert torch.equal(again(**batch).logits, wanted)
    assert not trained(again)
    base, _ = vk.load("pebble", plan)
    again = vk.finetuning.load(base, tmp_path / "kept", trainable=True)
    assert trained(again).keys() == trained(run.model).keys()


def test_merged_answers_are_the_adapters(rows, tmp_path):
    run = train(tmp_path, rows, plan="fp32", rate=1e-2)
    batch = Collator(adapted()[1])(list(rows)[:4])
    with torch.no_grad():
        wanted = run.model.eval()(**batch).logits
        merged, report = vk.finetuning.merge(run.model)
        assert torch.allclose(merged(**batch).logits, wanted, atol=1e-3)
    assert report["lost"].max() < 1e-5 and report["modules"].tolist() == [42]
    assert type(merged).__name__ == "LlavaForConditionalGeneration"


def test_merging_says_what_rounding_lost(rows, tmp_path):
    lost = {}
    for plan in ("bf16", None):
        run = train(tmp_path / str(plan), rows, plan=plan, training={"language_model": LORA})
        _, report = vk.finetuning.merge(run.model)
        lost[report["format"].item()] = report["lost"].item()
    assert 0.05 < lost["bf16"] < 1 < lost["nf4"]  # after four steps there is little to lose


def test_adapters_of_another_base_are_refused(rows, tmp_path):
    run = train(tmp_path / "run", rows, training={"language_model": LORA})
    vk.finetuning.save(run.model, tmp_path / "kept")
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
        ({"step": 3}, "Did you mean steps"),
        ({"steps": 0}, "steps is a whole number from 1"),
        ({"batch_size": 5, "accumulation": 2}, "does not part into 2"),
        ({"optimizer": "adamw_8bits"}, "Did you mean 'adamw_8bit'"),
        ({"rate": {"languge_model": 1e-3}}, "Did you mean 'language_model'"),
        ({"rate": -1}, "small number"),
        ({"patience": 2}, "give evaluate_every"),
    ],
)
def test_settings_that_cannot_be(given, message):
    with pytest.raises(FinetuningError, match=message):
        Settings.of(given)


# --- several processes ----------------------------------------------------------------------------

SHARED = """
import json, sys, torch, os
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from pathlib import Path
from test_training import train
import vlmkit as vk
rows = vk.tasks.dataset("vqa", 24, split="train")
run = train(Path({folder!r}), rows, plan={plan!r}, steps=4, batch_size=4, precision="fp32",
            training={{"projector": "full", "language_model": vk.LoRA(r=4)}})
if os.environ.get("RANK", "0") == "0":
    Path({folder!r}, "losses.json").write_text(json.dumps(run.curve["loss"].tolist()))
"""


def test_a_process_that_sees_two_gpus_uses_one(monkeypatch, tmp_path):
    """transformers would hand the model to both, with twice the batch: seen on two H200s."""
    from transformers import TrainingArguments

    def two_gpus(arguments):
        arguments._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(two_gpus))
    model, _ = adapted(language_model=vk.LoRA(r=2))
    arguments = training._arguments(model, tmp_path, Settings(batch_size=4), False)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fp32", None])
def test_two_processes_come_to_the_same_loss(plan, rows, tmp_path):
    alone = train(
        tmp_path / "alone", rows, plan=plan, precision="fp32",
        training={"projector": "full", "language_model": vk.LoRA(r=4)},
    )  # fmt: skip
    script = tmp_path / "script.py"
    script.write_text(SHARED.format(path=sys.path, folder=str(tmp_path / "two"), plan=plan))
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, str(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "two" / "losses.json").read_text())
    assert losses == pytest.approx(alone.curve["loss"].tolist(), rel=2e-3)


# accelerate has FSDP on GPUs alone: its AcceleratorState does not look for it on several CPUs,
# where PyTorch has it. The script tells it that these are GPUs, and no more than that.
PARTED = """
import json, sys, torch, os
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from pathlib import Path
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from test_training import adapted
import vlmkit as vk
from vlmkit.finetuning import LoRA, training
def arguments(*given, made=training._arguments):
    made = made(*given)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made
training._arguments = arguments
rows = vk.tasks.dataset("vqa", 24, split="train")
folder = Path({folder!r})
def run():
    model, processor = adapted({plan!r}, **{ways!r})
    few = rows.select(range(2))
    return vk.finetuning.train(
        model, processor, rows, folder / "run", steps=4, batch_size=4, precision="fp32",
        save_every=2, evaluation=few, evaluate_every=2,
    )
first = run()
assert "DTensor" in {{type(p).__name__ for p in first.model.parameters()}}
vk.finetuning.save(first.model, folder / "kept")
torch.distributed.barrier()
if os.environ["RANK"] == "0":
    (folder / "run" / "checkpoint-4" / "trainer_state.json").unlink()  # as if it were cut off
torch.distributed.barrier()
again = run()
if os.environ["RANK"] == "0":
    both = [run.curve["loss"].tolist() for run in (first, again)]
    (folder / "found.json").write_text(json.dumps([*both, first.evaluations["step"].tolist()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["fp32", None])
def test_parted_by_fsdp_it_comes_to_the_same_loss(plan, rows, tmp_path):
    ways = {"projector": "full", "language_model": vk.LoRA(r=4)}
    alone = train(tmp_path / "alone", rows, plan=plan, precision="fp32", training=ways)
    script = tmp_path / "script.py"
    script.write_text(PARTED.format(path=sys.path, folder=str(tmp_path), plan=plan, ways=ways))
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launch += ["--config_file", str(Path(__file__).parent / "data" / "fsdp.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, str(script)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, again, asked = json.loads((tmp_path / "found.json").read_text())
    # NF4 computes in bf16, whose numbers are 0.4% apart: gradients differ in the third digit
    rounding = {"rel": 2e-3} if plan == "fp32" else {"abs": 1e-3}
    assert first == pytest.approx(alone.curve["loss"].tolist(), **rounding)
    assert again == first and asked == [2, 4]
    kept = vk.finetuning.load(vk.load("pebble", plan)[0], tmp_path / "kept", trainable=True)
    for name, parameter in trained(kept).items():
        near = torch.allclose(parameter, trained(alone.model)[name], atol=1e-4)
        assert near or plan is None, name


def test_fsdp_that_would_not_be_is_an_error(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(FinetuningError, match="accelerate leaves it out on a CPU.*several GPUs"):
        train(tmp_path, rows)
