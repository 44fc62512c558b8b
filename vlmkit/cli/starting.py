"""`vlmkit new`: a project to begin with."""

import shlex
from pathlib import Path

from vlmkit.cli.options import MODEL, argument, name_of, option

EXAMPLES = """\
Examples:

\b
  vlmkit new my-task
  vlmkit new my-task --model cobble

Then replace the pictures and the rows by your own. README.md in the new folder says how.
"""


def new(
    folder: argument(Path, "The folder to write. It does not exist yet, or is empty.", "FOLDER"),
    model: option(
        str, f"{MODEL}; by default what VLMKIT_MODEL names, else pebble.", metavar="MODEL"
    ) = None,
):
    """Write a project: ten pictures, their rows, a training file and a notebook that uses them."""
    from vlmkit.course.project import write

    written = write(folder, name_of(model))
    print(f"written to {written}\n\n  cd {shlex.quote(str(folder))}\n  jupyter lab task.ipynb")
    print("\nOr without the notebook: vlmkit train train.yaml. README.md says what to replace.")
