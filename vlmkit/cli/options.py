"""What several commands take, in the words of their help."""

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help='A folder, a hub id, a model of the catalog or "pebble"; by default what VLMKIT_MODEL '
        "names, else pebble.",
        show_default=False,
    ),
]
PlanText = Annotated[
    str,
    typer.Option(
        "--plan",
        metavar="PLAN",
        help="Formats by component, such as vision_encoder=bf16,language_model=nf4, or one format "
        "for all, such as int8. By default the recommended plan: language model in nf4, the rest "
        "in bf16.",
        show_default=False,
    ),
]
Code = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let Python code that comes with the checkpoint run.",
        show_default=False,
    ),
]
Revision = Annotated[
    str,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a hub id.", show_default=False),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document and nothing else.", show_default=False),
]


def name_of(model):
    """The model that is meant where none is named."""
    from vlmkit.loading import default_model

    return model or default_model()


def print_json(document):
    """`document` on standard output."""
    import json

    print(json.dumps(document, indent=2))
