"""Pictures and text as tensors, for cobble's training; and answers, many at a time."""

import math

import torch
import torch.nn.functional as F

from vlmkit.models.cobble import recipe

IGNORED = -100


def pixel_values(pictures):
    """(n, 3, 84, 84) float32 in [-1, 1] of (n, 3, height, width) uint8 or float tensors from 0 to
    255: nearly what the processor makes of the same pictures, much faster.

    Pillow resizes in one direction after the other, and rounds and clips after each. So does this.
    Half a percent of the values differ, by one or two steps of 255.
    """
    x = pictures.float()
    for size in ((x.shape[2], recipe.SIZE), (recipe.SIZE, recipe.SIZE)):
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x / 127.5 - 1


def _uniform(n, low, high, device):
    return low + (high - low) * torch.rand(n, device=device)


def warped(pictures, *, turn, zoom, shift, fill):
    """Each picture turned by up to `turn` degrees, scaled by a factor of `zoom` = (low, high) and
    moved by up to `shift` of its side. fill: the value beside the picture; None mirrors it."""
    n, device = len(pictures), pictures.device
    angle = _uniform(n, -turn, turn, device) * math.pi / 180
    scale = 1 / _uniform(n, *zoom, device)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    dx, dy = _uniform(n, -2 * shift, 2 * shift, device), _uniform(n, -2 * shift, 2 * shift, device)
    matrix = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(matrix, pictures.shape, align_corners=False)
    padding = "reflection" if fill is None else "zeros"
    moved = pictures.float() - (fill or 0)
    moved = F.grid_sample(moved, grid, padding_mode=padding, align_corners=False, mode="bilinear")
    return (moved + (fill or 0)).clamp(0, 255)


def varied_photographs(pictures):
    """Photographs (n, 3, 32, 32) uint8, moved, mirrored, recolored, sharpened, with a hole."""
    n, device = len(pictures), pictures.device
    x = F.pad(pictures.float(), (4, 4, 4, 4), mode="reflect")
    row, column = torch.randint(0, 9, (2, n), device=device)
    along = torch.arange(32, device=device)
    each = torch.arange(n, device=device)[:, None, None, None]
    channels = torch.arange(3, device=device)[None, :, None, None]
    rows, columns = (
        (row[:, None] + along)[:, None, :, None],
        (column[:, None] + along)[:, None, None],
    )
    x = x[each, channels, rows, columns]
    far = warped(x, turn=15, zoom=(0.85, 1.5), shift=0.1, fill=None)
    x = torch.where(_coin(n, 0.5, device), far, x)
    x = torch.where(_coin(n, 0.5, device), x.flip(3), x)
    # A large photograph that is reduced is sharper than a small one that is enlarged.
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.where(_coin(n, 0.4, device), _uniform((n, 1, 1, 1), 0, 2, device), 0.0)
    x = (x + amount * (x - blurred)).clamp(0, 255)
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * _uniform((n, 1, 1, 1), 0.6, 1.4, device)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = middle + (x - middle) * _uniform((n, 1, 1, 1), 0.7, 1.3, device)
    x = (x * _uniform((n, 1, 1, 1), 0.75, 1.25, device)).clamp(0, 255)
    y0, x0 = torch.randint(0, 32, (2, n), device=device)
    hole = ((along[None, :, None] - y0[:, None, None]).abs() < 4) & (
        (along[None, None] - x0[:, None, None]).abs() < 4
    )
    return x.masked_fill(hole[:, None] & _coin(n, 0.5, device), 127.0)


def _coin(n, probability, device):
    return torch.rand(n, 1, 1, 1, device=device) < probability


def varied_digits(pictures):
    """Handwritten digits as pixel values, turned, scaled and moved a little on white paper."""
    large = (pixel_values(pictures) + 1) * 127.5
    moved = warped(large, turn=12, zoom=(0.8, 1.15), shift=0.06, fill=255.0)
    return moved / 127.5 - 1


class Prompts:
    """Conversations as token ids, equal to what the processor's chat template gives."""

    def __init__(self, tokenizer):
        self.tokenizer, self._known = tokenizer, {}
        turn = f"{recipe.END}\n<|im_start|>"
        self.head = f"<|im_start|>system\n{recipe.SYSTEM}{turn}user\n"
        self.tail = f"{turn}assistant\n"

    def _encode(self, text):
        if text not in self._known:
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def prompt(self, question, picture=True):
        """Token ids up to the answer, as a list. A picture comes before the question."""
        if not picture:
            return self._encode(self.head + question + self.tail)
        visual = [recipe.IMAGE_ID] * recipe.PATCHES
        return self._encode(self.head) + visual + self._encode(f"\n{question}{self.tail}")

    def training_batch(self, rows, device):
        """rows: [(question, answer, whether there is a picture)]. Returns input_ids,
        attention_mask and labels, each (rows, tokens), padded on the right."""
        prompts = [self.prompt(question, picture) for question, _, picture in rows]
        answers = [self._encode(answer + recipe.END) for _, answer, _ in rows]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        length = math.ceil(length / 8) * 8
        ids = torch.full((len(rows), length), recipe.END_ID)
        labels = torch.full_like(ids, IGNORED)
        mask = torch.zeros_like(ids)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : end] = torch.tensor(answer)
            mask[i, :end] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def answer_loss(model, batch, pixels):
    """Cross-entropy of the answers' tokens, and the share of rows that are right to the last token.

    The output head sees the answers' positions only: all others would cost most of the memory.
    """
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=pixels,
        use_cache=False,
    ).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    asked = labels != IGNORED
    logits = model.lm_head(hidden[asked]).float()
    loss = F.cross_entropy(logits, labels[asked])
    wrong = torch.zeros(len(labels), device=labels.device)
    row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[asked]
    wrong.index_add_(0, row, (logits.argmax(-1) != labels[asked]).float())
    return loss, (wrong == 0).float().mean()


@torch.no_grad()
def answers(model, tokenizer, questions, pixels=None, *, max_new_tokens=12, batch_size=500):
    """The model's greedy answers, as strings. pixels: a picture for each question, or None."""
    prompts, found = Prompts(tokenizer), []
    for start in range(0, len(questions), batch_size):
        part = [
            prompts.prompt(q, pixels is not None) for q in questions[start : start + batch_size]
        ]
        length = max(map(len, part))
        ids = torch.tensor([[recipe.END_ID] * (length - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in part])
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        if pixels is not None:
            seen = pixels[start : start + batch_size]
            inputs["pixel_values"] = seen.to(model.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
        found += [text.strip() for text in texts]
    return found
