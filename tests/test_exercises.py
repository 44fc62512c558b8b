"""The exercises of every chapter: solutions are right, mistakes are named, and nothing raises.

What a stub needs of its chapter is taken from it as `scripts/solutions.py` does, and run once a
chapter, in this process. A chapter that is new needs its mistakes in MISTAKES and nothing else.
"""

import ast
import contextlib
import io
import os
import runpy

import nbformat
import numpy as np
import pytest
import torch
from chapters import FOLDER
from PIL import Image

import vlmkit as vk
from vlmkit.exercises import EXERCISES, verdict

script = runpy.run_path(str(FOLDER.parent / "scripts" / "solutions.py"))
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))

# Of each exercise: wrong answers, as expressions that see what the stub sees, and hints' words.
MISTAKES = {
    "projector kept": {
        "vk.Plan.recommended()": "Still as large as in bf16: vision_encoder",
        'vk.Plan.uniform("nf4")': "in this plan it is nf4",
        'vk.Plan(vision_encoder="int8", language_model="int8")': "Fewer bits",
        '{"language_model": "nf4"}': "a vk.Plan",
    },
    "beyond noise": {
        "4": "as large as its noise",
        "3": "the noise of 3 changed answers is 3.5",
        "30": "29 lost would be, too",
        "49": "this counts every question",
    },
    "left over": {
        'vk.anatomy(models[llama])["language_model"].parameters': "nothing is left out",
        "8030": "in millions",
        "6_285_398_016": "the dot behind the number",
        "8_925_322_771": "has the vision encoder and the projector in it",
        "1_409_351_680": "what these layers hold",
        "8.03": "a whole number",
    },
    "how little is enough": {
        "49": "the whole picture",
        "5": "it says purple",
        "20": "with fewer of them as well",
        "50": "has 49 patches",
    },
    "mean of a block": {
        "Pooled(blocks, 512)": "a pixel shuffle",
        "torch.nn.Linear(128, 192)": "(1, 49, 192); (1, 16, 192) is asked for",
        "lambda x: blocks(x).unflatten(2, (4, 128)).mean(dim=2)": "the tokens are 128 wide",
        "lambda x: blocks(x) @ x": "your function stops with RuntimeError",
        "Pooled": "this is the class Pooled",
        "Pooled(lambda x: blocks(x).unflatten(2, (128, 4)).mean(dim=-1))": "neighbouring channels",
        "Pooled(lambda x: blocks(x)[..., :128])": "not the mean of its four patches",
        "Pooled(lambda x: x[:, [24] * 9])": "the last column and row are lost",
    },
    "first to learn": {
        "{'cross_attn_attn_gate'}": "1 of 2 are missing",
        "{n for n, _ in layer.named_parameters()}": "stands behind a gate",
        "{'attn_gate'}": "no parameter is called attn_gate",
    },
    "skip list": {
        "['lm_head']": "the vision_encoder would be in 4 bits",
        "['vision_model', 'connector', 'lm_head']": "protected by vision_model, connector",
        "['model.vision_model', 'lm_head']": "the projector would be in 4 bits",
        "['model.vision_model', 'model.connector']": "the head would be in 4 bits",
        "['model', 'lm_head']": "210 layers of the language model in 16 bits",
        "'lm_head'": "a list of names",
    },
    "better than NF4": {
        "levels": "NF4's own values",
        "torch.linspace(-1, 1, 16)": "Even steps put too few values",
        "levels.flip(0)": "go up",
        "levels[1:]": "the shape is (15,)",
        "levels * 0.5": "times NF4's error",
        "levels * float('nan')": "no finite numbers",
    },
    "the promised GB": {
        "vk.Plan.parse('nf4-dq')": "7.18 GB, of which embedding and head take 2.10. All Linear",
        "vk.Plan.parse('nf4')": "fewer bits of scales",
        "'nf4-dq'": "a vk.Plan",
    },
    "largest rank": {
        "117": "a higher one fits as well",
        "119": "needs 12.01 GB",
        "297": "the weights themselves",
        "475": "a gradient and two moments",
        "118.8": "a whole number",
    },
    "fewer bits": {
        "'int4'": "4.50 bits, and 3.50 are there",
        "'int2-asym'": "2 bits leave four values at most",
        "'int3-g128'": "A zero point would use all codes",
        "'int8-act-token'": "rounds activations",
        "'int3g32'": "is no format",
    },
    "how many questions": {
        "0.1 * (1.96 / 0.0025) ** 2": "is each side, not both",
        "0.1 * (1.96 / 0.01) ** 2": "this gives ± 1.0 points",
        "0.1 / 0.005**2": "one standard error",
        "0.1 * 0.9 * (1.96 / 0.005) ** 2": "the variance of a share",
        "0.1 * (1.96 / 0.5) ** 2": "half a point is 0.005",
        "1000": "this gives ± 1.96 points",
    },
    "plan by hand": {
        "{'vision_encoder:0': 'int4'}": "bytes too many. Some layers have to give bits up",
        "{'vision_encoder:0': 'int2-asym', 'projector': 'int4'}": "Is vision_encoder:0 a layer",
        "{'vision_encoder:7': 'int4'}": "there is no layer vision_encoder:7",
        "{'projector': 'int1'}": "no format here is int1",
        "['int4']": "a dict",
    },
    "make up for it": {
        "second": "this is the old weight",
        "second.T": "this is transposed",
        "second + 0.1": "the old weight loses",
        "second[:3]": "the shape should be (64, 128)",
        "second * float('nan')": "not finite",
    },
    "what fits": {
        "1148": "A side is rounded to whole tokens",
        "1743": "MB, and 100 are there",
        "1162": "101.2 MB",
    },
    "mirrored films": {
        "lambda rows: rows": "the pictures are as before",
        "lambda rows: flipped(rows, np.s_[:, :, ::-1])": "answers should be, but are not",
        "lambda rows: flipped(rows, np.s_[:, ::-1])": "top to bottom",
        "lambda rows: vk.controls.arranged(rows, [3, 2, 1, 0])": "a film backwards",
        "lambda rows: rows[:3]": "and 3 come out",
        "lambda rows: rows[0]['pictures']": "your function stops with KeyError",
        "lambda rows: [r | {'answer': 'up'} for r in flipped(rows, np.s_[:, :, ::-1])]": "me up",
    },
    "two frames": {
        "[0, 3]": "has 2 pictures, and it has learnt films of four",
        "[3, 3, 0, 0]": "runs backwards",
        "[0, 1, 2]": "these are 3",
        "[0, 0, 1, 1]": "farther apart",
        "[0, 4]": "the frames 0 to 3",
    },
    "equal cost": {
        "8": "at equal ranks",
        "3": "upside down",
        "20": "1.05 times as many",
        "19.5": "a whole number",
    },
    "learnable word": {
        "'rood'": "tokens are r, o, o, d, and pebble has never said r, o, d",
        "'RING'": "capital letters",
        "'red'": "four are asked for",
        "['ring']": "a str; this is a list",
    },
}


class Pooled(torch.nn.Module):
    """Tokens that are `pool` of the features, through a Linear layer."""

    def __init__(self, pool, width=128):
        super().__init__()
        self.pool, self.proj = pool, torch.nn.Linear(width, 192)

    def forward(self, features):
        return self.proj(self.pool(features))


def flipped(rows, where):
    """Rows with their pictures, as (frames, height, width, 3), indexed by `where`."""
    turned = (np.stack([np.asarray(image) for image in row["images"]])[where] for row in rows)
    return [r | {"images": [*map(Image.fromarray, t)]} for r, t in zip(rows, turned, strict=True)]


class Hostile:
    """Raises whatever is done with it."""

    def __getattribute__(self, name):
        raise RuntimeError("touched")

    __call__ = __len__ = __iter__ = __float__ = __eq__ = __repr__ = __bool__ = __getattribute__
    __hash__ = None


HELPERS = {"Pooled": Pooled, "flipped": flipped, "np": np}
NONSENSE = ["", "nonsense", float("nan"), -1, True, [], {}, object(), Hostile(), lambda: 1 / 0]
NONSENSE += [torch.full((2, 3), torch.nan), torch.nn.Linear(2, 2), [None], {"a": None}, len, int]


@contextlib.contextmanager
def as_found():
    """Leave behind no folder, gradient mode or number of threads that a chapter chose."""
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
    """A lesson whose setting has run in `scope`; .exercises: {name: (stub, answer, given)}."""

    def __init__(self, path):
        self.path = path
        self.lesson = nbformat.read(path, as_version=4)
        self.stubs = script["stubs"](self.lesson)
        self.scope = {}
        for source in script["setting"](self.lesson):
            exec(source.replace("../data/", "data/"), self.scope)

    def calls(self):
        """(stub, name of the exercise, name of the answer, data given) of each check."""
        for stub in self.stubs:
            source = stub.source[stub.source.index(script["CHECK"]) :]
            call = ast.parse(source).body[0].value
            name, answer = call.args
            scope = dict(self.scope)
            said(stub.source, scope)
            given = {k.arg: eval(ast.unparse(k.value), scope) for k in call.keywords}
            yield stub, name.value, answer.id, given


@pytest.fixture(scope="module", params=LESSONS, ids=lambda path: path.stem)
def chapter(request):
    before = {name: os.environ.pop(name, None) for name in ("VLMKIT_MODEL", "MPLBACKEND")}
    with as_found():
        yield Chapter(request.param)
    os.environ.update({name: value for name, value in before.items() if value is not None})


def said(source, scope):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(source, scope)
    return " ".join(printed.getvalue().split())


def test_has_two_or_three_with_their_effort(chapter):
    assert 2 <= len(chapter.stubs) <= 3
    for number, stub in enumerate(chapter.stubs, 1):
        text = script["asked"](chapter.lesson, stub)
        assert text.startswith(f"**{number}. ") and " minutes)*" in text
        assert set(stub.metadata["solution"]) == {"code", "text"}
    assert any(f"(solutions/{chapter.path.name})" in cell.source for cell in chapter.lesson.cells)


def test_unattempted_and_solved(chapter):
    for stub, name, _, _ in chapter.calls():
        assert said(stub.source, dict(chapter.scope)) == f"{name}: not attempted yet"
        assert said(script["solved"](stub), dict(chapter.scope)).startswith("Right: ")


def test_mistakes_are_named(chapter):
    for _, name, _, given in chapter.calls():
        assert len(MISTAKES[name]) >= 2
        for answer, words in MISTAKES[name].items():
            hint = verdict(name, eval(answer, HELPERS | chapter.scope), **given)
            assert hint.startswith("Not yet: ") and words in hint, (name, answer, hint)


def test_whatever_the_answer_a_sentence_comes_out(chapter):
    for _, name, _, given in chapter.calls():
        for answer in NONSENSE:
            assert verdict(name, answer, **given).startswith("Not yet: "), (name, answer)


def test_committed_solutions_are_those_of_the_lesson(chapter):
    made = script["solutions"](chapter.path)
    committed = nbformat.read(script["FOLDER"] / chapter.path.name, as_version=4)
    for notebook in (made, committed):
        notebook.cells = [(cell.id, cell.cell_type, cell.source) for cell in notebook.cells]
    assert committed.cells == made.cells


def test_every_check_is_of_an_exercise_and_has_mistakes():
    asked = [
        ast.literal_eval(stub.source.partition(script["CHECK"])[2].split(",")[0])
        for path in LESSONS
        for stub in script["stubs"](nbformat.read(path, as_version=4))
    ]
    assert sorted(asked) == sorted(EXERCISES) == sorted(MISTAKES)


def test_our_own_mistakes_are_errors():
    with pytest.raises(vk.exercises.ExerciseError, match="no exercise 'unheard of'; there are"):
        vk.exercises.check("unheard of", 1)
    with pytest.raises(vk.exercises.ExerciseError, match="takes trained, rank beside the answer"):
        vk.exercises.check("equal cost", None, ranks=8)


def test_a_slice_keeps_what_is_needed_and_its_order():
    """What is changed on the way counts as needed; what only shows does not."""
    cells = ["import a\nimport plt", "x = a.one()\n\n\ndef f(y):\n    return x + y + z\n\n\nw = 3"]
    cells += ["plt.plot(x)\nx[0] += 1\nz = [x for x in w]"]
    cells += ["a.seed(1)\na.assert_close(x)\nz.append(a.two())\nw = x\na.shown(x)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    stub = nbformat.v4.new_code_cell('answer = None\nvk.exercises.check("it", answer, f=f)')
    stub.metadata["solution"] = {"code": "import vk\n\nanswer = 1", "text": ""}
    notebook.cells.append(stub)
    kept = ["import a", "x = a.one()\n\n\ndef f(y):\n    return x + y + z\n\n\nw = 3"]
    kept += ["x[0] += 1\nz = [x for x in w]", "a.seed(1)\nz.append(a.two())"]
    assert script["setting"](notebook) == kept
