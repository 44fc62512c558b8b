"""Docstrings into reStructuredText.

vlmkit's docstrings are prose: code stands in single backticks, examples and tables are indented or
stand in columns, and what a parameter is follows its name and a colon. Sphinx would read the first
as references and the others as quotations. This says what is what.
"""

import re
import textwrap

PARAMETER = re.compile(r"(\**[a-z_]\w*(?:, \**[a-z_]\w*)*): (.*)")
COLUMNS = re.compile(r"\S+(?: \S+)* {3,}\S")


def setup(app):
    app.connect("autodoc-process-docstring", convert)
    return {"parallel_read_safe": True}


def convert(app, what, name, obj, options, lines):
    lines[:] = restructured(lines)


def restructured(lines):
    """The lines of a docstring as those of reStructuredText."""
    result = []
    for kind, part in parts(lines):
        result += [*WRITTEN[kind](part), ""]
    return result


def parts(lines):
    """[kind, lines] of what belongs together: text, parameters, or what is kept as it is."""
    found, kind = [], None
    for paragraph in split(lines):
        in_columns = sum(bool(COLUMNS.match(line)) for line in paragraph) > 1
        kind, before = None, kind
        for line in paragraph:
            earlier, kind = kind, kind_of(line, kind, in_columns)
            if earlier is None and kind == before == "kept":
                found[-1][1].extend(["", line])
            elif kind == earlier:
                found[-1][1].append(line)
            else:
                found.append([kind, [line]])
    return found


def split(lines):
    """Paragraphs, as lists of lines."""
    text = "\n".join(lines).strip("\n")
    return [paragraph.splitlines() for paragraph in re.split(r"\n(?:\s*\n)+", text) if paragraph]


def kind_of(line, earlier, in_columns):
    if earlier == "parameters":
        return earlier  # whose further lines are indented or not
    if line.startswith("- "):
        return "parameters"
    if in_columns or line.startswith("  "):
        return "kept"
    return "parameters" if earlier != "text" and PARAMETER.fullmatch(line) else "text"


def text(lines):
    return [inline(line) for line in lines]


def kept(lines):
    lines = textwrap.dedent("\n".join(lines)).splitlines()
    return ["::", "", *("    " + line if line else "" for line in lines)]


def parameters(lines):
    """A list, an item for each `name: what it is` and for each line that begins with a dash."""
    items = []
    for line in lines:
        begins = PARAMETER.fullmatch(line)
        if begins:
            items.append(f"- ``{begins[1]}``: {inline(begins[2])}")
        elif line.startswith("- "):
            items.append(inline(line))
        else:
            items.append("  " + inline(line))
    return [re.sub(r"^ {3,}", "  ", item) for item in items]


WRITTEN = {"text": text, "kept": kept, "parameters": parameters}


def inline(text):
    """Code as code, and nothing else as markup."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(f"`{piece}`" if piece.startswith("`") else escaped(piece) for piece in pieces)


def escaped(text):
    return re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", text)
