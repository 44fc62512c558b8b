"""Windows and macOS: what would break there is not in the repository, and no code relies on it."""

import ast
import shutil
import subprocess
from collections import Counter
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("vlmkit", "scripts", "benchmarks", "docs", "notebooks")
LONGEST = 200  # characters of a path, of the 260 that Windows allows with the folder of the course
RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(10))}
UNOPENED = {"rb", "wb", "ab", "xb", "r+b", "rb+", "w+b", "wb+"}


@pytest.fixture(scope="module")
def names():
    """Paths of all committed files, as git spells them."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    return subprocess.check_output(command, cwd=ROOT).decode().rstrip("\0").split("\0")


def problems(name):
    """What Windows would not take in a path."""
    for part in name.split("/"):
        if part.partition(".")[0].lower() in RESERVED:
            yield f"{part!r} is reserved"
        if set(part) & set('<>:"\\|?*') or min(part) < " " or part != part.rstrip(". "):
            yield f"{part!r} has a character, or an end, that is not allowed"
    if len(name) > LONGEST:
        yield f"longer than {LONGEST} characters"


@pytest.mark.parametrize("name", ["a/nul.txt", "a:b", "what?/c", "end. ", "x/" * 100 + "y"])
def test_what_windows_cannot_have_is_noticed(name):
    assert list(problems(name))


def test_file_names_are_ones_that_every_system_can_have(names):
    assert {name: found for name in names if (found := list(problems(name)))} == {}
    folded = Counter(name.casefold() for name in names)
    assert [name for name, count in folded.items() if count > 1] == []


def test_text_has_the_same_line_ends_everywhere(names):
    text = [name for name in names if Path(name).suffix not in {".png", ".jpg", ".ttf"}]
    text = [name for name in text if not name.endswith(".safetensors")]
    command = ["git", "check-attr", "-z", "eol", "--stdin"]
    given = subprocess.run(
        command, cwd=ROOT, input="\0".join(text), capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert {given[i] for i in range(2, len(given), 3)} == {"lf"}
    crlf = [
        name for name in text if (ROOT / name).exists() and b"\r\n" in (ROOT / name).read_bytes()
    ]
    assert crlf == []


# --- code -----------------------------------------------------------------------------------------


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            method = isinstance(function, ast.Attribute)
            yield node, function.attr if method else getattr(function, "id", ""), method


def without_encoding(source):
    """Lines that open a text file in whatever encoding the system has: on Windows not UTF-8."""
    for call, name, method in calls(ast.parse(source)):
        if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
            continue
        if name in ("read_text", "write_text"):
            yield call.lineno
        if name == "open" and (not method or _of_a_path(call)):
            place = 0 if method else 1
            modes = [k.value for k in call.keywords if k.arg == "mode"] + call.args[place:]
            mode = getattr(modes[0], "value", "r") if modes else "r"
            if mode not in UNOPENED:
                yield call.lineno


def _of_a_path(call):
    """Whether `x.open(...)` can be a path's: its first argument is a mode, or there is none."""
    owner = getattr(call.func.value, "id", "")
    mode = getattr(call.args[0], "value", None) if call.args else "r"
    return owner not in ("os", "Image") and isinstance(mode, str) and len(mode) <= 3


def joined_by_hand(source):
    """Lines in which a path to a file is put together with slashes of one system."""
    for call, name, _ in calls(ast.parse(source)):
        if name in ("open", "Path", "PurePath"):
            for node in (inner for argument in call.args for inner in ast.walk(argument)):
                parts = node.values if isinstance(node, ast.JoinedStr) else []
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                    parts = [node.left, node.right]
                if any(set(str(getattr(part, "value", ""))) & set("/\\") for part in parts):
                    yield call.lineno


@pytest.mark.parametrize(
    ("look", "good", "bad"),
    [
        (
            without_encoding,
            ["open(x, 'rb')", "open(x, encoding='utf-8')", "path.write_text(y, encoding='utf-8')",
             "path.open('rb')", "os.open(x, flags)", "Image.open(x)"],
            ["open(x)", "open(x, 'w')", "open(x, mode='r')", "path.read_text()",
             "path.open('w', newline='')"],
        ),
        (
            joined_by_hand,  # pathlib reads the slashes of a plain text on every system
            ["Path(folder) / 'config.json'", "Path('notebooks/data')"],
            ["open(f'{folder}/config.json', 'rb')", "Path(folder + '/config.json')"],
        ),
    ],
)  # fmt: skip
def test_code_that_is_not_portable_is_noticed(look, good, bad):
    assert [source for source in (*good, *bad) if list(look(source))] == bad


def test_code_names_encodings_and_lets_pathlib_join(names):
    found, looked = [], 0
    for name in names:
        file = ROOT / name
        if PurePath(name).parts[0] in CODE and file.suffix == ".py" and file.exists():
            source, looked = file.read_text(encoding="utf-8"), looked + 1
            found += [f"{name}:{line}: no encoding" for line in without_encoding(source)]
            found += [f"{name}:{line}: joined by hand" for line in joined_by_hand(source)]
    assert looked > 100
    assert found == []
