"""Processors: the part of a checkpoint that turns pictures and words into tensors."""

from vlmkit.errors import CheckpointError, brief

ANY_OF = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_processor(folder, trust_remote_code=False):
    """The AutoProcessor of the checkpoint in `folder`.

    Raises CheckpointError if one of its files is missing or unusable, or if it needs torchvision
    and there is none.
    """
    from transformers import AutoProcessor
    from transformers.processing_utils import ProcessorMixin

    for what, files in (("a processor config", ANY_OF), ("a tokenizer", TOKENIZERS)):
        if not any((folder / file).exists() for file in files):
            raise CheckpointError(
                f"{folder} lacks {what}: none of {', '.join(files)} is there. Without it the model "
                "can be shown no picture and no question. With processor=False it loads alone."
            )
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise CheckpointError(
                f"{folder}: the processor needs a package: {brief(error)}"
            ) from error
        raise CheckpointError(
            f"{folder}: this model's processor needs torchvision, which is not installed or does "
            'not fit this torch. Install it with: pip install "vlmkit[hub]"'
        ) from error
    except Exception as error:  # a missing file ends in a TypeError as often as in an OSError
        raise CheckpointError(
            f"{folder}: the processor cannot be loaded, a file of it is missing or damaged "
            f"({brief(error)}). With processor=False the model alone loads."
        ) from error
    if not isinstance(
        processor, ProcessorMixin
    ):  # without a processor class it is a mere tokenizer
        raise CheckpointError(
            f"{folder}: transformers finds only a {type(processor).__name__} there. A model that "
            "sees needs a processor with an image part: processor_config.json is missing or not "
            "complete. With processor=False the model alone loads."
        )
    return processor
