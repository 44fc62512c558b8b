"""The course in JupyterLab, and the site, in a real browser without a window.

`make test-all` first installs what these tests need (`make browser`). If it is missing they fail;
a skip would hide that nothing was tested.
"""

import functools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import pytest
from building import REPOSITORY, ROOT, site

sys.path.insert(0, str(ROOT / "scripts"))

import chromium  # noqa: E402

pytestmark = pytest.mark.slow
NEWS = "@jupyterlab/apputils-extension:announcements"  # would use the network
EXPLORER = 'import vlmkit as vk\n\nvk.course.explorer.memory("Qwen/Qwen2.5-VL-7B-Instruct")'


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is not installed: make browser")
    path = chromium.find()
    if not path:
        pytest.fail(chromium.MISSING)
    root = hasattr(os, "getuid") and os.getuid() == 0  # Chromium has no sandbox for root
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"] if root else []
        )
        yield started
        started.close()


@pytest.fixture
def tab(browser):
    """A page; `tab.elsewhere` lists its requests to other machines."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.elsewhere = []
    here = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")
    opened.on(
        "request", lambda r: None if r.url.startswith(here) else opened.elsewhere.append(r.url)
    )
    opened.set_default_timeout(60_000)
    yield opened
    opened.close()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# --- JupyterLab ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(folder, address(name) of a notebook in it) of a JupyterLab on a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    scratch = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(EXPLORER)])
    scratch.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(scratch, folder / "scratch.ipynb")
    (folder / "CONFIG" / "labconfig").mkdir(parents=True)
    without = json.dumps({"disabledExtensions": {NEWS: True}})
    (folder / "CONFIG" / "labconfig" / "page_config.json").write_text(without, encoding="utf-8")
    port, token = free_port(), secrets.token_hex(16)
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1"}
    for name in ("VLMKIT_MODEL", "MPLBACKEND"):
        environment.pop(name, None)
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    options += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    options += [f"--LabApp.{kind}_dir={folder / kind}" for kind in ("user_settings", "workspaces")]
    with (folder / "log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{address}/api?token={token}"), 60, folder / "log")
        yield folder, lambda name: f"{address}/lab/tree/{name}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(timeout=30)


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_for(condition, seconds, log=None):
    end = time.monotonic() + seconds
    while not condition():
        end_of_log = log.read_text(encoding="utf-8")[-2000:] if log else ""
        assert time.monotonic() < end, f"not within {seconds} seconds. {end_of_log}"
        time.sleep(0.5)


def run_all(tab, seconds):
    """Run all cells from the menu, as a reader does, and save the notebook."""
    indicator = ".jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status='{}']"
    tab.locator("#jp-main-statusbar", has_text="| Idle").wait_for()
    tab.get_by_role("menuitem", name="Run", exact=True).click()
    tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    tab.locator(indicator.format("busy")).wait_for(state="attached")
    tab.locator(indicator.format("idle")).wait_for(state="attached", timeout=1000 * seconds)
    tab.keyboard.press("Control+s")


def test_chapter_00_runs_to_its_end_in_jupyterlab(tab, lab):
    folder, address = lab
    path = folder / "notebooks" / "00_start_here.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)

    tab.goto(address("notebooks/00_start_here.ipynb"))
    run_all(tab, seconds=300)
    wait_for(lambda: code_of(path)[-1].execution_count, 20)
    cells = code_of(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds and "display_data" in kinds
    assert tab.elsewhere == []


def code_of(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_a_slider_of_the_memory_explorer_changes_the_figure(tab, lab):
    _, address = lab
    tab.goto(address("scratch.ipynb"))
    run_all(tab, seconds=120)
    figure = tab.locator(".jp-OutputArea-output .widget-html img")
    figure.wait_for()
    before = figure.get_attribute("src")
    assert "kv cache" not in figure.get_attribute("alt")
    tokens = tab.locator(".widget-slider", has_text="tokens of text")
    handle, track = tokens.locator(".noUi-handle").bounding_box(), tokens.bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(track["x"] + 0.7 * track["width"], y, steps=5)
    tab.mouse.up()
    tab.wait_for_function(
        "before => document.querySelector('.widget-html img').src != before", arg=before
    )
    assert "kv cache" in figure.get_attribute("alt")
    assert figure.evaluate("image => image.complete && image.naturalWidth > 0")


# --- the site ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    """The address of the built site."""
    pages, built = site()
    assert built.returncode == 0, built.stderr
    handler = functools.partial(Quietly, directory=str(pages))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Quietly(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_search_finds_a_chapter_whose_terms_link_to_the_glossary(tab, served):
    tab.goto(f"{served}/index.html")
    tab.wait_for_url("**/docs/index.html")
    tab.get_by_placeholder("Search").fill("checkpointing")
    tab.keyboard.press("Enter")
    tab.locator("#search-results ul.search li a[href*='04_memory']").first.click()
    tab.wait_for_url("**/notebooks/04_memory.html*")
    tab.locator("a.glossary", has_text="gradient checkpointing").click()
    tab.wait_for_url("**/docs/glossary.html#term-gradient-checkpointing")
    assert tab.locator("#term-gradient-checkpointing").is_visible()
    assert tab.elsewhere == []


def test_the_landing_figure_links_to_chapter_00_and_its_pictures_load(tab, served):
    tab.goto(f"{served}/docs/index.html")
    tab.locator("article a.image-reference, article a:has(img)").first.click()
    tab.wait_for_url("**/notebooks/00_start_here.html")
    figures = tab.locator("div.cell_output img")
    assert figures.count() >= 3
    for figure in figures.all():
        figure.scroll_into_view_if_needed()
        assert figure.evaluate("image => image.decode().then(() => image.naturalWidth)")
    assert tab.elsewhere == []


def test_search_shows_solutions_below_the_lessons(tab, served):
    tab.goto(f"{served}/search.html?q=exercise")
    tab.locator("#search-results .search-summary", has_text="found").wait_for()
    found = tab.locator("#search-results ul.search > li > a")
    found = [link.get_attribute("href") for link in found.all()]
    solved = [number for number, link in enumerate(found) if "notebooks/solutions/" in link]
    lessons = [number for number, link in enumerate(found) if "notebooks/" in link]
    lessons = [number for number in lessons if number not in solved]
    assert solved and lessons and max(lessons) < min(solved)


def test_a_chapter_has_links_that_download_and_open_it(tab, served):
    tab.goto(f"{served}/notebooks/03_loading.html")
    with tab.expect_download() as download:
        tab.get_by_role("link", name="Download the notebook").click()
    assert download.value.suggested_filename == "03_loading.ipynb"
    colab = tab.get_by_role("link", name="Open in Colab").get_attribute("href")
    assert colab.startswith("https://colab.research.google.com/") and REPOSITORY in colab
    binder = tab.get_by_role("link", name="Open in Binder").get_attribute("href")
    assert binder.startswith("https://mybinder.org/v2/gh/") and REPOSITORY in binder


WIDER = """
selector => [...document.querySelectorAll(selector)]
  .filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => {
    e.scrollLeft = 10000;
    return e.scrollLeft + e.clientWidth >= e.scrollWidth - 1;
  })
"""
"""For each of these elements that is too narrow for what it holds: does it scroll to the end?"""


@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_wide_cells_scroll_and_the_page_does_not(tab, served, width):
    tab.set_viewport_size({"width": width, "height": 900})
    scrolled = []
    pages = ["notebooks/03_loading", "notebooks/04_memory", "notebooks/05_sensitivity"]
    for page in [*pages, "README", "docs/measured", "docs/api/memory", "docs/glossary", "genindex"]:
        tab.goto(f"{served}/{page}.html")
        scrolled += tab.evaluate(WIDER, "article pre, .cell_output, .table-wrapper")
        for whole in ("document.documentElement", "document.querySelector('.content')"):
            assert tab.evaluate(f"{whole}.scrollWidth") <= tab.evaluate(f"{whole}.clientWidth"), (
                page
            )
    assert all(scrolled) and (scrolled or width > 1024)


ALIGNED = """
selector => [...document.querySelectorAll(selector)]
  .map(cell => [cell.textContent.trim(), getComputedStyle(cell).textAlign])
  .filter(([text]) => text)
"""
"""The texts of these cells of a table, and where each begins."""


def test_text_in_tables_is_on_the_left_and_numbers_are_on_the_right(tab, served):
    tab.goto(f"{served}/notebooks/00_start_here.html")
    answers = tab.locator(".cell_output table", has_text="model's answer")
    answers.evaluate("table => (table.id = 'answers')")
    assert {side for _, side in tab.evaluate(ALIGNED, "#answers th, #answers td")} == {"left"}
    tab.goto(f"{served}/notebooks/04_memory.html")
    compared = tab.locator(".cell_output table", has_text="because")
    compared.evaluate("table => (table.id = 'compared')")
    names = tab.evaluate(ALIGNED, "#compared tbody th, #compared thead tr:last-child th")
    assert {"component", "kind", "vision_encoder", "linear", "norm"} <= {text for text, _ in names}
    assert {side for _, side in names} == {"left"}
    numbers = tab.evaluate(ALIGNED, "#compared td, #compared thead tr:first-child th")
    assert len(numbers) > 10
    assert {side for text, side in numbers if text != "because"} == {"right"}


def test_a_figure_fits_a_narrow_screen_if_its_text_can_still_be_read(tab, served):
    tab.set_viewport_size({"width": 390, "height": 900})
    tab.goto(f"{served}/notebooks/00_start_here.html")
    tab.wait_for_load_state("load")
    widths = "image => [image.naturalWidth, image.getBoundingClientRect().width]"
    figures = [f.evaluate(widths) for f in tab.locator("div.cell_output img:not(table img)").all()]
    fitting = [shown for drawn, shown in figures if 390 < drawn < 560]
    assert fitting and max(fitting) < 390
    assert [shown for drawn, shown in figures if drawn > 640 and shown < 600] == []
    tab.goto(f"{served}/notebooks/04_memory.html")  # the explorer's picture has a style of its own
    explorer = tab.locator("div.cell_output .text_html img")
    assert explorer.evaluate("image => image.getBoundingClientRect().width") > 600


def test_a_button_copies_the_code_of_a_cell(tab, served):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(f"{served}/notebooks/00_start_here.html")
    cell = tab.locator("div.cell_input div.highlight").first
    code = cell.locator("pre").text_content()
    cell.hover()
    cell.locator("button.copy").click()
    cell.locator("button.copy", has_text="copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == code.rstrip()


def test_figures_lie_on_white_on_a_dark_page(tab, served):
    tab.emulate_media(color_scheme="dark")
    tab.goto(f"{served}/notebooks/04_memory.html")
    color = "e => getComputedStyle(e).backgroundColor"
    figure = tab.locator("div.cell_output img").first
    assert figure.evaluate(color) == "rgb(255, 255, 255)"
    assert tab.locator("body").evaluate(color) != "rgb(255, 255, 255)"
