"""The first occurrence of each of the glossary's terms on a page leads to its definition.

Notebooks and pages need no markup for that: the terms are looked for in the text, not in headings,
code, links and what a cell printed. Within the glossary each definition counts as a page.

A notebook can also name a term itself: [the cache](../docs/glossary.md#kv-cache) leads to the
definition of "KV cache".
"""

import re

from docutils import nodes
from sphinx import addnodes

AMBIGUOUS = {"block", "group", "head", "keys and values", "loss", "moment", "parameter", "rank"}
AMBIGUOUS |= {"scale", "stage"}
"""Terms that are also ordinary words or mean something else besides: looked up, never linked."""

NOT_IN = (
    nodes.literal,
    nodes.literal_block,
    nodes.raw,
    nodes.reference,
    nodes.term,
    nodes.thead,
    nodes.title,
    addnodes.desc,
    addnodes.download_reference,
    addnodes.toctree,
)


def setup(app):
    app.connect("doctree-read", name)
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def name(app, doctree):
    """Let links find the terms as they find headings: as `#kv-cache`."""
    for term in doctree.findall(nodes.term):
        if isinstance(term.parent.parent.parent, addnodes.glossary):
            places = app.env.metadata[app.env.current_document.docname].setdefault("myst_slugs", {})
            slug = re.sub(r"\W+", "-", term.astext().lower()).strip("-")
            places[slug] = (term.line, term["ids"][0], term.astext())


def link(app, doctree, docname):
    domain = app.env.get_domain("std")
    places = {name: place for (kind, name), place in domain.objects.items() if kind == "term"}
    places = {name: place for name, place in places.items() if name not in AMBIGUOUS}
    if not places:
        return
    pattern = pattern_of(places)
    glossaries = list(doctree.findall(addnodes.glossary))
    if glossaries:
        pages = [
            (definition, set(definition.parent["ids"]) | own_ids(definition))
            for glossary in glossaries
            for definition in glossary.findall(nodes.definition)
        ]
    else:
        pages = [(doctree, set())]
    for page, linked in pages:
        for text in list(page.findall(nodes.Text)):
            if not inside(text, NOT_IN):
                text.parent.replace(text, with_links(text, pattern, places, linked, app, docname))


def own_ids(definition):
    return {i for term in definition.parent.findall(nodes.term) for i in term["ids"]}


def inside(node, kinds):
    while node.parent is not None:
        node = node.parent
        if isinstance(node, kinds) or "cell_output" in node.get("classes", ()):
            return True
    return False


def pattern_of(terms):
    """One expression for all terms, the longest first, with an optional plural."""
    each = sorted(terms, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(form(term) for term in each)})(?![\w-])")


def form(term):
    """`Gradient checkpointing` at the start of a sentence; a name such as LoRA only as it is."""
    words = re.sub(r"\\? ", r"\\s+", re.escape(term))
    if term == term.lower():
        words = f"[{term[0]}{term[0].upper()}]{words[1:]}" if term[0].isalpha() else words
    return f"(?P<t{number_of(term)}>{words})(?:s|es)?"


def number_of(term):
    """A name for a group of an expression, one for each term."""
    return term.encode().hex()


def with_links(text, pattern, places, linked, app, docname):
    """Nodes for `text`, with a reference for each term whose place is not yet in `linked`."""
    result, done = [], 0
    for match in pattern.finditer(text):
        term = bytes.fromhex(match.lastgroup[1:]).decode()
        page, anchor = places[term]
        if anchor in linked:
            continue
        linked.add(anchor)
        address = "" if page == docname else app.builder.get_relative_uri(docname, page)
        reference = nodes.reference(
            "", match[0], refuri=f"{address}#{anchor}", internal=True, classes=["glossary"]
        )
        result += [nodes.Text(text[done : match.start()]), reference]
        done = match.end()
    return [*result, nodes.Text(text[done:])]
