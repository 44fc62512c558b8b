"""The house: imports point one way, from the top of the list to what stands below it."""

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "vlmkit"
FLOORS = """
errors units tables rows folders catalog checkpoints images architectures headers anatomy formats
backend plan layout adapters families loading memory evaluation tasks sensitivity planner finetuning
linting tracing attention figures models course environment cli
""".split()  # noqa: SIM905 (a list of quoted words is no easier to read)
"""Lowest first: a module imports from its own floor and from those before it."""


def imported(path):
    """(line, floor) of every import of vlmkit in a file, those inside functions with them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vlmkit":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}".split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("vlmkit."):
                    yield node.lineno, alias.name.split(".")[1]


def test_imports_point_down_the_house():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        floor = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if floor not in ("__init__", "__main__"):
            for line, other in imported(path):
                if other in FLOORS and FLOORS.index(other) > FLOORS.index(floor):
                    wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {other}")
    assert wrong == []


def test_every_module_has_a_floor():
    there = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] not in "_."
    }
    assert there == set(FLOORS)


def test_a_name_means_one_thing():
    """No two classes have the same name, and no two files, with two exceptions: the commands of the
    command line, and the models, whose files correspond to each other (recipe, train)."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.stem[0] != "_"]
    paths = [path for path in paths if path.parent.name != "cli"]
    homes = {(path.stem, "models" if "models" in path.parts else path.parent) for path in paths}
    stems = Counter(stem for stem, _ in homes)
    classes = Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (stems + classes).items() if count > 1] == []
