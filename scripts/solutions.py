"""Make notebooks/solutions/ from the lessons: `make solutions`, or one by its number.

    python scripts/solutions.py 07

An exercise is a stub in the lesson, a cell that calls `vk.course.check`; its solution is in the
cell's metadata, as {"code": ..., "text": ...}, and nowhere else. A notebook of solutions has the
statements of the lesson that the exercises need, so that no training is repeated that they can do
without, and then each exercise with its text, the stub filled in, and what there is to say of it.
`tests/test_exercises.py` holds what is committed against what this makes.
"""

import ast
import builtins
import re
import sys
from pathlib import Path

import nbformat
from nbformat import v4

LESSONS = Path(__file__).resolve().parent.parent / "notebooks"
FOLDER = LESSONS / "solutions"
CHECK = "vk.course.check("
SHOWING = {"plt", "vk"}  # a bare call of these only shows something


class Names(ast.NodeVisitor):
    """Names that code reads before it sets them (`used`), sets (`defined`), whose objects it
    changes (`changed`) by `x[...] = `, `x.y = ` or a bare call of `x.method(...)`, and that its
    functions read once they are called (`late`)."""

    def __init__(self, node, local=()):
        self.used, self.defined, self.changed, self.late = set(), set(local), set(), set()
        self.visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.defined.add(node.id)
        elif node.id not in self.defined:
            self.used.add(node.id)

    def visit_Assign(self, node):
        for part in (node.value, *node.targets):  # as it is evaluated, not as it is written
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
        """A scope of its own: what it sets is its own, what it reads is read from here."""
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
    """`x` of `x.y[z].w(...)`; None if it begins with something else."""
    while not isinstance(node, ast.Name):
        node = getattr(node, "value", getattr(node, "func", None))
        if node is None:
            return None
    return node.id


def stubs(notebook):
    """The cells that are to be filled in."""
    return [cell for cell in notebook.cells if CHECK in cell.source and "solution" in cell.metadata]


def solved(stub):
    """The stub's source with the solution in place of its first line, `name = None`."""
    code, (_, _, rest) = stub.metadata["solution"]["code"], stub.source.partition("\n")
    last = ast.parse(code).body[-1]
    gap = "\n\n\n" if isinstance(last, ast.FunctionDef | ast.ClassDef) else "\n"
    return code + gap + rest


def setting(notebook):
    """Sources of the lesson's cells, cut down to the statements that the solved stubs need."""
    first = notebook.cells.index(stubs(notebook)[0])
    lesson = [cell.source for cell in notebook.cells[:first] if cell.cell_type == "code"]
    names = Names(ast.parse("\n".join(solved(stub) for stub in stubs(notebook))))
    modules = set().union(*(imported(source) for source in lesson))
    wanted, known = names.used | names.late - names.defined, set(dir(builtins))
    while True:
        needed, late, cells = wanted - known, set(), []
        for source in reversed(lesson):
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
        raise ValueError(f"nothing in the lesson defines {', '.join(sorted(needed))}")
    return cells


def joined(source, statements):
    """The lines of some of a cell's statements, with the empty lines that stood between them."""
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
    return text.replace('"data/', '"../data/')  # a path from the lesson's folder


def asked(notebook, stub):
    """The exercise's text, from its number on, which stands above the stub, without its hint."""
    above = notebook.cells[notebook.cells.index(stub) - 1].source
    begin = re.search(r"^\*\*\d\. ", above, re.M).start()
    return re.sub(r"\n*<details>.*?</details>", "", above[begin:], flags=re.S).strip()


def solutions(path):
    """The notebook of solutions for the lesson at `path`, not run yet."""
    lesson = nbformat.read(path, as_version=4)
    title = lesson.cells[0].source.splitlines()[0].removeprefix("# ")
    cells = [
        v4.new_markdown_cell(
            f"# Solutions: {title}\n\nTo the exercises of [the chapter](../{path.name}). Made from "
            "it by `make solutions`: edit it there. First what they need of it:"
        )
    ]
    cells += [v4.new_code_cell(source) for source in setting(lesson)]
    for stub in stubs(lesson):
        cells += [v4.new_markdown_cell(asked(lesson, stub)), v4.new_code_cell(solved(stub))]
        cells.append(v4.new_markdown_cell(stub.metadata["solution"]["text"]))
    for number, cell in enumerate(cells):
        cell["id"] = f"solution-{number:02d}"
    metadata = {"kernelspec": lesson.metadata["kernelspec"]}
    return v4.new_notebook(cells=cells, metadata=metadata)


def main(numbers):
    from nbclient import NotebookClient

    for path in sorted(LESSONS.glob("[0-9][0-9]_*.ipynb")):
        if numbers and path.name[:2] not in numbers:
            continue
        notebook = solutions(path)
        resources = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, FOLDER / path.name)
        print(f"{path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main(sys.argv[1:])
