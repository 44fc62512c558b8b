"""`vlmkit memory` and `vlmkit fit`: what a model needs, before it is downloaded."""

import re
import sys
from pathlib import Path

import typer

from vlmkit.cli.options import (
    MODEL,
    Code,
    Json,
    MaxPixels,
    MinPixels,
    Model,
    PlanText,
    Revision,
    argument,
    limits_of,
    name_of,
    option,
    print_json,
)

MEMORY_EXAMPLES = """\
Examples:

\b
  vlmkit memory Qwen/Qwen2.5-VL-7B-Instruct
  vlmkit memory meta-llama/Llama-3.2-11B-Vision-Instruct --plan language_model=nf4 \\
      --images 4 --image-size 1024x768 --tokens 2048
  vlmkit memory Qwen/Qwen2.5-VL-7B-Instruct --images 1 --image-size 1024x768 --tokens 512 \\
      --train lora --rank 16 --gradient-checkpointing --budget "24 GB"
  vlmkit memory Qwen/Qwen2.5-VL-7B-Instruct --images 1 --image-size 4032x3024 --max-pixels 1003520
  vlmkit memory Qwen/Qwen3-VL-2B-Instruct --frames 32 --image-size 640x360 --tokens 100
  vlmkit memory Qwen/Qwen2.5-VL-7B-Instruct --images 1 --tokens 512 --train lora --gpus 2
  vlmkit memory pebble --train projector=full,language_model=lora --tokens 64 --json
  vlmkit memory ./Qwen2.5-VL-7B-Instruct-AWQ
  vlmkit memory ./gemma-3-4b-it-Q4_K_M.gguf       # with the mmproj file beside it

With --budget the exit status is 1 if the model does not fit.
"""
FIT_EXAMPLES = """\
With MODEL: the largest batch, pictures, context and rank of LoRA that fit on one card, and what to
save where something does not fit. Without: a table of models, cards and plans.

Examples:

\b
  vlmkit fit Qwen/Qwen2.5-VL-7B-Instruct --card "RTX 4090"
  vlmkit fit Qwen/Qwen2.5-VL-7B-Instruct --card "2 x RTX 4090"
  vlmkit fit Qwen/Qwen2.5-VL-7B-Instruct --card "12 GB" --only prompt --image-size 1024x768
  vlmkit fit Qwen/Qwen2.5-VL-7B-Instruct --card L40S --serve --max-model-len 8192
  vlmkit fit
  vlmkit fit --model Qwen/Qwen2.5-VL-7B-Instruct --card T4 --card "12 GB" --plan nf4
  vlmkit fit --tokens 2048 --images 4 --image-size 1024x768 --figure what_fits.png

A card of the catalog has the memory that nvidia-smi shows for it. A size is what it says: "24 GB"
is 24 x 10^9 bytes, "24 GiB" is 24 x 2^30. A model can use that less --reserve, an assumption. Every
number is predicted.
"""


def _size(text):
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.strip().isdigit() for side in sides):
        raise typer.BadParameter(f"write WIDTHxHEIGHT in pixels, such as 1024x768, not {text!r}.")
    return tuple(int(side) for side in sides)


# What a model is to do: options of both commands. `_use` reads them.
Tokens = option(int, "Text tokens in the prompt, without the images'.", metavar="N", shown=True)
NewTokens = option(int, "Tokens that are generated.", metavar="N", shown=True)
Images = option(int, "Images in each prompt.", metavar="N", shown=True)
ImageSize = option(
    str,
    "Size of each image and frame in pixels, such as 1024x768. By default the model's own.",
    metavar="WIDTHxHEIGHT",
    parser=_size,
)
Frames = option(
    int, "Frames of a video in each prompt. 0 is no video.", "--frames", metavar="N", shown=True
)
BatchSize = option(int, "Prompts at once.", metavar="N", shown=True)
Train = option(
    str,
    'A training step: "lora", "full", or by component, such as projector=full,language_model=lora.',
    metavar="WAY",
)
Rank = option(int, "Rank of the adapters. 16 by default.", metavar="N")
Checkpointing = option(
    bool,
    "Compute activations again in the backward pass instead of keeping them.",
    "--gradient-checkpointing",
)
Optim = option(
    str,
    "adamw_torch_fused (the default), adamw_8bit, paged_adamw_32bit or paged_adamw_8bit.",
    metavar="NAME",
)


def memory(
    context: typer.Context,
    model: Model = None,
    plan: PlanText = None,
    images: Images = 0,
    num_frames: Frames = 0,
    image_size: ImageSize = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    tokens: Tokens = 0,
    new_tokens: NewTokens = 0,
    batch_size: BatchSize = 1,
    train: Train = None,
    rank: Rank = None,
    gradient_checkpointing: Checkpointing = False,
    optim: Optim = None,
    allocator: option(
        str,
        "Count what a GPU needs: its kernels, and what PyTorch's allocator rounds up to. Without "
        "it, everything is counted as on a CPU, unless --budget names a card.",
        metavar="cuda",
    ) = None,
    gpus: option(
        int,
        "Cards that share the model: with --train by FSDP, otherwise with whole layers on each, as "
        "device_map='auto' puts them. Shown is each card.",
        metavar="N",
        shown=True,
    ) = 1,
    budget: option(
        str,
        'Say whether the model fits in SIZE, such as "8 GB", 8GiB or 8000MB, or on a card of the '
        'catalog, such as "RTX 4090", less 1 GB for CUDA and other programs, and counted as with '
        "--allocator cuda.",
        metavar="SIZE",
    ) = None,
    revision: Revision = None,
    trust_remote_code: Code = False,
    json: Json = False,
):
    """Predict a model's memory from its config: weights under a plan, the cache of keys and values,
    activations, and what training adds. Nothing is downloaded for a model of the catalog.

    For a folder or file that vlmkit cannot load (AWQ, GPTQ, FP8, compressed-tensors, torchao, HQQ,
    GGUF), and without --plan, it shows the bytes in the weight files by component and format."""
    import vlmkit as vk
    from vlmkit.backend.quiet import quiet
    from vlmkit.catalog.gpus import GPUS
    from vlmkit.memory.stored import loadable
    from vlmkit.units import readable

    room = None if budget is None else _room(budget)
    if budget in GPUS and allocator is None and (plan or loadable(name_of(model), revision)):
        allocator = "cuda"  # of what only lies in files, as with AWQ, there is nothing to run
    more = {"revision": revision, "trust_remote_code": trust_remote_code, "allocator": allocator}
    more["gpus"] = gpus
    use = _use(context.params)
    with quiet():
        ledger = vk.memory.predict(name_of(model), plan, **more, **use)
    fits = room is None or ledger.total <= room
    stored = hasattr(ledger, "by_format")  # of a checkpoint that vlmkit counts and does not load
    if json:
        document = {
            "title": ledger.title,
            "total": ledger.total,
            "by_component": {c or "unknown": size for c, size in ledger.by_component.items()},
            "by_kind": ledger.by_kind,
            "bounded": ledger.bounded,
            "notes": list(ledger.notes),
        }
        if gpus > 1:
            document["cards"] = [
                {"total": card.total, "by_kind": card.by_kind} for card in ledger.cards
            ]
        if stored:
            document["by_format"] = [
                {"component": component or "unknown", "format": name, "bytes": size}
                for (component, name), size in ledger.by_format.items()
            ]
        print_json(document | ({} if room is None else {"budget": int(room), "fits": fits}))
    else:
        print(ledger if stored else _ledger_as_text(ledger, allocator))
        if room is not None:
            left = readable(abs(room - ledger.total)) + " of each card" * (gpus > 1)
            words = f"Fits in {room}: {left} are left."
            if not fits:
                words = f"Does not fit in {room}: {left} too much."
            print(f"\n{words}{_advice(budget, room - ledger.total)}")
            if not fits and train and not gradient_checkpointing:
                use["gradient_checkpointing"] = True
                with quiet():
                    less = vk.memory.predict(name_of(model), plan, **more, **use).total
                print(
                    f"With --gradient-checkpointing it needs {readable(less)}, which "
                    f"{'fits' if less <= room else 'does not fit either'}."
                )
    return int(not fits)


def _room(budget):
    """The Size that a budget names, in bytes."""
    from vlmkit.catalog.gpus import GPUS, RESERVED
    from vlmkit.memory.fitting import memory_of, room_on
    from vlmkit.units import Size

    if budget not in GPUS:
        return memory_of(budget)
    return Size(room_on(budget), f"{budget}, less {RESERVED},")


def _advice(budget, left):
    """What to know about a budget in GB, if a graphics card is meant by it."""
    from vlmkit.units import GIGABYTE

    number = re.fullmatch(r"\s*([0-9]{1,3}) *gb\s*", budget.lower())
    if not number or left > GIGABYTE:
        return ""
    return (
        " A GB is 10^9 bytes, and all of them are counted here. If you mean a graphics card, give "
        'its name, such as --budget "RTX 4090": 1 GB is then taken off for CUDA and other '
        "programs, as `vlmkit fit` does."
    )


def fit(
    context: typer.Context,
    name: argument(str, f"{MODEL}. With it, --card is needed too.", "MODEL") = None,
    model: option(
        list[str],
        "For the table: a model, as in `vlmkit memory`; may be repeated. By default the whole "
        "catalog.",
        metavar="MODEL",
    ) = None,
    gpu: option(
        list[str],
        'A card of the catalog, such as "RTX 4090", or a size, such as "12 GB"; may be repeated. '
        'With MODEL also several, such as "2 x RTX 4090". '
        "The table has all cards of the catalog by default.",
        "--card",
        "--gpu",
        metavar="CARD",
    ) = None,
    plan: option(
        list[str],
        "A plan, as in `vlmkit memory`; may be repeated for the table, which has bf16, and the "
        "language model in int8 and in nf4, by default.",
        metavar="PLAN",
    ) = None,
    images: option(
        int, "Images in each prompt. By default 1, or 0 with --frames.", metavar="N"
    ) = None,
    num_frames: Frames = 0,
    image_size: ImageSize = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    tokens: Tokens = 512,
    new_tokens: NewTokens = 0,
    batch_size: BatchSize = 1,
    train: Train = None,
    rank: Rank = None,
    gradient_checkpointing: Checkpointing = False,
    optim: Optim = None,
    reserve: option(
        str,
        "Memory of each card that CUDA and other programs are assumed to take.",
        metavar="SIZE",
        shown=True,
    ) = "1 GB",
    only: option(
        list[str],
        "With MODEL: load, prompt or training, which takes longest; may be repeated.",
        metavar="USE",
    ) = None,
    serve: option(
        bool,
        "With MODEL: what vLLM would keep for weights, pictures and its cache, and how many "
        "requests fit, by its published rules; in bf16 without --plan.",
        "--serve",
    ) = False,
    gpu_memory_utilization: option(
        float, "With --serve: the share of the card that vLLM takes.", metavar="SHARE", shown=True
    ) = 0.92,
    max_model_len: option(
        int,
        "With --serve: tokens of the longest request. The model's context by default.",
        metavar="N",
    ) = None,
    max_num_batched_tokens: option(
        int, "With --serve: tokens of one step. 2048 by default, 8192 from 70 GiB on.", metavar="N"
    ) = None,
    figure: option(Path, "Also draw the table, as .png, .svg or .pdf.", metavar="FILE") = None,
    json: Json = False,
):
    """Show what fits on a graphics card: for one model the most that it can do there, or for many a
    table of models, cards and plans, and a figure of it if you name a file. With --tokens 0
    --images 0 only the weights of the table have to fit, which is quicker."""
    if name is not None:
        from vlmkit.backend.quiet import without_garbage_collection

        with without_garbage_collection():  # a second less while the libraries are imported
            return _largest(context.params)
    from vlmkit.memory import fitting

    if only:
        raise typer.BadParameter("--only is for one model: vlmkit fit MODEL --card CARD --only USE")
    which = {"models": model, "gpus": gpu, "plans": plan}
    which = {name: given for name, given in which.items() if given}
    use = _use(context.params)
    if figure is not None and (figure.is_dir() or not figure.parent.is_dir() or not figure.suffix):
        raise typer.BadParameter(
            f"--figure {figure}: give a file that ends in .png, .svg or .pdf, in a folder that "
            "exists."
        )
    table = fitting.fit(**which, reserved=reserve, progress=sys.stderr.isatty(), **use)
    if figure is not None:
        _draw(table, figure)
    if json:
        table = table.astype(object).where(table.notna(), None)
        print_json(table.to_dict(orient="records"))
    else:
        print(_fit_as_text(table, reserve))


def _largest(options):
    """The most that one model can do on one card."""
    import vlmkit as vk
    from vlmkit.catalog.gpus import GPUS

    cards, plans = options["gpu"] or [], options["plan"] or []
    if len(cards) != 1:
        raise typer.BadParameter(
            f"With MODEL, name one card: --card CARD. A card is {', '.join(GPUS)}, or a size such "
            'as "12 GB".'
        )
    if options["model"] or options["figure"] or len(plans) > 1:
        raise typer.BadParameter(
            "--model, --figure and several plans are for the table of many models. Leave out MODEL "
            "for that, or give one plan and one card with it."
        )
    limits = limits_of(options["min_pixels"], options["max_pixels"])
    if options["serve"]:
        if options["num_frames"]:
            raise typer.BadParameter("--serve counts pictures, not videos: leave out the frames.")
        taken = (
            "gpu_memory_utilization", "max_model_len", "max_num_batched_tokens", "images",
            "image_size",
        )  # fmt: skip
        found = vk.memory.serving(
            options["name"], cards[0], *plans, reserved=options["reserve"], **limits,
            **{name: options[name] for name in taken if options[name] is not None},
        )  # fmt: skip
        print_json(found.to_dict()) if options["json"] else print(found)
        return int(found.requests < 1)
    taken = ("tokens", "new_tokens", "num_frames", "image_size", "batch_size")
    use = {name: options[name] for name in (*taken, "gradient_checkpointing")}
    given = ("images", "rank", "optim")
    use |= {name: options[name] for name in given if options[name] is not None}
    if options["train"] not in (None, "lora"):
        use["training"] = _training(options["train"], use.pop("rank", None))
    if options["only"]:
        use["uses"] = ["training step" if what == "training" else what for what in options["only"]]
    found = vk.memory.largest(
        options["name"], cards[0], plans[0] if plans else None, reserved=options["reserve"],
        **use, **limits,
    )  # fmt: skip
    if options["json"]:
        print_json(found.to_dict())
    else:
        print(found)


def _use(options):
    """What `vk.memory.predict` needs to know besides a model and a plan."""
    names = ["num_frames", "image_size", "tokens", "new_tokens", "batch_size"]
    use = {name: options[name] for name in (*names, "gradient_checkpointing")}
    if options["images"] is not None:
        use["images"] = options["images"]
    use |= limits_of(options["min_pixels"], options["max_pixels"])
    if options["optim"] is not None:
        use["optim"] = options["optim"]
    return use | {"training": _training(options["train"], options["rank"])}


def _training(text, rank):
    if rank is not None and "lora" not in (text or ""):
        raise typer.BadParameter("--rank is the rank of adapters. Add --train lora.")
    if text is None:
        return None
    import vlmkit as vk

    lora = vk.LoRA(r=16 if rank is None else rank)
    if "=" not in text:
        return {"language_model": lora} if text == "lora" else text
    pairs = (item.partition("=") for item in filter(None, text.split(",")))
    ways = {"lora": lora, "none": None}
    return {part.strip(): ways.get(way.strip(), way.strip()) for part, _, way in pairs}


def _ledger_as_text(ledger, allocator):
    """A ledger with a row for each kind of bytes, which is what fits in a terminal."""
    from vlmkit.memory import BOUNDED
    from vlmkit.units import MEGABYTE

    table = (ledger.table().T / MEGABYTE).map("{:,.3f}".format)
    table = table.rename(index={kind: f"{kind} *" for kind in BOUNDED})
    lines = [f"{ledger.title}, in MB (1 MB = 10^6 bytes)", "", table.to_string()]
    if ledger.bounded:
        lines.append("* bounded, not exact; the rest is to the byte")
        if allocator is None:
            lines.append(
                "Counted as on a CPU. A GPU's operations need other amounts: add --allocator cuda."
            )
    return "\n".join([*lines, *([""] if ledger.notes else []), *ledger.notes])


def _fit_as_text(table, reserve):
    from vlmkit.memory.fitting import in_gigabytes, summary

    cards = {}
    for gpu, size in sorted(zip(table["gpu"], table["memory"], strict=True), key=lambda g: g[1]):
        cards.setdefault(f"{in_gigabytes(size)} GB", {})[gpu] = True
    legend = "\n".join(f"{size:>7}  {', '.join(names)}" for size, names in cards.items())
    return (
        "GB needed (1 GB = 10^9 bytes), and GB left on a card of each size, or - if the model does "
        f"not fit.\nCUDA and other programs are assumed to take {reserve} of each card.\n\n"
        f"{summary(table).to_string()}\n\n{legend}"
    )


def _draw(table, path):
    import matplotlib

    matplotlib.use("agg")
    from vlmkit import figures

    try:
        figures.what_fits(table).figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--figure {path}: {error}") from error
