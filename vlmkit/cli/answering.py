"""`vlmkit ask`, `vlmkit anatomy`, and what `vlmkit` alone shows."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from vlmkit.cli.options import Code, Model, PlanText, name_of
from vlmkit.errors import ImageError, QuestionError

ASK_EXAMPLES = """\
Examples:

\b
  vlmkit ask photo.jpg "What is in this picture?"
  vlmkit ask before.png after.png "Which picture has more circles?"
  vlmkit ask photo.jpg "What is this?" --model PATH_OR_HUB_ID --plan language_model=nf4
"""
ANATOMY_EXAMPLES = """\
Examples:

\b
  vlmkit anatomy
  vlmkit anatomy meta-llama/Llama-3.2-11B-Vision-Instruct
"""


def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar='PICTURE... "QUESTION"',
            help="Files, then the question in quotes.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help='A folder, a hub id or "pebble"; by default what VLMKIT_MODEL names, else pebble.',
            show_default=False,
        ),
    ] = None,
    plan: PlanText = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Length of the answer at most.")
    ] = 64,
    answer_only: Annotated[
        bool,
        typer.Option(
            "--answer-only", help="Print the answer and nothing else.", show_default=False
        ),
    ] = False,
    trust_remote_code: Code = False,
):
    """Ask a model about one picture or several, and show what was loaded for it."""
    *paths, question = words or [None]
    if not paths:
        raise typer.BadParameter(
            "at least one picture and then a question are required: "
            'vlmkit ask cat.jpg "What is it?"'
        )
    # What can be wrong with the pictures and the plan is told before anything slow begins.
    pictures = _read(paths)
    if os.path.isfile(question):
        raise QuestionError(f"{question} is a file: after the pictures comes a question.")
    from vlmkit.evaluation import check_question
    from vlmkit.plan import Plan

    check_question(question)
    plan = None if plan is None else Plan.parse(plan)
    run = _Run(name_of(model), plan, max_new_tokens, trust_remote_code)
    if answer_only:
        print(run.answer(*run.load(), pictures, question))
        return
    for path, picture in zip(paths, pictures, strict=True):
        print(f"picture    {path} ({picture.width} x {picture.height} pixels)")
    print(f"question   {question}")
    run.show(pictures, question)


def first_answer():
    """The bundled model on a bundled picture, with everything that is worth seeing."""
    from vlmkit.course.pictures import FIRST

    here = Path.cwd()
    path = FIRST.path.relative_to(here) if FIRST.path.is_relative_to(here) else FIRST.path
    ask([str(path), FIRST.question])
    print('\nNow ask about a picture of yours:  python -m vlmkit ask PICTURE "QUESTION"')


def anatomy(model: Model = None, trust_remote_code: Code = False):
    """Show which component of a model has which parameters, without its weights."""
    from vlmkit.anatomy import anatomy
    from vlmkit.backend.quiet import quiet

    with quiet():
        found = anatomy(name_of(model), trust_remote_code=trust_remote_code)
    print(found)


def _read(paths):
    from vlmkit.images import read_all

    try:
        return read_all(paths)
    except ImageError as error:
        if len(paths) > 1 and not any(map(os.path.exists, paths[1:])):
            raise ImageError(f"{error} A question of several words is put in quotes.") from error
        raise


class _Run:
    """One model, loaded to answer one question."""

    def __init__(self, name, plan, max_new_tokens, trust_remote_code):
        self.name = name
        self.plan = plan
        self.max_new_tokens = max_new_tokens
        self.code = {"trust_remote_code": trust_remote_code}

    def load(self):
        from vlmkit.loading import load

        return load(self.name, self.plan, **self.code)

    def answer(self, model, processor, pictures, question):
        from vlmkit.backend.quiet import quiet
        from vlmkit.evaluation import ask

        with quiet():
            return ask(model, processor, pictures, question, max_new_tokens=self.max_new_tokens)

    def show(self, pictures, question):
        import vlmkit as vk

        print(f"model      {self.name}", flush=True)
        start = time.perf_counter()
        model, processor = self.load()
        loaded = time.perf_counter()
        answer = self.answer(model, processor, pictures, question)
        answered = time.perf_counter()
        print(f"answer     {answer}")
        print(f"time       loading {loaded - start:.1f} s, answering {answered - loaded:.1f} s\n")
        print("What was loaded, every module audited against the plan:\n")
        # of a checkpoint that is quantized: what it holds
        plan = self.plan or vk.loading.plan_of(model)
        print(vk.audit(model, plan))
        print(f"\n{self._saving(plan, vk.memory.measure(model))}")

    def _saving(self, plan, measured):
        """What the plan costs by component beside bf16, as text."""
        import pandas as pd

        from vlmkit import memory

        ledgers = {
            "bf16": memory.predict(self.name, "bf16", **self.code),
            "this plan": memory.predict(self.name, plan, **self.code),
        }
        table = pd.DataFrame({title: ledger.by_component for title, ledger in ledgers.items()})
        table.loc["total"] = table.sum()
        saved = 1 - table["this plan"] / table["bf16"]
        table = (table / memory.MEGABYTE).map("{:.2f} MB".format)
        table["saved"] = saved.map("{:.0%}".format)
        predicted = ledgers["this plan"].total
        found = "the same" if measured.total == predicted else f"{measured.total:,}"
        return (
            "Bytes, predicted from the config alone (1 MB = 10^6 bytes):\n\n"
            f"{table.to_string()}\n\n"
            f"predicted {predicted:,} bytes; measured on the loaded model: {found}"
        )
