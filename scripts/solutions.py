"""Make notebooks/solutions/ from the chapters: `make solutions`, or one by its number.

    python scripts/solutions.py 08

An exercise is a stub in a chapter: a cell that calls `vk.course.check`. Its solution is in the
metadata of that cell, as {"code": ..., "text": ...}, and nowhere else. A notebook of solutions has
first the statements of the chapter that the exercises need, and no training that they do not need,
and then each exercise with its text, the solved stub, and a remark. `tests/test_exercises.py`
compares the committed notebooks with what this script makes.
"""

import ast
import builtins
import re
import sys
from pathlib import Path

import nbformat
from nbformat import v4

CHAPTERS = Path(__file__).resolve().parent.parent / "notebooks"
FOLDER = CHAPTERS / "solutions"
CHECK = "vk.course.check("
SHOWING = {"plt", "vk"}  # calls of these that are not assigned only show something


class Names(ast.NodeVisitor):
    """Four sets of names in a piece of code.

    used: read before they are set. defined: set. changed: their object changes, by `x[...] = `,
    `x.y = ` or a call `x.method(...)` that is not assigned. late: read by functions when they are
    called.
    """

    def __init__(self, node, local=()):
        self.used, self.defined, self.changed, self.late = set(), set(local), set(), set()
        self.visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.defined.add(node.id)
        elif node.id not in self.defined:
            self.used.add(node.id)

    def visit_Assign(self, node):
        for part in (node.value, *node.targets):  # in the order of evaluation
            self.visit(part)

    def visit_AugAssign(self, node):
        self.visit(node.value)
        target = node.target
        self.used |= {root(target)} - self.defined
        self.visit(target)

    def visit_For(self, node):
        for part in (node.iter, node.target, *node.body, *node.orelse):
            self.visit(part)

    def visit_Import(self, node):
        self.defined |= {(name.asname or name.name).partition(".")[0] for name in node.names}

    visit_ImportFrom = visit_Import

    def visit_Subscript(self, node):
        if isinstance(node.ctx, ast.Store):
            self.changed.add(root(node))
        self.generic_visit(node)

    visit_Attribute = visit_Subscript

    def visit_Expr(self, node):
        function = getattr(node.value, "func", None)
        if isinstance(function, ast.Attribute) and not function.attr.startswith("assert"):
            self.changed |= {root(function)} - SHOWING
        self.generic_visit(node)

    def inside(self, body, local=()):
        """Visit code with its own scope: its names stay inside, its reads come from here."""
        found = [Names(part, local) for part in body]
        set_there = set().union(*(each.defined for each in found))
        self.used |= set().union(*(each.used for each in found)) - set_there - self.defined
        self.late |= set().union(*(each.late for each in found)) - set_there

    def visit_FunctionDef(self, node):
        for default in (*node.args.defaults, *node.args.kw_defaults, *node.decorator_list):
            if default is not None:
                self.visit(default)
        body = Names(ast.Module(node.body, []), arguments(node))
        self.late |= (body.used | body.late) - body.defined
        self.defined.add(node.name)

    def visit_Lambda(self, node):
        self.inside([node.body], arguments(node))

    def visit_ClassDef(self, node):
        for part in (*node.bases, *node.decorator_list):
            self.visit(part)
        self.inside(node.body)
        self.defined.add(node.name)

    def visit_GeneratorExp(self, node):
        local = set()
        for loop in node.generators:
            self.inside([loop.iter], local)
            local |= {name.id for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
            self.inside(loop.ifs, local)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.inside(parts, local)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp


def imported(source):
    imports = ast.Import, ast.ImportFrom
    found = (node for node in ast.walk(ast.parse(source)) if isinstance(node, imports))
    return set().union(*(Names(node).defined for node in found))


def arguments(function):
    return [part.arg for part in ast.walk(function.args) if isinstance(part, ast.arg)]


def root(node):
    """`x` of `x.y[z].w(...)`, or None if this begins with something else than a name."""
    while not isinstance(node, ast.Name):
        node = getattr(node, "value", getattr(node, "func", None))
        if node is None:
            return None
    return node.id


def stubs(notebook):
    """The cells that a reader fills in."""
    return [cell for cell in notebook.cells if CHECK in cell.source and "solution" in cell.metadata]


def split(stub):
    """(first statement, rest) of a stub's source: `name = None` or a function without a body, and
    what follows it."""
    lines, end = stub.source.splitlines(), ast.parse(stub.source).body[0].end_lineno
    return "\n".join(lines[:end]), "\n".join(lines[end:]).lstrip("\n")


def solved(stub):
    """The stub's source with the solution in place of its first statement."""
    code, (_, rest) = stub.metadata["solution"]["code"], split(stub)
    last = ast.parse(code).body[-1]
    gap = "\n\n\n" if isinstance(last, ast.FunctionDef | ast.ClassDef) else "\n"
    return code + gap + rest


def setting(notebook):
    """The sources of a chapter's cells, with only the statements that the solved stubs need."""
    asked = stubs(notebook)
    before = notebook.cells[: notebook.cells.index(asked[-1])]
    chapter = [c.source for c in before if c.cell_type == "code" and c not in asked]
    names = Names(ast.parse("\n".join(solved(stub) for stub in asked)))
    modules = set().union(*(imported(source) for source in chapter))
    wanted, known = names.used | names.late - names.defined, set(dir(builtins))
    while True:
        needed, late, cells = wanted - known, set(), []
        for source in reversed(chapter):
            kept = []
            for statement in reversed(ast.parse(source).body):
                names = Names(statement)
                if not kept and isinstance(statement, ast.Expr):
                    names.changed -= modules  # torch.manual_seed(0) is for what comes after it
                if needed & (names.defined | names.changed):
                    kept.insert(0, statement)
                    needed = (needed - names.defined) | names.used - known
                    late |= names.late - known
            if kept:
                cells.insert(0, joined(source, kept))
        if late <= wanted:
            break
        wanted |= late  # a function may read what is set after it
    if needed:
        raise ValueError(f"nothing in the chapter defines {', '.join(sorted(needed))}")
    return cells


def joined(source, statements):
    """The lines of some statements of a cell, with the empty lines between them."""
    lines, text, end = source.splitlines(), "", None
    for statement in statements:
        begin = min(
            [statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))]
        )
        if end is not None:
            between = [line.strip() for line in lines[end : begin - 1]]
            text += "\n" * (1 + max(between[:2].count(""), between[-2:].count("")))
        text += "\n".join(lines[begin - 1 : statement.end_lineno])
        end = statement.end_lineno
    return text.replace('"data/', '"../data/')  # a path from the chapter's folder


def asked(notebook, stub):
    """The text of an exercise, above its stub: from its number on, without its hint."""
    above = notebook.cells[notebook.cells.index(stub) - 1].source
    begin = re.search(r"^\*\*\d+\. ", above, re.M).start()
    return re.sub(r"\n*<details>.*?</details>", "", above[begin:], flags=re.S).strip()


def solutions(path):
    """The notebook of solutions for the chapter at `path`, not run yet."""
    chapter = nbformat.read(path, as_version=4)
    title = chapter.cells[0].source.splitlines()[0].removeprefix("# ")
    cells = [
        v4.new_markdown_cell(
            f"# Solutions: {title}\n\nTo the exercises of [the chapter](../{path.name}). Made from "
            "it by `make solutions`: edit it there. First what they need of it:"
        )
    ]
    cells += [v4.new_code_cell(source) for source in setting(chapter)]
    for stub in stubs(chapter):
        cells += [v4.new_markdown_cell(asked(chapter, stub)), v4.new_code_cell(solved(stub))]
        cells.append(v4.new_markdown_cell(stub.metadata["solution"]["text"]))
    for number, cell in enumerate(cells):
        cell["id"] = f"solution-{number:02d}"
    metadata = {"kernelspec": chapter.metadata["kernelspec"]}
    return v4.new_notebook(cells=cells, metadata=metadata)


def is_bar(output):
    """Whether an output is a piece of a progress bar, which differs in every run."""
    text = output.get("text", "")
    return output.get("name") == "stderr" and (text.startswith("\r") or not text.strip())


def main(numbers):
    from nbclient import NotebookClient

    for path in sorted(CHAPTERS.glob("[0-9][0-9]_*.ipynb")):
        if numbers and path.name[:2] not in numbers:
            continue
        notebook = solutions(path)
        resources = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if not is_bar(output)]
        nbformat.write(notebook, FOLDER / path.name)
        print(f"{path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main(sys.argv[1:])
