"""`vlmkit merge`: adapters and their base, as one ordinary model."""

from pathlib import Path
from typing import Annotated

import typer

from vlmkit.cli.options import Code, option

EXAMPLES = """\
Examples:

\b
  vlmkit merge my-run/adapters my-model                       # into bf16
  vlmkit merge my-run/adapters my-model --plan recommended    # into the quantized base
  vlmkit merge my-run/adapters my-model --base pebble

OUT is an ordinary checkpoint: transformers and vk.load load it, and in bf16 vLLM and llama.cpp's
converter do (docs/from_vlmkit.md). A quantized weight is quantized again, and a part of what was
learnt can be lost. The table shows how much: 0 means that all of the adapters' change arrived, and
1 that rounding undid as much as was learnt.
"""


def merge(
    adapters: Annotated[
        Path,
        typer.Argument(help="A folder of vk.finetuning.save or vlmkit train.", metavar="ADAPTERS"),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    base: option(
        str,
        "The model that the adapters were trained on. By default, the one that ADAPTERS names.",
        metavar="MODEL",
    ) = None,
    plan: option(str, "The formats of the merged model.", metavar="PLAN", shown=True) = "bf16",
    overwrite: option(bool, "Replace OUT if it is there.", "--overwrite") = False,
    trust_remote_code: Code = False,
):
    """Merge adapters, and what was trained in full beside them, into their base."""
    import vlmkit as vk
    from vlmkit.checkpoints import find
    from vlmkit.errors import CheckpointError, FinetuningError
    from vlmkit.finetuning.saved import notes_of
    from vlmkit.folders import require_free

    named = notes_of(adapters).get("base")
    if not (base or named):
        raise FinetuningError(f"{adapters} does not say what it was trained on. Give --base MODEL.")
    try:
        folder = find(base or named, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        if base:
            raise
        raise FinetuningError(
            f"{adapters} was trained on {named}, which is not to be found ({error}) Give its name "
            "or folder: --base MODEL."
        ) from error
    # Before a weight is read
    for name, needed in {"ADAPTERS": adapters, "the base": folder}.items():
        if needed.expanduser().resolve().is_relative_to(out.expanduser().resolve()):
            raise FinetuningError(
                f"{out} is or contains {name} ({needed}), which would be deleted. Name another OUT."
            )
    require_free(out.expanduser(), overwrite)
    model, processor = vk.load(base or named, plan, trust_remote_code=trust_remote_code)
    model = vk.finetuning.load(model, adapters)
    if hasattr(model, "peft_config"):
        model, report = vk.finetuning.merge(model)
        report["lost"] = report["lost"].map("{:.4f}".format)
        print("Lost by rounding, as a share of the adapters' change:\n")
        print(report.to_string(index=False), end="\n\n")
    else:
        print("There are no adapters: what was trained in full is put into the base.")
    written = vk.save(model, processor, out, overwrite=overwrite)
    print(f"written to {written}")
