"""The command line: a first answer, and the same for one's own pictures.

    python -m vlmkit                                       # the bundled model and picture
    python -m vlmkit ask cat.jpg "What is on the sofa?"    # one's own, or another model
    python -m vlmkit anatomy pebble                        # which component has which parameters

Exit status: 0 for an answer, 2 for a mistake in what was asked, told in a sentence, and 130 after
Ctrl-C. A traceback means a defect of vlmkit's.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from vlmkit import __version__
from vlmkit.errors import ImageError, QuestionError, VlmkitError

DESCRIPTION = """\
Without a command: load the bundled model with its language model in 4 bits, ask it about a bundled
picture, and show what was loaded and what that saves.
"""
PLAN_HELP = (
    '"recommended" (the default: language model in nf4, the rest in bf16), one format for all, '
    "such as bf16, or formats by component, such as vision_encoder=bf16,language_model=nf4"
)
MODEL_HELP = 'a folder, a hub id or "pebble"; by default what VLMKIT_MODEL names, else pebble'
CODE_HELP = "let Python code that comes with the checkpoint run"


def main(argv=None):
    """Run the command line on `argv` (by default the process's own). Returns the exit status."""
    parser = _parser()
    # argparse finds the last words of "ask a.png b.png --plan nf4 question" to be one too many.
    args, late = parser.parse_known_args(argv)
    if late and (args.command != "ask" or any(word.startswith("-") for word in late)):
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    if args.command == "ask" and len(args.words) + len(late) < 2:
        parser.error('give at least one picture and then the question: ask cat.jpg "What is it?"')
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may answer in any alphabet
    try:
        if args.command == "ask":
            *paths, question = args.words + late
            _ask(args, paths, question)
        elif args.command == "anatomy":
            _anatomy(args)
        else:
            _first_answer()
        sys.stdout.flush()
    except VlmkitError as error:
        print(f"vlmkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m vlmkit", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"vlmkit {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    ask = commands.add_parser(
        "ask",
        help="ask a model about pictures of your own",
        usage='python -m vlmkit ask [options] PICTURE [PICTURE ...] "QUESTION"',
        description="Ask a model about one picture or several, and show what was loaded for it.",
    )
    ask.add_argument(
        "words",
        nargs="+",
        metavar="PICTURE ... QUESTION",
        help="files, then the question in quotes",
    )
    ask.add_argument("--model", metavar="NAME", help=MODEL_HELP)
    ask.add_argument("--plan", metavar="PLAN", help=PLAN_HELP)
    ask.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="length of the answer at most (64)",
    )
    ask.add_argument("--answer-only", action="store_true", help="print the answer and nothing else")
    ask.add_argument("--trust-remote-code", action="store_true", help=CODE_HELP)
    anatomy = commands.add_parser(
        "anatomy",
        help="show which component of a model has which parameters",
        description="Show which component of a model has which parameters, without its weights.",
    )
    anatomy.add_argument("model", nargs="?", metavar="NAME", help=MODEL_HELP)
    anatomy.add_argument("--trust-remote-code", action="store_true", help=CODE_HELP)
    return parser


def _first_answer():
    from vlmkit.pictures import FIRST

    options = argparse.Namespace(
        model=None, plan=None, max_new_tokens=64, answer_only=False, trust_remote_code=False
    )
    here = Path.cwd()
    path = FIRST.path.relative_to(here) if FIRST.path.is_relative_to(here) else FIRST.path
    _ask(options, [str(path)], FIRST.question)
    print('\nNow ask about a picture of yours:  python -m vlmkit ask PICTURE "QUESTION"')


def _ask(args, paths, question):
    # What can be wrong with the pictures and the plan is told before anything slow begins.
    pictures = _read(paths)
    if os.path.isfile(question):
        raise QuestionError(f"{question} is a file: after the pictures comes a question.")
    from vlmkit.evaluation import check_question
    from vlmkit.plan import Plan

    check_question(question)
    plan = None if args.plan is None else Plan.parse(args.plan)
    if args.answer_only:
        model, processor = _load(args, plan)
        print(_answer(args, model, processor, pictures, question))
        return
    import vlmkit as vk

    for path, picture in zip(paths, pictures, strict=True):
        print(f"picture    {path} ({picture.width} x {picture.height} pixels)")
    print(f"question   {question}")
    print(f"model      {_name(args)}", flush=True)
    start = time.perf_counter()
    model, processor = _load(args, plan)
    loaded = time.perf_counter()
    answer = _answer(args, model, processor, pictures, question)
    answered = time.perf_counter()
    print(f"answer     {answer}")
    print(f"time       loading {loaded - start:.1f} s, answering {answered - loaded:.1f} s\n")
    print("What was loaded, every module audited against the plan:\n")
    plan = plan or vk.loading.plan_of(model)  # of a checkpoint that is quantised: what it holds
    print(vk.audit(model, plan))
    print(f"\n{_saving(args, plan, vk.memory.measure(model))}")


def _read(paths):
    from vlmkit.images import read_all

    try:
        return read_all(paths)
    except ImageError as error:
        if len(paths) > 1 and not any(map(os.path.exists, paths[1:])):
            raise ImageError(f"{error} A question of several words is put in quotes.") from error
        raise


def _name(args):
    from vlmkit.loading import default_model

    return args.model or default_model()


def _load(args, plan):
    from vlmkit.loading import load

    return load(_name(args), plan, trust_remote_code=args.trust_remote_code)


def _answer(args, model, processor, pictures, question):
    from vlmkit.evaluation import ask
    from vlmkit.loading.quiet import quiet

    with quiet():
        return ask(model, processor, pictures, question, max_new_tokens=args.max_new_tokens)


def _saving(args, plan, measured):
    """What the plan costs by component beside bf16, as text."""
    import pandas as pd

    from vlmkit import memory

    ledgers = {
        "bf16": memory.predict(_name(args), "bf16", trust_remote_code=args.trust_remote_code),
        "this plan": memory.predict(_name(args), plan, trust_remote_code=args.trust_remote_code),
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


def _anatomy(args):
    from vlmkit.anatomy import anatomy
    from vlmkit.loading.quiet import quiet

    with quiet():
        found = anatomy(_name(args), trust_remote_code=args.trust_remote_code)
    print(found)
