"""Typical mistakes in the exercises, for `test_exercises.py`.

MISTAKES: for each exercise its wrong answers, as expressions that can use what the stub can use and
HELPERS, with words that the hint must contain.
"""

import itertools
import math
import re

import numpy as np
import torch
from PIL import Image


def falling(step, stage):
    """A learning rate that comes down along a line."""
    share = max(0, step - 100) / (stage.max_steps - 100)
    return stage.learning_rate * min(1, (step + 1) / 100) * (1 - share * (1 - stage.final))


def means_of_what_is_there(features, blocks):
    """The mean of each block, without the zeros of the padding."""
    sums, real = (
        blocks(x).unflatten(2, (4, -1)).sum(2) for x in (features, torch.ones_like(features))
    )
    return sums / real


def shared(means, points, directions=all):
    """The pairs of formats that lose at most `points` in each other's format."""
    found = set()
    for a, b in itertools.combinations(means.index, 2):
        losses = (means.loc[y, y] - means.loc[x, y] for x, y in ((a, b), (b, a)))
        found |= {(a, b)} if directions(loss <= points for loss in losses) else set()
    return found


def flipped(rows, where):
    """Rows with their pictures, as (frames, height, width, 3), indexed by `where`."""
    turned = (np.stack([np.asarray(image) for image in row["images"]])[where] for row in rows)
    return [r | {"images": [*map(Image.fromarray, t)]} for r, t in zip(rows, turned, strict=True)]


def tail(lost, won):
    """One side of the exact paired test."""
    n = lost + won
    return sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n


def squares(picture, side):
    """The patches of a picture, (rows, columns, 3, side, side)."""
    return picture.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4)


def weights(q, k, mask=0.0):
    return (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)


def in_heads(q, k, v, heads, mask=0.0):
    """Attention of each head, (heads, n, width / heads)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    return weights(q, k, mask) @ v


def write(scores, prompt, end, most, seen=None, stop=True):
    """Greedy decoding. seen(prompt, new): the tokens that the model is asked about."""
    new = []
    for _ in range(most):
        new.append(int(scores((seen or list.__add__)(prompt, new)).argmax()))
        if stop and new[-1] == end:
            return new[:-1]
    return new


def write_with_cache(step, prompt, end, most, tokens=None, keep=lambda old, new: new):
    """Greedy decoding. tokens(prompt, new): the tokens of a step. keep(old, new): the cache."""
    new, (found, cache) = [], step(prompt, None)
    while len(new) < most and (token := int(found.argmax())) != end:
        new.append(token)
        found, newer = step(tokens(prompt, new) if tokens else [token], cache)
        cache = keep(cache, newer)
    return new


def remember(cache, k, v):
    cache["k"], cache["v"] = torch.cat([cache["k"], k]), torch.cat([cache["v"], v])
    return cache["k"], cache["v"]


def look_first(q, k, v, cache):
    """Attention to the tokens before this one, which is remembered too late."""
    found = weights(q, cache["k"]) @ cache["v"]
    remember(cache, k, v)
    return found


def in_blocks(weights, levels, divide=64, largest=lambda b: b.abs().amax(1), bounds=None):
    """NF4's codes and absmax, with what a mistake changes."""
    n = weights.numel()
    blocks = torch.nn.functional.pad(weights.flatten(), (0, -n % divide)).reshape(-1, divide)
    absmax = largest(blocks)
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).flatten()[:n]
    bounds = (levels[:-1] + levels[1:]) / 2 if bounds is None else bounds
    return torch.bucketize(scaled, bounds), absmax


def in_steps(rows, dim=1, most=127, size=torch.abs, whole=torch.round):
    """Rows rounded to 8 bits, each with a scale; `dim` None for one scale for all. The rest is what
    a mistake changes."""
    largest = size(rows).max() if dim is None else size(rows).amax(dim, keepdim=True)
    step = largest.clamp(min=1e-30) / most
    return whole(rows / step).clamp(max=127) * step


def apart(x, weight, kept):
    """The product of the columns of `x` in `kept`, unrounded, and of the others in 8 bits."""
    rest = in_steps(x[:, ~kept]) @ in_steps(weight[:, ~kept]).T
    return rest + x[:, kept] @ weight[:, kept].T


HELPERS = {"falling": falling, "flipped": flipped, "np": np, "re": re}
HELPERS |= {"math": math, "tail": tail, "torch": torch, "squares": squares, "weights": weights}
HELPERS |= {"in_heads": in_heads, "write": write, "write_with_cache": write_with_cache}
HELPERS |= {"remember": remember, "look_first": look_first, "inf": math.inf}
HELPERS |= {"in_blocks": in_blocks, "in_steps": in_steps, "apart": apart}
HELPERS |= {"shared": shared, "means_of_what_is_there": means_of_what_is_there}
HELPERS["mirror"] = np.s_[:, :, ::-1]

MISTAKES = {
    "projector kept": {
        "vk.Plan.recommended()": "As large as in bf16: vision_encoder",
        'vk.Plan.uniform("nf4")': "in this plan it is nf4",
        'vk.Plan(vision_encoder="int8", language_model="int8")': "fewer bits",
        '{"language_model": "nf4"}': "a vk.Plan",
    },
    "beyond noise": {
        "5": "5 lost and 0 won, p = 0.0625",
        "4": "at least so unevenly 12.5% of the time",
        "30": "29 lost would be, too",
        "49": "this counts every question",
    },
    "exact paired test": {
        "lambda lost, won: tail(lost, won)": "one side only",
        "lambda lost, won: math.comb(lost + won, won) / 2 ** (lost + won)": "exactly this result",
        "lambda lost, won: 2 * math.comb(lost + won, won) / 2 ** (lost + won)": "to either side",
        "lambda lost, won: 2 * tail(lost, won)": "cannot be more than 1",
        "lambda lost, won: min(1, 2 * tail(lost, won)) if lost > won else 1": "the same p as 7",
        "lambda lost, won: lost / won": "7 lost and 2 won give p = 3.5; it should be 0.1797",
        "lambda lost: lost": "your function stops with TypeError",
        "0.18": "should be a function",
    },
    "patches": {
        "lambda p, s: squares(p, s).transpose(0, 1).reshape(-1, 3 * s * s)": "down the columns. Go",
        "lambda p, s: squares(p, s).permute(0, 1, 3, 4, 2).reshape(-1, 3 * s * s)": "side by side",
        "lambda p, s: squares(p, s).mT.reshape(-1, 3 * s * s)": "inside a patch",
        "lambda p, s: p.reshape(-1, 3 * s * s)": "not squares",
        "lambda p, s: squares(p, s).reshape(-1, 3 * s * s).T": "here it is a column",
        "lambda p, s: squares(p, s).reshape(1, -1, 3 * s * s)": "Yours has the shape (1, 6, 48)",
        "lambda p, s: squares(p, s).reshape(-1, 3 * s * s) + 1": "in other places",
        "lambda p, s: p.numpy()": "Yours has the shape (3, 8, 12)",
        "lambda p, s: {}": "Yours returns a dict",
    },
    "attention": {
        "lambda q, k, v, mask: (q @ k.T + mask).softmax(-1) @ v": "not divided by the square root",
        "lambda q, k, v, mask: (q @ k.T / q.shape[1] + mask).softmax(-1) @ v": "its square root",
        "lambda q, k, v, mask: (q @ k.T * q.shape[1] ** 0.5 + mask).softmax(-1) @ v": "; divide.",
        "lambda q, k, v, mask: (q @ k.T / q.shape[1] ** 0.5 + mask).softmax(0) @ v": "the queries",
        "lambda q, k, v, mask: (q @ k.T / q.shape[1] ** 0.5 + mask) @ v": "softmax is missing",
        "lambda q, k, v, mask: (q @ k.T / len(k) ** 0.5 + mask).softmax(-1) @ v": "of 5, a",
        "lambda q, k, v, mask: weights(q, k, mask)": "Multiply the weights by the values",
        "lambda q, k, v, mask: weights(q, k) @ v": "the mask changes nothing",
        "lambda q, k, v, mask: (weights(q, k) + mask) @ v": "Add the mask before softmax",
        "lambda q, k, v, mask: (weights(q, k, mask) @ v, 0)": "returns a tuple",
    },
    "heads": {
        "lambda q, k, v, n, mask: weights(q, k, mask) @ v": "a single head",
        "lambda q, k, v, n, mask: in_heads(q, k, v, n, mask).reshape(len(q), -1)": "put together",
        "lambda q, k, v, n, mask: in_heads(q, k, v, n, mask)": "Yours has the shape (4, 5, 6)",
        "lambda q, k, v, n, mask: in_heads(q / 2, k, v, n, mask).transpose(0, 1).flatten(1)": (
            "the square root of 24"
        ),
        "lambda q, k, v, n, mask: in_heads(q, k, v, n).transpose(0, 1).flatten(1)": "every head",
        "lambda q, k, v, n, mask: in_heads(q, k, v, n).permute(1, 2, 0).flatten(1)": "take turns",
    },
    "causal mask": {
        "lambda n: torch.full((n, n), -inf).triu(2)": "sees the next one",
        "lambda n: torch.full((n, n), -inf).triu(0)": "not even at itself",
        "lambda n: torch.full((n, n), -inf).tril(-1)": "the past is hidden",
        "lambda n: torch.ones(n, n).tril()": "hides nothing",
        "lambda n: torch.full((n, n), -inf).triu(1) + torch.eye(n)": "should add 0",
        "lambda n: torch.ones(n, n).triu(1) * -inf": "0 times −∞",
        "lambda n: torch.ones(n, n).triu(1) > 0": "True is where a token may not look",
        "lambda n: torch.ones(n, n + 1)": "should have the shape (4, 4)",
    },
    "merging": {
        "lambda words, ids, i, seen: words": "nothing was replaced",
        "lambda words, ids, i, seen: torch.cat([seen, words])": "placeholders are still there",
        "lambda words, ids, i, seen: torch.cat([seen, words[ids != i]])": "at the beginning",
        "lambda words, ids, i, seen: words.masked_scatter((ids == i)[:, None], seen.flip(0))": (
            "in reverse order"
        ),
        "lambda words, ids, i, seen: words.index_fill(0, torch.tensor(0), 0)": "position [0]",
    },
    "greedy": {
        "lambda scores, prompt, end, most: prompt + write(scores, prompt, end, most)": (
            "without the prompt"
        ),
        "lambda *a: write(*a, stop=False)": "writes on after",
        "lambda *a: write(*a) + [a[2]]": "leave out the token `end`",
        "lambda *a: write(*a, seen=lambda prompt, new: new[-1:] or prompt)": "only the last token",
        "lambda *a: write(*a, seen=lambda prompt, new: prompt)": "the prompt again",
        "lambda *a: write(*a[:3], most=20)": "does not stop",
        "lambda *a: write(*a[:3], most=8)": "new tokens; `most` is 5",
        "lambda *a: write(*a)[:1]": "after the first token",
        "lambda *a: 5": "a list of tokens",
    },
    "attention with a cache": {
        "lambda q, k, v, c: weights(q, torch.cat([c['k'], k])) @ torch.cat([c['v'], v])": (
            "Add the new one"
        ),
        "look_first": "also looks at itself",
        "lambda q, k, v, c: c.update(k=k, v=v) or v": "Add the new one",
        "lambda q, k, v, c: remember(c, k, v) and v": "sees only itself",
        "lambda q, k, v, c: (q @ remember(c, k, v)[0].T).softmax(-1) @ c['v']": "not divided",
        "lambda q, k, v, c: remember(c, k, v) and c.update(k=c['k'].flip(0)) or "
        "weights(q, c['k']) @ c['v']": "do not fit together",
        "lambda q, k, v, c: remember(c, k, v)[1]": "Yours has the shape (2, 8)",
    },
    "greedy with a cache": {
        "lambda *a: write_with_cache(*a, tokens=list.__add__)": "the whole prompt is given again",
        "lambda *a: write_with_cache(*a, tokens=lambda prompt, new: new)": "give one",
        "lambda *a: write_with_cache(*a, keep=lambda old, new: old)": "an old cache",
        "lambda *a: write(lambda tokens: a[0](tokens, None)[0], *a[1:])": "without a cache",
        "lambda step, *a: write_with_cache(lambda t, c: step(t, None), *a)": "knows no prompt",
        "lambda step, prompt, *a: write_with_cache(step, prompt[:1], *a)": "should get the prompt",
        "lambda step, prompt, *a: step(prompt[0], None)": "`step` should be given a list",
    },
    "left over": {
        'vk.anatomy(models[llama])["language_model"].parameters': "nothing is left out",
        "8030": "in millions",
        "6_285_398_016": "the dot behind the number",
        "8_925_322_771": "has the vision encoder and the projector in it",
        "1_409_351_680": "what these layers hold",
        "8030.3": "in millions",
        "8.03": "in billions",
        "7_504_957_440": "lm_head, is missing",
    },
    "how little is enough": {
        "49": "the whole picture",
        "5": "it says purple",
        "20": "with fewer of them as well",
        "50": "has 49 patches",
    },
    "mean of a block": {
        "lambda f, linear: linear(f)": "for each patch",
        "lambda f, linear: blocks(f).unflatten(2, (4, -1)).mean(2)": "apply the Linear layer",
        "lambda f, linear: linear(blocks(f))": "your function stops with RuntimeError",
        "torch.nn.Linear": "this is the class Linear",
        "lambda f, linear: linear(blocks(f).unflatten(2, (-1, 4)).mean(3))": "neighboring channels",
        "lambda f, linear: linear(blocks(f)[..., : f.shape[2]])": "the first patch",
        "lambda f, linear: linear(blocks(f).unflatten(2, (4, -1)).sum(2))": "the sum",
        "lambda f, linear: linear(blocks(f).unflatten(2, (4, -1)).amax(2))": "not the mean",
        "lambda f, linear: linear(f[:, [24] * 9])": "the last column and row are lost",
        "lambda f, linear: linear(means_of_what_is_there(f, blocks))": "divide by 4 as well",
        "lambda f, linear: (f, None)[1]": "is the `return` missing?",
    },
    "first to learn": {
        "{'cross_attn_attn_gate'}": "1 of 2 are missing",
        "{n for n, _ in layer.named_parameters()}": "is behind a gate",
        "{'attn_gate'}": "no parameter here is attn_gate",
    },
    "NF4 levels": {
        "lambda offset: torch.linspace(-1, 1, 16)": "no value is exactly zero",
        "lambda offset: (torch.linspace(-1, 1, 17) ** 3)[:-1]": "should be",
        "lambda offset: torch.cat([torch.linspace(-1, 0, 8), torch.linspace(0, 1, 9)[1:]])": "even",
        "lambda offset: torch.special.ndtri(torch.linspace(0, 1, 16))": "not finite",
        "lambda offset: torch.special.ndtri(torch.linspace(1 - offset, offset, 15))": "15 values",
        "lambda offset: -levels.flip(0)": "the other way round",
        "lambda offset: levels * 1.85": "Divide all by the largest",
        "lambda offset: levels.flip(0)": "sort them",
        "lambda offset: levels": "with offset 0.93 the second",
        "lambda offset: print(end='')": "is the `return` missing?",
        "0.97": "should be a function",
    },
    "blocks of 64": {
        "lambda w, t: in_blocks(w, t, w.numel())": "each block of 64 has its own",
        "lambda w, t: in_blocks(w, t, w.shape[1])": "(5, 100), 500 weights: there is an absmax for",
        "lambda w, t: (in_blocks(w, t)[0], in_blocks(w, t)[1][: w.numel() // 64])": "is missing",
        "lambda w, t: in_blocks(w, t, largest=lambda b: b.amax(1))": "the largest magnitude: take",
        "lambda w, t: (t[in_blocks(w, t)[0]], in_blocks(w, t)[1])": "these are values",
        "lambda w, t: in_blocks(w, t)[0]": "should return codes and absmax",
        "lambda w, t: (w.reshape(-1, 64).argmin(1), 0)": "absmax",
        "lambda w, t: (in_blocks(w, t)[0], in_blocks(w, t)[1].clamp(min=0.1))": "of zeros is 0",
        "lambda w, t: in_blocks(w, t + 0.1)": "codes are not of the nearest",
        "lambda w, t: in_blocks(w, t, bounds=t)": "the next level above it",
        "lambda w, t: in_blocks(w.reshape(-1, 64), t)": "500 weights: your function stops",
    },
    "two codes a byte": {
        "lambda c: c.to(torch.uint8)": "Two codes share a byte",
        "lambda c: c[:-1:2] * 16 + c[1::2]": "each number is torch.int64",
        "lambda c: (c[1::2] * 16 + c[:-1:2]).to(torch.uint8)": "the two halves are swapped",
        "lambda c: (c[:-1:2] * 10 + c[1::2]).to(torch.uint8)": "16 × the first code",
        "lambda c: (c[: len(c) // 2 * 2 : 2] * 16 + c[1::2]).to(torch.uint8)": "is half empty",
    },
    "back to numbers": {
        "lambda p, a, t, s: t[torch.stack([p >> 4, p & 15], 1).flatten().long()]": "the shape is",
        "lambda p, a, t, s: t[torch.stack([p >> 4, p & 15], 1).flatten().long()]"
        "[: s[0] * s[1]].reshape(s)": "these are the levels",
        "lambda p, a, t, s: (t[torch.stack([p & 15, p >> 4], 1).flatten().long()]"
        "[: s[0] * s[1]] * a.repeat_interleave(64)[: s[0] * s[1]]).reshape(s)": "are swapped",
        "lambda p, a, t, s: (t[torch.stack([p >> 4, p & 15], 1).flatten().long()]"
        "[: s[0] * s[1]] * a[0]).reshape(s)": "Has each block its own absmax?",
        "lambda p, a, t, s: (t[torch.cat([p >> 4, p & 15]).long()][: s[0] * s[1]] "
        "* a.repeat_interleave(64)[: s[0] * s[1]]).reshape(s)": "should take turns",
    },
    "scales of scales": {
        "lambda a, v: (*in_blocks(a, v, 256), 0.0)": "the mean is that of all absmax",
        "lambda a, v: (*in_blocks(a, v, 256), a.mean())": "Is the mean taken off",
        "lambda a, v: (*in_blocks(a - a.mean(), v, 64), a.mean())": "for blocks of 64",
        "lambda a, v: (*in_blocks(a - a.mean(), v, len(a)), a.mean())": "one scale for all",
        "lambda a, v: in_blocks(a - a.mean(), v, 256)": "codes and largest and mean",
    },
    "a 4-bit layer": {
        "lambda x, w, d: x.to(d) @ vk.formats.dequantize(w).to(d).T": "give it the dtype of x",
        "lambda x, w, d: (x.float() @ vk.formats.dequantize(w).T).to(x.dtype)": "Cast both",
        "lambda x, w, d: x @ vk.formats.dequantize(w).to(x.dtype).T": "not computed in compute",
        "lambda x, w, d: (vk.formats.dequantize(w).to(d) @ x.to(d).T).to(x.dtype)": "the shape is",
        "lambda x, w, d: x @ vk.formats.dequantize(w)": "your function stops with RuntimeError",
    },
    "8-bit rows": {
        "lambda x, w: x @ w.T": "nothing was rounded",
        "lambda x, w: x @ in_steps(w).T": "the inputs were not rounded",
        "lambda x, w: in_steps(x) @ w.T": "the weights were not rounded",
        "lambda x, w: in_steps(x, None) @ in_steps(w).T": "one scale for all tokens",
        "lambda x, w: in_steps(x) @ in_steps(w, None).T": "the weights have one scale",
        "lambda x, w: in_steps(x, 0) @ in_steps(w, 0).T": "belong to columns",
        "lambda x, w: (127 * x / x.abs().amax(1, True)).round() @ w.T": "0/0",
        "lambda x, w: 127 * (in_steps(x) @ in_steps(w).T)": "multiplied by both scales",
        "lambda x, w: in_steps(w) @ in_steps(x).T": "the shape is",
        "lambda x, w: in_steps(x, most=128) @ in_steps(w, most=128).T": "goes to 128",
        "lambda x, w: in_steps(x, size=lambda x: x) @ in_steps(w, size=lambda x: x).T": ".abs()",
        "lambda x, w: in_steps(x, whole=torch.trunc) @ in_steps(w, whole=torch.trunc).T": "cut off",
    },
    "outlier columns": {
        "lambda x, w, t: x @ w.T": "nothing was rounded",
        "lambda x, w, t: in_steps(x) @ in_steps(w).T": "still comes from its outlier",
        "lambda x, w, t: in_steps(x * ~(x.abs() >= t).any(0)) @ in_steps(w).T": "never added back",
        "lambda x, w, t: apart(x, w, (x >= t).any(0))": "only positive outliers",
        "lambda x, w, t: apart(x, w, (x.abs() >= 6).any(0))": "the threshold is 3.5 here",
        "lambda x, w, t: in_steps(x) @ in_steps(w).T + (x * (x.abs() >= t).any(0)) @ w.T": "twice",
        "lambda x, w, t: in_steps(x * (x.abs() < t)) @ in_steps(w).T + "
        "(x * (x.abs() >= t)) @ w.T": "takes whole columns",
        "lambda x, w, t: apart(x, w, (x.abs() >= t).all(0))": "comes from its outlier",
        "lambda x, w, t: apart(x, w, x.abs().amax(0) >= 2)": "reaches the threshold",
        "lambda x, w, t: apart(x, w, (x.abs() >= t).any(1))": "your function stops with",
    },
    "skip list": {
        "['lm_head']": "the vision_encoder would be in 4 bits",
        "['vision_model', 'connector', 'lm_head']": "protected by vision_model, connector",
        "['model.vision_model', 'lm_head']": "the projector would be in 4 bits",
        "['model.vision_model', 'model.connector']": "the head would be in 4 bits",
        "['model', 'lm_head']": "210 layers of the language model in 16 bits",
        "'lm_head'": "a list of names",
    },
    "better than NF4": {
        "levels": "NF4's own values",
        "torch.linspace(-1, 1, 16)": "Even steps put too few values",
        "levels.flip(0)": "go up",
        "levels[1:]": "the shape is (15,)",
        "levels * 0.5": "times NF4's error",
        "levels * float('nan')": "not finite numbers",
    },
    "bytes of NF4": {
        "lambda n: n // 2 + 4 * (n // 64)": "the 16 values",
        "lambda n: n // 2 + 64": "the scales are missing",
        "lambda n: n // 2 + n // 64 + 64": "a scale in fp32",
        "lambda n: n + 4 * -(-n // 64) + 64": "two codes share",
        "lambda n: n // 2 + 4 * (n // 64) + 64": "round up",
        "lambda n: 8 * (n // 2 + 4 * -(-n // 64) + 64)": "these are bits",
        "lambda n: n / 2 + 99": "it should be 100",
        "72": "should be a function",
    },
    "a KV cache": {
        "lambda layers, heads, size, n: 2 * layers * heads * size * n": "two vectors",
        "lambda layers, heads, size, n: layers * heads * size * n": "numbers, not bytes",
        "lambda layers, heads, size, n: 32 * layers * heads * size * n": "bits",
        "lambda layers, heads, size, n: 8 * layers * heads * size * n": "not 4",
        "lambda layers, heads, size, n: 4 * layers * heads * size": "one token",
        "lambda layers, heads, size, n: 4 * n * heads * size": "one layer",
        "lambda layers, heads, size, n: 4 * layers * heads * size * n / 1e6": "return bytes",
        "lambda layers, heads, size, n: 4 * layers * size * n": "one head",
        "lambda layers, heads, size, n: 4 * layers * heads * n": "bytes are kept",
        "302e6": "should be a function",
    },
    "the promised GB": {
        "vk.Plan.parse('nf4-dq')": "head take 2.10 of it. All Linear",
        "vk.Plan.parse('nf4')": "fewer bits of scales",
        "'nf4-dq'": "a vk.Plan",
    },
    "largest rank": {
        "117": "a higher one fits as well",
        "119": "needs 12.01 GB",
        "297": "the weights themselves",
        "475": "a gradient and two moments",
        "118.8": "a whole number",
    },
    "with a zero point": {
        "lambda w, bits, group: w": "different values",
        "lambda w, b, g: vk.formats.rounding(f'int{b}-g{g}').rounded(w)": "one code stays unused",
        "lambda w, b, g: vk.formats.rounding(f'int{b}-g128-asym').rounded(w)": "not each group",
        "lambda w, b, g: w[:, :8]": "the shape is (8, 8)",
        "lambda w, b, g: w * 0": "n − 1 gaps",
        "lambda w, b, g: w / 0": "not finite",
        "lambda w, b, g: (w, None)[1]": "is the `return` missing?",
        "lambda w: w": "your function stops with TypeError",
    },
    "paired test": {
        "lambda b, a: binomtest(int((b & ~a).sum()), len(b)).pvalue": "all 100 questions",
        "lambda b, a: 0.5 ** 5": "this is one-sided",
        "lambda b, a: 0.04": "chi-squared",
        "lambda b, a: binomtest(int((b & ~a).sum()), int((b != a).sum())).pvalue": "your function",
        "lambda b, a: 'nothing'": "the answer should be a p",
    },
    "fewer bits": {
        "'int4'": "4.50 bits, and the limit is 3.50",
        "'int2-asym'": "2 bits leave four values at most",
        "'int3-g128'": "A zero point would use all codes",
        "'int8-act-token'": "rounds activations",
        "'int3g32'": "is not a format",
    },
    "how many questions": {
        "0.1 * (1.96 / 0.0025) ** 2": "is each side, not both",
        "0.1 * (1.96 / 0.01) ** 2": "this gives ± 1.0 points",
        "0.1 / 0.005**2": "one standard error",
        "0.1 * 0.9 * (1.96 / 0.005) ** 2": "the variance of a share",
        "0.1 * (1.96 / 0.5) ** 2": "half a point is 0.005",
        "1000": "this gives ± 1.96 points",
    },
    "plan by hand": {
        "{'vision_encoder:0': 'int4'}": "bytes too many. Some layers have to give bits up",
        "{'vision_encoder:0': 'int2-asym', 'projector': 'int4'}": "Does vision_encoder:0 do well",
        "{'vision_encoder:7': 'int4'}": "no layer here is vision_encoder:7",
        "{'projector': 'int1'}": "no format here is int1",
        "['int4']": "a dict",
    },
    "the best of both": {
        "{}": "times the least",
        "best('kl_text')": "the plan for text alone",
        "best('kl_digits')": "the plan for digits alone",
        "dict.fromkeys(layers['scope'], 'int8')": "bytes too many",
        "{'language_model:99': 'int8'}": "no layer here is language_model:99",
        "{'projector': 'int4'}": "no format here is int4",
    },
    "make up for it": {
        "second": "this is the old weight",
        "second.T": "this is transposed",
        "second + 0.1": "the old weight loses",
        "second[:3]": "the shape should be (64, 128)",
        "second * float('nan')": "not finite",
    },
    "tokens of a picture": {
        "lambda w, h: (w // 28) * (h // 28)": "not down",
        "lambda w, h: -(-w // 28) * -(-h // 28)": "not up",
        "lambda w, h: round(w * h / 784)": "not the area",
        "lambda w, h: 4 * round(w / 28) * round(h / 28)": "Four patches",
        "lambda w, h: 576": "multiples of 28",
        "2772": "a function",
    },
    "what fits": {
        "1148": "A side is rounded to whole tokens",
        "1743": "MB, and the budget is 100",
        "1162": "101.2 MB",
    },
    "mirrored films": {
        "lambda rows: rows": "the pictures are as before",
        "lambda rows: flipped(rows, mirror)": "answers should be, but are not",
        "lambda rows: flipped(rows, np.s_[:, ::-1])": "top to bottom",
        "lambda rows: vk.course.controls.arranged(rows, [3, 2, 1, 0])": "a film backwards",
        "lambda rows: rows[:3]": "and 3 come out",
        "lambda rows: rows[0]['pictures']": "your function stops with KeyError",
        "lambda rows: [r | {'answer': 'up'} for r in flipped(rows, mirror)]": "became up",
    },
    "two frames": {
        "[0, 3]": "has 2 pictures, and the model learned films of four",
        "[3, 3, 0, 0]": "runs backwards",
        "[0, 1, 2]": "these are 3",
        "[0, 0, 1, 1]": "farther apart",
        "[0, 4]": "the frames 0 to 3",
    },
    "only the projector": {
        "lambda model: (model, None)[1]": "would learn as well",
        "lambda model: model.requires_grad_(False)": "the projector would not learn",
        "lambda model: model.requires_grad_(True)": "language_model",
        "'projector'": "a function",
    },
    "who is passed": {
        "dict.fromkeys(first_stages, ['projector'])": "language_model is frozen, but lies between",
        "dict.fromkeys(first_stages, vk.COMPONENTS[:2] + vk.COMPONENTS[3:4])": "ends before vision",
        "dict.fromkeys(first_stages, ['projector', 'language_model'])": "Qwen-VL: vision_encoder",
        "dict.fromkeys(first_stages, ['bridge'])": "no component here is bridge",
        "{'projector', 'language_model'}": "a dict",
        "{'LLaVA': {'projector', 'language_model'}}": "keys should be 'LLaVA' and 'Qwen-VL'",
    },
    "steps to a share": {
        "[22_700, 23_200]": "counted from 0",
        "[227, 232]": "a line stands for 100 steps",
        "[1_500, 2_000]": "steps of a stage",
        "[23_300, 22_800]": "the other run",
        "np.array([22_800, 23_200])": "run 2 has 89% right",
        "[100, 23_300]": "run 1 was not asked yet",
        "12_800": "a list of numbers",
    },
    "rate": {
        "lambda step, stage: stage.learning_rate": "the full rate already",
        "lambda step, stage: train.learning_rate_at(step - 1, stage)": "count it as one",
        "lambda step, stage: stage.learning_rate * min(1, (step + 1) / 100)": "does not come down",
        "lambda n, s: train.learning_rate_at(n, dataclasses.replace(s, final=0))": "down to 0",
        "falling": "along a line",
        "lambda step, stage: 2 * train.learning_rate_at(step, stage)": "at step 0, where",
        "lambda step: 0.1": "your function stops with TypeError",
    },
    "equal cost": {
        "8": "at equal ranks",
        "3": "upside down",
        "20": "1.05 times as many",
        "19.5": "a whole number",
    },
    "merge an adapter": {
        "lambda W, A, B, r, alpha: W + B @ A": "the scale is missing",
        "lambda W, A, B, r, alpha: W + r / alpha * B @ A": "upside down",
        "lambda W, A, B, r, alpha: W + alpha * B @ A": "do not divide by r",
        "lambda W, A, B, r, alpha: alpha / r * B @ A": "Add it to W",
        "lambda W, A, B, r, alpha: W + alpha / r * A @ B": "your function stops with",
        "lambda W, A, B, r, alpha: W.add_(alpha / r * B @ A)": "changes W itself",
        "lambda W, A, B, r, alpha: (W + alpha / r * B @ A).T": "has the shape (5, 4)",
        "lambda W, A, B, r, alpha: W - alpha / r * B @ A": "the shape is right",
        "lambda W, A, B, r, alpha: 3": "the shape ()",
    },
    "mix old into new": {
        "lambda new, old, share: new + old[:20]": "on one side",
        "lambda new, old, share: old[:20] + new": "on one side",
        "lambda new, old, share: old[:7] + new + old[7:15]": "a quarter of the *result*",
        "lambda new, old, share: new[:45] + old[:15]": "15 of the 60 new rows are missing",
        "lambda new, old, share: (new + old[:20])[::2] + new + old[:20]": "there twice",
        "lambda new, old, share: new + [0]": "no row of new or old",
        "lambda new, old, share: 3": "a list of rows",
    },
    "learnable word": {
        "'rood'": "tokens are r, o, o, d, and pebble has never said r, o, d",
        "'RING'": "capital letters",
        "'red'": "has 3 letters",
        "['ring']": "a str; this is a list",
    },
    "a cache with windows": {
        "lambda n, windows: (sum(min(n, w or n) for w in windows), 0)": "the whole prompt is still",
        "lambda n, windows: (n * len(windows), (n + 1) * len(windows))": "no more tokens than the",
        "lambda n, windows: (n * len(windows), sum(min(n, w or n) for w in windows))": "new token",
        "lambda n, windows: n * len(windows)": "two numbers",
        "1024": "a function",
    },
    "a wasted mebibyte": {
        "2**20": "segments are small ones",
        "10 * 2**20 + 1": "becomes a block of its own",
        "20 * 2**20": "less than 1 MiB to spare",
        "19.5 * 2**20 + 0.5": "a whole number",
    },
    "twelve gigabytes": {
        "vk.Plan.recommended()": "scales take half a GB",
        "vk.Plan(language_model='nf4-dq')": "cross-attention is in bf16",
        "vk.Plan(language_model='nf4-dq', cross_attention='nf4-dq')": "the head takes 1.05 GB",
        "vk.Plan.parse('nf4-dq')": "the vision encoder should stay in bf16",
        "'nf4-dq'": "a vk.Plan",
    },
    "how far it moved": {
        "lambda s, r: (s - r).norm(dim=-1)": "Divide them",
        "lambda s, r: (s - r).norm() / r.norm()": "the shape is ()",
        "lambda s, r: (s - r).norm(dim=-1) / s.norm(dim=-1)": "the new vector's length",
        "lambda s, r: (s - r).norm(dim=-1) / r.norm()": "everything together",
        "lambda s, r: (s.norm(dim=-1) / r.norm(dim=-1) - 1).abs()": "compares lengths",
        "lambda s, r: (s - r).abs().mean(dim=-1)": "other numbers",
        "lambda s, r: (s, None)[1]": "is the `return` missing?",
    },
    "is it named": {
        "lambda answer, thing, things: thing in answer.lower()": "compare whole words",
        "lambda answer, thing, things: thing in answer": "upper case",
        "lambda answer, thing, things: thing in answer.lower().split()": "the plain sentence",
        "lambda answer, thing, things: thing in re.findall('[a-z]+', answer.lower())": "two things",
        "lambda answer, thing, things: True": "another thing",
        "lambda answer, thing, things: (thing, None)[1]": "should return True or False",
        "lambda answer: True": "your function stops with TypeError",
    },
    "who can share": {
        "lambda means, points: shared(means, points, any)": "one direction is not enough",
        "lambda means, points: shared(means.T[means.index], points)": "the same column",
        "lambda means, points: shared(means.set_axis(means.index, axis=1), points)": "by their",
        "lambda means, points: {(a, a) for a in means}": "two different formats",
        "lambda means, points: {('nf4', 'nf4-dq')}": "no format here is nf4",
        "lambda means, points: set(means)": "a set whose elements are pairs",
        "lambda means, points: set()": "you found none",
        "lambda means, points: 2": "a set of pairs",
        "lambda means, points: (means, None)[1]": "is the `return` missing?",
        "lambda means: set()": "your function stops with TypeError",
        "{('bf16', 'int8')}": "should be a function",
    },
    "train where it is used": {
        'load("cobble-int3", "nf4")[0]': "reads 0 of 50",
        'load("cobble", "nf4")[0]': "trained in nf4; begin with cobble-int3",
        'load("cobble-int3", "bf16")[0]': "its language model is in bf16",
    },
}
