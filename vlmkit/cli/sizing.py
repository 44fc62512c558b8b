"""`vlmkit memory` and `vlmkit fit`: what a model needs, before it is downloaded."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmkit.cli.options import Code, Json, Model, PlanText, Revision, name_of, print_json

MEMORY_EXAMPLES = """\
Examples:

\b
  vlmkit memory Qwen/Qwen2.5-VL-7B-Instruct
  vlmkit memory meta-llama/Llama-3.2-11B-Vision-Instruct --plan language_model=nf4 \\
      --images 4 --image-size 1024x768 --tokens 2048
  vlmkit memory Qwen/Qwen2.5-VL-7B-Instruct --images 1 --image-size 1024x768 --tokens 512 \\
      --train lora --rank 16 --checkpointing --budget "24 GB"
  vlmkit memory pebble --train projector=full,language_model=lora --tokens 64 --json

With --budget the exit status is 1 where it does not fit.
"""
FIT_EXAMPLES = """\
Examples:

\b
  vlmkit fit
  vlmkit fit --model Qwen/Qwen2.5-VL-7B-Instruct --gpu T4 --gpu "12 GB" --plan nf4
  vlmkit fit --tokens 2048 --images 4 --image-size 1024x768 --figure what_fits.png

A GB is 10^9 bytes. Usable is a card's nominal memory less --reserve, which is an assumption.
"""

Tokens = Annotated[
    int, typer.Option(metavar="N", help="Tokens of text in the prompt, without the images'.")
]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Tokens that are generated.")]
Images = Annotated[int, typer.Option(metavar="N", help="Images in each prompt.")]
ImageSize = Annotated[
    str,
    typer.Option(
        metavar="WIDTHxHEIGHT",
        help="Size of each image in pixels, such as 1024x768. By default the model's own.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(metavar="N", help="Prompts at once.")]
Train = Annotated[
    str,
    typer.Option(
        metavar="WAY",
        help='A training step: "lora", "full", or by component, such as '
        "projector=full,language_model=lora.",
        show_default=False,
    ),
]
Rank = Annotated[
    int,
    typer.Option(metavar="N", help="Rank of the adapters. 16 unless given.", show_default=False),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        help="Gradient checkpointing: compute activations twice rather than keep them.",
        show_default=False,
    ),
]
Optimizer = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="adamw (the default), adamw_8bit, paged_adamw or paged_adamw_8bit.",
        show_default=False,
    ),
]


def memory(
    model: Model = None,
    plan: PlanText = None,
    images: Images = 0,
    image_size: ImageSize = None,
    tokens: Tokens = 0,
    new_tokens: NewTokens = 0,
    batch: Batch = 1,
    train: Train = None,
    rank: Rank = None,
    checkpointing: Checkpointing = False,
    optimizer: Optimizer = None,
    allocator: Annotated[
        str,
        typer.Option(
            metavar="cuda",
            help="Count what PyTorch's allocator for that device rounds up to, too.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help='Say whether it fits in SIZE, such as "8 GB", 8GiB or 8000MB.',
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: Code = False,
    json: Json = False,
):
    """Predict a model's memory from its config: weights under a plan, the cache of keys and values,
    activations, and what training adds. Nothing is downloaded for a model of the catalog."""
    import vlmkit as vk
    from vlmkit.backend.quiet import quiet

    room = None if budget is None else vk.memory.parse_size(budget)
    use = _use(images, image_size, tokens, new_tokens, batch, train, rank, checkpointing, optimizer)
    with quiet():
        ledger = vk.memory.predict(
            name_of(model),
            plan,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allocator=allocator,
            **use,
        )
    if json:
        print_json(_document(ledger, room))
    else:
        print(_ledger_as_text(ledger))
        if room is not None:
            print(_verdict(ledger, room))
    return int(room is not None and ledger.total > room)


def fit(
    model: Annotated[
        list[str],
        typer.Option(
            metavar="MODEL",
            help="A model, as in `vlmkit memory`; may be repeated. By default the whole catalog.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        list[str],
        typer.Option(
            metavar="GPU",
            help='A card of the catalog, such as "RTX 4090", or a size, such as "12 GB"; may be '
            "repeated. By default all cards of the catalog.",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[
        list[str],
        typer.Option(
            metavar="PLAN",
            help="A plan, as in `vlmkit memory`; may be repeated. By default bf16, and the "
            "language model in int8 and in nf4.",
            show_default=False,
        ),
    ] = None,
    images: Images = 1,
    image_size: ImageSize = None,
    tokens: Tokens = 512,
    new_tokens: NewTokens = 0,
    batch: Batch = 1,
    train: Train = None,
    rank: Rank = None,
    checkpointing: Checkpointing = False,
    optimizer: Optimizer = None,
    reserve: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Memory of each card that is taken to be lost to CUDA and others."
        ),
    ] = "1 GB",
    figure: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Draw it too, as .png, .svg or .pdf.", show_default=False
        ),
    ] = None,
    json: Json = False,
):
    """Which models fit on which graphics cards, under which plans: a table, and a figure if asked
    for. With --tokens 0 --images 0 it is the weights alone that are to fit, which is quicker."""
    from vlmkit.memory import fitting

    use = _use(images, image_size, tokens, new_tokens, batch, train, rank, checkpointing, optimizer)
    chosen = {"models": model, "gpus": gpu, "plans": plan}
    chosen = {name: given for name, given in chosen.items() if given}
    table = fitting.fit(**chosen, reserved=reserve, progress=sys.stderr.isatty(), **use)
    if figure is not None:
        _draw(table, figure)
    if json:
        table = table.astype(object).where(table.notna(), None)
        print_json(table.to_dict(orient="records"))
    else:
        print(_as_text(table, reserve))


def _use(images, image_size, tokens, new_tokens, batch, train, rank, checkpointing, optimizer):
    """What `vk.memory.predict` is to be asked, besides a model and a plan."""
    given = {} if optimizer is None else {"optimizer": optimizer}
    return given | {
        "images": images,
        "image_size": _size(image_size),
        "tokens": tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "training": _training(train, rank),
        "checkpointing": checkpointing,
    }


def _size(text):
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.strip().isdigit() for side in sides):
        raise typer.BadParameter(f"--image-size is WIDTHxHEIGHT in pixels, not {text!r}: 1024x768")
    return tuple(int(side) for side in sides)


def _training(text, rank):
    if rank is not None and "lora" not in (text or ""):
        raise typer.BadParameter("--rank is that of adapters: say so with --train lora")
    if text is None:
        return None
    import vlmkit as vk

    lora = vk.LoRA(r=16 if rank is None else rank)
    if "=" not in text:
        return {"language_model": lora} if text == "lora" else text
    pairs = (item.partition("=") for item in filter(None, text.split(",")))
    ways = {"lora": lora, "none": None}
    return {part.strip(): ways.get(way.strip(), way.strip()) for part, _, way in pairs}


def _ledger_as_text(ledger):
    """A ledger as a terminal has room for: a row for each kind of bytes."""
    from vlmkit.memory import BOUNDED, MEGABYTE

    table = (ledger.table().T / MEGABYTE).map("{:,.3f}".format)
    table = table.rename(index={kind: f"{kind} *" for kind in BOUNDED})
    lines = [f"{ledger.title}, in MB (1 MB = 10^6 bytes)", "", table.to_string()]
    if ledger.bounded:
        lines.append("* bounded, not exact; the rest is to the byte")
    return "\n".join([*lines, *([""] if ledger.notes else []), *ledger.notes])


def _document(ledger, room):
    document = {
        "title": ledger.title,
        "total": ledger.total,
        "by_component": {component or "unknown": n for component, n in ledger.by_component.items()},
        "by_kind": ledger.by_kind,
        "bounded": ledger.bounded,
        "notes": list(ledger.notes),
    }
    if room is not None:
        document |= {"budget": int(room), "fits": ledger.total <= room}
    return document


def _verdict(ledger, room):
    left = (room - ledger.total) / 10**6
    if left < 0:
        return f"\nDoes not fit in {room}: {-left:,.2f} MB too much."
    return f"\nFits in {room}: {left:,.2f} MB are left."


def _as_text(table, reserve):
    from vlmkit.memory.fitting import summary

    wide = summary(table)
    cards = {}
    for gpu, memory in sorted(zip(table["gpu"], table["memory"], strict=True), key=lambda g: g[1]):
        cards.setdefault(f"{memory / 10**9:g} GB", {})[gpu] = True
    legend = "\n".join(f"{size:>7}  {', '.join(names)}" for size, names in cards.items())
    return (
        "GB needed (1 GB = 10^9 bytes), and GB left on a card of so many GB, of which "
        f"{reserve} is taken\nto be lost to CUDA and others (an assumption); - where it does not "
        "fit.\n\n"
        f"{wide.to_string()}\n\n{legend}"
    )


def _draw(table, path):
    import matplotlib

    matplotlib.use("agg")
    from vlmkit import figures

    try:
        figures.what_fits(table).figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--figure {path}: {error}") from error
