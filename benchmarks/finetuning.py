"""Steps per second of `vk.finetuning.train`, against a bare loop and an untuned Trainer.

    make benchmark-finetuning
    make benchmark-finetuning BENCHMARK_ARGS="--steps=20 --repeats=7 --threads=1"

All three train pebble, with LoRA on the language model and the projector in full, on the same
batches of vqa with the same learning rates, in turns. Their losses are compared:

bare loop        a DataLoader with vlmkit's Collator, bf16 autocast, the attention that `train`
                 chooses, clipping, AdamW and its schedule: the same work with nothing around it
untuned Trainer  transformers' Trainer with default settings (no autocast, the attention that the
                 model was loaded with) and a collator as people write it, that calls the
                 processor a second time to find where the answer begins

A step is timed from one forward pass to the next: making its batch counts, loading the model does
not. The table also has processor time, which depends less on the machine's other work.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from statistics import mean, median

import torch
import transformers

import vlmkit as vk
from vlmkit.backend.quiet import quiet
from vlmkit.finetuning import Collator

PLANS = ("bf16", "recommended")
BATCH = 8
RATE = 5e-5  # a Trainer's own, as are the linear schedule and no warmup
TRAIN, BARE, UNTUNED = "vk.finetuning.train", "bare loop", "untuned Trainer"
WANTED = {BARE: 0.95, UNTUNED: 1.5}


@dataclass(frozen=True)
class Timed:
    """Seconds and processor seconds a step, and the mean loss."""

    seconds: float
    processor: float
    loss: float


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=16, help="of every run (16)")
    parser.add_argument("--repeats", type=int, default=5, help="of every way (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    rows = vk.tasks.dataset("vqa", options.steps * BATCH, split="train")
    print(f"{options.steps} steps of {BATCH} rows, {options.threads} threads.\n")
    head = "| plan | way | steps a second | train to it | in processor time | wanted | loss |"
    print(head, "|---|---|---:|---:|---:|---:|---:|", sep="\n", flush=True)
    equal = [compare(plan, rows, options.steps, options.repeats) for plan in PLANS]
    return int(not all(equal))


def compare(plan, rows, steps, repeats):
    """Print a row for each way, and return whether the losses agree."""
    order = order_of(plan, rows)
    ways = {TRAIN: train, BARE: bare_loop, UNTUNED: untuned}
    found = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            timed = run(plan, rows, order, steps)
            if repeat:  # the first is for warming up
                found[way].append(timed)
    losses = {way: mean(timed.loss for timed in runs) for way, runs in found.items()}
    for way, runs in found.items():
        rates = sorted(1 / timed.seconds for timed in runs)
        ratios = {
            name: median(
                getattr(b, name) / getattr(a, name) for a, b in zip(found[TRAIN], runs, strict=True)
            )
            for name in ("seconds", "processor")
        }
        print(
            f"| {plan} | {way} | {median(rates):.2f} [{rates[0]:.2f}, {rates[-1]:.2f}] "
            f"| {ratios['seconds']:.2f} × | {ratios['processor']:.2f} × "
            f"| {WANTED.get(way, '')} | {losses[way]:.4f} |",
            flush=True,
        )
    return all(abs(loss / losses[TRAIN] - 1) < 0.01 for loss in losses.values())


# --- three ways to train --------------------------------------------------------------------------


def train(plan, rows, order, steps):
    model, processor = adapted(plan)
    with Watch(model) as watch, tempfile.TemporaryDirectory() as folder:
        run = vk.finetuning.train(model, processor, rows, folder, **settings(steps))
    return watch.timed(run.curve["loss"].mean())


def settings(steps):
    return {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
    }


def bare_loop(plan, rows, order, steps):
    model, processor = adapted(plan)
    model.set_attn_implementation("eager")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    rows = vk.images.undecoded(rows)
    batches = torch.utils.data.DataLoader(
        rows, batch_size=BATCH, sampler=order, collate_fn=Collator(processor)
    )
    losses = []
    with Watch(model) as watch:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return watch.timed(mean(losses))


def untuned(plan, rows, order, steps):
    model, processor = adapted(plan)
    with Watch(model) as watch, tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=steps, use_cpu=True, remove_unused_columns=False, seed=0,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, plain_collator(processor), train_dataset=rows
        )
        trainer.remove_callback(transformers.PrinterCallback)
        done = trainer.train()
    return watch.timed(done.training_loss)


def plain_collator(processor):
    def collate(rows):
        asked, told, pictures = [], [], []
        for row in rows:
            content = [{"type": "image"} for _ in row["images"]]
            content.append({"type": "text", "text": row["question"]})
            turns = [{"role": "user", "content": content}]
            answer = {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
            asked.append(processor.apply_chat_template(turns, add_generation_prompt=True))
            told.append(processor.apply_chat_template([*turns, answer]).rstrip())
            pictures.append([picture.convert("RGB") for picture in row["images"]])
        more = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
        batch = processor(images=pictures, text=told, **more)
        prompts = processor(images=pictures, text=asked, **more)["attention_mask"].sum(dim=1)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for label, length in zip(labels, prompts, strict=True):
            label[:length] = -100
        batch["labels"] = labels
        return batch

    return collate


# --- what they share ------------------------------------------------------------------------------


def adapted(plan):
    model, processor = vk.load("pebble", plan, device="cpu")
    torch.manual_seed(0)
    return vk.finetuning.add_adapters(
        model, projector="full", language_model=vk.LoRA(r=16)
    ), processor


def order_of(plan, rows):
    """The order in which a Trainer takes the rows, as numbers."""
    taken = []

    class Noting(list):
        def __getitem__(self, number):
            taken.append(number)
            return super().__getitem__(number)

    model, processor = adapted(plan)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        steps = len(rows) // BATCH
        vk.finetuning.train(model, processor, Noting(rows), folder, **settings(steps))
    return taken[-len(rows) :]


class Watch:
    """Takes the time at each forward pass of a model."""

    def __init__(self, model):
        self.model, self.times = model, []

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(self.mark)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def mark(self, *_):
        self.times.append((time.perf_counter(), time.process_time()))

    def timed(self, loss):
        first, last, steps = self.times[0], self.times[-1], len(self.times) - 1
        seconds, processor = ((b - a) / steps for a, b in zip(first, last, strict=True))
        return Timed(seconds, processor, loss)


if __name__ == "__main__":
    sys.exit(main())
