"""Processors: they turn pictures and text into a model's tensors."""

from vlmkit.errors import CheckpointError, PlanError, SizeError, brief, did_you_mean
from vlmkit.families import LIMITS, family_of, newer_names, with_limits

ANY_OF = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
REMEDY = "Copy or download it, or load the model alone: processor=False."


def load_processor(folder, trust_remote_code=False):
    """The AutoProcessor of the checkpoint in `folder`.

    Raises CheckpointError if one of its files is missing or damaged, or if it needs a package, such
    as torchvision, that is not installed.
    """
    from transformers import AutoProcessor
    from transformers.processing_utils import ProcessorMixin

    for what, files in (("a processor config", ANY_OF), ("a tokenizer", TOKENIZERS)):
        if not any((folder / file).exists() for file in files):
            raise CheckpointError(
                f"{folder} lacks {what}: none of {', '.join(files)} is there. The model needs it "
                f"for pictures and questions. {REMEDY}"
            )
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise CheckpointError(
                f"{folder}: the processor needs a package that is not installed: {brief(error)}"
            ) from error
        raise CheckpointError(
            f"{folder}: this model's processor needs torchvision, which is not installed or does "
            "not match this torch. Install the build for this torch: python -m pip install "
            "torchvision. In the course's folder, python -m pip install -c constraints.txt -e "
            '".[hub]" does it too.'
        ) from error
    except Exception as error:  # for a missing file it can be a TypeError
        raise CheckpointError(
            f"{folder}: the processor cannot be loaded, because one of its files is missing or "
            f"damaged ({brief(error)}). {REMEDY}"
        ) from error
    if not isinstance(processor, ProcessorMixin):  # a tokenizer alone
        raise CheckpointError(
            f"{folder}: transformers finds only a {type(processor).__name__} there, which reads no "
            f"images. processor_config.json is missing or incomplete. {REMEDY}"
        )
    return processor


def check_limits(limits, processor):
    """Raise PlanError for names that are neither limits of a family nor arguments of `vk.load`,
    and SizeError for limits without a processor."""
    from vlmkit.loading import load

    known = (*load.__wrapped__.__kwdefaults__, *LIMITS)
    for name in limits:
        if name not in LIMITS:
            hint = did_you_mean(name, known)
            if name in FORMATS_ELSEWHERE:
                hint = "Formats are a plan's: vk.load(name, plan). "
            raise PlanError(
                f"{name!r} is not an argument of vk.load. {hint}The arguments are "
                f"{', '.join(known)}."
            )
    if limits and not processor:
        raise SizeError(
            f"{', '.join(limits)} limits what a processor makes of pictures, and processor=False "
            "leaves it out."
        )


FORMATS_ELSEWHERE = (
    "dtype", "torch_dtype", "quantization_config", "load_in_4bit", "load_in_8bit"
)  # fmt: skip
"""Arguments with which transformers is told what a plan says here."""


def limits_of(processor):
    """{name of LIMITS: value} that the processor has."""
    settings = _settings(processor)
    return {name: settings[name] for name in LIMITS if name in settings}


def set_limits(processor, config, limits):
    """Put `limits` into the processor of the model of `config`, and into its part for videos where
    that has such limits: see `vlmkit.families.with_limits`, whose SizeError it raises."""
    parts = ["image_processor"]
    if family_of(config).limits_videos and getattr(processor, "video_processor", None) is not None:
        parts.append("video_processor")
    for part in parts:
        own, settings = getattr(processor, part), _settings(processor, part)
        for name, value in with_limits(config, settings, limits).items():
            if value != settings.get(name):
                setattr(own, name, type(own.size)(**value) if name == "size" else value)


def _settings(processor, part="image_processor"):
    pictures = getattr(processor, part, None)
    found = {} if pictures is None else pictures.to_dict()
    return newer_names({name: value for name, value in found.items() if value is not None})
