"""`vlmkit anatomy`, `vlmkit lint` and `vlmkit doctor`: questions that need no weights."""

import sys

from vlmkit.cli.options import MODEL, Code, Json, Model, Revision, argument, name_of, option
from vlmkit.cli.options import print_json as print_document

ANATOMY_EXAMPLES = """\
Examples:

\b
  vlmkit anatomy
  vlmkit anatomy meta-llama/Llama-3.2-11B-Vision-Instruct
  vlmkit anatomy ./Qwen2.5-VL-7B-Instruct-AWQ      # also in which formats it is stored
"""
LINT_EXAMPLES = """\
Examples:

\b
  vlmkit lint Qwen/Qwen2.5-VL-7B-Instruct quantization_config.json
  vlmkit lint ./my-checkpoint                      # its own config.json says how it is quantized
  vlmkit lint ./my-checkpoint ./another/config.json --json

CONFIG holds the fields of a quantization config, or is a config.json with a quantization_config:

\b
  {"load_in_4bit": true, "llm_int8_skip_modules": ["model.vision_tower", "lm_head"]}
  {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["visual"]}

Known methods are bitsandbytes, awq, gptq, fp8, fbgemm_fp8, hqq, quanto, eetq, nvfp4, torchao and
compressed-tensors. The output says how vlmkit knows the method's rule.

The exit status is 1 if there is an error, and 0 if there are only warnings and notes.
"""
DOCTOR_EXAMPLES = """\
Examples:

\b
  vlmkit doctor
  vlmkit doctor --quick            # leaves out which models fit, which takes a minute
  vlmkit doctor --json

The exit status is 1 if the course cannot run here. Without typer there is no command line. Then run
python -m vlmkit.environment
"""


def anatomy(model: Model = None, trust_remote_code: Code = False):
    """Show which component of a model has which parameters, without its weights, and for a
    quantized checkpoint (also a GGUF file) in which formats they are stored."""
    import vlmkit as vk
    from vlmkit.backend.quiet import quiet

    with quiet():
        found = vk.anatomy(name_of(model), trust_remote_code=trust_remote_code)
    print(found)


def lint(
    model: argument(str, f"{MODEL}.", "MODEL"),
    config: argument(
        str, "A JSON file, or a checkpoint's folder. By default the model's own config.json.",
        "CONFIG",
    ) = None,
    revision: Revision = None,
    trust_remote_code: Code = False,
    json: Json = False,
):  # fmt: skip
    """Show what transformers will make of a quantization config and its skip list, before any
    weight is loaded: entries that protect nothing, components that nobody meant to quantize, a head
    that is quantized by accident, and the list to paste instead."""
    import vlmkit as vk

    findings = vk.lint(model, config, revision=revision, trust_remote_code=trust_remote_code)
    if json:
        print_document(findings.to_dict())
    else:
        print(findings)
    return int(not findings.ok)


def doctor(
    quick: option(bool, "Leave out which models fit.", "--quick") = False,
    json: Json = False,
):
    """Show what this machine can run and what is missing: packages and their versions, processor,
    GPUs, memory, disk, caches, the hub, optional packages, the notebooks' kernel, and which models
    of the catalog fit into the free memory. Nothing is contacted and nothing is written."""
    from vlmkit.environment import report

    return report(quick=quick, as_json=json, progress=sys.stderr.isatty() and not json)
