"""The site builds from the committed notebooks without a warning, is complete, and works offline.

`test_browser.py` tests it in a real browser.
"""

import importlib
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chapters
import pytest
from building import REPOSITORY, ROOT, page, site

import vlmkit as vk

sys.path[:0] = [str(ROOT / "docs" / "extensions"), str(ROOT / "scripts")]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]


@pytest.fixture(scope="module")
def pages():
    return site()[0]


@pytest.fixture(scope="module")
def every(pages):
    """{name: page} of all pages except the copies of the package's source code."""
    names = [path.relative_to(pages).as_posix() for path in pages.rglob("*.html")]
    return {n: page(pages / n) for n in sorted(names) if not n.startswith(("_modules", "_static"))}


@pytest.fixture(scope="module")
def glossary(pages):
    """{tuple of synonyms: the definition} of the glossary."""
    found = {}
    for definition in page(pages / "docs/glossary.html").select("dl.glossary dd"):
        terms = []
        for earlier in definition.find_previous_siblings(["dt", "dd"]):
            if earlier.name == "dd":
                break
            terms.insert(0, earlier.get_text().removesuffix("¶").strip())
        found[tuple(terms)] = definition
    return found


def is_elsewhere(address):
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme not in ("", "data")


# --- the whole -----------------------------------------------------------------------------------


def test_builds_without_a_warning_as_make_site_builds_it():
    _, built = site()
    assert (built.returncode, built.stderr) == (0, "")
    (command,) = re.findall(r"-m sphinx (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"-E", "-W", "--keep-going"} <= set(command.split())


def test_pages_load_nothing_from_elsewhere(every):
    loading = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}
    loaded = [
        (name, tag[attribute])
        for name, soup in every.items()
        for kind, attribute in loading.items()
        for tag in soup.find_all(kind, attrs={attribute: True})
    ]
    assert len(loaded) > 100
    assert [each for each in loaded if is_elsewhere(each[1])] == []


def test_style_sheets_load_nothing_from_elsewhere(pages, every):
    sheets = [path.read_text(encoding="utf-8") for path in pages.rglob("*.css")]
    sheets += [str(style) for soup in every.values() for style in soup.find_all("style")]
    named = [
        a for sheet in sheets for a in re.findall(r"(?:@import|url\()\s*[\"']?([^\"')]+)", sheet)
    ]
    assert sheets and [address for address in named if is_elsewhere(address)] == []


def test_links_and_pictures_are_there(pages, every):
    ids = {name: {tag["id"] for tag in soup.find_all(id=True)} for name, soup in every.items()}
    broken = []
    for name, soup in every.items():
        for tag in soup.select("a[href], img[src]"):
            address = tag.get("href") or tag["src"]
            if is_elsewhere(address) or address.startswith("data:"):
                continue
            parts = urlsplit(address)
            target = (pages / name).parent / unquote(parts.path) if parts.path else pages / name
            leads = target.resolve().relative_to(pages.resolve()).as_posix()
            known = ids.get(leads, {parts.fragment}) | {""}
            if not target.exists() or parts.fragment not in known:
                broken.append((name, address))
    assert broken == []


def test_the_first_page_links_to_what_students_teachers_and_engineers_need(every):
    assert every["index.html"].a["href"] == "docs/index.html"
    links = every["docs/index.html"].article.find_all("a", href=True)
    leads = {Path(urlsplit(link["href"]).path).stem for link in links}
    assert leads >= {"00_start_here", "teaching", "times", "solutions", "loading", "api", "running"}


# --- chapters and solutions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_chapter_is_a_page_with_its_outputs_and_with_text_for_its_figures(pages, name):
    shown = page(pages / f"notebooks/{name}.html").article
    notebook = chapters.read(f"{name}.ipynb")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(shown.select("div.cell_input")) == len(cells)
    images = [
        i for i in shown.select("div.cell_output img") if not i.find_parent(class_="text_html")
    ]
    stored = sum("image/png" in o.get("data", ()) for cell in cells for o in cell.outputs)
    assert len(images) == stored
    assert [image["alt"] for image in images if not image["alt"].startswith("Figure ")] == []
    assert all(image["alt"] for image in shown.select("div.cell_output .text_html img"))


def test_every_notebook_can_be_downloaded_and_opened_elsewhere(pages, every):
    for name in [*NOTEBOOKS, *(f"solutions/{name}" for name in solutions())]:
        links = every[f"notebooks/{name}.html"].select("nav.chapter-links a")
        notebook, colab, binder = (link["href"] for link in links)
        copied = (pages / f"notebooks/{name}.html").parent / notebook
        assert copied.read_bytes() == (ROOT / f"notebooks/{name}.ipynb").read_bytes()
        assert colab.endswith(f"github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb")
        assert f"gh/{REPOSITORY}/main?" in binder and unquote(binder).endswith(f"{name}.ipynb")


@pytest.mark.parametrize("repository", ["", "OWNER/vlmkit"])
def test_without_an_address_only_the_download_is_left(repository):
    from chapter_links import links

    (download,) = links("notebooks/00_start_here", repository)
    assert download[0] == "00_start_here.ipynb"


def test_every_page_has_an_icon_and_a_description_of_its_own(pages, every):
    found = {}
    for name, soup in every.items():
        if soup.article and name != "search.html":
            assert (
                (pages / name).parent.joinpath(soup.select_one("link[rel*=icon]")["href"]).exists()
            )
            found[name] = soup.select_one("meta[name=description]")["content"]
    assert all(20 < len(text) <= 200 for text in found.values())
    chapters_of = [found[f"notebooks/{name}.html"] for name in NOTEBOOKS]
    assert len(set(chapters_of)) == len(NOTEBOOKS)


def test_a_link_can_name_a_term_of_the_glossary(every):
    links = [link["href"] for link in every["docs/package.html"].article.find_all("a", href=True)]
    assert "glossary.html#term-plan" in links


def solutions():
    return sorted(path.stem for path in (ROOT / "notebooks/solutions").glob("*.ipynb"))


def test_solutions_are_listed_apart_from_the_lessons(pages):
    tree = page(pages / "docs/index.html").select_one(".sidebar-tree")
    links = [Path(link["href"]) for link in tree.select("a[href*='notebooks/']")]
    assert [path.stem for path in links if path.parent.name != "solutions"] == NOTEBOOKS
    listed = page(pages / "docs/solutions.html").article.select("a[href*='notebooks/solutions']")
    assert {Path(urlsplit(link["href"]).path).stem for link in listed} == set(solutions())


# --- the reference -------------------------------------------------------------------------------


def test_reference_has_every_public_name_with_a_docstring(pages):
    parts = list((pages / "docs/api").glob("*.html"))
    assert len(parts) > 10
    documented = {tag["id"] for part in parts for tag in page(part).find_all(id=True)}
    public = {"vlmkit": set(vk._HOME_OF)}
    for module in vk._MODULES:
        names = getattr(importlib.import_module(f"vlmkit.{module}"), "__all__", ())
        public[f"vlmkit.{module}"] = {name for name in names if name not in vk._HOME_OF}
    missing = {
        f"{module}.{name}"
        for module, names in public.items()
        for name in names
        if callable(thing := getattr(sys.modules[module], name))
        and thing.__doc__
        and not {f"{module}.{name}", f"vlmkit.{vk._HOME_OF.get(name)}.{name}"} & documented
    }
    assert missing == set()


def test_docstrings_become_what_they_mean():
    from docstrings import restructured

    docstring = """Load `name` under **plan. See layer_.

        vk.load(*names)

        vk.load("pebble")

    name: a folder, or
        a hub id.
    plan, revision: what `Plan.parse` takes.

    - a path; of an
      animation, the first frame
    - rows: a list

    left      right
    more      less""".replace("\n    ", "\n")
    assert restructured(docstring.splitlines()) == [
        r"Load ``name`` under \*\*plan. See layer\_.",
        "",
        *["::", "", "    vk.load(*names)", "", '    vk.load("pebble")', ""],
        *["- ``name``: a folder, or", "  a hub id."],
        *["- ``plan, revision``: what ``Plan.parse`` takes.", ""],
        *["- a path; of an", "  animation, the first frame", "- rows: a list", ""],
        *["::", "", "    left      right", "    more      less", ""],
    ]


# --- the glossary --------------------------------------------------------------------------------


def test_every_definition_links_to_a_chapter_that_uses_the_term(glossary):
    assert len(glossary) >= 60
    for terms, definition in glossary.items():
        chapter = definition.find_all("a")[-1]
        name = Path(urlsplit(chapter["href"]).path).stem
        assert name in NOTEBOOKS, terms
        text = re.sub(r"[*`]", "", chapters.text(chapters.read(f"{name}.ipynb")))
        taught = " ".join(text.split()).lower()
        assert any(term.lower() in taught for term in terms), f"{terms} in {name}"


def test_no_term_is_defined_twice_and_ambiguous_terms_are_not_linked(glossary, every):
    from glossary_links import AMBIGUOUS

    terms = [term for terms in glossary for term in terms]
    assert len(terms) == len(set(terms)) and set(terms) >= AMBIGUOUS
    links = [link for soup in every.values() for link in soup.select("a.glossary")]
    assert {link.get_text() for link in links} & AMBIGUOUS == set()


def test_only_the_first_occurrence_of_a_term_links_to_the_glossary(every):
    assert sum(len(soup.select("a.glossary")) for soup in every.values()) > 200
    for name, soup in every.items():
        links = soup.select("a.glossary")
        if name != "docs/glossary.html":  # there each definition has its own links
            leads = [link["href"] for link in links]
            assert len(leads) == len(set(leads)), name
        for link in links:
            assert not link.find_parents([*HEADINGS, "pre", "code", "a", "th", "dt"]), link
    for name in NOTEBOOKS:
        assert len(every[f"notebooks/{name}.html"].select("a.glossary")) >= 5, name


def test_terms_are_linked_once_as_whole_words_and_in_the_plural():
    from docutils import nodes
    from glossary_links import pattern_of, with_links

    places = {"rank": ("g", "rank"), "LoRA": ("g", "lora"), "KV cache": ("g", "kv")}

    class App:
        class builder:
            get_relative_uri = staticmethod(lambda start, end: f"{end}.html")

    text = "Ranks of QLoRA, not loRA, in a KV\ncache: rank by rank-order. LoRA."
    made = with_links(text, pattern_of(places), places, set(), App, "page")
    links = {n.astext(): n["refuri"] for n in made if isinstance(n, nodes.reference)}
    assert links == {"Ranks": "g.html#rank", "KV\ncache": "g.html#kv", "LoRA": "g.html#lora"}
    assert "".join(n.astext() for n in made) == text


# --- search --------------------------------------------------------------------------------------


def test_search_knows_the_chapters(pages):
    index = (pages / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"notebooks/{name}"' in index for name in NOTEBOOKS)
    assert "checkpoint" in index
