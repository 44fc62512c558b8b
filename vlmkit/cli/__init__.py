"""The command line: a first answer, your own pictures, questions about memory, and training.

    vlmkit                                            # pebble on a drawing, cobble on a photograph
    vlmkit ask cat.jpg "What is this?" --model cobble # your own picture, or another model
    vlmkit fetch cobble                               # the model for photographs, 93 MB, once
    vlmkit anatomy pebble                             # which component has which parameters
    vlmkit memory pebble --plan nf4                   # what a model needs
    vlmkit fit pebble --card "RTX 4090"               # the most that fits on a card
    vlmkit fit                                        # which models fit on which card
    vlmkit lint pebble quantization_config.json       # what somebody's config will do
    vlmkit new my-task                                # a project: pictures, rows, notebook
    vlmkit train train.yaml                           # fine-tuning, as a file says
    vlmkit merge my-run/adapters my-model             # adapters and base as one model
    vlmkit doctor                                     # what this machine can run

`python -m vlmkit` does the same. The exit status is 0 for an answer; 1 if the answer is no (`lint`
finds an error, `memory` is over its budget, `doctor` finds that the course cannot run); 2 for a
mistake in the words, which a sentence explains; and 130 after Ctrl-C. With VLMKIT_TRACEBACK=1 an
error also shows where it happened.
"""

import atexit
import contextlib
import errno
import gc
import os
import sys
import traceback
import warnings
from pathlib import Path

import typer

from vlmkit import __version__
from vlmkit.cli import answering, checking, fetching, merging, sizing, starting, training
from vlmkit.cli.options import option
from vlmkit.errors import VlmkitError, brief, failed_import

# Without rich: not every terminal and no log file likes the characters of its boxes.
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each command has a help of its own, with examples: vlmkit memory --help",
)
for command, short, epilog in (
    (answering.ask, "Ask a model about your own pictures.", answering.EXAMPLES),
    (fetching.fetch, "Download the model for photographs, once.", fetching.EXAMPLES),
    (checking.anatomy, "Which component has which parameters.", checking.ANATOMY_EXAMPLES),
    (sizing.memory, "What a model needs, by component.", sizing.MEMORY_EXAMPLES),
    (sizing.fit, "What fits on a graphics card.", sizing.FIT_EXAMPLES),
    (checking.lint, "What a quantization config will really do.", checking.LINT_EXAMPLES),
    (starting.new, "Write a project to begin with.", starting.EXAMPLES),
    (training.train, "Train a model as a file says.", training.EXAMPLES),
    (merging.merge, "Merge adapters into their base.", merging.EXAMPLES),
    (checking.doctor, "What this machine can run, and what is missing.", checking.DOCTOR_EXAMPLES),
):
    app.command(short_help=short, epilog=epilog)(command)


def _print_version(wanted):
    if wanted:
        print(f"vlmkit {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _first(
    context: typer.Context,
    version: option(
        bool, "Print the version.", "--version", shown=True, callback=_print_version, is_eager=True
    ) = False,
):
    """How a vision-language model is built, what it needs, and what it answers.

    Without a command: load pebble with its language model in 4 bits, ask it about a drawing, and
    show what was loaded and what that saves; then the same with cobble and a photograph.
    """
    if context.invoked_subcommand is None:
        answering.first_answer()


def main(argv=None):
    """Run the command line on `argv`, by default the process's own. Returns the exit status."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may answer in any alphabet
    # Otherwise Python searches all that was imported for garbage at its end, for a second or two.
    atexit.register(gc.freeze)
    formatted, warnings.formatwarning = warnings.formatwarning, _as_one_line
    try:
        status = typer.main.get_command(app).main(argv, _program(), standalone_mode=False)
        if sys.stdout:  # None if the shell has closed it: >&-
            sys.stdout.flush()
    except VlmkitError as error:
        _show_traceback()
        print(f"vlmkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (BrokenPipeError, SystemExit) as stop:  # a reader such as `head` has seen enough
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of typer's about the words
            return _unforeseen(error)
        where = getattr(error, "ctx", None)
        help_at = where.command_path if where else _program()
        print(f"vlmkit: {error.format_message()}\nTry {help_at} --help", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = formatted
    return status or 0


def _unforeseen(error):
    """Say in one line what nobody foresaw. Returns the exit status."""
    _show_traceback()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EBADF, errno.EIO):
        print(f"vlmkit: the output cannot be written: {brief(error)}", file=sys.stderr)
        with contextlib.suppress(OSError, AttributeError, ValueError):
            # Python would try again when it ends, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    said = failed_import(error) or (
        f"{brief(error, 400)}. Check the words and the files that you gave. If they are right, "
        "this is a defect of vlmkit: please report it with what VLMKIT_TRACEBACK=1 shows."
    )
    print(f"vlmkit: {said}", file=sys.stderr)
    return 2


def _show_traceback():
    if os.environ.get("VLMKIT_TRACEBACK"):
        traceback.print_exc()


def _as_one_line(message, *where, **more):
    """A warning as text, without the line of code that caused it."""
    return f"vlmkit: {message}\n"


def _program():
    """The words that call this program."""
    return "vlmkit" if Path(sys.argv[0]).stem == "vlmkit" else "python -m vlmkit"
