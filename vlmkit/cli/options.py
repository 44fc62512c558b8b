"""Options that several commands have, with the words of their help."""

import json
from typing import Annotated

import typer


def option(kind, text, *names, metavar=None, shown=False, **more):
    """The annotation of a parameter that is an option.

    names: of the option, if it is not called as the parameter is; a bool needs one.
    shown: whether the help shows the default.
    """
    return Annotated[
        kind, typer.Option(*names, help=text, metavar=metavar, show_default=shown, **more)
    ]


def argument(kind, text, metavar):
    """The annotation of a parameter that is an argument."""
    return Annotated[kind, typer.Argument(help=text, metavar=metavar, show_default=False)]


MODEL = "pebble, cobble, a folder, a hub id or a model of the catalog"
Model = argument(str, f"{MODEL}; by default what VLMKIT_MODEL names, else pebble.", "MODEL")
PlanText = option(
    str,
    "Formats by component, such as vision_encoder=bf16,language_model=nf4, or one format for all, "
    "such as int8, or a file with a plan. By default the recommended plan: language model in nf4, "
    "the rest in bf16.",
    "--plan",
    metavar="PLAN",
)
Code = option(bool, "Allow Python code that comes with the checkpoint.", "--trust-remote-code")
Revision = option(str, "Branch, tag or commit of a hub id.", metavar="NAME")
Json = option(bool, "Print one JSON document and nothing else.", "--json")


MinPixels = option(int, "The least pixels of a picture or video (Qwen-VL, GLM-4V).", metavar="N")
MaxPixels = option(int, "The most pixels of a picture: larger ones are shrunk.", metavar="N")


def limits_of(min_pixels, max_pixels):
    """The limits that are given, as `vk.load` and `vk.memory.predict` take them."""
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return {name: value for name, value in given.items() if value is not None}


def name_of(model):
    """The name of a model, or the default model's if there is none."""
    from vlmkit.loading import default_model

    return model or default_model()


def print_json(document):
    """Print `document` on standard output."""
    print(json.dumps(document, indent=2))
