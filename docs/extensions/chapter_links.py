"""Above each chapter and each solution: the notebook to download and, if the repository has an
address, links that open it in Colab and in Binder.

The address is the constant `REPOSITORY` in `scripts/colab.py`. The environment variable
VLMKIT_REPOSITORY names another one for a build.
"""

import shutil
from pathlib import Path
from urllib.parse import quote

FOLDER = "notebooks/"


def setup(app):
    app.add_config_value("repository", "", "html", str)
    app.connect("html-page-context", add)
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def add(app, pagename, templatename, context, doctree):
    if pagename.startswith(FOLDER):
        context["chapter_links"] = links(pagename, app.config.repository)


def links(pagename, repository):
    """[(address, text, explanation)] of the links above a notebook's page.

    repository: "owner/name" on GitHub. Without it, or with the placeholder "OWNER/…", only the
    download is left.
    """
    name = f"{pagename.rsplit('/', 1)[-1]}.ipynb"
    found = [(name, "Download the notebook", "")]
    if repository and not repository.startswith("OWNER/"):
        colab = f"https://colab.research.google.com/github/{repository}/blob/main/{pagename}.ipynb"
        path = quote(f"{pagename}.ipynb", safe="")
        binder = f"https://mybinder.org/v2/gh/{repository}/main?labpath={path}"
        install = f"!git clone --depth 1 https://github.com/{repository} course\n"
        install += "%run course/scripts/colab.py\n%cd course/notebooks"
        found.append((colab, "Open in Colab", f"Run this in a first cell:\n{install}"))
        found.append((binder, "Open in Binder", "The first start takes minutes"))
    return found


def copy(app, exception):
    """Put each notebook beside its page."""
    if exception is None and app.builder.format == "html":
        for name in app.env.found_docs:
            if name.startswith(FOLDER):
                shutil.copy(app.env.doc2path(name), Path(app.outdir) / f"{name}.ipynb")
