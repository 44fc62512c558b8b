"""Published data and your own, in the form of vlmkit's own tasks.

layouts.py  one form for conversations and pictures, however a row keeps them
schemas.py  the column layouts in which such data is kept, and how a row of each is read
opening.py  files, folders, saved datasets and the hub
reading.py  checked rows with their pictures, by number or as a stream
writing.py  the way back: rows in the layout that TRL reads
"""

import warnings

from vlmkit.errors import TaskError, public
from vlmkit.evaluation.columns import columns_of
from vlmkit.tasks.published.layouts import picture_columns
from vlmkit.tasks.published.opening import FileRows, opened
from vlmkit.tasks.published.reading import Joined, Pictures, RowReader, mapped, streamed
from vlmkit.tasks.published.schemas import SCHEMAS, find
from vlmkit.tasks.published.writing import to_messages

__all__ = ["SCHEMAS", "from_dataset", "to_messages"]


@public
def from_dataset(
    source,
    schema=None,
    split=None,
    streaming=False,
    limit=None,
    *,
    name=None,
    images=None,
    prompt=None,
    on_error="raise",
    skipped=None,
    decode=True,
    **loading,
):
    """Questions and conversations from people's data: a `datasets.Dataset` with rows like those of
    `dataset`.

    Columns: images (a list of RGB pictures, read when a row is asked for), question, answer, task
    (the schema's name), kind (how the data set divides its questions, else "all") and answers (all
    accepted answers). If a row is more than one question after its pictures, such as several turns,
    a system prompt or pictures between words, there is also the column messages with the whole
    conversation: {"role", "content": [{"type": "image"}, {"type": "text", "text"}, ...]}; question
    and answer are then its last ones. The texts are in memory. The pictures are read from where
    they are, after splitting, shuffling and selecting too; `save_to_disk` would save the rows
    without them, and `to_messages` makes rows with them.

    source: a parquet, JSON-lines, JSON, CSV or TSV file, or a folder of these (also an
        imagefolder with metadata.jsonl); a folder that `save_to_disk` wrote; an opened dataset of
        the `datasets` library; a list of rows; or a hub id. Paths of pictures are relative to the
        file, or to the folder.
    schema: one of `SCHEMAS`, the column layouts that vlmkit reads; by default recognized from the
        columns. "plain" is for your own data: image or images, question, answer, and optionally
        answers, task and kind.
    split: its name, needed if there are several. name: the subset of a hub data set.
    streaming: return an `IterableDataset`, which keeps nothing in memory. `vlmkit.evaluate` takes
        `list(rows.take(n))` of it. An opened stream stays a stream.
    limit: the most rows to return; nothing beyond them is read.
    images: for rows with imageId, the source of the pictures, with the columns id and image. By
        default, on the hub, the subset ..._images beside the subset ..._instructions.
    prompt: a text around each question, such as "{question}\\nAnswer the question using a single
        word or phrase.". Many published results are made with such a prompt. For captions, which
        have no question, it is the question.
    on_error: what to do with a row without a question, an answer or a readable picture: "raise", or
        "skip" it and warn how many were skipped. To skip, all pictures are read once at the start,
        except in a stream.
    skipped: a list that gets (row number, why) of each skipped row; in a stream, as it is read.
    decode: False leaves pictures as bytes or paths, for a training whose collator reads pictures
        and decides about unreadable ones. No picture is then looked for at the start.
    loading: further arguments of `datasets.load_dataset`, such as revision, token or cache_dir. For
        JSON, field is the key of the rows.

    Texts come out as they stand in the file: numbers, dates, true and NaN too. Raises TaskError for
    a source that cannot be opened, for several splits, for columns that match no schema and for
    unusable rows, and ImageError for missing and unusable pictures; both name the row.
    """
    import datasets

    _check_options(limit, prompt, on_error, skipped)
    given = isinstance(source, (datasets.Dataset, datasets.IterableDataset, list, tuple))
    if split is not None and given:
        raise TaskError(f"An opened dataset is already one split: leave out split={split!r}.")
    data, folders, title = opened(source, split, streaming, name, **loading)
    if streaming and isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset()
    by_row = isinstance(data, (list, FileRows))
    columns = _columns(data, title) if by_row else columns_of(data)
    found = find(columns, schema)
    noted = None if on_error == "raise" else [] if skipped is None else skipped
    reader = RowReader(None if by_row and schema is None else found, title, prompt, noted)
    if found.joined in columns and not picture_columns(columns):
        pictures = _joined(images, source, split, name, loading, title, reader, decode)
    else:
        pictures = Pictures(data, reader, folders, decode)
    if not isinstance(data, (datasets.Dataset, list)) or streaming:
        return streamed(data, reader, pictures, limit)
    before = len(noted or ())
    rows = mapped(data, reader, pictures, limit)
    if noted and len(noted) > before:
        number, why = noted[before]
        warnings.warn(
            f"{title}: skipped {len(noted) - before} rows, the first is row {number}: {why}",
            stacklevel=2,
        )
    return rows


def _columns(rows, title):
    """The columns that any row of a list fills; of a stream, those of its first usable row."""
    columns, first = {}, None
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            filled = [name for name, value in row.items() if value is not None]
            columns |= dict.fromkeys(filled or row)
            if isinstance(rows, FileRows):
                break
        elif first is None:
            what = row if isinstance(row, TaskError) else f"a row is a dict, not {row!r:.80}."
            first = TaskError(f"Row {number} of {title}: {what}")
    if not columns:
        raise first or TaskError(f"{title} has no rows.")
    return list(columns)


def _joined(images, source, split, name, loading, title, reader, decode):
    found, folders, title = _images(images, source, split, name, loading, title)
    return Joined(found, reader, folders, title, decode)


def _images(images, source, split, name, loading, title):
    """What `opened` returns for the pictures that rows refer to by imageId."""
    if images is not None:
        found, folders, title = opened(images, split)
        return found, folders, f"{title} of images"
    if isinstance(source, str) and name and name.endswith("_instructions"):
        return opened(source, split, name=f"{name.removesuffix('_instructions')}_images", **loading)
    raise TaskError(
        f"The rows of {title} refer to their pictures by imageId. Give the pictures with images=: "
        "a source with the columns id and image."
    )


def _check_options(limit, prompt, on_error, skipped):
    if limit is not None and (type(limit) is not int or limit < 1):
        raise TaskError(f"limit is a whole number of rows from 1, or None, and not {limit!r}.")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise TaskError(f"A prompt is text with {{question}} where the question goes: {prompt!r}.")
    if on_error not in ("raise", "skip"):
        raise TaskError(f"on_error is 'raise' or 'skip', and not {on_error!r}.")
    if skipped is not None and (on_error != "skip" or not isinstance(skipped, list)):
        raise TaskError("skipped is a list that the skipped rows are added to: on_error='skip'.")
