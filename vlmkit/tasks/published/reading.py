"""Published rows in the form of vlmkit: texts checked, pictures read when they are asked for."""

import os
from functools import partial

from vlmkit.errors import ImageError, TaskError, VlmkitError
from vlmkit.evaluation.columns import columns_of, lacking_columns
from vlmkit.images import read_all, undecoded
from vlmkit.tasks.published.schemas import PICTURES

TEXTS = ("question", "answer", "task", "kind")


class RowReader:
    """Reads rows of a source, and notes those that cannot be used.

    prompt: a text with {question} where the question goes, or None for the question alone.
    skipped: a list that gets (row number, why), or None to raise at the first unusable row.
    """

    def __init__(self, schema, title, prompt, skipped):
        self.schema, self.title, self.skipped = schema, title, skipped
        self.prompt = prompt or "{question}"

    def read(self, row, number, pictures):
        """The questions of a row, a list of dicts in the form of vlmkit.

        pictures: a function that returns what goes into the column images, or raises ImageError.
        """
        try:
            images = pictures()
            found = self.schema.read(row)
            if not found:
                raise TaskError("it asks no question.")
        except VlmkitError as error:
            return self._failed(number, error)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            what = f"it does not match the schema {self.schema.name}: {type(error).__name__}"
            return self._failed(number, TaskError(f"{what}: {error}."))
        questions = []
        for one in found:
            try:
                questions.append({"images": images, **self._checked(**one)})
            except TaskError as error:
                self._failed(number, error)
        return questions

    def _checked(self, question, answer, answers=(), kind=None, task=None):
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)  # JSON has numbers
        for text, what in ((question, "question"), (answer, "answer")):
            if not isinstance(text, str) or not text.strip():
                found = "is empty" if text is None or isinstance(text, str) else f"is {text!r}"
                hint = " Test splits are often published without answers." * (what == "answer")
                raise TaskError(f"the {what} {found}.{hint}")
        return {
            "question": self.prompt.replace("{question}", question),
            "answer": answer,
            "task": task or self.schema.name,
            "kind": str(kind) if kind not in (None, "") else "all",
            "answers": list(answers) or [answer],
        }

    def _failed(self, number, error):
        """Note the row, which then has no questions; without a list to note it in, raise."""
        if self.skipped is None:
            raise type(error)(f"Row {number} of {self.title}: {error}") from error
        self.skipped.append((number, str(error)))
        return []


class Pictures:
    """The pictures of a dataset by row number. As a transform, it fills the column images.

    dataset: with a column image or images, or both, of which each row uses the one that it fills.
    `vlmkit.images` reads the pictures, so that an error can name the row. folder: where relative
    paths start. decode: False gives pictures as they are stored.
    """

    def __init__(self, dataset, folder, title, decode=True):
        self.folder, self.title, self.decode = folder, title, decode
        self.columns = [name for name in PICTURES if name in columns_of(dataset)]
        self.dataset = undecoded(dataset, self.columns)
        if hasattr(dataset, "__len__"):
            self.dataset = self.dataset.select_columns(self.columns)

    def __call__(self, batch):
        batch = dict(batch)
        if "images" in batch:
            batch["images"] = [self[number] for number in batch["images"]]
        return batch

    def __getitem__(self, number):
        try:
            return self.at(number)
        except ImageError as error:
            raise ImageError(f"Row {number} of {self.title}: {error}") from error

    def number(self, row, number):
        """Number of the row that holds the pictures of `row`, the row `number` of the source."""
        return number

    def of(self, row):
        """The pictures of a row of the source, which is at hand."""
        return self._read(row)

    def at(self, number):
        """The pictures of a row by its number, with errors that do not name it."""
        return self._read(self.dataset[number])

    def _read(self, row):
        """RGB pictures from one cell or a list: each as stored, as a path or as a PIL image."""
        cell = next((row[name] for name in self.columns if row[name] is not None), None)
        cells = (cell if isinstance(cell, list) else [cell]) or [None]
        located = [self._located(one) for one in cells]
        if not self.decode:
            return located
        if None in located:
            raise ImageError("there is no picture.")
        return read_all(located)

    def _located(self, cell):
        if isinstance(cell, bytes):
            return {"bytes": cell, "path": None}
        if isinstance(cell, dict) and cell.get("bytes") is None:
            cell = cell.get("path") or ""
        if isinstance(cell, str) and self.folder and not cell.startswith(("http://", "https://")):
            return os.path.join(self.folder, os.path.expanduser(cell))
        return cell


class Joined(Pictures):
    """Pictures of another dataset, which has them by the `imageId` of a row (GQA)."""

    def __init__(self, dataset, folder, title, decode=True):
        lacking = lacking_columns(columns_of(dataset), ("id", "image"))
        if lacking or not hasattr(dataset, "__len__"):
            raise TaskError(f"{title}: {lacking or 'Give the pictures by id without streaming.'}")
        super().__init__(dataset, folder, title, decode)
        self.numbers = {str(name): number for number, name in enumerate(dataset["id"])}

    def number(self, row, number):
        if str(row["imageId"]) not in self.numbers:
            raise ImageError(f"there is no image {row['imageId']} in {self.title}.")
        return self.numbers[str(row["imageId"])]

    def of(self, row):
        return self.at(self.number(row, None))


def mapped(dataset, reader, pictures, limit):
    """A `datasets.Dataset` of the questions in memory, which reads their pictures on demand."""
    import datasets

    def placed(row, number):
        number = pictures.number(row, number)
        if reader.skipped is not None and pictures.decode:
            pictures.at(number)  # to see whether the row must be skipped
        return number

    bare = dataset.select_columns([n for n in dataset.column_names if n not in PICTURES])
    rows = []
    for number, row in enumerate(bare):
        if limit is not None and len(rows) >= limit:
            break
        rows += reader.read(row, number, partial(placed, row, number))
    if not rows:
        why = "; ".join(f"row {n}: {reason}" for n, reason in (reader.skipped or ())[:1])
        raise TaskError(f"{reader.title} has no row that can be used. {why}".rstrip())
    features = datasets.Features(
        images=datasets.Value("int64"),  # the number of the row that `pictures` reads
        **dict.fromkeys(TEXTS, datasets.Value("string")),
        answers=datasets.List(datasets.Value("string")),
    )
    columns = {name: [row[name] for row in rows[:limit]] for name in features}
    return datasets.Dataset.from_dict(columns, features=features).with_transform(pictures)


def streamed(dataset, reader, pictures, limit):
    """A `datasets.IterableDataset` of the questions, which reads each row as it comes."""

    def questions(batch, numbers):
        row = {name: values[0] for name, values in batch.items()}
        found = reader.read(row, numbers[0], partial(pictures.of, row))
        return {name: [one[name] for one in found] for name in ("images", *TEXTS, "answers")}

    source = dataset if isinstance(pictures, Joined) else pictures.dataset
    stream = source.map(
        questions, with_indices=True, batched=True, batch_size=1, remove_columns=columns_of(source)
    )
    return stream if limit is None else stream.take(limit)
