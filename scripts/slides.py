"""Make slides from the chapters: `make slides`, or some chapters by their numbers.

    python scripts/slides.py 00 05

A file of HTML for each chapter, in build/slides, and one for each session of a schedule that has
several chapters. A chapter's slides are its card, the questions to predict, a slide for each
figure with its caption, what the chapter does not show, and the questions of docs/quiz.md with
their answers. A session begins with its timetable and the one idea of the course. Everything is
what the chapter stores: nothing runs, and nothing comes from the network. In the browser the arrow
keys turn the pages, a click on a figure enlarges it, and printing gives a PDF, a slide a page.
"""

import ast
import html
import re
import sys

import nbformat
import schedules
import solutions
from nbconvert.filters import markdown2html

ROOT = solutions.CHAPTERS.parent
FOLDER = ROOT / "build" / "slides"
QUIZ = ROOT / "docs" / "quiz.md"
INDEX = ROOT / "docs" / "index.md"

PREDICTION = "(?:First your prediction|What does it cost to make it smaller)"
"""How the heading begins under which a chapter asks for predictions."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
html {{ scroll-snap-type: y mandatory; font: 22px/1.4 system-ui, sans-serif; color: #111; }}
body {{ margin: 0; background: #fff; }}
section {{ box-sizing: border-box; height: 100vh; padding: 4vh 6vw; scroll-snap-align: start;
  display: flex; flex-direction: column; overflow: auto; break-after: page; }}
h1 {{ font-size: 1.9em; margin: auto 0 .5em; }} h2 {{ font-size: 1.3em; margin: 0 0 .4em; }}
.first > :last-child {{ margin-bottom: auto; }}
img {{ flex: 1 1 0; min-height: 0; max-width: 100%; object-fit: contain; object-position: left;
  cursor: zoom-in; }}
img.large {{ flex: none; width: 100%; cursor: zoom-out; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .1em .8em .1em 0; text-align: left; }}
.caption {{ font-size: .75em; color: #444; flex: none; }}
code, pre {{ background: #eee; padding: 0 .2em; }}
pre {{ white-space: pre-wrap; font-size: .85em; }}
a {{ color: inherit; }} details {{ margin-top: 1em; }}
footer {{ font-size: .55em; color: #666; margin-top: auto; padding-top: .5em; }}
@page {{ size: 13.33in 7.5in; margin: 0; }}
@media print {{ section {{ height: 7.5in; }} }}
</style></head><body>
{slides}
<script>
const pages = [...document.querySelectorAll("section")];
addEventListener("keydown", event => {{
  const step = {{ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1,
    ArrowLeft: -1, ArrowUp: -1, PageUp: -1}}[event.key];
  if (!step) return;
  event.preventDefault();
  const here = Math.round(scrollY / innerHeight);
  pages[Math.max(0, Math.min(pages.length - 1, here + step))].scrollIntoView();
}});
addEventListener("click", event => event.target.matches("img") &&
  event.target.classList.toggle("large"));
</script></body></html>
"""


def rendered(text):
    """Markdown as HTML. Links keep their text only: their targets are not beside the slides."""
    made = markdown2html(re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text))
    return re.sub(r'<a class="anchor-link".*?</a>', "", made)  # the "¶" of a heading


def slide(body, source, kind=""):
    return f'<section class="{kind}">{body}<footer>{html.escape(source)}</footer></section>'


def heading(text):
    found = re.findall(r"^##+ (.+)$", text, re.M)
    return found[-1] if found else None


def caption(cells, number):
    """The caption below the figure of cell `number`: "*Figure 1. ...*", or nothing."""
    following = cells[number + 1].source if number + 1 < len(cells) else ""
    found = re.match(r"\*Figure.*?\*(?=\n\n|$)", following, re.S)
    return found[0] if found else ""


def section(text, title):
    """The text of the section whose heading contains `title`, without deeper headings."""
    found = re.search(rf"^## [^\n]*{title}[^\n]*\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return found[1].strip() if found else ""


def prediction(cells):
    """The questions that everybody answers before the chapter runs, and the cell to answer in."""
    number, text = next(
        (number, found[0])
        for number, cell in enumerate(cells)
        if (found := re.search(rf"^## {PREDICTION}.*", cell.source, re.S | re.M))
    )
    for cell in cells[number:]:
        if cell.cell_type == "code" and all(
            isinstance(step, ast.Assign) for step in ast.parse(cell.source).body
        ):
            return f"{rendered(text)}<pre>{html.escape(cell.source)}</pre>"


def of_chapter(path):
    """The slides of the chapter at `path`, a list of HTML."""
    cells = nbformat.read(path, as_version=4).cells
    title = cells[0].source.splitlines()[0].removeprefix("# ")
    source, card = f"vlmkit, {path.stem}", cells[0].source
    learn = re.search(r"\*\*What you will learn\.?\*\*.*?(?=\n\n\*\*|\Z)", card, re.S)
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    slides = [slide(f"<h1>{rendered(title)}</h1>{rendered(learn[0])}", source, "first")]
    slides.append(slide(prediction(cells), source))
    current = title
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            current = heading(cell.source) or current
            continue
        for output in cell.outputs:
            image = output.get("data", {}).get("image/png")
            if image:
                text = caption(cells, number)
                alt = html.escape(re.sub(r"[*`]", "", " ".join(text.split())) or current)
                body = f"<h2>{rendered(current)}</h2>"
                body += f'<img alt="{alt}" src="data:image/png;base64,{image.strip()}">'
                slides.append(slide(f'{body}<div class="caption">{rendered(text)}</div>', source))
    limits = section(text, "[Ww]hat this does not show")
    if limits:
        slides.append(slide(f"<h2>What this does not show</h2>{rendered(limits)}", source))
    return slides + [slide(rendered(question), source) for question in questions(path.name[:2])]


def questions(number):
    """The texts of the quiz questions for a chapter."""
    text = section(QUIZ.read_text(encoding="utf-8"), number)
    return [part.strip() for part in re.split(r"^(?=\*\*\d\.\*\* )", text, flags=re.M) if part]


def sessions():
    """{name of a file: (first slides, chapters)} of the schedules whose sessions have several."""
    known, index = schedules.chapters(), INDEX.read_text(encoding="utf-8")
    plans = {
        "two_hours": ("A tutorial of two hours", schedules.TWO_HOURS, 0, 120),
        "one_day": ("A course of one day", schedules.DAY, 9 * 60, 17 * 60 + 30),
    }
    found = {}
    for name, (title, steps, start, end) in plans.items():
        table = rendered(schedules.timetable(steps, known, start, end))
        idea = rendered(section(index, "One idea"))
        first = [slide(f"<h2>{title}</h2>{table}", "vlmkit")]
        first.append(slide(f"<h2>One idea</h2>{idea}", "vlmkit"))
        found[name] = first, sorted({kind for kind, *_ in steps if kind.isdigit()})
    return found


def main(numbers):
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = {}
    for path in sorted(solutions.CHAPTERS.glob("[0-9][0-9]_*.ipynb")):
        if not numbers or path.name[:2] in numbers:
            made[path.name[:2]] = path.stem, of_chapter(path)
    files = dict(made.values())
    for name, (first, wanted) in sessions().items() if not numbers else ():
        files[name] = first + [slide for number in wanted for slide in made[number][1]]
    for name, slides in files.items():
        page = PAGE.format(title=name.replace("_", " "), slides="\n".join(slides))
        (FOLDER / f"{name}.html").write_text(page, encoding="utf-8")
        print(f"build/slides/{name}.html: {len(slides)} slides")


if __name__ == "__main__":
    main(sys.argv[1:])
