"""A link to a folder of the repository leads, on the site, to the page that lists it."""

PAGES = {"](notebooks/solutions)": "](docs/solutions.md)"}
"""What stands in the README, and what it is here."""


def setup(app):
    app.connect("source-read", replace)
    return {"parallel_read_safe": True}


def replace(app, docname, source):
    if docname == "README":
        for folder, page in PAGES.items():
            source[0] = source[0].replace(folder, page)
