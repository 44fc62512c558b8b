"""Another connector in place of pebble's projector: inserted, trained, scored.

    model, processor = vk.load("pebble", vk.Plan.uniform("fp32"))
    match_size(connector, model)
    connected, its_processor = connect(model, processor, connector, visual_tokens=16)
    curve = fit(connected, processor.tokenizer, FIRST_STAGE, visual_tokens=16)
    score(connected, processor.tokenizer, rows, visual_tokens=16)

A connector is any module that maps the vision encoder's features, (pictures, patches, vision
width), to (pictures, visual tokens, language width).
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
"""The tasks that ask about one picture."""

GROUPS = (
    Group("scenes", ("vqa", "caption"), 16, 6),
    Group("signs", ("ocr",), 20, 1),
    Group("charts", ("chart",), 16, 5),
)
"""Half as large as in pebble's own training: while only a connector learns, more steps help more
than larger batches."""

FIRST_STAGE = train.Stage("connector", 500, 2e-3, ("multi_modal_projector",), GROUPS)
"""LLaVA's stage 1 (Liu et al., 2023, arXiv 2304.08485, section 4.2): only the connector learns."""

SECOND_STAGE = train.Stage("connector and language", 1000, 1e-3, train.LANGUAGE_SIDE, GROUPS)
"""LLaVA's stage 2: the language model learns too."""


def connect(model, processor, connector, visual_tokens):
    """Copies of pebble and its processor, with `connector` and this number of `visual_tokens` for
    each picture.

    The copies answer through `vk.ask`, `generate` and so on; the given model and processor do not
    change. A saved copy cannot be read again: its class would build its own projector.

    visual_tokens: a square number, because the processor counts an image's tokens by rows and
        columns. Raises VlmkitError if it is not, or if the connector gives another number.
    """
    vision = model.config.vision_config
    pixels = vision.image_size
    sides = [side for side in range(1, 11) if pixels // (pixels // side) == side]
    if visual_tokens not in [side**2 for side in sides]:
        raise VlmkitError(
            f"{visual_tokens} visual tokens a picture are not possible: LlavaProcessor counts rows "
            f"times columns. Possible are {', '.join(str(side**2) for side in sides)}."
        )
    features = torch.zeros(1, batches.PATCHES, vision.hidden_size)
    wanted = (1, visual_tokens, model.config.text_config.hidden_size)
    with torch.no_grad():
        found = tuple(connector(features).shape)
    if found != wanted:
        raise VlmkitError(
            f"The connector turns the features of a picture, {tuple(features.shape)}, into "
            f"{found}; it should return {wanted}."
        )
    model, processor = copy.deepcopy(model), copy.deepcopy(processor)
    # At this size, eager attention has a much faster backward pass on a CPU than the fused one.
    model.set_attn_implementation("eager")
    model.model.multi_modal_projector = connector
    model.config.image_seq_length = visual_tokens
    # The processor uses the patch size for nothing but the number of tokens.
    processor.patch_size = pixels // math.isqrt(visual_tokens)
    return model, processor


def match_size(connector, model, pictures=32):
    """Scale the connector's last Linear layer (the last to be defined), so that its visual tokens
    have the same root mean square as those of the `model`'s own projector.

    The norms of the language model's layers remove the size, but the residual stream keeps it:
    tokens twenty times too small are lost in what the first layers add to them.
    """
    frames = [
        tasks.RECIPES[task].draw(tasks.generator("train", "size", task, index)).frames[0]
        for task in TASKS
        for index in range(pictures // len(TASKS))
    ]
    last = [module for module in connector.modules() if isinstance(module, torch.nn.Linear)][-1]
    pixels = batches.pixel_values(frames).to(model.device, model.dtype)
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_hidden_states=True)
        features = seen.hidden_states[model.config.vision_feature_layer]
        both = (model.model.multi_modal_projector, connector)
        own, new = (each(features).square().mean() for each in both)
        for parameter in last.parameters():
            parameter *= (own / new).sqrt()


def fit(model, tokenizer, stage, visual_tokens, device="cpu"):
    """Train what `stage` names, and freeze the rest. Returns a DataFrame with a row per step: the
    seconds since the start, the loss, and the share of right answers, all about new pictures. The
    pictures and questions, and their order, are the same for any connector.
    """
    import pandas as pd

    optimizer = torch.optim.AdamW(
        train.trainable(model, stage), stage.learning_rate, betas=train.BETAS, weight_decay=0.0
    )
    started, curve = time.perf_counter(), []
    for step in range(stage.max_steps):
        group = stage.groups[step % len(stage.groups)]
        batch = batches.question_batch(
            group, tokenizer, stage.name, step, visual_tokens=visual_tokens
        )
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss, right = train.answered(model, batch, device)
        train.update(optimizer, loss, step, stage)
        seconds = time.perf_counter() - started
        curve.append((seconds, loss.item(), right.float().mean().item()))
    return pd.DataFrame(curve, columns=["seconds", "loss", "right"])


def score(model, tokenizer, rows, visual_tokens, device="cpu", batch_size=100):
    """Scores of a dataset's rows: the same as those of `vk.evaluate`, and many times faster,
    because one pass checks all tokens of an answer (see `train.answered`).

    This does not show what the model would say instead of the right answer: there, `predicted` is
    None.
    """
    import pandas as pd

    from vlmkit.evaluation import Scores

    right = []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = batches.row_batch(some, tokenizer, visual_tokens=visual_tokens)
            right += train.answered(model, batch, device)[1].tolist()
    columns = ("question", "answer", "task", "kind")
    answers = pd.DataFrame([{name: row[name] for name in columns} for row in rows])
    answers["predicted"] = answers["answer"].where(pd.Series(right))
    answers["correct"] = right
    return Scores(answers)
