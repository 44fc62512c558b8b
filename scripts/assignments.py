"""Make assignments for nbgrader from the chapters: `make assignments`, or some by their numbers.

    python scripts/assignments.py 00 04
    python scripts/assignments.py --mark

An assignment has the exercises of a chapter, and of the chapter only what the exercises need, so it
runs in seconds. Everything comes from the stubs in the chapters, as `scripts/solutions.py` reads
them. Each exercise becomes two cells: the answer, which the student edits, and the check, which is
locked and gives the points. There is a point for every five minutes that the exercise is said to
take. build/nbgrader becomes a course folder of nbgrader, with its configuration.

--mark instead writes into the chapters themselves: the stubs get nbgrader's metadata of an answer
that a person grades, because there the answer and its check are one cell. Nothing else changes. Run
it after a change to the exercises; `tests/test_assignments.py` says when it is needed.
"""

import json
import re
import shutil
import sys

import nbformat
import solutions
from nbformat import v4

ROOT = solutions.CHAPTERS.parent
COURSE = ROOT / "build" / "nbgrader"
FILES = {'"../data/': "notebooks/data", '"../benchmarks/results': "benchmarks/results"}
"""Folders that the cells of an assignment may read, by the text that names them in the cells."""

TO_STDOUT = """\
# nbgrader gives no points for a cell that writes to stderr, as warnings and progress bars do.
import sys

sys.stderr = sys.stdout"""

CONFIG = """# Made by `make assignments`. Set the name of your course here.
import os
from pathlib import Path

# kernels/ holds a kernel that starts the Python with vlmkit in it. nbgrader's own has none.
folders = [str(Path.cwd()), os.environ.get("JUPYTER_PATH")]
os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, folders))

c = get_config()
c.CourseDirectory.course_id = "vlmkit"
c.ClearSolutions.code_stub = {"python": "# Your answer comes here."}
c.ExecutePreprocessor.timeout = 300
"""


HEADER = """# Exercises: {title}

These are the exercises of the chapter {name}. Keep the chapter open beside this notebook: a text
such as "write that rule" means what the chapter says just above the exercise, and the chapter has a
hint for most exercises.

Run the cells one by one, from the top. Write each answer into the cell that says so, and run the
check below it. The check prints what is wrong. `AssertionError` below a check means: no points yet.
Please do not change the other cells."""


def points(text):
    """The points for an exercise with this text: one for every five minutes."""
    return max(1, round(int(re.search(r"\*\((\d+) minutes?\)\*", text)[1]) / 5))


def grade_id(stub):
    """A name for nbgrader: "projector-kept" of a stub that checks "projector kept"."""
    name = re.search(re.escape(solutions.CHECK) + r"\s*([\"'])(.+?)\1", stub.source)[2]
    return re.sub(r"\W+", "-", name).strip("-")


def metadata(name, **more):
    """nbgrader's metadata of a cell, in the third version of its schema."""
    kind = {"grade": False, "solution": False, "locked": False, "task": False} | more
    return {"nbgrader": {"grade_id": name, "schema_version": 3, **kind}}


def answer_and_check(stub, worth):
    """The two cells of an exercise."""
    name, code = grade_id(stub), stub.metadata["solution"]["code"]
    first, rest = solutions.split(stub)
    # nbgrader indents its "Your answer comes here" like the mark, so it comes into the function.
    indent = "    " if first.startswith("def ") else ""
    answer = f"{first}\n{indent}### BEGIN SOLUTION\n{code}\n{indent}### END SOLUTION"
    check = rest.replace(solutions.CHECK, f"assert {solutions.CHECK}")
    cells = v4.new_code_cell(answer), v4.new_code_cell(check)
    cells[0].metadata.update(metadata(f"{name}-answer", solution=True))
    cells[1].metadata.update(metadata(name, grade=True, locked=True, points=worth))
    return cells


def assignment(path):
    """The notebook of the assignment for the chapter at `path`, with its solutions inside."""
    chapter = nbformat.read(path, as_version=4)
    title = chapter.cells[0].source.splitlines()[0].removeprefix("# ")
    cells = [v4.new_markdown_cell(HEADER.format(title=title, name=path.stem))]
    for source in (TO_STDOUT, *solutions.setting(chapter)):
        cells.append(v4.new_code_cell(source))
    for cell in cells:
        cell.metadata.update(metadata("", locked=True))
    for stub in solutions.stubs(chapter):
        text = solutions.asked(chapter, stub)
        cells.append(v4.new_markdown_cell(text))
        cells[-1].metadata.update(metadata("", locked=True))
        cells += answer_and_check(stub, points(text))
    for number, cell in enumerate(cells):
        cell["id"] = f"assignment-{number:02d}"
        if cell.metadata["nbgrader"]["grade_id"] == "":
            cell.metadata["nbgrader"]["grade_id"] = f"given-{number:02d}"
    return v4.new_notebook(cells=cells, metadata={"kernelspec": chapter.metadata["kernelspec"]})


def write(path, course=COURSE):
    """Write the assignment for the chapter at `path` into nbgrader's folder source/, with the files
    that it reads. Returns its folder."""
    notebook, folder = assignment(path), course / "source" / path.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = "\n".join(cell.source for cell in notebook.cells)
    for there, source in FILES.items():
        if there in text:
            (folder / "data").mkdir(exist_ok=True)
            for file in (ROOT / source).iterdir():
                if f"/{file.name}" in text or f'"{file.stem}"' in text:
                    shutil.copyfile(file, folder / "data" / file.name)
        for cell in notebook.cells:
            cell.source = cell.source.replace(there, '"data/' if there[-1] == "/" else '"data')
    nbformat.write(notebook, folder / path.name)
    kernel = course / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    kernel.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    config = course / "nbgrader_config.py"
    if not config.exists():
        config.write_text(CONFIG, encoding="utf-8")
    return folder


def marks(chapter):
    """{id of a stub: nbgrader's metadata for it} of a chapter."""
    return {
        stub.id: metadata(
            grade_id(stub), grade=True, solution=True, points=points(solutions.asked(chapter, stub))
        )["nbgrader"]
        for stub in solutions.stubs(chapter)
    }


def mark(path):
    """Put nbgrader's metadata on the stubs of the chapter at `path`. Returns whether it changed."""
    chapter = nbformat.read(path, as_version=4)
    wanted, changed = marks(chapter), False
    for cell in chapter.cells:
        if cell.metadata.get("nbgrader") != wanted.get(cell.id):
            cell.metadata.pop("nbgrader", None)
            cell.metadata.update({"nbgrader": wanted[cell.id]} if cell.id in wanted else {})
            changed = True
    if changed:
        nbformat.write(chapter, path)
    return changed


def main(arguments):
    numbers = [argument for argument in arguments if argument != "--mark"]
    for path in sorted(solutions.CHAPTERS.glob("[0-9][0-9]_*.ipynb")):
        if not numbers or path.name[:2] in numbers:
            if "--mark" in arguments:
                print(f"{path.name}: {'marked' if mark(path) else 'as it was'}")
            else:
                print(write(path).relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
