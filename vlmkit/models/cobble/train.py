"""Train cobble's vision encoder, projectors and adapters, stage by stage.

    python -m vlmkit.models.cobble.train --photographs ../photos --device cuda

pictures         photographs, handwriting, drawings and easy-VQA, decoded once
teacher          a convolutional network learns the photographs (and is not kept)
vision_encoder   learns what the teacher sees, digits, and what is where in drawings
projector-nf4    learns to answer, with the language model frozen in NF4; other formats likewise
chat             adapters on the language model in NF4, and its projector, learn mixed instructions

The projectors depend on the vision encoder alone, so they can be trained side by side, each by a
call of its own with --stages. A run that was killed continues where it last saved.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from vlmkit import formats, tasks
from vlmkit.errors import VlmkitError
from vlmkit.models.cobble import instructions, recipe, tensors
from vlmkit.models.pebble import batches
from vlmkit.models.pebble.train import replace
from vlmkit.tasks import real

FORMATS = ("bf16", "int8", "nf4", "nf4-dq", "int3")
STAGES = ("pictures", "teacher", "vision_encoder", *(f"projector-{f}" for f in FORMATS), "chat")
DRAWINGS = 24_000
CHUNK = 250
"""Steps between two checkpoints of a run."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a stage learns: AdamW, a linear warm-up, then a cosine down to 2% of `learning_rate`."""

    max_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 50


SETTINGS = {
    "teacher": Schedule(3_000, 512, 2e-3, 0.05, 300),
    "vision_encoder": Schedule(9_000, 1_024, 2e-3, 0.05, 300),
    "projector": Schedule(800, 128, 1e-3),
    "chat": Schedule(1_500, 128, 5e-4),
}


# --- pictures -------------------------------------------------------------------------------------


def prepare_pictures(folder, source, workers=0):
    """Write all pictures to folder/pictures as arrays, once, so that each stage opens them fast."""
    if (folder / "pictures").is_dir():
        return
    part = folder / "pictures.part"
    part.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        _write(part, f"photographs-{split}", *real.read_photographs(source, split))
        _write(part, f"digits-{split}", *real.read_digits(split))
    drawings = _in_processes(draw, range(DRAWINGS), workers)
    _write(part, "drawings-train", np.stack([d[0] for d in drawings]))
    np.save(part / "drawings-marks.npy", np.stack([d[1] for d in drawings]))
    _write_json(part / "drawings-questions.json", [d[2] for d in drawings])
    for split in ("train", "test"):
        pictures, questions = real.read_easy_vqa(split)
        _write(part, f"easy_vqa-{split}", pictures)
        _write_json(part / f"easy_vqa-{split}-questions.json", questions)
    os.replace(part, folder / "pictures")


def _write(folder, name, pictures, labels=None):
    np.save(folder / f"{name}.npy", np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    if labels is not None:
        np.save(folder / f"{name}-labels.npy", labels)


def _write_json(file, rows):
    file.write_text(json.dumps(rows), encoding="utf-8")


def _in_processes(function, items, workers):
    if not workers:
        return [function(item) for item in items]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(function, items, chunksize=200))


def draw(index):
    """One drawing for training: its pixels, its dense targets, and questions with answers."""
    rng = tasks.generator("train", "cobble", index)
    scenes = tasks.RECIPES["vqa"]
    picture = scenes.draw(rng)
    asked = []
    for name in ("vqa", "caption"):
        for kind in tasks.KINDS[name]:
            found = [tasks.RECIPES[name].ask(kind, picture, rng) for _ in range(3)]
            asked += [[kind, *pair] for pair in found if pair]
    return picture.frames[0], batches.dense_targets(picture.marks[0]), asked


class Arrays:
    """The arrays of `prepare_pictures`, on a device."""

    def __init__(self, folder, device):
        self.folder, self.device, self._known = folder / "pictures", device, {}

    def __getitem__(self, name):
        if name not in self._known:
            if (file := self.folder / f"{name}.npy").exists():
                self._known[name] = torch.from_numpy(np.load(file)).to(self.device)
            else:
                text = (self.folder / f"{name}.json").read_text(encoding="utf-8")
                self._known[name] = json.loads(text)
        return self._known[name]


# --- one loop for all stages ----------------------------------------------------------------------


def learn(name, folder, modules, parameters, settings, loss_of, device, seed=0):
    """Train until `settings.max_steps`, from the last checkpoint of this stage if there is one.

    modules: {name: module}, what is saved. loss_of: a function of a step that returns (loss, share
    of right answers). All randomness of a step depends on the seed, the stage and the step alone.
    """
    file = folder / f"{name}.progress.pt"
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )
    start, seconds, lines = 0, 0.0, []
    if file.exists():
        saved = torch.load(file, map_location=device)
        optimizer.load_state_dict(saved["optimizer"])
        for key, module in modules.items():
            module.load_state_dict(saved[key], strict=False)
        start, seconds, lines = saved["step"], saved["seconds"], saved["lines"]
    learning = {
        key
        for module in modules.values()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    progress = tqdm(total=settings.max_steps, initial=start, desc=name, unit="step", mininterval=5)
    began, losses, shares = time.perf_counter(), [], []
    for step in range(start, settings.max_steps):
        torch.manual_seed(tasks.generator(name, seed, step).getrandbits(48))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, right = loss_of(step)
        warm = min(1.0, (step + 1) / settings.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.max_steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * (0.02 + 0.98 * cosine)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        shares.append(right.detach())
        progress.update()
        if (step + 1) % CHUNK == 0 or step + 1 == settings.max_steps:
            mean, share = torch.stack(losses).mean().item(), torch.stack(shares).mean().item()
            if not math.isfinite(mean):
                raise VlmkitError(
                    f"the loss of stage {name} is {mean} at step {step + 1}: nothing was saved of "
                    f"the last {len(losses)} steps. Start again with another --seed."
                )
            now = time.perf_counter()
            seconds, began = seconds + now - began, now
            lines.append([name, step + 1, f"{seconds:.0f}", f"{mean:.4f}", f"{share:.4f}"])
            progress.set_postfix(loss=f"{mean:.3f}", right=f"{share:.3f}")
            losses, shares = [], []
            state = {"optimizer": optimizer.state_dict(), "step": step + 1, "lines": lines}
            for key, module in modules.items():
                held = module.state_dict()
                state[key] = {k: held[k] for k in held if k in learning or "running" in k}
            state["seconds"] = seconds
            replace(file, lambda path, state=state: torch.save(state, path))
    progress.close()
    _write_log(folder / f"{name}.csv", lines)


def _write_log(file, lines):
    def write(path):
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["stage", "step", "seconds", "loss", "right"])
            writer.writerows(lines)

    replace(file, write)


# --- the vision encoder ---------------------------------------------------------------------------


class Residual(torch.nn.Module):
    """Convolution, normalization, ReLU; a pool; then two more convolutions that are added."""

    def __init__(self, before, after, residual):
        super().__init__()
        self.first = torch.nn.Sequential(_convolution(before, after), torch.nn.MaxPool2d(2))
        self.more = torch.nn.Sequential(*[_convolution(after, after) for _ in range(2 * residual)])

    def forward(self, x):
        x = self.first(x)
        return x + self.more(x) if len(self.more) else x


def _convolution(before, after):
    return torch.nn.Sequential(
        torch.nn.Conv2d(before, after, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(after),
        torch.nn.ReLU(inplace=True),
    )


def build_teacher():
    """A small residual network for 32 × 32 pixels (He et al., 2016, arXiv 1512.03385)."""
    return torch.nn.Sequential(
        _convolution(3, 64),
        Residual(64, 128, True),
        Residual(128, 256, True),
        Residual(256, 512, True),
        torch.nn.AdaptiveMaxPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(512, len(real.THINGS)),
    )


def train_teacher(folder, pictures, device, seed, settings):
    done = folder / "teacher.pt"
    torch.manual_seed(seed)
    teacher = build_teacher().to(device, memory_format=torch.channels_last)
    if done.exists():
        teacher.load_state_dict(torch.load(done, map_location=device))
        return teacher.eval().requires_grad_(False)
    photos, labels = pictures["photographs-train"], pictures["photographs-train-labels"]

    def loss_of(step):
        chosen = torch.randint(len(photos), (settings.batch_size,), device=device)
        seen = tensors.varied_photographs(photos[chosen]) / 127.5 - 1
        logits = teacher(seen.contiguous(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
        return loss, (logits.argmax(-1) == labels[chosen]).float().mean()

    parameters = list(teacher.parameters())
    learn("teacher", folder, {"teacher": teacher}, parameters, settings, loss_of, device, seed)
    teacher.eval().requires_grad_(False)
    replace(done, lambda path: torch.save(teacher.state_dict(), path))
    test = pictures["photographs-test"]
    right = 0
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        for start in range(0, len(test), 1000):
            found = teacher(test[start : start + 1000].float() / 127.5 - 1).argmax(-1)
            right += (
                (found == pictures["photographs-test-labels"][start : start + 1000]).sum().item()
            )
    print(f"teacher: {right / len(test):.4f} of the test photographs", flush=True)
    return teacher


class Heads(torch.nn.Module):
    """Reads the targets from the vision encoder's features, and is not kept: the classes of
    photographs, digits and easy-VQA from the mean of the patches, and pebble's targets from each
    patch, through noise, so that each target must take enough room in the features."""

    POOLED = {"photographs": 10, "digits": 10, "shape": 3, "color": 8}
    NOISE = 0.5

    def __init__(self, width):
        super().__init__()
        self.pooled = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, size) for name, size in self.POOLED.items()}
        )
        sizes = batches.TARGETS.items()
        self.dense = torch.nn.ModuleDict({n: torch.nn.Linear(width, size) for n, size in sizes})

    def forward(self, features, name):
        features = F.layer_norm(features.float(), features.shape[-1:])
        if name in self.pooled:
            return self.pooled[name](features.mean(1))
        return self.dense[name](features + self.NOISE * torch.randn_like(features))


EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def easy_vqa_facts(questions):
    """(shape, color) of a picture of easy-VQA as indices, -100 where no answer names it."""
    answers = {answer for _, answer in questions}
    return [
        next((i for i, name in enumerate(names) if name in answers), tensors.IGNORED)
        for names in (EASY_SHAPES, EASY_COLORS)
    ]


def train_vision_encoder(folder, encoder, pictures, device, seed, settings):
    """Train `encoder` in place. Photographs: only the teacher's distribution on the same mixed
    pictures (Beyer et al., 2022, arXiv 2106.05237, "A good teacher is patient and consistent")."""
    torch.manual_seed(seed)
    reader = Heads(recipe.VISION_WIDTH).to(device)
    teacher = train_teacher(folder, pictures, device, seed, SETTINGS["teacher"])
    facts = [easy_vqa_facts(rows) for rows in pictures["easy_vqa-train-questions"]]
    facts = torch.tensor(facts, device=device)
    sizes = {
        name: max(1, settings.batch_size * share // 16)
        for name, share in {"photographs": 11, "digits": 1, "drawings": 3, "easy_vqa": 1}.items()
    }

    def some(name):
        rows = pictures[f"{name}-train"]
        chosen = torch.randint(len(rows), (sizes[name],), device=device)
        return chosen, rows[chosen]

    def loss_of(step):
        _, photos = some("photographs")
        photos = tensors.varied_photographs(photos)
        share = torch.rand(len(photos), 1, 1, 1, device=device)
        share = torch.where(torch.rand_like(share) < 0.5, share, 1.0)
        photos = share * photos + (1 - share) * photos.flip(0)
        with torch.no_grad():
            target = teacher((photos / 127.5 - 1).contiguous(memory_format=torch.channels_last))
            target = target.float().softmax(-1)
        digit, digits = some("digits")
        drawing, drawings = some("drawings")
        easy, shapes = some("easy_vqa")
        flat = [tensors.pixel_values(x) for x in (photos, drawings, shapes)]
        pixels = torch.cat([*flat, tensors.varied_digits(digits)])
        features = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        parts = features.split([len(photos), len(drawing), len(easy), len(digit)])
        logits = reader(parts[0], "photographs")
        loss = 2 * F.cross_entropy(logits, target)
        right = (logits.argmax(-1) == target.argmax(-1)).float().mean()
        labels = pictures["digits-train-labels"][digit]
        loss = loss + 0.5 * F.cross_entropy(reader(parts[3], "digits"), labels)
        for i, name in enumerate(("shape", "color")):
            loss = loss + 0.5 * F.cross_entropy(reader(parts[2], name), facts[easy, i])
        marks = pictures["drawings-marks"][drawing]
        filled = marks[:, 0] > 0
        for i, name in enumerate(batches.TARGETS):
            each = F.cross_entropy(
                reader(parts[1], name).flatten(0, 1), marks[:, i].flatten(), reduction="none"
            ).view_as(filled)
            loss = loss + 0.2 * (each[filled].mean() + each[~filled].mean())
        return loss, right

    modules = {"encoder": encoder, "reader": reader}
    parameters = [p for module in modules.values() for p in module.parameters()]
    encoder.train()
    learn("vision_encoder", folder, modules, parameters, settings, loss_of, device, seed)
    encoder.eval()
    reader.eval()
    for name, label in (("photographs", "photographs"), ("digits", "digits")):
        print(f"vision_encoder: {_read(encoder, reader, pictures, name, label):.4f} of the test "
              f"{name}", flush=True)  # fmt: skip


@torch.no_grad()
def _read(encoder, reader, pictures, name, head):
    test, labels = pictures[f"{name}-test"], pictures[f"{name}-test-labels"]
    right = 0
    for start in range(0, len(test), 1000):
        pixels = tensors.pixel_values(test[start : start + 1000])
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
            found = reader(states[-1], head).argmax(-1)
        right += (found == labels[start : start + 1000]).sum().item()
    return right / len(test)


# --- projector and adapters -----------------------------------------------------------------------


def round_linear_layers(module, format):
    """Round the weights of all Linear layers of `module` to a format, in place, in their dtype.

    For "nf4" these are, to the bit, the weights with which a model loaded in NF4 computes.
    """
    if format in ("bf16", None):
        return
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.data
            if format == "int8":
                rounded = formats.dequantize(formats.quantize(weight, "int8"))
            else:
                rounded = formats.rounding(format).rounded(weight)
            layer.weight.data = rounded.to(weight.dtype)


def prepare_projector(model, pictures, seed, hidden=None):
    """Give `model` a fresh projector, in float32. hidden: its width, LLaVA's by default.

    The vision encoder's features differ widely from channel to channel. So the first layer begins
    with weights that take their mean and spread out, and the second ends at the spread of the
    language model's embeddings: that is where picture tokens have to arrive.
    """
    projector = model.model.multi_modal_projector
    device = model.device
    hidden = hidden or recipe.LANGUAGE_WIDTH
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        first = torch.nn.Linear(recipe.VISION_WIDTH, hidden)
        second = torch.nn.Linear(hidden, recipe.LANGUAGE_WIDTH)
        projector.linear_1, projector.linear_2 = first.to(device), second.to(device)
        pixels = tensors.pixel_values(pictures["photographs-train"][:512])
        tower = model.model.vision_tower
        features = tower(pixels.to(tower.dtype), output_hidden_states=True).hidden_states[-1]
        features = features.float().flatten(0, 1)
        mean, spread = features.mean(0), features.std(0).clamp(min=1e-3)
        projector.linear_1.weight /= spread
        projector.linear_1.bias -= projector.linear_1.weight @ mean
        reached = projector(features).std()
        wanted = model.get_input_embeddings().weight.float().std()
        projector.linear_2.weight *= wanted / reached
        projector.linear_2.bias *= wanted / reached
    return projector


class Conversations:
    """Batches of pictures with questions. shares: {source: rows of 128}."""

    PROJECTOR = {"photographs": 84, "digits": 20, "drawings": 12, "easy_vqa": 12}
    CHAT = {
        "photographs": 40,
        "facts": 16,
        "digits": 12,
        "drawings": 32,
        "easy_vqa": 16,
        "text": 12,
    }

    def __init__(self, pictures, shares, batch_size, answers=None):
        self.pictures, self.answers = pictures, answers or {}
        self.sizes = {name: max(1, rows * batch_size // 128) for name, rows in shares.items()}

    def batch(self, rng, device):
        """(rows for `Prompts.training_batch`, pixel values of those that have a picture)."""
        rows, pixels = [], []
        for name, size in self.sizes.items():
            if name == "text":
                asked = [rng.choice(instructions.TEXT_PROMPTS) for _ in range(size)]
                rows += [(question, self.answers[question], False) for question in asked]
                continue
            source = "photographs" if name == "facts" else name
            seen = self.pictures[f"{source}-train"]
            chosen = [rng.randrange(len(seen)) for _ in range(size)]
            part = seen[torch.tensor(chosen, device=seen.device)]
            if source == "photographs":
                pixels.append(tensors.pixel_values(tensors.varied_photographs(part)))
            elif source == "digits":
                pixels.append(tensors.varied_digits(part))
            else:
                pixels.append(tensors.pixel_values(part))
            rows += [(*self._ask(name, i, rng), True) for i in chosen]
        return rows, torch.cat(pixels).to(device)

    def _ask(self, name, i, rng):
        if name == "photographs":
            return instructions.about_photograph(self._label(name, i), rng)
        if name == "facts":
            return instructions.about_facts(self._label("photographs", i), rng, self.answers)
        if name == "digits":
            return instructions.about_digit(self._label(name, i), rng)
        if name == "drawings":
            return rng.choice(self.pictures["drawings-questions"][i])[1:]
        return rng.choice(self.pictures["easy_vqa-train-questions"][i])

    def _label(self, name, i):
        if (labels := f"_{name}") not in self.__dict__:
            self.__dict__[labels] = self.pictures[f"{name}-train-labels"].tolist()
        return self.__dict__[labels][i]


def train_answers(name, folder, model, modules, conversations, tokenizer, device, seed, settings):
    """Train whatever requires gradients, on `conversations`."""
    prompts = tensors.Prompts(tokenizer)

    def loss_of(step):
        rows, pixels = conversations.batch(tasks.generator(name, seed, step, "rows"), device)
        return tensors.answer_loss(model, prompts.training_batch(rows, device), pixels.bfloat16())

    parameters = [p for p in model.parameters() if p.requires_grad]
    with _compiled(model.model.language_model.layers, device):
        learn(name, folder, modules, parameters, settings, loss_of, device, seed)


@contextlib.contextmanager
def _compiled(layers, device):
    """Compiled layers on a GPU, where their many small operations cost more than their products.
    All layers share one compilation. Afterwards they are as before, since generation would compile
    again for every length."""
    if device.type == "cuda":
        for layer in layers:
            layer.compile(dynamic=True)
    yield
    for layer in layers:
        layer._compiled_call_impl = None


def train_projector(
    folder, model, pictures, tokenizer, device, *, name, seed=0, hidden=None, settings=None
):
    """Train a fresh projector of `model`, all else frozen. Returns its state in bf16."""
    settings = settings or SETTINGS["projector"]
    model.requires_grad_(False)
    projector = prepare_projector(model, pictures, seed, hidden).requires_grad_(True)
    conversations = Conversations(pictures, Conversations.PROJECTOR, settings.batch_size)
    modules = {"projector": projector}
    train_answers(name, folder, model, modules, conversations, tokenizer, device, seed, settings)
    projector.to(torch.bfloat16)
    return {key: tensor.cpu().contiguous() for key, tensor in projector.state_dict().items()}


def own_answers(file, model, tokenizer):
    """{question: the language model's own answer}, without pictures, from `file` if it exists.

    Asked before the language model is quantized. An answer ends with its last whole sentence.
    """
    if not file.exists():
        questions = [*instructions.knowledge_prompts(), *instructions.TEXT_PROMPTS]
        found = tensors.answers(model, tokenizer, questions, max_new_tokens=48, batch_size=250)
        ends = [max(answer.rfind(mark) for mark in ".!?") + 1 for answer in found]
        kept = {
            question: answer[: end or None].strip()
            for question, answer, end in zip(questions, found, ends, strict=True)
        }
        replace(file, lambda path: _write_json(path, kept))
    return json.loads(file.read_text(encoding="utf-8"))


def train_chat(folder, model, pictures, tokenizer, device, answers, seed=0, settings=None):
    """Adapters on the language model, which is rounded already, and its projector. Writes
    folder/adapters as `vk.finetuning.save` does."""
    from vlmkit import finetuning
    from vlmkit.adapters import LoRA

    settings = settings or SETTINGS["chat"]
    torch.manual_seed(seed)
    model.model.multi_modal_projector.float()
    adapted = finetuning.add_adapters(
        model, projector="full", language_model=LoRA(r=4, lora_alpha=8)
    ).to(device)
    conversations = Conversations(pictures, Conversations.CHAT, settings.batch_size, answers)
    base = adapted.get_base_model()
    modules = {"adapted": adapted}
    train_answers("chat", folder, base, modules, conversations, tokenizer, device, seed, settings)
    finetuning.save(adapted.to(torch.bfloat16), folder / "adapters", overwrite=True)
    return adapted


# --- the stages -----------------------------------------------------------------------------------


def naming(model, tokenizer, pictures, n=1_000):
    """The share of test photographs that the model names in free text."""
    test, labels = pictures["photographs-test"][:n], pictures["photographs-test-labels"][:n]
    pixels = tensors.pixel_values(test)
    found = tensors.answers(model, tokenizer, ["What is in the picture?"] * n, pixels)
    things = [real.THINGS[label] for label in labels.tolist()]
    return sum(map(instructions.is_right, found, things)) / n


def load_parts(folder, language_model_file, device, vision="bf16", language="bf16"):
    """(model with the trained vision encoder, tokenizer), both components rounded as asked."""
    from safetensors.torch import load_file

    language_model, tokenizer = recipe.read_language_model(language_model_file)
    model = recipe.build_model(language_model)
    model.model.vision_tower.load_state_dict(load_file(folder / "vision_encoder.safetensors"))
    model = model.to(device, torch.bfloat16)
    round_linear_layers(model.model.vision_tower, vision)
    round_linear_layers(model.model.language_model, language)
    return model, recipe.with_image_token(tokenizer)


def train(folder, photos, language_model_file, device, stages=STAGES, workers=0, seed=0):
    """Run `stages` in the order of STAGES and write what they learned to `folder`.

    photos: see `tasks.real.read_photographs`. language_model_file: the GGUF file of SmolLM2.
    workers: processes that draw. A folder of a run that was killed continues it.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(device)
    if "pictures" in stages:
        prepare_pictures(folder, photos, workers)
    pictures = Arrays(folder, device)
    if "teacher" in stages:
        train_teacher(folder, pictures, device, seed, SETTINGS["teacher"])
    file = folder / "vision_encoder.safetensors"
    if "vision_encoder" in stages and not file.exists():
        torch.manual_seed(seed)
        encoder = build_encoder(seed).to(device)
        train_vision_encoder(folder, encoder, pictures, device, seed, SETTINGS["vision_encoder"])
        weights = encoder.to(torch.bfloat16).state_dict()
        weights = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
        replace(file, lambda path: save_file(weights, path))
    for format in FORMATS:
        name = f"projector-{format}"
        file = folder / f"{name}.safetensors"
        if name in stages and not file.exists():
            model, tokenizer = load_parts(folder, language_model_file, device, language=format)
            weights = train_projector(
                folder, model, pictures, tokenizer, device, name=name, seed=seed
            )
            replace(file, lambda path, weights=weights: save_file(weights, path))
            share = naming(model, tokenizer, pictures)
            print(f"{name}: {share:.3f} of 1,000 test photographs named", flush=True)
    if "chat" in stages and not (folder / "adapters").exists():
        model, tokenizer = load_parts(folder, language_model_file, device)
        answers = own_answers(folder / "own_answers.json", model, tokenizer)
        round_linear_layers(model.model.language_model, "nf4")
        weights = load_file(folder / "projector-nf4.safetensors")
        model.model.multi_modal_projector.load_state_dict(weights)
        adapted = train_chat(folder, model, pictures, tokenizer, device, answers, seed)
        share = naming(adapted, tokenizer, pictures)
        print(f"chat: {share:.3f} of 1,000 test photographs named", flush=True)


def build_encoder(seed=0):
    """A fresh vision encoder in float32."""
    from transformers import SiglipVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SiglipVisionModel(recipe.build_config().vision_config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/cobble"), help="where to write")
    parser.add_argument(
        "--photographs", default=real.HUB, help="a folder, or a data set on the hub"
    )
    parser.add_argument(
        "--language-model", type=Path, required=True, help="the GGUF file of SmolLM2"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(
        given.output,
        given.photographs,
        given.language_model,
        given.device,
        given.stages,
        given.workers,
        given.seed,
    )


if __name__ == "__main__":
    main()
