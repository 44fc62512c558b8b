"""pebble at the end of an early stage of its training: `after("projector")`.

The vision encoder was frozen after its own stage, and the language model while the projector
learned. So two files without the vision encoder are enough for four stages:
states/projector.safetensors (bf16, 5.9 MB) for vision, language and projector, and
states/instruct.safetensors for instruct. The vision encoder comes from the checkpoint.
"""

from pathlib import Path

from vlmkit.errors import VlmkitError, did_you_mean
from vlmkit.models import pebble
from vlmkit.models.pebble import recipe

VISION, LANGUAGE = ("vision_tower",), ("language_model", "lm_head")
ALL = (*VISION, *LANGUAGE, "multi_modal_projector")
TRAINED = {
    "nothing": (),
    "vision": VISION,
    "language": VISION + LANGUAGE,
    "projector": ALL,
    "instruct": ALL,
}
"""The parts that are trained at the end of a stage. "nothing" is before the first stage."""


def after(stage, seed=0):
    """pebble at the end of `stage`, one of TRAINED, in float32 on the CPU.

    seed: of the weights that are not trained yet. Those of seed 0 are the ones with which the run
        of training_log.csv began.

    Raises VlmkitError for a stage whose state is not in the package.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from vlmkit import loading
    from vlmkit.plan import Plan

    if stage not in TRAINED:
        raise VlmkitError(
            f"{stage!r} is not a stage whose end is in the package. {did_you_mean(stage, TRAINED)}"
            f"The stages are {', '.join(TRAINED)}. `vk.load('pebble')` is the end of the last one."
        )
    config = AutoConfig.from_pretrained(pebble.path())
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32  # in bf16, the same seed would draw other weights
    model = recipe.build_model(config, seed)
    parts = TRAINED[stage]
    if not parts:
        return model.eval()
    finished, _ = loading.load("pebble", Plan.uniform("fp32"), processor=False, device="cpu")
    file = "instruct" if stage == "instruct" else "projector"
    weights = finished.state_dict()  # all but the vision encoder is replaced in the next line
    weights |= load_file(Path(__file__).parent / "states" / f"{file}.safetensors")
    trained = {n: w for n, w in weights.items() if any(part in n.split(".") for part in parts)}
    model.load_state_dict(model.state_dict() | trained)
    return model.eval()
