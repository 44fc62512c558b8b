"""`python -m vlmkit.models.pebble.train`: train pebble from random weights, stage by stage.

The stages are those of the literature. The vision encoder learns alone to say what is in each
patch. The language model learns from text alone to answer questions about pictures that are
described in words. Then both are frozen, and the projector learns to map visual features into the
language model's space (LLaVA, Liu et al., 2023, arXiv 2304.08485, section 4.2, stage 1). Then
projector and language model learn to answer, with the vision encoder still frozen (stage 2). A
skill that stays at chance in this mixture gets a short stage of its own.

Each step draws new pictures, so the accuracy in the log is on pictures never seen before. Questions
that get wrong answers are asked more often. A run that was killed continues where it was.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from vlmkit import tasks
from vlmkit.folders import write_whole
from vlmkit.models.pebble import batches, recipe
from vlmkit.models.pebble.batches import Group

SCENES = Group("scenes", ("vqa", "caption"), 32, 6)
SIGNS = Group("signs", ("ocr", "spelling"), 40, 4)
CHARTS = Group("charts", ("chart",), 32, 5)
PAIRS = Group("pairs", ("multi_image",), 20, 4)
VIDEOS = Group("videos", ("video",), 12, 4)
GROUPS = (SCENES, SIGNS, CHARTS, PAIRS, VIDEOS)
HARD_GROUPS = (
    dataclasses.replace(SCENES, pictures=40, questions=4),
    SIGNS,
    CHARTS,
    dataclasses.replace(PAIRS, pictures=24, questions=3),
    dataclasses.replace(VIDEOS, questions=3),
)
"""More pictures with fewer questions each, so that the hard kinds get enough room."""

SKILLS = {
    name: Group(name, (recipe_name,), pictures, 2)
    for name, recipe_name, pictures in (
        ("lookups", "lookup", 64),
        ("wheres", "where", 64),
        ("relations", "relation", 64),
        ("places", "place", 64),
        ("existence", "existence", 64),
        ("color counts", "color_count", 64),
        ("matches", "match", 48),
        ("searches", "search", 48),
        ("motions", "motion", 24),
    )
}
"""One skill each, among few objects.

In a mixture with everything else, "left of" stayed at chance for 7,000 steps. Trained alone, a
skill comes in a few hundred steps: the color of a shape, then where a thing is, then which of two
things is left of the other. An earlier model that was asked where things are before it knew colors
by shape stayed at 55%, hence this order; the present recipe does not need it (chapter 10). The
other skills come when all skills take turns, and then stay."""

CAPTIONS = Group("captions", ("caption",), 64, 1)
ALL_KINDS = tuple(
    dict.fromkeys(kind for recipe in batches.RECIPES.values() for kind in recipe.kinds)
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training.

    trains: the parts that learn, as they are called in names of parameters. groups: its batches.
    images: whether prompts have the pictures, or their descriptions. focus: how strongly questions
    with wrong answers are preferred; with 0 all questions are equally frequent. final: the share of
    the learning rate that is left at the end. The name of a stage seeds its pictures.
    """

    name: str
    max_steps: int
    learning_rate: float
    trains: tuple
    groups: tuple = GROUPS
    images: bool = True
    focus: int = 1
    final: float = 0.02


LANGUAGE_SIDE = ("multi_modal_projector", "language_model", "lm_head")
MIXTURE = (*HARD_GROUPS, *SKILLS.values())


def _skill(name, max_steps):
    return Stage(name, max_steps, 1e-3, LANGUAGE_SIDE, (SKILLS[name],), final=0.9)


STAGES = (
    Stage("vision", 4000, 1.5e-3, ("vision_tower",)),
    Stage("language", 2500, 1.5e-3, ("language_model", "lm_head"), images=False),
    Stage("projector", 400, 2e-3, ("multi_modal_projector",)),
    Stage("instruct", 1500, 1e-3, LANGUAGE_SIDE, final=0.5),
    _skill("lookups", 400),
    _skill("wheres", 500),
    _skill("relations", 700),
    Stage("lessons", 3000, 1e-3, LANGUAGE_SIDE, tuple(SKILLS.values()), final=0.5),
    Stage("mixed", 1200, 1e-3, LANGUAGE_SIDE, MIXTURE, focus=2, final=0.94),
    _skill("matches", 300),
    _skill("searches", 300),
    Stage("everything", 6500, 1e-3, LANGUAGE_SIDE, MIXTURE, focus=2),
    Stage("final", 3500, 7e-4, LANGUAGE_SIDE, (*HARD_GROUPS, CAPTIONS, SKILLS["places"]), focus=2),
)
CHUNK = 100
"""Steps between two checkpoints, between two lines of the log, and between two updates of how often
each kind of question is asked."""

NOISE = 0.5
"""Standard deviation of the noise that `Reader` adds. That of the features is 1."""

WEIGHT_DECAY, BETAS, MAX_GRAD_NORM, WARMUP_STEPS = 0.05, (0.9, 0.98), 1.0, 100


class Reader(torch.nn.Module):
    """One linear head for each of the vision encoder's targets. Only its own stage needs them.

    The heads see the features through noise, so that each target must take enough room in the
    features to be recognized. Without the noise, color took 70% of the features' variance, row and
    column took 1.5% each, and the language model learned to use them much more slowly.
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
    """The batches of a range of steps. Each batch depends on nothing but its step, the stage, and
    the accuracies so far."""

    def __init__(self, stage, steps, tokenizer, accuracy):
        self.stage, self.steps, self.tokenizer = stage, steps, tokenizer
        # A kind with 99 of 100 right answers is still asked, a fifth as often as an unknown one.
        self.weights = {kind: (1.25 - accuracy.get(kind, 0.0)) ** stage.focus for kind in ALL_KINDS}

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        stage, step = self.stage, self.steps[index]
        if stage.name == "vision":
            return batches.vision_batch(96, stage.name, step)
        rng = tasks.generator("train", "group", stage.name, step)
        group = rng.choices(stage.groups, [self._need(group) for group in stage.groups])[0]
        options = {"images": stage.images, "weights": self.weights}
        return batches.question_batch(group, self.tokenizer, stage.name, step, **options)

    def _need(self, group):
        kinds = [kind for name in group.tasks for kind in batches.RECIPES[name].kinds]
        need = statistics.mean(self.weights[kind] for kind in kinds)
        return 2 * need if group.name == SCENES.name else need


def vision_loss(model, reader, batch, device):
    """Cross-entropy of all targets, in which the filled patches together count as much as the empty
    ones; and by "patches" how many filled patches are completely right, and how many there are."""
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
    return loss, Counter(patches=right.sum().item()), Counter(patches=filled.sum().item())


def answer_loss(model, batch, device):
    """Cross-entropy of the answers' tokens; and by kind of question how many answers are completely
    right, and how many there are."""
    loss, right = answered(model, batch, device)
    pairs = zip(batch["kinds"], right.tolist(), strict=True)
    return loss, Counter(kind for kind, one in pairs if one), Counter(batch["kinds"])


def answered(model, batch, device="cpu"):
    """Cross-entropy of the answers' tokens; and a boolean for each question, in the batch's order.

    An answer is right if each of its tokens is the most likely one after the true tokens before it.
    That is the case exactly if greedy generation gives this answer.
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


def learning_rate_at(step, stage):
    """Linear warm-up, then a cosine down to the final share."""
    if step < WARMUP_STEPS:
        return stage.learning_rate * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, stage.max_steps - WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return stage.learning_rate * (stage.final + (1 - stage.final) * cosine)


def trainable(model, stage):
    """Freeze all but what the stage trains. Returns the parameters that learn."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        parameter.requires_grad_("" in stage.trains or any(part in parts for part in stage.trains))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def update(optimizer, loss, step, stage):
    """One step of the optimizer, with the learning rate of this step and clipped gradients."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, stage)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()


def run_stage(model, reader, stage, folder, tokenizer, device, workers):
    """Train one stage, from its last checkpoint if there is one; log and save each chunk."""
    done, part = folder / f"{stage.name}.pt", folder / f"{stage.name}.progress.pt"
    if done.exists():
        model.load_state_dict(torch.load(done, map_location=device))
        return
    vision = stage.name == "vision"
    parameters = trainable(model, stage) + (list(reader.parameters()) if vision else [])
    optimizer = torch.optim.AdamW(
        parameters, lr=stage.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    learning = {"model": model, "reader": reader, "optimizer": optimizer}
    so_far = {"step": 0, "seconds": 0.0, "accuracy": {}}
    if part.exists():
        state = torch.load(part, map_location=device)
        for name, each in learning.items():
            each.load_state_dict(state[name])
        so_far = {name: state[name] for name in so_far}
    model.train()
    progress = tqdm(total=stage.max_steps, initial=so_far["step"], desc=stage.name, unit="step")
    while so_far["step"] < stage.max_steps:
        started, losses, right, total = time.perf_counter(), [], Counter(), Counter()
        chunk = range(so_far["step"], min(so_far["step"] + CHUNK, stage.max_steps))
        steps = Steps(stage, chunk, tokenizer, so_far["accuracy"])
        loader = torch.utils.data.DataLoader(steps, batch_size=None, num_workers=workers)
        for step, batch in zip(chunk, loader, strict=True):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                if vision:
                    torch.manual_seed(step)  # the same noise after a kill as without
                    loss, *counts = vision_loss(model, reader, batch, device)
                else:
                    loss, *counts = answer_loss(model, batch, device)
            update(optimizer, loss, step, stage)
            losses.append(loss.detach())
            right.update(counts[0])
            total.update(counts[1])
            progress.update()
        so_far["step"] = chunk.stop
        so_far["seconds"] += time.perf_counter() - started
        so_far["accuracy"] |= {kind: right[kind] / count for kind, count in total.items()}
        mean = torch.stack(losses).mean().item()
        shown = statistics.mean(so_far["accuracy"].values())
        progress.set_postfix(loss=f"{mean:.3f}", right=f"{shown:.3f}")
        state = {name: each.state_dict() for name, each in learning.items()} | so_far
        write_whole(part, lambda path, state=state: torch.save(state, path))
        log(folder / "log.csv", stage, loss=mean, **so_far)
    progress.close()
    write_whole(done, lambda path: torch.save(model.state_dict(), path))
    part.unlink(missing_ok=True)


def log(file, stage, step, seconds, accuracy, loss):
    """Append a line, and drop later lines of an earlier run of the stage that was killed."""
    rows = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            old = list(csv.DictReader(stream))
        rows = [row for row in old if row["stage"] != stage.name or int(row["step"]) < step]
    row = {"stage": stage.name, "step": step, "seconds": f"{seconds:.0f}", "loss": f"{loss:.4f}"}
    rows.append(row | {kind: f"{value:.4f}" for kind, value in accuracy.items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, [*row, "patches", *ALL_KINDS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(file, lambda path: path.write_bytes(text.getvalue().encode()))


def train(folder, stages=STAGES, device="cpu", workers=0, seed=0):
    """Train pebble and write what `vk.load` reads to folder/checkpoint. Returns the model, in bf16.

    workers: processes that draw pictures. A folder of a run that was killed continues it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    tokenizer = recipe.build_tokenizer()
    config = recipe.build_config(tokenizer)
    model = recipe.build_model(config, seed).to(device)
    torch.manual_seed(seed)
    reader = Reader(config.vision_config.hidden_size).to(device)
    for stage in stages:
        run_stage(model, reader, stage, folder, tokenizer, device, workers)
    model = model.to(torch.bfloat16).eval().requires_grad_(True)
    model.save_pretrained(folder / "checkpoint")
    recipe.build_processor(tokenizer).save_pretrained(folder / "checkpoint")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pebble"), help="where to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", type=json.loads, default={}, help=argparse.SUPPRESS)
    given = parser.parse_args()
    stages = [dataclasses.replace(each, **given.override.get(each.name, {})) for each in STAGES]
    stages = [stage for stage in stages if stage.max_steps]
    train(given.output, stages, given.device, given.workers, given.seed)


if __name__ == "__main__":
    main()
