"""`vlmkit doctor`: what this machine can run, and what is missing."""

import sys
from typing import Annotated

import typer

from vlmkit.cli.options import Json

EXAMPLES = """\
Examples:

\b
  vlmkit doctor
  vlmkit doctor --quick            # without the question which models fit: some seconds less
  vlmkit doctor --json

The exit status is 1 if the course cannot run here. Where typer itself is missing, and with it this
command line: python -m vlmkit.environment
"""


def doctor(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Leave out which models fit.", show_default=False),
    ] = False,
    json: Json = False,
):
    """Say what this machine can run and what is missing: packages and their versions, processor,
    GPUs, memory, disk, caches, the hub, optional packages, the notebooks' kernel, and which models
    of the catalog fit into the memory that is free. Nothing is contacted and nothing is written."""
    from vlmkit.environment.doctor import report

    return report(quick=quick, as_json=json, progress=sys.stderr.isatty() and not json)
