"""Typical mistakes in the exercises, for `test_exercises.py`.

MISTAKES: for each exercise its wrong answers, as expressions that can use what the stub can use and
HELPERS, with words that the hint must contain.
"""

import numpy as np
import torch
from PIL import Image


class Pooled(torch.nn.Module):
    """A Linear layer on `pool` of the features."""

    def __init__(self, pool, width=128):
        super().__init__()
        self.pool, self.proj = pool, torch.nn.Linear(width, 192)

    def forward(self, features):
        return self.proj(self.pool(features))


def falling(step, stage):
    """A learning rate that comes down along a line."""
    share = max(0, step - 100) / (stage.max_steps - 100)
    return stage.learning_rate * min(1, (step + 1) / 100) * (1 - share * (1 - stage.final))


def flipped(rows, where):
    """Rows with their pictures, as (frames, height, width, 3), indexed by `where`."""
    turned = (np.stack([np.asarray(image) for image in row["images"]])[where] for row in rows)
    return [r | {"images": [*map(Image.fromarray, t)]} for r, t in zip(rows, turned, strict=True)]


HELPERS = {"Pooled": Pooled, "falling": falling, "flipped": flipped, "np": np}
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
    "left over": {
        'vk.anatomy(models[llama])["language_model"].parameters': "nothing is left out",
        "8030": "in millions",
        "6_285_398_016": "the dot behind the number",
        "8_925_322_771": "has the vision encoder and the projector in it",
        "1_409_351_680": "what these layers hold",
        "8.03": "a whole number",
    },
    "how little is enough": {
        "49": "the whole picture",
        "5": "it says purple",
        "20": "with fewer of them as well",
        "50": "has 49 patches",
    },
    "mean of a block": {
        "Pooled(blocks, 512)": "a pixel shuffle",
        "torch.nn.Linear(128, 192)": "(1, 49, 192); it should be (1, 16, 192)",
        "lambda x: blocks(x).unflatten(2, (4, 128)).mean(dim=2)": "the tokens are 128 wide",
        "lambda x: blocks(x) @ x": "your function stops with RuntimeError",
        "Pooled": "this is the class Pooled",
        "Pooled(lambda x: blocks(x).unflatten(2, (128, 4)).mean(dim=-1))": "neighboring channels",
        "Pooled(lambda x: blocks(x)[..., :128])": "not the mean of its four patches",
        "Pooled(lambda x: x[:, [24] * 9])": "the last column and row are lost",
    },
    "first to learn": {
        "{'cross_attn_attn_gate'}": "1 of 2 are missing",
        "{n for n, _ in layer.named_parameters()}": "is behind a gate",
        "{'attn_gate'}": "no parameter here is attn_gate",
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
        "lambda model: None": "would learn as well",
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
        "[19_700, 11_600]": "counted from 0",
        "[197, 116]": "a line stands for 100 steps",
        "[5_000, 1_700]": "steps of a stage",
        "[11_700, 19_800]": "the other run",
        "[19_800, 12_000]": "run 2 has",
        "19_800": "a list of numbers",
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
    "cells left out": {
        '{"bf16": 88, "nf4": 68}': "the other way round",
        '{"bf16": 88, "nf4": 88}': "88 for bf16 is too high",
        '{"bf16": 68, "nf4": 50}': "50 for nf4 is too low",
        '{"bf16": 0.68, "nf4": 0.88}': "these are shares",
        '{"bf16": 68}': "a prediction for nf4 is missing",
        '{"bf16": 68, "int8": 88}': "no format of a training here is int8",
        '{"bf16": 68, "nf4": 880}': "from 0 to 100",
    },
    "train where it is used": {
        'load("cobble-int3", "nf4")[0]': "reads 0 of 50",
        'load("cobble", "nf4")[0]': "trained in nf4; begin with cobble-int3",
        'load("cobble-int3", "bf16")[0]': "its language model is in bf16",
    },
}
