"""Another connector in the place of pebble's projector: put in, trained, scored.

    model, processor = vk.load("pebble", vk.Plan.uniform("fp32"))
    match_size(connector, model)
    connected, its_processor = connect(model, processor, connector, visual_tokens=16)
    curve = fit(connected, processor.tokenizer, FIRST_STAGE, visual_tokens=16)
    score(connected, processor.tokenizer, rows, visual_tokens=16)

A connector is any module that makes (pictures, visual tokens, language width) of the vision
encoder's features, (pictures, patches, vision width).
"""

import copy
import math
import time

import torch

from vlmkit import tasks
from vlmkit.errors import VlmkitError
from vlmkit.models.pebble import batches, train
from vlmkit.models.pebble.batches import Group

TASKS = ("caption", "vqa", "ocr", "chart")
"""Those that ask about one picture."""

GROUPS = (
    Group("scenes", ("vqa", "caption"), 16, 6),
    Group("signs", ("ocr",), 20, 1),
    Group("charts", ("chart",), 16, 5),
)
"""Half as large as pebble's own: while only a connector learns, more steps are worth more than
larger ones."""

FIRST_STAGE = train.Stage("connector", 500, 2e-3, ("multi_modal_projector",), GROUPS)
"""LLaVA's stage 1 (Liu et al., 2023, arXiv 2304.08485, section 4.2): both ends are frozen."""

SECOND_STAGE = train.Stage("connector and language", 1000, 1e-3, train.LANGUAGE_SIDE, GROUPS)
"""LLaVA's stage 2: the language model learns too."""


def connect(model, processor, connector, visual_tokens):
    """Copies of pebble and its processor that have `connector` and as many `visual_tokens` for each
    picture. Both stay what they were, and answer through `vk.ask`, `generate` and so on; saved, the
    model would be read with the projector of its class.

    visual_tokens: a square number, since the processor counts an image's tokens by rows and
    columns. Raises VlmkitError where it is none, or not what the connector makes of a picture.
    """
    vision = model.config.vision_config
    pixels = vision.image_size
    sides = [side for side in range(1, 11) if pixels // (pixels // side) == side]
    if visual_tokens not in [side**2 for side in sides]:
        raise VlmkitError(
            f"{visual_tokens} visual tokens a picture are not possible: LlavaProcessor counts rows "
            f"times columns. Possible are {', '.join(str(side**2) for side in sides)}."
        )
    side = math.isqrt(visual_tokens)
    features = torch.zeros(1, batches.PATCHES, vision.hidden_size)
    with torch.no_grad():
        made, needed = connector(features).shape, model.config.text_config.hidden_size
    if made != (1, visual_tokens, needed):
        raise VlmkitError(
            f"Of the features of one picture, {tuple(features.shape)}, this connector makes "
            f"{tuple(made)}; needed is {(1, visual_tokens, needed)}."
        )
    model, processor = copy.deepcopy(model), copy.deepcopy(processor)
    # At this size the backward pass of eager attention is much faster on a CPU than the fused.
    model.set_attn_implementation("eager")
    model.model.multi_modal_projector = connector
    model.config.image_seq_length = visual_tokens
    processor.patch_size = pixels // side  # read for nothing else than that count
    return model, processor


def match_size(connector, model, pictures=32):
    """Scale the connector's last Linear layer so that its visual tokens are as large, in root mean
    square, as those of the `model`'s own projector. Which layer is last is told by the order of
    definition.

    The norms in front of the language model's layers pass over size, but its residual stream does
    not: tokens twenty times too small are lost in what the first layers add to them.
    """
    frames = [
        tasks.RECIPES[task].draw(tasks.generator("train", "size", task, index)).frames[0]
        for task in TASKS
        for index in range(pictures // len(TASKS))
    ]
    last = [module for module in connector.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        seen = model.model.vision_tower(
            batches.pixel_values(frames).to(model.device, model.dtype), output_hidden_states=True
        )
        features = seen.hidden_states[model.config.vision_feature_layer]
        own, its = (
            m(features).square().mean() for m in (model.model.multi_modal_projector, connector)
        )
        for parameter in last.parameters():
            parameter *= (own / its).sqrt()


def fit(model, tokenizer, stage, visual_tokens, device="cpu"):
    """Train what `stage` names; all else is frozen. Returns a DataFrame with a row per step: the
    seconds since the start, the loss, and the share of right answers about pictures that no step
    before has seen. The pictures and questions are the same for any connector, in the same order.
    """
    import pandas as pd

    parameters = train.trainable(model, stage)
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=train.BETAS, weight_decay=0.0)
    started, curve = time.perf_counter(), []
    for step in range(stage.steps):
        group = stage.groups[step % len(stage.groups)]
        batch = batches.question_batch(
            group, tokenizer, stage.name, step, visual_tokens=visual_tokens
        )
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss, right = train.answered(model, batch, device)
        for settings in optimizer.param_groups:
            settings["lr"] = train.rate_at(step, stage)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.CLIP)
        optimizer.step()
        seconds = time.perf_counter() - started
        curve.append((seconds, loss.item(), right.float().mean().item()))
    return pd.DataFrame(curve, columns=["seconds", "loss", "right"])


def score(model, tokenizer, rows, visual_tokens, device="cpu", batch_size=100):
    """Scores of a dataset's rows, the same as those of `vk.evaluate` and many times faster: an
    answer is given at once instead of token by token (see `train.answered`).

    What a model would have said instead of the right answer is not known: its `predicted` is None.
    """
    import pandas as pd

    from vlmkit.evaluation import Scores

    right = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = batches.row_batch(
                rows[start : start + batch_size], tokenizer, visual_tokens=visual_tokens
            )
            right += train.answered(model, batch, device)[1].tolist()
    columns = ("question", "answer", "task", "kind")
    answers = pd.DataFrame([{name: row[name] for name in columns} for row in rows])
    answers["predicted"] = answers["answer"].where(pd.Series(right))
    answers["correct"] = right
    return Scores(answers)
