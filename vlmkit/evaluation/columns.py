"""The columns of a dataset, which may be of the `datasets` library, a stream, or a list of rows."""

COLUMNS = ("images", "question", "answer")
"""The columns that a dataset must have; `task`, `kind` and `answers` are used if they are there."""


def columns_of(dataset):
    """The names of the columns. If a stream does not know them, those of its first row."""
    names = getattr(dataset, "column_names", None)
    return list(next(iter(dataset), {}) if names is None else names)


def column(dataset, name):
    """The values of one column, as a list."""
    if hasattr(dataset, "column_names"):
        # The column alone: with a transform, a dataset reads all of a row for it, pictures too.
        return list(dataset.select_columns([name])[name])
    return [row[name] for row in dataset]


def lacking_columns(columns, needed=COLUMNS):
    """What to say about columns that are missing, as text; None if all of `needed` are there."""
    missing = [name for name in needed if name not in columns]
    if not missing:
        return None
    return (
        f"The dataset has no column {' and no column '.join(missing)}. It has "
        f"{', '.join(columns) or 'no columns'}, and needs {', '.join(needed)}. "
        "vk.tasks.from_dataset(dataset) makes these columns of other layouts, such as messages, "
        "conversations, prompt and completion, or image; dataset.rename_column renames a column."
    )
