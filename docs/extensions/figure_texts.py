"""A figure's caption, which is the text after its cell, is also its alternative text.

Otherwise a page would give in its place the name of a file.
"""

from docutils import nodes


def setup(app):
    app.connect("doctree-read", describe)
    return {"parallel_read_safe": True}


def describe(app, doctree):
    for cell in doctree.findall(nodes.container):
        images = [image for image in cell.findall(nodes.image) if "cell" in cell["classes"]]
        following = cell.next_node(descend=False, siblings=True) if images else None
        text = following.astext() if isinstance(following, nodes.paragraph) else ""
        if text.startswith("Figure "):
            for image in images:
                image["alt"] = " ".join(text.split())
