"""`python -m vlmkit.models.pebble.train`: pebble, stage by stage, from nothing.

The stages are the literature's. A vision encoder learns on its own to say what is in every patch; a
language model learns on text alone to answer questions about pictures put in words; then both are
frozen and the projector learns to put the one's features into the other's space (LLaVA, Liu et al.,
2023, arXiv 2304.08485, section 4.2, stage 1); then projector and language model learn to answer,
with the vision encoder still frozen (stage 2). Skills that stay at chance among all the others get
a short lesson of their own.

Every step draws fresh pictures, so the accuracy in the log is an accuracy on pictures never seen
before, and what it gets wrong is asked more often. A run that was killed continues where it was.
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from vlmkit import tasks
from vlmkit.models.pebble import batches, recipe
from vlmkit.models.pebble.batches import Group

SCENES = Group("scenes", ("vqa", "caption"), 32, 6)
SIGNS = Group("signs", ("ocr", "spelling"), 40, 4)
CHARTS = Group("charts", ("chart",), 32, 5)
PAIRS = Group("pairs", ("multi_image",), 20, 4)
VIDEOS = Group("videos", ("video",), 12, 4)
GROUPS = (SCENES, SIGNS, CHARTS, PAIRS, VIDEOS)
ALL_KINDS = tuple(
    dict.fromkeys(kind for recipe in batches.RECIPES.values() for kind in recipe.kinds)
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: what learns, on which batches, for how many steps, at which highest rate.

    focus: how much more often what goes wrong is asked; 0 would ask everything equally often.
    final: the share of the rate that is left at the end, after a cosine.
    """

    name: str
    steps: int
    rate: float
    trains: tuple
    groups: tuple = GROUPS
    images: bool = True
    focus: int = 1
    final: float = 0.02


HARD_GROUPS = (
    dataclasses.replace(SCENES, pictures=40, questions=4),
    SIGNS,
    CHARTS,
    dataclasses.replace(PAIRS, pictures=24, questions=3),
    dataclasses.replace(VIDEOS, questions=3),
)
"""More pictures and fewer questions of each, so that the hard kinds are not crowded out."""

LOOKUPS = Group("lookups", ("lookup",), 64, 2)
WHERES = Group("wheres", ("where",), 64, 2)
RELATIONS = Group("relations", ("relation",), 64, 2)
PLACES = Group("places", ("place",), 64, 2)
EXISTENCE = Group("existence", ("existence",), 64, 2)
COLOR_COUNTS = Group("color counts", ("color_count",), 64, 2)
MATCHES = Group("matches", ("match",), 48, 2)
SEARCHES = Group("searches", ("search",), 48, 2)
MOTIONS = Group("motions", ("motion",), 24, 2)
LESSONS = (
    LOOKUPS,
    WHERES,
    RELATIONS,
    PLACES,
    EXISTENCE,
    COLOR_COUNTS,
    MATCHES,
    SEARCHES,
    MOTIONS,
)
"""One skill each, among few objects. Mixed with everything else alone, "left of" stayed at chance
for 7,000 steps. Asked alone, a skill comes in a few hundred steps: looking up a color by its
shape, then where a thing is, then which of two is left of the other. In this order, since an
earlier model that was asked where things were before it could look one up stayed at 55%; this
recipe's does not need it (chapter 09). The other skills come when the lessons take turns, and then
stay."""

CAPTIONS = Group("captions", ("caption",), 64, 1)

LANGUAGE_SIDE = ("multi_modal_projector", "language_model", "lm_head")

STAGES = (
    Stage("vision", 4000, 1.5e-3, ("vision_tower",)),
    Stage("language", 2500, 1.5e-3, ("language_model", "lm_head"), images=False),
    Stage("projector", 400, 2e-3, ("multi_modal_projector",)),
    Stage("instruct", 1500, 1e-3, LANGUAGE_SIDE, final=0.5),
    Stage("lookups", 400, 1e-3, LANGUAGE_SIDE, (LOOKUPS,), final=0.9),
    Stage("wheres", 500, 1e-3, LANGUAGE_SIDE, (WHERES,), final=0.9),
    Stage("relations", 700, 1e-3, LANGUAGE_SIDE, (RELATIONS,), final=0.9),
    Stage("lessons", 3000, 1e-3, LANGUAGE_SIDE, LESSONS, final=0.5),
    Stage("mixed", 1200, 1e-3, LANGUAGE_SIDE, HARD_GROUPS + LESSONS, focus=2, final=0.94),
    Stage("matches", 300, 1e-3, LANGUAGE_SIDE, (MATCHES,), final=0.9),
    Stage("searches", 300, 1e-3, LANGUAGE_SIDE, (SEARCHES,), final=0.9),
    Stage("everything", 6500, 1e-3, LANGUAGE_SIDE, HARD_GROUPS + LESSONS, focus=2),
    Stage("final", 3500, 7e-4, LANGUAGE_SIDE, (*HARD_GROUPS, CAPTIONS, PLACES), focus=2),
)
CHUNK = 100
"""Steps between two checkpoints, two lines of the log, and two looks at what goes wrong."""

NOISE = 0.5
"""Standard deviation of the noise between vision encoder and reader; the features have 1."""

WEIGHT_DECAY, BETAS, CLIP, WARMUP = 0.05, (0.9, 0.98), 1.0, 100


class Reader(torch.nn.Module):
    """The heads that the vision encoder's own stage needs and that are thrown away after it.

    They see the features through noise, so that each target must take enough room in them to be
    told from it. Without the noise, color took 70% of the features' variance and row and column
    1.5% each, and the language model learnt to use them much more slowly.
    """

    def __init__(self, width):
        super().__init__()
        sizes = batches.TARGETS.values()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, size) for size in sizes)

    def forward(self, features):
        features = F.layer_norm(features, features.shape[-1:])
        if self.training:
            features = features + NOISE * torch.randn_like(features)
        return [head(features) for head in self.heads]


class Steps(torch.utils.data.Dataset):
    """The batches of a chunk, each made from its step number alone."""

    def __init__(self, stage, steps, tokenizer, accuracy):
        self.stage, self.steps, self.tokenizer = stage, steps, tokenizer
        # What is right 99 times in 100 is still asked, but a fifth as often as what is not known.
        self.weights = {kind: (1.25 - accuracy.get(kind, 0.0)) ** stage.focus for kind in ALL_KINDS}

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        step = self.steps[index]
        if self.stage.name == "vision":
            return batches.vision_batch(96, self.stage.name, step)
        rng = tasks.generator("train", "group", self.stage.name, step)
        groups = self.stage.groups
        needs = [
            statistics.mean(
                self.weights[kind] for name in group.tasks for kind in batches.RECIPES[name].kinds
            )
            * (2 if group.name == SCENES.name else 1)
            for group in groups
        ]
        group = rng.choices(groups, needs)[0]
        return batches.question_batch(
            group,
            self.tokenizer,
            self.stage.name,
            step,
            images=self.stage.images,
            weights=self.weights,
        )


def vision_loss(model, reader, batch, device):
    """Cross-entropy of all targets; patches with something in them count for as much as all the
    empty ones. Returns the loss and how many filled patches are wholly right, of how many."""
    images, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    output = model.model.vision_tower(images, output_hidden_states=True)
    logits = reader(output.hidden_states[-1])
    filled = targets[:, 0] > 0
    loss, right = 0.0, filled.clone()
    for number, prediction in enumerate(logits):
        target = targets[:, number]
        each = F.cross_entropy(prediction.flatten(0, 1).float(), target.flatten(), reduction="none")
        each = each.view_as(target)
        loss = loss + each[filled].mean() + each[~filled].mean()
        right &= prediction.argmax(-1) == target
    return loss, {"patches": (right.sum().item(), filled.sum().item())}


def answer_loss(model, batch, device):
    """Cross-entropy of the answers' tokens; and per kind of question how many were wholly right."""
    loss, right = answered(model, batch, device)
    counts = {}
    for kind, one in zip(batch["kinds"], right.tolist(), strict=True):
        so_far, total = counts.get(kind, (0, 0))
        counts[kind] = (so_far + one, total + 1)
    return loss, counts


def answered(model, batch, device="cpu"):
    """Cross-entropy of the answers' tokens; and a boolean for each question, in the batch's order.

    An answer is right when each token is the most likely one after the true ones before it, which
    is the case exactly when greedy generation gives that answer.
    """
    tensors = {
        name: value.to(device, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    kind = torch.device(device).type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    mask = torch.zeros(tensors["mask"].shape, dtype=dtype, device=device)
    mask.masked_fill_(~tensors["mask"], torch.finfo(dtype).min)
    hidden = model.model(
        input_ids=tensors["input_ids"],
        position_ids=tensors["position_ids"],
        attention_mask=mask,
        pixel_values=tensors.get("pixel_values"),
        use_cache=False,
    ).last_hidden_state
    answers = tensors["labels"] != batches.IGNORED
    logits, labels = model.lm_head(hidden[answers]), tensors["labels"][answers]
    loss = F.cross_entropy(logits.float(), labels)
    wrong = torch.zeros(len(batch["kinds"]), device=device)
    wrong.index_add_(0, tensors["questions"][answers], (logits.argmax(-1) != labels).float())
    return loss, wrong == 0


def rate_at(step, stage):
    """Linear warm-up, then a cosine down to the final share."""
    if step < WARMUP:
        return stage.rate * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, stage.steps - WARMUP)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return stage.rate * (stage.final + (1 - stage.final) * cosine)


def trainable(model, stage):
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_("" in stage.trains or any(part in parts for part in stage.trains))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_atomically(state, file):
    """Written beside and renamed: a kill leaves the old file or the new one, never half of one."""
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


def run_stage(model, reader, stage, folder, tokenizer, device, workers):
    """Train one stage, from its last checkpoint if there is one; log and checkpoint each chunk."""
    done = folder / f"{stage.name}.pt"
    part = folder / f"{stage.name}.progress.pt"
    if done.exists():
        model.load_state_dict(torch.load(done, map_location=device))
        return
    parameters = trainable(model, stage)
    if stage.name == "vision":
        parameters = parameters + list(reader.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=stage.rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    step, spent, accuracy = 0, 0.0, {}
    if part.exists():
        state = torch.load(part, map_location=device)
        model.load_state_dict(state["model"])
        reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, accuracy = state["step"], state["spent"], state["accuracy"]
    progress = tqdm(total=stage.steps, initial=step, desc=stage.name, unit="step")
    model.train()
    while step < stage.steps:
        started, losses, counts = time.perf_counter(), [], {}
        steps = Steps(stage, range(step, min(step + CHUNK, stage.steps)), tokenizer, accuracy)
        for batch in torch.utils.data.DataLoader(steps, batch_size=None, num_workers=workers):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, stage)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                if stage.name == "vision":
                    torch.manual_seed(step)  # the same noise after a kill as without
                    loss, counted = vision_loss(model, reader, batch, device)
                else:
                    loss, counted = answer_loss(model, batch, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            losses.append(loss.detach())
            for kind, (right, total) in counted.items():
                before = counts.get(kind, (0, 0))
                counts[kind] = (before[0] + right, before[1] + total)
            step += 1
            progress.update()
        spent += time.perf_counter() - started
        accuracy |= {kind: right / total for kind, (right, total) in counts.items()}
        mean = torch.stack(losses).mean().item()
        progress.set_postfix(loss=f"{mean:.3f}", right=f"{_mean(accuracy):.3f}")
        save_atomically(
            {
                "model": model.state_dict(),
                "reader": reader.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent": spent,
                "accuracy": accuracy,
            },
            part,
        )
        log(folder / "log.csv", stage, step, spent, mean, accuracy)
    progress.close()
    save_atomically(model.state_dict(), done)
    part.unlink(missing_ok=True)


def _mean(accuracy):
    return sum(accuracy.values()) / len(accuracy)


def log(file, stage, step, seconds, loss, accuracy):
    """Append one line, dropping any later line of an earlier run that was killed after it."""
    columns = ["stage", "step", "seconds", "loss", "patches", *ALL_KINDS]
    rows = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            rows = [
                row
                for row in csv.DictReader(stream)
                if row["stage"] != stage.name or int(row["step"]) < step
            ]
    shown = {kind: f"{value:.4f}" for kind, value in accuracy.items()}
    row = {"stage": stage.name, "step": step, "seconds": f"{seconds:.0f}", "loss": f"{loss:.4f}"}
    rows.append(row | shown)
    part = file.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, file)


def export(model, processor, folder):
    """What `vk.load` reads: bf16 safetensors, config, processor."""
    model = model.to(torch.bfloat16).eval()
    model.requires_grad_(True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train(folder, stages=STAGES, device="cpu", workers=0, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    tokenizer = recipe.build_tokenizer()
    config = recipe.build_config(tokenizer)
    model = recipe.build_model(config, seed).to(device)
    torch.manual_seed(seed)
    reader = Reader(config.vision_config.hidden_size).to(device)
    for stage in stages:
        run_stage(model, reader, stage, folder, tokenizer, device, workers)
    export(model, recipe.build_processor(tokenizer), folder / "checkpoint")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pebble"), help="where to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", type=json.loads, default={}, help=argparse.SUPPRESS)
    given = parser.parse_args()
    stages = [
        dataclasses.replace(stage, **given.override.get(stage.name, {}))
        for stage in STAGES
        if given.override.get(stage.name, {}).get("steps") != 0
    ]
    train(given.output, stages, given.device, given.workers, given.seed)


if __name__ == "__main__":
    main()
