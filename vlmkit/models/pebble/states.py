"""pebble as it was at the end of an early stage of its training: `after("projector")`.

The vision encoder was frozen from the end of its own stage on, and the language model while the
projector learned. So two files of what is not the vision encoder hold the ends of four stages:
states/projector.safetensors (bf16, 5.9 MB) those of vision, language and projector, and
states/instruct.safetensors that of instruct; the vision encoder is the checkpoint's.
"""

from pathlib import Path

from vlmkit.errors import VlmkitError
from vlmkit.models import pebble
from vlmkit.models.pebble import recipe

EYES, BRIDGE, TONGUE = ("vision_tower",), ("multi_modal_projector",), ("language_model", "lm_head")
LEARNT = {
    "nothing": (),
    "vision": EYES,
    "language": EYES + TONGUE,
    "projector": EYES + TONGUE + BRIDGE,
    "instruct": EYES + TONGUE + BRIDGE,
}
"""What had learnt something by the end of a stage; "nothing" is before the first."""


def after(stage, seed=0):
    """pebble at the end of `stage`, one of LEARNT, in float32 on the CPU.

    seed: of the weights of what had learnt nothing by then. With 0 they are those that the run of
    training_log.csv began with. Raises VlmkitError for a stage whose state is not shipped.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    from vlmkit import loading
    from vlmkit.plan import Plan

    if stage not in LEARNT:
        raise VlmkitError(
            f"No state of pebble at the end of {stage!r} is shipped. There are: "
            f"{', '.join(LEARNT)}. `vk.load('pebble')` is the end of the last stage."
        )
    config = AutoConfig.from_pretrained(pebble.path())
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32  # drawn in bf16, fresh weights would be others
    model = recipe.build_model(config, seed)
    if not LEARNT[stage]:
        return model.eval()
    finished, _ = loading.load("pebble", Plan.uniform("fp32"), processor=False, device="cpu")
    file = "instruct" if stage == "instruct" else "projector"
    learnt = load_file(Path(__file__).parent / "states" / f"{file}.safetensors")
    learnt |= {name: value for name, value in finished.state_dict().items() if EYES[0] in name}
    parts = LEARNT[stage]
    learnt = {n: v for n, v in learnt.items() if any(part in n.split(".") for part in parts)}
    model.load_state_dict(model.state_dict() | learnt)  # float32 keeps what bf16 says
    return model.eval()
