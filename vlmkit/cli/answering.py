"""`vlmkit ask`, and what `vlmkit` without a command shows."""

import os
import time
from pathlib import Path

import typer

from vlmkit.cli.options import (
    MODEL,
    Code,
    MaxPixels,
    MinPixels,
    PlanText,
    argument,
    limits_of,
    name_of,
    option,
)
from vlmkit.errors import ImageError, QuestionError

EXAMPLES = """\
Examples:

\b
  vlmkit ask drawing.png "How many circles are there?"
  vlmkit ask before.png after.png "Which picture has more circles?"
  vlmkit ask photo.jpg "What is in the picture?" --model cobble
  vlmkit ask photo.jpg "Can it fly?" --model cobble-chat --answer-only
  vlmkit ask photo.jpg "What is this?" --model PATH_OR_HUB_ID --plan language_model=nf4
  vlmkit ask photo.jpg "Tell a story." --model cobble-chat --do-sample --temperature 0.7 --seed 1
"""


def ask(
    words: argument(
        list[str], "Files, then the question in quotes.", 'PICTURE... "QUESTION"'
    ) = None,
    model: option(
        str, f"{MODEL}; by default what VLMKIT_MODEL names, else pebble.", metavar="MODEL"
    ) = None,
    plan: PlanText = None,
    max_new_tokens: option(int, "The greatest length of the answer.", metavar="N", shown=True) = 64,
    do_sample: option(bool, "Draw tokens at random; greedy without it.", "--do-sample") = False,
    temperature: option(float, "Above 1 is more random, below 1 less.", metavar="T") = None,
    top_p: option(float, "Draw from the likeliest tokens that add up to P.", metavar="P") = None,
    top_k: option(int, "Draw from the K likeliest tokens.", metavar="K") = None,
    seed: option(int, "The same answer again for the same number.", metavar="N") = None,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    answer_only: option(bool, "Print the answer and nothing else.", "--answer-only") = False,
    trust_remote_code: Code = False,
):
    """Ask a model about one or several pictures, and show what was loaded for the answer."""
    *paths, question = words or [None]
    if not paths:
        raise typer.BadParameter(
            'give at least one picture, and then a question: vlmkit ask cat.jpg "What is it?"'
        )
    # Mistakes in the pictures, the question and the plan are reported before anything slow begins.
    pictures = _read(paths)
    if os.path.isfile(question):
        raise QuestionError(f"{question} is a file. After the pictures, write a question.")
    import vlmkit as vk
    from vlmkit.backend.quiet import quiet
    from vlmkit.evaluation import check_question
    from vlmkit.evaluation.asking import sampling_of

    check_question(question)
    sampling = {
        "do_sample": do_sample, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "seed": seed,
    }  # fmt: skip
    sampling_of(**sampling)
    limits = limits_of(min_pixels, max_pixels)
    plan, name = None if plan is None else vk.Plan.parse(plan), name_of(model)
    if not answer_only:
        for path, picture in zip(paths, pictures, strict=True):
            print(f"picture    {path} ({picture.width} x {picture.height} pixels)")
        print(f"question   {question}\nmodel      {name}", flush=True)
    start = time.perf_counter()
    model, processor = vk.load(name, plan, trust_remote_code=trust_remote_code, **limits)
    loaded = time.perf_counter()
    with quiet():
        answer = vk.ask(
            model, processor, pictures, question, max_new_tokens=max_new_tokens, **sampling
        )
    if answer_only:
        print(answer)
        return
    seconds = time.perf_counter() - loaded
    plan = plan or vk.loading.plan_of(model)  # of a quantized checkpoint: the formats it holds
    print(f"answer     {answer}")
    print(f"time       loading {loaded - start:.1f} s, answering {seconds:.1f} s\n")
    print("What was loaded, every module audited against the plan:\n")
    print(f"{vk.audit(model, plan)}\n")
    print(_saving(name, plan, vk.memory.measure(model).total, trust_remote_code))


def first_answer():
    """The default model's answer about a picture that comes with the course, with all that there is
    to see. If the default is pebble, cobble answers about a photograph as well."""
    from vlmkit.course import pictures

    name = name_of(None)
    if name.startswith("cobble"):  # knows photographs better than drawings
        _ask_about(pictures.photograph(), pictures.ABOUT_PHOTOGRAPHS, name)
    else:
        _ask_about(pictures.FIRST.path, pictures.FIRST.question, name)
    if name == "pebble":
        print()
        if missing := pictures.missing_for_photographs():
            print(missing)
        else:
            _ask_about(pictures.photograph(), pictures.ABOUT_PHOTOGRAPHS, "cobble")
    print('\nNow ask about a picture of your own:\n  python -m vlmkit ask PICTURE "QUESTION"')
    if name == "pebble":
        print('  python -m vlmkit ask PHOTO "QUESTION" --model cobble')


def _ask_about(path, question, name):
    here = Path.cwd()
    path = path.relative_to(here) if path.is_relative_to(here) else path
    ask([str(path), question], name)


def _read(paths):
    from vlmkit.images import read_all

    try:
        return read_all(paths)
    except ImageError as error:
        if len(paths) > 1 and not any(map(os.path.exists, paths[1:])):
            raise ImageError(f"{error} Put a question of several words in quotes.") from error
        raise


def _saving(name, plan, measured, trust_remote_code):
    """The bytes of each component under the plan and in bf16, as text."""
    import pandas as pd

    from vlmkit import memory
    from vlmkit.units import MEGABYTE

    ledgers = {
        title: memory.predict(name, given, trust_remote_code=trust_remote_code)
        for title, given in (("bf16", "bf16"), ("this plan", plan))
    }
    table = pd.DataFrame({title: ledger.by_component for title, ledger in ledgers.items()})
    table.loc["total"] = table.sum()
    saved = 1 - table["this plan"] / table["bf16"]
    table = (table / MEGABYTE).map("{:.2f} MB".format)
    table["saved"] = saved.map("{:.0%}".format)
    predicted = ledgers["this plan"].total
    found = "the same" if measured == predicted else f"{measured:,}"
    return (
        "Bytes, predicted from the config alone (1 MB = 10^6 bytes):\n\n"
        f"{table.to_string()}\n\n"
        f"predicted {predicted:,} bytes; measured on the loaded model: {found}"
    )
