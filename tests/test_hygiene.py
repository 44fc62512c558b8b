"""Every notebook is committed as it ran, and notebooks and pages are clean.

nbval (`make test`) runs the notebooks and compares outputs, but it accepts a notebook without
outputs and execution counts. `make lint` prints how long chapters are (`scripts/style_report.py`),
which is not tested.
"""

import ast
import itertools
import re
import subprocess
from pathlib import Path

import chapters
import color_vision
import nbformat
import pytest
from matplotlib.colors import is_color_like, to_hex

from vlmkit.figures import style as colors

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(chapters.FOLDER.rglob("*.ipynb"))
CHAPTERS = sorted(chapters.FOLDER.glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def shown(cell):
    """All text that a code cell has printed or shown."""
    for output in cell.get("outputs", ()):
        yield str(output.get("text", ""))
        yield "\n".join(output.get("traceback", ()))
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield str(data)


# --- runs ----------------------------------------------------------------------------------------


@every
def test_ran_from_top_to_bottom_in_this_environments_kernel(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


@every
def test_ran_without_errors_and_warnings(path):
    for cell in read(path).cells:
        outputs = cell.get("outputs", ())
        tolerated = "raises-exception" in cell.metadata.get("tags", [])
        assert tolerated or "error" not in {output.output_type for output in outputs}, cell.source
        printed = [output.text for output in outputs if output.get("name") == "stderr"]
        assert not printed, f"on stderr: {printed[0][:200]}"


@every
def test_outputs_have_no_address_in_memory(path):
    """`<object at 0x7f...>` differs in every run, and tells a reader nothing."""
    for output in (o for cell in read(path).cells for o in cell.get("outputs", ())):
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert not re.search(r" at 0x[0-9a-f]{6,}", text), text[:200]


# --- paths ---------------------------------------------------------------------------------------

ABSOLUTE = re.compile(
    r"(?<![\w.$}~:/-])/(?:home|root|Users|work|tmp|opt|usr|var|private|mnt)/\w|\b[A-Z]:\\\w"
)


@every
def test_no_source_or_output_has_a_path_of_one_machine(path):
    for cell in read(path).cells:
        for text in (cell.source, *shown(cell)):
            found = ABSOLUTE.search(text)
            assert not found, text[max(0, found.start() - 40) : found.end() + 40]


def test_paths_of_one_machine_are_found():
    homes = ("/".join(("", folder, "x1")) for folder in ("home", "tmp", "work"))
    assert all(ABSOLUTE.search(f"in '{path}'") for path in (*homes, "C:" + r"\Data"))
    innocent = ("vlmkit/pebble", "https://example.org/home/a", "a/home/b", "../tmp/x", "and/or")
    assert not any(ABSOLUTE.search(text) for text in innocent)


# --- figures -------------------------------------------------------------------------------------


@every
def test_every_figure_is_alone_in_its_cell_and_a_numbered_caption_follows(path):
    cells, numbers = read(path).cells, itertools.count(1)
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        figures = sum("image/png" in output.get("data", ()) for output in cell.get("outputs", ()))
        if figures:
            caption = following.source if following else ""
            assert figures == 1, cell.source
            assert re.match(rf"\*Figure {next(numbers)}\. \S", caption), cell.source


@every
def test_pictures_in_the_text_have_alternative_text(path):
    text = chapters.text(read(path))
    assert not re.search(r"!\[\s*\]\(", text)
    assert all(re.search(r'alt="[^"]+"', image) for image in re.findall(r"<img [^>]*>", text))


PALETTE = {to_hex(value) for value in vars(colors).values() if is_color_like(value)}
PALETTE |= {to_hex(color) for color in colors.COMPONENT_COLORS.values()}
MAPS = {"gray", "gray_r", "Greys", "Blues", "viridis", "cividis"}
DRAWING = {"plot", "bar", "barh", "scatter", "errorbar", "step", "hist", "fill_between", "line"}
WITHOUT_COLORS = {
    ("03_loading", "used.plot"): "one series, in the first color of any palette",
}
"""Where a chapter uses matplotlib's own colors, which not everybody can tell apart, and why."""


def is_gray(color):
    return len(set(re.findall("..", to_hex(color)[1:]))) == 1


def named_colors(tree):
    """Every color that a cell writes out: hexadecimal ones, and values of arguments for colors."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch("#[0-9a-fA-F]{3,8}", str(node.value)):
            yield node.value
        if isinstance(node, ast.keyword) and re.fullmatch("c|color|.*_?colors?", node.arg or ""):
            for part in ast.walk(node.value):
                if isinstance(part, ast.Constant) and is_color_like(part.value):
                    yield part.value


def drawn_without_colors(tree):
    """The calls, such as `ax.plot`, that draw something without giving it a color."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            draws = re.match(r"(ax\w*|plt)\b.*\.|.*\.plot\b", called)
            if draws and node.func.attr in DRAWING:
                given = {keyword.arg for keyword in node.keywords}
                texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
                given |= {"c" for text in texts if re.search("[kw]", str(text))}  # as in "k|"
                if not given & {"c", "color", "colors", "facecolor", "cmap"}:
                    yield called


@each
def test_chapter_uses_only_colors_of_the_palette(path):
    for source in chapters.sources(read(path), "code"):
        tree = ast.parse(source)
        other = {c for c in named_colors(tree) if to_hex(c) not in PALETTE and not is_gray(c)}
        assert not other, source
        given = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
        maps = {ast.literal_eval(keyword.value) for keyword in given if keyword.arg == "cmap"}
        assert maps <= MAPS, source
        without = {(path.stem, call) for call in drawn_without_colors(tree)}
        assert without - set(WITHOUT_COLORS) == set(), source


def test_colors_outside_the_palette_are_found():
    tree = ast.parse(
        'ax.plot(x, y, color="red"); ax.bar(x, y); f = ["#ff0000"]; ax.text(0, 0, "b")'
    )
    assert sorted(named_colors(tree)) == ["#ff0000", "red"]
    assert list(drawn_without_colors(tree)) == ["ax.bar"]


@pytest.mark.parametrize("vision", color_vision.SIMULATED)
def test_palette_can_be_told_apart_with_any_color_vision(vision):
    """A distance of 15 in L*a*b* is about six times the smallest that people notice."""
    assert color_vision.nearest(colors.COMPONENT_COLORS.values(), vision)[0] > 15
    assert color_vision.nearest((color for color, _ in colors.MARKS), vision)[0] > 15
    assert len({mark for _, mark in colors.MARKS}) == len(colors.MARKS)


def test_the_distance_of_colors_separates_good_palettes_from_bad_ones():
    usual = ["C0", "C1", "C2", "C3"]  # matplotlib's first four, with a green and a red
    assert color_vision.nearest(usual)[0] > 15
    assert color_vision.nearest(usual, "deuteranopia")[0] < 15
    assert color_vision.nearest(usual, "protanopia")[0] < 15
    assert color_vision.distance("white", "black") == pytest.approx(100, abs=0.1)
    assert color_vision.lab("#ff0000") == pytest.approx([53.2, 80.1, 67.2], abs=0.2)
    for vision in color_vision.SIMULATED:  # a gray looks the same to all
        assert color_vision.lab("#777777", vision) == pytest.approx(
            color_vision.lab("#777777"), abs=0.5
        )


# --- links ---------------------------------------------------------------------------------------

PAGES = [
    *(path for path in sorted(ROOT.glob("*.md"))),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "vlmkit").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]


def markdown(path):
    text = chapters.text(read(path)) if path.suffix == ".ipynb" else path.read_text("utf-8")
    return re.sub(r"^(```+|~~~+).*?^\1\s*$", "", text, flags=re.M | re.S)


def anchors(path):
    """The anchors of a page's headings, as GitHub and the site make them, and of the glossary's
    terms, as the site makes them."""
    if path.suffix not in (".md", ".ipynb"):
        return set()
    headings = re.findall(r"^#+ +(.+?) *#*$", markdown(path), flags=re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    glossaries = re.findall(r"```\{glossary\}\n(.*?)```", path.read_text("utf-8"), flags=re.S)
    terms = [line for each in glossaries for line in each.splitlines() if line[:1].strip()]
    return {
        re.sub(r"[^\w\- ]", "", h.replace("`", "")).strip().lower().replace(" ", "-") for h in plain
    } | {re.sub(r"\W+", "-", term.lower()).strip("-") for term in terms}


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda path: path.stem)
def test_links_resolve_inside_the_repository(path):
    links = re.findall(r"\]\((?!\w+:)([^)\s]+)", markdown(path))
    links += re.findall(r"(?:src|href)=\"(?!\w+:)([^\"]+)\"", markdown(path))
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_linked_files_are_committed():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    known = {Path(name) for name in listed} | {p for name in listed for p in Path(name).parents}
    for path in (path for path in PAGES if path.relative_to(ROOT) in known):
        for link in re.findall(r"\]\((?!\w+:)([^)#\s]+)", markdown(path)):
            assert (path.parent / link).resolve().relative_to(ROOT) in known, f"{path}: {link}"


# --- numbers -------------------------------------------------------------------------------------


def test_a_number_in_a_text_is_found_however_it_is_written():
    text = "It loses 12.30% of 1,200 answers, or −4.5 points. Three are left in Qwen2.5-VL-7B."
    chapters.states(text, "12.3", 1200, "-4.50", 3)
    for missing in (12, 5, "2.5", 7, 200):
        with pytest.raises(AssertionError, match="not a number in the text"):
            chapters.states(text, missing)


# --- cards ---------------------------------------------------------------------------------------


@each
def test_card_names_its_chapter_and_builds_on_earlier_ones_only(path):
    card, number = read(path).cells[0].source, path.stem[:2]
    assert re.search(rf"^\*Chapter {number}\. \S", card, flags=re.M)
    lists = re.findall(r"[Cc]hapters? ((?:\d\d(?:, | and )?)+)", card)
    named = {other for each in lists for other in re.findall(r"\d\d", each)}
    assert named <= {chapter.stem[:2] for chapter in CHAPTERS} and max(named) == number
