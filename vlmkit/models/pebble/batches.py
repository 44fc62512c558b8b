"""Pictures, text and questions made into tensors, for each stage of pebble's training.

A picture costs 49 tokens and a question about 15, so one picture is asked several questions at
once. Each question attends to the picture and to itself, not to the other questions, and its
positions count on from the picture: the loss is exactly that of separate samples, at a fraction of
the cost.
"""

import dataclasses
import functools

import numpy as np
import torch

from vlmkit import tasks
from vlmkit.models.pebble.recipe import ASSISTANT, END, IMAGE, PATCH, PATCHES, USER
from vlmkit.tasks.drawing import COLORS, SHAPES
from vlmkit.tasks.ocr import DIGITS, LETTERS, SPELLING
from vlmkit.tasks.scenes import COLOR_COUNT, EXISTENCE, LOOKUP, PLACE, RELATION, WHERE
from vlmkit.tasks.several import MATCH, MOTION, SEARCH

WHATS = ("nothing", *SHAPES, *LETTERS, *DIGITS, "bar")
HUES = (tasks.NONE, *COLORS)
VALUES = 10
SIDE = tasks.SIZE // PATCH
TARGETS = {"what": len(WHATS), "hue": len(HUES), "value": VALUES, "row": SIDE, "column": SIDE}
"""The vision encoder's targets for each patch and how many classes each has: what is centerd in it,
its color, the value of a bar (0 where there is none), and where the patch is. Without the last two
the encoder forgets where it looks, and no question about places can be learnt from its features."""

IGNORED = -100

LESSONS = (SPELLING, LOOKUP, WHERE, RELATION, PLACE, EXISTENCE, COLOR_COUNT, MATCH, SEARCH, MOTION)
RECIPES = tasks.RECIPES | {lesson.name: lesson for lesson in LESSONS}


def pixel_values(frames):
    """List of (SIZE, SIZE, 3) uint8 → (frames, 3, SIZE, SIZE) float32, as the processor does."""
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    return stacked.to(torch.float32).div_(127.5).sub_(1.0)


def dense_targets(marks):
    """Marks of one frame → class numbers, a row of PATCHES for each of TARGETS."""
    targets = np.zeros((len(TARGETS), PATCHES), dtype=np.int64)
    targets[3:] = np.divmod(np.arange(PATCHES), SIDE)
    for mark in marks:
        patch = mark.y // PATCH * SIDE + mark.x // PATCH
        targets[:3, patch] = WHATS.index(mark.what), HUES.index(mark.color), mark.value
    return targets


def vision_batch(size, *key):
    """`size` frames of all tasks with their dense targets, (size, len(TARGETS), PATCHES)."""
    frames, targets = [], []
    for index in range(size):
        rng = tasks.generator("train", "vision", *key, index)
        # Signs more often than the rest: their 36 characters are the hardest to tell apart.
        picture = tasks.RECIPES[rng.choice((*tasks.TASKS, "ocr", "ocr"))].draw(rng)
        chosen = rng.randrange(len(picture.frames))
        frames.append(picture.frames[chosen])
        targets.append(dense_targets(picture.marks[chosen]))
    return pixel_values(frames), torch.from_numpy(np.stack(targets))


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures that are batched together: their tasks, how many a batch, questions for each."""

    name: str
    tasks: tuple
    pictures: int
    questions: int


@functools.cache
def _encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def _questions(recipes, picture, how_many, rng, weights):
    """Questions of different kinds in turn, each asked again only when all kinds have been."""
    asked = []
    kinds = [(recipe, kind) for recipe in recipes for kind in recipe.kinds]
    while len(asked) < how_many:
        before = len(asked)
        order = sorted(kinds, key=lambda rk: rng.random() ** (1 / weights.get(rk[1], 1.0)))
        for recipe, kind in reversed(order):
            pair = recipe.ask(kind, picture, rng)
            if pair is None or len(asked) == how_many:
                continue
            # Another phrasing of what was asked and answered already would teach little.
            if not any(kind == other and pair[1] == answer for other, _, answer in asked):
                asked.append((kind, *pair))
        if len(asked) == before:
            break
    return asked


def question_batch(group, tokenizer, *key, images=True, weights=None, visual_tokens=PATCHES):
    """One batch of a group: a dict of tensors for `answer_loss`.

    With `images`, the prompt holds the pictures; without, their description in words (the language
    model's own stage). `weights` ask some kinds of question more often than others. The pictures
    and questions are the same for any number of `visual_tokens`, those that the projector makes of
    a picture.
    """
    prefixes, conversations, frames, kinds = [], [], [], []
    for index in range(group.pictures):
        rng = tasks.generator("train", group.name, *key, index)
        recipes = [RECIPES[name] for name in group.tasks]
        asked = []
        while not asked:
            picture = rng.choice(recipes).draw(rng)
            asked = _questions(recipes, picture, group.questions, rng, weights or {})
        if images:
            frames += picture.frames
            prefixes.append(_picture_prompt(tokenizer, len(picture.frames), visual_tokens))
        else:
            text = recipes[0].describe(picture.facts)
            prefixes.append(tokenizer.encode(f"{USER}{text}\n", add_special_tokens=False))
        conversations.append([_turn(tokenizer, question, answer) for _, question, answer in asked])
        kinds += [kind for kind, _, _ in asked]
    batch = packed(prefixes, conversations, tokenizer.pad_token_id)
    batch["kinds"] = kinds
    batch["pixel_values"] = pixel_values(frames) if images else None
    return batch


def row_batch(rows, tokenizer, *, visual_tokens=PATCHES):
    """Rows of a dataset of `vlmkit.tasks` as one batch for `answer_loss`, a question each: what the
    processor makes of them, and their answers after it."""
    prefixes = [_picture_prompt(tokenizer, len(row["images"]), visual_tokens) for row in rows]
    conversations = [[_turn(tokenizer, row["question"], row["answer"])] for row in rows]
    batch = packed(prefixes, conversations, tokenizer.pad_token_id)
    batch["kinds"] = [row["kind"] for row in rows]
    batch["pixel_values"] = pixel_values([np.asarray(i) for row in rows for i in row["images"]])
    return batch


def _picture_prompt(tokenizer, pictures, visual_tokens):
    return _encode(tokenizer, USER + (IMAGE * visual_tokens + "\n") * pictures)


def _turn(tokenizer, question, answer):
    return (
        _encode(tokenizer, question + ASSISTANT),
        tokenizer.encode(f" {answer}{END}", add_special_tokens=False),
    )


def packed(prefixes, conversations, pad):
    """Token lists → input_ids, position_ids, labels and question numbers, each (rows, length), and
    a (rows, 1, length, length) boolean mask, True where a token may look."""
    lengths = [
        len(prefix) + sum(len(q) + len(a) for q, a in turns)
        for prefix, turns in zip(prefixes, conversations, strict=True)
    ]
    rows, length = len(prefixes), max(lengths)
    input_ids = np.full((rows, length), pad, dtype=np.int64)
    positions = np.zeros((rows, length), dtype=np.int64)
    labels = np.full((rows, length), IGNORED, dtype=np.int64)
    branch = np.full((rows, length), -1, dtype=np.int64)
    numbers, asked = np.full((rows, length), -1, dtype=np.int64), 0
    for row, (prefix, turns) in enumerate(zip(prefixes, conversations, strict=True)):
        end = len(prefix)
        input_ids[row, :end], positions[row, :end], branch[row, :end] = prefix, range(end), 0
        for number, (question, answer) in enumerate(turns, start=1):
            start, end = end, end + len(question) + len(answer)
            input_ids[row, start:end] = question + answer
            positions[row, start:end] = range(len(prefix), len(prefix) + end - start)
            branch[row, start:end] = number
            # Position t predicts token t + 1.
            labels[row, start + len(question) - 1 : end - 1] = answer
            numbers[row, start + len(question) - 1 : end - 1] = asked
            asked += 1
    branch = torch.from_numpy(branch)
    same = branch[:, :, None] == branch[:, None, :]
    shared = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "questions": torch.from_numpy(numbers),
        "mask": ((same | shared) & causal)[:, None],
    }
