"""Make slides from the chapters: `make slides`, or some chapters by their numbers.

    python scripts/slides.py 00 05

A file of HTML for each chapter, in build/slides, and one for each session of a schedule that has
several chapters. A chapter's slides are its card, a slide for each section's figure with the
caption that stands below it, what the chapter does not show, and the questions of docs/quiz.md with
their answers. Everything is what the chapter stores: nothing runs, and nothing comes from the
network. In the browser the arrow keys turn the pages, and printing gives a PDF, a slide a page.
"""

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
img {{ flex: 1 1 0; min-height: 0; max-width: 100%; object-fit: contain; object-position: left; }}
.caption {{ font-size: .75em; color: #444; flex: none; }}
code {{ background: #eee; padding: 0 .2em; }} a {{ color: inherit; }} details {{ margin-top: 1em; }}
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
</script></body></html>
"""


def rendered(text):
    """Markdown as HTML. Links keep their text only: their targets are not beside the slides."""
    return markdown2html(re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text))


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


def of_chapter(path):
    """The slides of the chapter at `path`, a list of HTML."""
    cells = nbformat.read(path, as_version=4).cells
    title = cells[0].source.splitlines()[0].removeprefix("# ")
    source, card = f"vlmkit, {path.stem}", cells[0].source
    learn = re.search(r"\*\*What you will learn\.?\*\*.*?(?=\n\n\*\*|\Z)", card, re.S)
    slides = [slide(f"<h1>{rendered(title)}</h1>{rendered(learn[0])}", source, "first")]
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
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    limits = section(text, "[Ww]hat this does not show")
    if limits:
        slides.append(slide(f"<h2>What this does not show</h2>{rendered(limits)}", source))
    return slides + [slide(rendered(question), source) for question in questions(path.name[:2])]


def questions(number):
    """The texts of the quiz questions for a chapter."""
    text = section(QUIZ.read_text(encoding="utf-8"), number)
    return [part.strip() for part in re.split(r"^(?=\*\*\d\.\*\* )", text, flags=re.M) if part]


def sessions():
    """{name of a file: chapters} of the schedules whose sessions have several chapters."""
    plans = {"two_hours": schedules.TWO_HOURS, "one_day": schedules.DAY}
    return {
        name: sorted({kind for kind, *_ in steps if kind.isdigit()})
        for name, steps in plans.items()
    }


def main(numbers):
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = {}
    for path in sorted(solutions.CHAPTERS.glob("[0-9][0-9]_*.ipynb")):
        if not numbers or path.name[:2] in numbers:
            made[path.name[:2]] = path.stem, of_chapter(path)
    files = dict(made.values())
    for name, wanted in sessions().items():
        if not numbers:
            files[name] = [slide for number in wanted for slide in made[number][1]]
    for name, slides in files.items():
        page = PAGE.format(title=name.replace("_", " "), slides="\n".join(slides))
        (FOLDER / f"{name}.html").write_text(page, encoding="utf-8")
        print(f"build/slides/{name}.html: {len(slides)} slides")


if __name__ == "__main__":
    main(sys.argv[1:])
