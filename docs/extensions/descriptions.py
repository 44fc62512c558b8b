"""A description of each page for search engines: its first paragraph of more than a few words."""

import textwrap

from docutils import nodes

SHORTEST, LONGEST = 40, 200


def setup(app):
    app.connect("html-page-context", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def describe(app, pagename, templatename, context, doctree):
    for paragraph in doctree.findall(nodes.paragraph) if doctree else ():
        text = paragraph.astext()
        if len(text) >= SHORTEST:
            context["description"] = textwrap.shorten(text, LONGEST, placeholder=" …")
            break
