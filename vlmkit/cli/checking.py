"""`vlmkit lint`: what somebody's quantization config will do."""

from typing import Annotated

import typer

from vlmkit.cli.options import Code, Json, Revision, print_json

EXAMPLES = """\
Examples:

\b
  vlmkit lint Qwen/Qwen2.5-VL-7B-Instruct quantization_config.json
  vlmkit lint ./my-checkpoint                      # its own config.json says how it is quantized
  vlmkit lint ./my-checkpoint ./another/config.json --json

CONFIG holds the fields of a BitsAndBytesConfig, or is a config.json with a quantization_config:

\b
  {"load_in_4bit": true, "llm_int8_skip_modules": ["model.vision_tower", "lm_head"]}

The exit status is 1 if there is an error, 0 if there are warnings and notes alone.
"""


def lint(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='A folder, a hub id, a model of the catalog or "pebble".',
            show_default=False,
        ),
    ],
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A JSON file, or a checkpoint's folder. By default the model's own config.json.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Code = False,
    json: Json = False,
):
    """Say what transformers will make of a BitsAndBytesConfig and its skip list, before any weight
    is loaded: entries that protect nothing, components that were perhaps not meant, a lost head."""
    import vlmkit as vk

    findings = vk.lint(model, config, revision=revision, trust_remote_code=trust_remote_code)
    if json:
        print_json(findings.to_dict())
    else:
        print(findings)
    return int(not findings.ok)
