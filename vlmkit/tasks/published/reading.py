"""Rows in the form of vlmkit: texts checked, pictures read when they are asked for."""

import os

from vlmkit.errors import ImageError, TaskError, VlmkitError
from vlmkit.evaluation.columns import columns_of, lacking_columns
from vlmkit.images import check_all, read_all, undecoded, without_scheme
from vlmkit.tasks.published.schemas import schema_of

TEXTS = ("question", "answer", "task", "kind")


def message_features():
    """A message as `datasets` keeps it: a role, and parts of which image parts have no text."""
    from datasets import List, Value

    text = Value("string")
    return List({"role": text, "content": List({"type": text, "text": text})})


class RowReader:
    """Reads rows of a source, and notes those that cannot be used.

    schema: of all rows; None finds one for each row. prompt: a text with {question} where the
    question goes, or None for the question alone. skipped: a list that gets (row number, why), or
    None to raise at the first unusable row.
    """

    def __init__(self, schema, title, prompt=None, skipped=None):
        self.schema, self.title, self.prompt, self.skipped = schema, title, prompt, skipped

    def schema_of(self, row):
        """The schema of a row, by the columns that it fills."""
        return self.schema or schema_of(row)

    def read(self, row, number, pictures):
        """The questions of a row, a list of dicts in the form of vlmkit, with `images` from
        `pictures.taken`."""
        try:
            if isinstance(row, TaskError):
                raise row
            schema = self.schema_of(row)
            found = schema.questions(row, pictures.beside(row), self.prompt)
            talks = [one["conversation"] for one in found if isinstance(one, dict)]
            images = pictures.taken(row, number, talks[0].images) if talks else None
        except VlmkitError as error:
            return self._failed(number, error)
        questions = []
        for one in found:
            if isinstance(one, TaskError):
                self._failed(number, one)
            else:
                questions.append(self._question(one, images))
        return questions

    def _question(self, one, images):
        talk = one["conversation"]
        first, last = talk.turns[0], talk.turns[-1]
        plain = talk.is_plain
        return {
            "images": images,
            "question": first["content"][-1]["text"] if plain else talk.question,
            "answer": last["content"][0]["text"],
            "task": one["task"],
            "kind": one["kind"],
            "answers": one["answers"] or [last["content"][0]["text"]],
            "messages": talk.turns,
            "plain": plain,
        }

    def _failed(self, number, error):
        """Note the row, which then has no questions; without a list to note it in, raise."""
        if self.skipped is None:
            raise type(error)(f"Row {number} of {self.title}: {error}") from error
        self.skipped.append((number, str(error)))
        return []


class Pictures:
    """The pictures of a source by row number. As a transform, it fills the column images.

    rows: a dataset, or a list of rows. folders: where relative paths start, the first that has the
    file. decode: False gives pictures as they are stored.
    """

    def __init__(self, rows, reader, folders, decode=True):
        self.reader, self.folders, self.decode = reader, folders, decode
        self.rows = undecoded(rows)

    def __call__(self, batch):
        batch = dict(batch)
        if "images" in batch:
            batch["images"] = [self[number] for number in batch["images"]]
        return batch

    def __getitem__(self, number):
        try:
            return self.at(number)
        except ImageError as error:
            raise ImageError(f"Row {number} of {self.reader.title}: {error}") from error

    def at(self, number):
        """The pictures of a row by its number, with errors that do not name it."""
        row = self.rows[number]
        return self._read(self.located(row, self.reader.schema_of(row).pictures(row)))

    def beside(self, row):
        """The pictures of a row that another source has; None if the row has its own."""
        return None

    def taken(self, row, number, cells):
        """What goes into the column images of a stream: the pictures of the row."""
        return self._read(self.located(row, cells))

    def _read(self, located):
        if not self.decode:
            return located
        if any(one is None for one in located):
            raise ImageError("there is no picture.")
        return read_all(located)

    def located(self, row, cells):
        """The pictures `cells` of a row, with the folder in paths."""
        own = getattr(row, "folder", None)
        folders = self.folders if own is None else dict.fromkeys((own, *self.folders[-1:]))
        return [_located(cell, folders) for cell in cells]


def _located(cell, folders):
    if isinstance(cell, bytes):
        return {"bytes": cell, "path": None}
    if isinstance(cell, dict) and cell.get("bytes") is None:
        cell = cell.get("path") or ""
    if not isinstance(cell, str) or cell.startswith(("http://", "https://", "data:")):
        return cell
    cell = without_scheme(cell)
    if not folders:
        return cell
    # Paths are also written on a system with another separator.
    names = dict.fromkeys((os.path.expanduser(cell), cell.replace("\\", "/")))
    paths = [os.path.join(folder, name) for folder in folders for name in names]
    return next(filter(os.path.exists, paths), paths[0])


class Joined(Pictures):
    """Pictures of another dataset, which has them by the `imageId` of a row (GQA)."""

    def __init__(self, dataset, reader, folders, title, decode=True):
        lacking = lacking_columns(columns_of(dataset), ("id", "image"))
        if lacking or not hasattr(dataset, "__len__"):
            raise TaskError(f"{title}: {lacking or 'Give the pictures by id without streaming.'}")
        super().__init__(dataset, reader, folders, decode)
        self.title = title
        ids = [row["id"] for row in dataset] if isinstance(dataset, list) else dataset["id"]
        self.numbers = {str(name): number for number, name in enumerate(ids)}

    def at(self, number):
        row = self.rows[number]
        return self._read(self.located(row, [row["image"]]))

    def number(self, row):
        """The number of the row that holds the pictures of `row`."""
        if str(row["imageId"]) not in self.numbers:
            raise ImageError(f"there is no image {row['imageId']} in {self.title}.")
        return self.numbers[str(row["imageId"])]

    def beside(self, row):
        return [self.number(row)]

    def taken(self, row, number, cells):
        return self.at(self.number(row))


class Numbered:
    """In place of Pictures while the rows are read: takes numbers, and finds unusable pictures.

    thorough: read every picture; otherwise only files that are not there are found.
    """

    def __init__(self, pictures, thorough):
        self.pictures, self.thorough = pictures, thorough

    def beside(self, row):
        return self.pictures.beside(row)

    def taken(self, row, number, cells):
        pictures = self.pictures
        if isinstance(pictures, Joined):
            number = pictures.number(row)
            if self.thorough:
                pictures.at(number)
        elif pictures.decode:
            located = pictures.located(row, cells)
            if self.thorough:
                pictures._read(located)
            else:
                check_all(located)
        return number


def mapped(rows, reader, pictures, limit):
    """A `datasets.Dataset` of the questions in memory, which reads their pictures on demand."""
    import datasets

    numbered, found = Numbered(pictures, thorough=reader.skipped is not None), []
    own = rows if isinstance(pictures, Joined) else pictures.rows
    for number, row in enumerate(own):
        if limit is not None and len(found) >= limit:
            break
        found += reader.read(row, number, numbered)
    if not found:
        why = "; ".join(f"row {n}: {reason}" for n, reason in (reader.skipped or ())[:1])
        raise TaskError(f"{reader.title} has no row that can be used. {why}".rstrip())
    text = datasets.Value("string")
    features = datasets.Features(
        images=datasets.Value("int64"),  # the number of the row that `pictures` reads
        **dict.fromkeys(TEXTS, text),
        answers=datasets.List(text),
    )
    if not all(row["plain"] for row in found):
        features["messages"] = message_features()
    columns = {name: [row[name] for row in found[:limit]] for name in features}
    return datasets.Dataset.from_dict(columns, features=features).with_transform(pictures)


def streamed(rows, reader, pictures, limit):
    """A `datasets.IterableDataset` of the questions, which reads each row as it comes."""
    import datasets

    names = ("images", *TEXTS, "answers", "messages")

    def of_row(row, number):
        return [{name: one[name] for name in names} for one in reader.read(row, number, pictures)]

    def questions(batch, numbers):
        found = of_row({name: values[0] for name, values in batch.items()}, numbers[0])
        return {name: [one[name] for one in found] for name in names}

    if isinstance(rows, datasets.IterableDataset):
        source = rows if isinstance(pictures, Joined) else pictures.rows
        stream = source.map(
            questions,
            with_indices=True,
            batched=True,
            batch_size=1,
            remove_columns=columns_of(source),
        )
    else:

        def generated():
            for number, row in enumerate(rows):
                yield from of_row(row, number)

        stream = datasets.IterableDataset.from_generator(generated)
    return stream if limit is None else stream.take(limit)
