"""The exercises of every chapter: solutions are right, mistakes are named, and nothing raises.

`scripts/solutions.py` selects what a stub needs of its chapter, and this process runs it once for
each chapter. A new chapter needs its mistakes in `mistakes.py`, and nothing here.
"""

import ast
import contextlib
import io
import math
import os
import runpy
from decimal import Decimal
from fractions import Fraction

import nbformat
import pytest
import torch
from chapters import FOLDER
from mistakes import HELPERS, MISTAKES, in_steps
from torch.nn import functional

import vlmkit as vk
from vlmkit.catalog.bundled import BUNDLED
from vlmkit.course.exercises import EXERCISES, attempted, verdict
from vlmkit.errors import ExerciseError

script = runpy.run_path(str(FOLDER.parent / "scripts" / "solutions.py"))
CHAPTERS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


class Hostile:
    """Raises whatever is done with it."""

    def __getattribute__(self, name):
        raise RuntimeError("touched")

    __call__ = __len__ = __iter__ = __float__ = __eq__ = __repr__ = __bool__ = __getattribute__
    __hash__ = None


NONSENSE = ["", "nonsense", float("nan"), -1, True, [], {}, object(), Hostile(), lambda: 1 / 0]
NONSENSE += [torch.full((2, 3), torch.nan), torch.nn.Linear(2, 2), [None], {"a": None}, len, int]


@contextlib.contextmanager
def as_found():
    """Restore the folder, the gradient mode and the number of threads after a chapter."""
    folder, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(FOLDER)
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        os.chdir(folder)


class Chapter:
    """A chapter whose statements that the stubs need have run in `scope`."""

    def __init__(self, path):
        self.path = path
        self.notebook = nbformat.read(path, as_version=4)
        self.stubs = script["stubs"](self.notebook)
        self.scope, self.shown = {}, ""
        for source in script["setting"](self.notebook):
            self.shown += printed(source.replace("../data/", "data/"), self.scope)

    def calls(self):
        """(stub, name of the exercise, what the stub sees, data given) of each check."""
        for stub in self.stubs:
            source = stub.source[stub.source.index(script["CHECK"]) :]
            call = ast.parse(source).body[0].value
            scope = dict(self.scope)
            said(stub.source, scope)
            given = {k.arg: eval(ast.unparse(k.value), scope) for k in call.keywords}
            yield stub, call.args[0].value, scope, given


@pytest.fixture(scope="module", params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    if request.param.stem == "06_the_recipe" and not BUNDLED["cobble"].is_current:
        pytest.skip("cobble is not in the cache: run vlmkit fetch cobble")
    shell = ("VLMKIT_MODEL", "MPLBACKEND", "VLMKIT_STUDENT", "VLMKIT_SCORES")
    before = {name: os.environ.pop(name, None) for name in shell}
    with as_found():
        yield Chapter(request.param)
    os.environ.update({name: value for name, value in before.items() if value is not None})


def printed(source, scope):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(source, scope)
    return output.getvalue()


def said(source, scope):
    return " ".join(printed(source, scope).split())


def committed(chapter):
    return nbformat.read(script["FOLDER"] / chapter.path.name, as_version=4)


def test_has_at_least_two_with_their_effort(chapter):
    assert len(chapter.stubs) >= 2
    for number, stub in enumerate(chapter.stubs, 1):
        text = script["asked"](chapter.notebook, stub)
        assert text.startswith(f"**{number}. ") and " minutes)*" in text
        assert set(stub.metadata["solution"]) == {"code", "text"}
    assert any(f"(solutions/{chapter.path.name})" in cell.source for cell in chapter.notebook.cells)


def test_unattempted(chapter):
    for stub, name, _, _ in chapter.calls():
        assert said(stub.source, dict(chapter.scope)) == f"{name}: not attempted yet"


def test_solutions_are_right_and_print_what_is_committed(chapter):
    """So `make test` need not run the notebooks of solutions, too: they are the code that this
    module has run. `make test-all` runs them."""
    cells = [cell for cell in committed(chapter).cells if cell.cell_type == "code"]
    stored, scope = {cell.source: cell.outputs for cell in cells}, dict(chapter.scope)
    for stub in chapter.stubs:  # a solution may use those before it
        source = script["solved"](stub)
        (output,) = stored.pop(source)
        text = printed(source, scope)
        assert text.startswith("Right: ")
        assert (output.name, output.text) == ("stdout", text)
    assert not any(stored.values())  # the statements of the chapter show nothing
    assert chapter.shown == ""


def test_students_have_numbers_of_their_own(chapter, monkeypatch):
    """Where a chapter uses `vk.course.seed`: another name asks for another answer, which is right,
    and another student's answer is wrong."""
    seeded = [s for s in script["setting"](chapter.notebook) if "vk.course.seed(" in s]
    names = {name for source in seeded for name in script["Names"](ast.parse(source)).defined}
    asked = [s for s in chapter.stubs if names & script["Names"](ast.parse(s.source)).used]
    assert len(asked) == len(seeded) == (chapter.path.stem[:2] in ("00", "04", "09", "10"))
    answers = {}
    for student in ("", "Ada", "Alan"):
        monkeypatch.setenv("VLMKIT_STUDENT", student)
        scope = dict(chapter.scope)
        for source in seeded:
            printed(source.replace("../data/", "data/"), scope)
        for stub in asked:
            assert said(script["solved"](stub), scope).startswith("Right: ")
            first, check = script["split"](stub)
            name = first.partition(" = ")[0]
            answers[student] = scope[name]
            for other in answers.values():
                right = said(check, scope | {name: other}).startswith("Right: ")
                assert right == (other == scope[name])
    assert len({str(answer) for answer in answers.values()}) == len(answers)


def test_mistakes_are_named(chapter):
    for _, name, scope, given in chapter.calls():
        assert len(MISTAKES[name]) >= 2
        for answer, words in MISTAKES[name].items():
            hint = verdict(name, eval(answer, HELPERS | scope), **given).text
            assert hint.startswith("Not yet: ") and words in hint, (name, answer, hint)


def test_whatever_the_answer_a_sentence_comes_out(chapter):
    for _, name, _, given in chapter.calls():
        for answer in NONSENSE:
            found = verdict(name, answer, **given)
            assert found.text.startswith("Not yet: ") and found.right is False, (name, answer)


def test_committed_solutions_are_those_of_the_chapter(chapter):
    made = script["solutions"](chapter.path)
    made, stored = (
        [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]
        for notebook in (made, committed(chapter))
    )
    assert stored == made


def test_every_check_is_of_an_exercise_and_has_mistakes():
    asked = [
        ast.literal_eval(stub.source.partition(script["CHECK"])[2].split(",")[0])
        for path in CHAPTERS
        for stub in script["stubs"](nbformat.read(path, as_version=4))
    ]
    assert sorted(asked) == sorted(EXERCISES) == sorted(MISTAKES)


def in_other_types(name, function):
    """The right answer, returning a list with a tensor for each row, and an array."""
    yield name, lambda *arguments: list(function(*arguments))
    yield name, lambda *arguments: function(*arguments).numpy()


def double_quantized(absmax, values):
    """Codes of 8 bits in a dtype of 8 bits."""
    blocks = (absmax - absmax.mean()).split(256)
    largest = torch.stack([block.abs().max() for block in blocks])
    scaled = [b / most.clamp(min=1e-38) for b, most in zip(blocks, largest, strict=True)]
    codes = torch.bucketize(torch.cat(scaled), (values[1:] + values[:-1]) / 2)
    return codes.to(torch.uint8), largest, absmax.mean()


def added_up(x, weight, dtype):
    """Products and their sums in `dtype`, a token at a time."""
    w = vk.formats.dequantize(weight).to(dtype)
    return torch.stack([(row.to(dtype) * w).sum(1) for row in x]).to(x.dtype)


def in_bf16(x, weight, threshold):
    """LLM.int8 with its outlier columns in bf16."""
    kept = (x.abs() >= threshold).any(0)
    large = x[:, kept].bfloat16() @ weight[:, kept].bfloat16().T
    return in_steps(x[:, ~kept]) @ in_steps(weight[:, ~kept]).T + large.float()


def p_in(kind):
    return lambda lost, won: kind(vk.evaluation.mcnemar(lost, won))


OTHERWISE = [
    *in_other_types("patches", lambda p, s: functional.unfold(p[None], s, stride=s)[0].T),
    *in_other_types("attention", functional.scaled_dot_product_attention),
    *in_other_types("merging", lambda e, ids, i, v: e.masked_scatter((ids == i)[:, None], v)),
    *in_other_types("causal mask", lambda n: torch.full((n, n), -math.inf).triu(1)),
    *in_other_types("causal mask", lambda n: torch.ones(n, n).tril() > 0),
    *(("exact paired test", p_in(kind)) for kind in (torch.tensor, Fraction, Decimal)),
    ("two codes a byte", lambda codes: bytes(16 * int(c[0]) + int(c[-1]) for c in codes.split(2))),
    ("scales of scales", double_quantized),
    ("a 4-bit layer", added_up),
    ("outlier columns", in_bf16),
]
"""Right answers in forms that no solution has."""


@pytest.mark.parametrize("name, answer", OTHERWISE)
def test_a_right_answer_in_another_form_is_accepted(name, answer):
    assert verdict(name, answer).right, verdict(name, answer)


def test_a_function_without_a_body_is_not_attempted():
    def stub(a, b):
        """What it returns."""

    def bare(a, b): ...

    def returned(a, b):
        return a

    def hard_coded(a, b):
        return 0.5

    found = [attempted(answer) for answer in (None, stub, bare, returned, hard_coded, len, 0)]
    assert found == [False] * 3 + [True] * 4


def test_more_answers_lost_than_won_are_asked_for():
    """The other side of the test has a small p, too. And 49 lost can be the right answer."""
    found = verdict("beyond noise", 0, won=10, asked=600)
    assert not found.right and "better than bf16" in found.text
    assert verdict("beyond noise", 49, won=30, asked=600).right


def test_our_own_mistakes_are_errors():
    with pytest.raises(ExerciseError, match="'equal costs' is not .* Did you mean 'equal cost'"):
        vk.course.check("equal costs", 1)
    with pytest.raises(ExerciseError, match="takes trained, rank beside the answer"):
        vk.course.check("equal cost", None, ranks=8)


def test_a_selection_keeps_what_is_needed_in_order():
    """A statement that changes a needed object is needed; one that only shows is not."""
    cells = ["import a\nimport plt", "x = a.one()\n\n\ndef f(y):\n    return x + y + z\n\n\nw = 3"]
    cells += ["plt.plot(x)\nx[0] += 1\nz = [x for x in w]"]
    cells += ["a.seed(1)\na.assert_close(x)\nz.append(a.two())\nw = x\na.shown(x)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    stub = nbformat.v4.new_code_cell('answer = None\nvk.course.check("it", answer, f=f)')
    stub.metadata["solution"] = {"code": "import vk\n\nanswer = 1", "text": ""}
    notebook.cells.append(stub)
    kept = ["import a", "x = a.one()\n\n\ndef f(y):\n    return x + y + z\n\n\nw = 3"]
    kept += ["x[0] += 1\nz = [x for x in w]", "a.seed(1)\nz.append(a.two())"]
    assert script["setting"](notebook) == kept
