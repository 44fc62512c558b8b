"""How Sphinx makes the site: `make site`, from the notebooks as they are committed.

The source folder is the repository itself, so that a link from one file to another leads to the
same place here as in the repository; this folder is only where the configuration lies. Nothing is
run, and no page loads anything from elsewhere (`tests/test_site.py`).
"""

import os
import sys
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER / "extensions"), str(FOLDER.parent), str(FOLDER.parent / "scripts")]

import colab  # noqa: E402

import vlmkit  # noqa: E402

project = "vlmkit"
author = "The vlmkit authors"
project_copyright = "The vlmkit authors. Text: CC BY 4.0, code: Apache-2.0"
version = release = vlmkit.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "chapter_links",
    "descriptions",
    "docstrings",
    "execution_times",
    "figure_texts",
    "folder_links",
    "glossary_links",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/*.rst",
    "docs/api/*.rst",
    "notebooks/*.ipynb",
    "notebooks/solutions/*.ipynb",
    "vlmkit/models/cobble/MODEL_CARD.md",
    "vlmkit/models/pebble/MODEL_CARD.md",
    "README.md",
    "CONTRIBUTING.md",
    "LICENSE-TEXT.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "**/.ipynb_checkpoints", "**/__pycache__"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # the widgets' scripts would come from elsewhere: pages have their pictures
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
suppress_warnings = [
    "myst-nb.mime_type",  # the explorer's widget: its picture is shown in its place
]
nitpicky = True

autodoc_typehints = "none"
autodoc_preserve_defaults = True  # `models=NAMES`, and not all the names
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

html_theme = "furo"
html_title = "vlmkit"
html_templates = ["templates"]
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "static/favicon.svg"
html_search_scorer = str(FOLDER / "static" / "scorer.js")
html_additional_pages = {"index": "to_landing_page.html"}
html_context = {"description": metadata.metadata("vlmkit")["Summary"]}  # of pages without text
html_copy_source = False
html_show_sphinx = False
html_use_smartypants = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
# Figures are drawn on white: on a dark page they lie on a white card.
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {
        "code-background": "#fefefe",
        "figure-card": "transparent",
        "figure-edge": "0px",
    },
    "dark_css_variables": {
        "code-background": "#2b2b2b",
        "figure-card": "#fff",
        "figure-edge": "0.5rem",
    },
}

# For the links to Colab and Binder; a placeholder leaves them out (docs/running.md)
repository = os.environ.get("VLMKIT_REPOSITORY", colab.REPOSITORY)
