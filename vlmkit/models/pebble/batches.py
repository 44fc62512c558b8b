"""Pictures, text and questions as tensors, for each stage of pebble's training.

A picture costs 49 tokens and a question about 15, so a sequence holds one picture with several
questions. Each question attends to the picture and to itself, not to the other questions, and its
positions continue from the picture. The loss is exactly that of separate samples, at a fraction of
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
"""The vision encoder's targets for each patch, with the number of classes of each: which object has
its center in the patch, the object's color, the value of a bar (0 if there is none), and the
patch's row and column. Without row and column the encoder forgets where it looks, and the language
model cannot learn questions about places from its features."""

IGNORED = -100

SKILLS = (SPELLING, LOOKUP, WHERE, RELATION, PLACE, EXISTENCE, COLOR_COUNT, MATCH, SEARCH, MOTION)
RECIPES = tasks.RECIPES | {skill.name: skill for skill in SKILLS}
"""The recipes of the tasks, and those that train a single skill."""


def pixel_values(frames):
    """(frames, 3, SIZE, SIZE) float32 of a list of (SIZE, SIZE, 3) uint8, as the processor does."""
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
    return stacked.to(torch.float32).div_(127.5).sub_(1.0)


def dense_targets(marks):
    """Class numbers for the marks of one frame: (TARGETS, PATCHES)."""
    targets = np.zeros((len(TARGETS), PATCHES), dtype=np.int64)
    targets[3:] = np.divmod(np.arange(PATCHES), SIDE)
    for mark in marks:
        patch = mark.y // PATCH * SIDE + mark.x // PATCH
        targets[:3, patch] = WHATS.index(mark.what), HUES.index(mark.color), mark.value
    return targets


def vision_batch(size, *key):
    """`size` frames of all tasks, and their dense targets: (size, TARGETS, PATCHES)."""
    frames, targets = [], []
    for index in range(size):
        rng = tasks.generator("train", "vision", *key, index)
        # Signs come more often: their 36 characters are the hardest to tell apart.
        picture = tasks.RECIPES[rng.choice((*tasks.TASKS, "ocr", "ocr"))].draw(rng)
        chosen = rng.randrange(len(picture.frames))
        frames.append(picture.frames[chosen])
        targets.append(dense_targets(picture.marks[chosen]))
    return pixel_values(frames), torch.from_numpy(np.stack(targets))


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures that share a batch: their tasks, pictures in a batch, questions for a picture."""

    name: str
    tasks: tuple
    pictures: int
    questions: int


@functools.cache
def _encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def _questions(recipes, picture, how_many, rng, weights):
    """[(kind, question, answer)], of all kinds in turn: a kind comes again after all others."""
    asked = []
    kinds = [(recipe, kind) for recipe in recipes for kind in recipe.kinds]
    while len(asked) < how_many:
        before = len(asked)
        order = sorted(kinds, key=lambda rk: rng.random() ** (1 / weights.get(rk[1], 1.0)))
        for recipe, kind in reversed(order):
            pair = recipe.ask(kind, picture, rng)
            if pair is None or len(asked) == how_many:
                continue
            # Another phrasing of the same question would teach little.
            if not any(kind == other and pair[1] == answer for other, _, answer in asked):
                asked.append((kind, *pair))
        if len(asked) == before:
            break
    return asked


def question_batch(group, tokenizer, *key, images=True, weights=None, visual_tokens=PATCHES):
    """One batch of a group: a dict of tensors for `answer_loss`.

    key: what seeds the pictures and questions, such as a stage's name and a step.
    images: whether the prompt has the pictures, or (in the language model's own stage) their
        description in words.
    weights: {kind of question: how often it is asked, compared with 1}.
    visual_tokens: how many a picture has. The pictures and questions do not depend on it.
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
    return packed(prefixes, conversations, kinds, frames, tokenizer.pad_token_id)


def row_batch(rows, tokenizer, *, visual_tokens=PATCHES):
    """Rows of a dataset of `vlmkit.tasks` as one batch for `answer_loss`, one question each, with
    the tokens that the processor would give."""
    prefixes = [_picture_prompt(tokenizer, len(row["images"]), visual_tokens) for row in rows]
    conversations = [[_turn(tokenizer, row["question"], row["answer"])] for row in rows]
    frames = [np.asarray(image) for row in rows for image in row["images"]]
    kinds = [row["kind"] for row in rows]
    return packed(prefixes, conversations, kinds, frames, tokenizer.pad_token_id)


def _picture_prompt(tokenizer, pictures, visual_tokens):
    return _encode(tokenizer, USER + (IMAGE * visual_tokens + "\n") * pictures)


def _turn(tokenizer, question, answer):
    return (
        _encode(tokenizer, question + ASSISTANT),
        tokenizer.encode(f" {answer}{END}", add_special_tokens=False),
    )


def packed(prefixes, conversations, kinds, frames, pad):
    """Tensors of token lists: input_ids, position_ids, labels and numbers of questions, each
    (rows, length), and a boolean mask (rows, 1, length, length) that is True where a token may
    look."""
    lengths = [
        len(prefix) + sum(len(q) + len(a) for q, a in turns)
        for prefix, turns in zip(prefixes, conversations, strict=True)
    ]
    rows, length = len(prefixes), max(lengths)
    input_ids, positions, labels, branch, numbers = (
        torch.full((rows, length), fill) for fill in (pad, 0, IGNORED, -1, -1)
    )
    asked = 0
    for row, (prefix, turns) in enumerate(zip(prefixes, conversations, strict=True)):
        end = len(prefix)
        input_ids[row, :end], branch[row, :end] = torch.tensor(prefix), 0
        positions[row, :end] = torch.arange(end)
        for number, (question, answer) in enumerate(turns, start=1):
            start, end = end, end + len(question) + len(answer)
            input_ids[row, start:end] = torch.tensor(question + answer)
            positions[row, start:end] = torch.arange(end - start) + len(prefix)
            branch[row, start:end] = number
            answered = slice(start + len(question) - 1, end - 1)  # position t predicts token t + 1
            labels[row, answered], numbers[row, answered] = torch.tensor(answer), asked
            asked += 1
    same = branch[:, :, None] == branch[:, None, :]
    shared = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "labels": labels,
        "questions": numbers,
        "mask": ((same | shared) & causal)[:, None],
        "kinds": kinds,
        "pixel_values": pixel_values(frames) if frames else None,
    }
