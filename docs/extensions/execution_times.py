"""The table of `docs/times.md`, from the recorded times."""

import times

MARK = "<!-- the table of recorded times -->"


def setup(app):
    app.connect("source-read", insert)
    return {"parallel_read_safe": True}


def insert(app, docname, source):
    if docname == "docs/times":
        source[0] = source[0].replace(MARK, times.table(times.recorded()))
