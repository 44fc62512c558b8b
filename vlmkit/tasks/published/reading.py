"""Published rows in vlmkit's own shape: texts checked, pictures read when they are asked for."""

import os

from vlmkit.errors import ImageError, TaskError, VlmkitError
from vlmkit.images import read_all
from vlmkit.tasks.published.schemas import PICTURES


class Texts:
    """Reads what the rows of a source ask, and keeps account of those that cannot be used.

    prompt: a text with {question} where the question goes, or None for the question as it is.
    skipped: a list that takes (row number, why) of each, or None to raise at the first.
    """

    def __init__(self, schema, title, prompt, skipped):
        self.schema, self.title, self.skipped = schema, title, skipped
        self.prompt = prompt or "{question}"

    def questions(self, row, number):
        """The questions of a row: dicts with question, answer, task, kind and answers."""
        try:
            found = self.schema.read(row)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            what = f"it is not laid out as {self.schema.name}: {type(error).__name__}: {error}."
            self.failed(number, TaskError(what))
            return
        if not found:
            self.failed(number, TaskError("it asks no question."))
        for one in found:
            try:
                yield self._checked(**one)
            except TaskError as error:
                self.failed(number, error)

    def _checked(self, question, answer, answers=(), kind=None, task=None):
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)  # JSON lines have numbers
        for text, what in ((question, "question"), (answer, "answer")):
            if not isinstance(text, str) or not text.strip():
                found = "is empty" if text is None or isinstance(text, str) else f"is {text!r}"
                hint = " The answers of test splits are often kept back." * (what == "answer")
                raise TaskError(f"the {what} {found}.{hint}")
        return {
            "question": self.prompt.replace("{question}", question),
            "answer": answer,
            "task": task or self.schema.name,
            "kind": str(kind) if kind not in (None, "") else "all",
            "answers": list(answers) or [answer],
        }

    def failed(self, number, error):
        """Raise the error with the row's number, or note it down where rows are to be skipped."""
        named = type(error)(f"Row {number} of {self.title}: {error}")
        if self.skipped is None:
            raise named from error
        self.skipped.append((number, str(error)))


class Pictures:
    """The pictures of a dataset by row number; as a transform, the column `images` of a batch.

    dataset: with a column `images` or `image`, or both, of which a row uses the one that it fills.
    They are kept undecoded, so that a picture is read by `vlmkit.images` and an error names its
    row. folder: where relative paths start. decode: False gives pictures as they are stored.
    """

    def __init__(self, dataset, folder, title, decode=True):
        self.decode = decode
        self.columns = [name for name in PICTURES if name in columns_of(dataset)]
        self.dataset, self.folder, self.title = undecoded(dataset, self.columns), folder, title
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

    def at(self, number):
        """The pictures of a row; an error does not name it."""
        return self.read(self.dataset[number])

    def read(self, row):
        """The RGB pictures of a row: one or a list of them, each stored, a path or a PIL image."""
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
    """Pictures that another dataset holds, found by the `imageId` of a row (GQA)."""

    def __init__(self, dataset, folder, title, decode=True):
        missing = [name for name in ("id", "image") if name not in columns_of(dataset)]
        if missing or not hasattr(dataset, "__len__"):
            lacks = f"no column {' and no column '.join(missing)}" if missing else "no length"
            raise TaskError(
                f"{title} is to hold the images by id, and has {lacks}: give a dataset with the "
                "columns id and image, not streamed."
            )
        super().__init__(dataset, folder, title, decode)
        self.numbers = {str(name): number for number, name in enumerate(dataset["id"])}

    def number(self, row):
        if str(row["imageId"]) not in self.numbers:
            raise ImageError(f"there is no image {row['imageId']} in {self.title}.")
        return self.numbers[str(row["imageId"])]


def columns_of(dataset):
    """The names of a dataset's columns; of a stream that does not say, those of its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


def undecoded(dataset, columns):
    """The dataset with the pictures of these columns as they are stored, bytes or paths."""
    import datasets

    stored = datasets.Image(decode=False)
    for column in columns:
        feature = (dataset.features or {}).get(column)
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, stored)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(column, datasets.List(stored))
    return dataset


def mapped(dataset, texts, pictures, limit):
    """A `datasets.Dataset` of the questions in memory, which reads their pictures on demand."""
    import datasets

    features = datasets.Features(
        images=datasets.Value("int64"),  # the picture's row; `pictures` puts it in its place
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
        task=datasets.Value("string"),
        kind=datasets.Value("string"),
        answers=datasets.List(datasets.Value("string")),
    )
    columns = {name: [] for name in features}
    bare = dataset.select_columns([n for n in dataset.column_names if n not in PICTURES])
    for number, row in enumerate(bare):
        if limit is not None and len(columns["answer"]) >= limit:
            break
        try:
            picture = pictures.number(row) if isinstance(pictures, Joined) else number
            if texts.skipped is not None and pictures.decode:
                pictures.at(picture)
        except VlmkitError as error:
            texts.failed(number, error)
            continue
        for one in texts.questions(row, number):
            for name, value in {"images": picture, **one}.items():
                columns[name].append(value)
    columns = {name: values[:limit] for name, values in columns.items()}
    if not columns["answer"]:
        raise TaskError(f"{texts.title} has no row that can be used{_reasons(texts.skipped)}.")
    return datasets.Dataset.from_dict(columns, features=features).with_transform(pictures)


def _reasons(skipped):
    return f": row {skipped[0][0]}: {skipped[0][1].rstrip('.')}" if skipped else ""


def streamed(dataset, texts, pictures, limit):
    """A `datasets.IterableDataset` of the questions, each read as it comes by."""

    def expand(batch, numbers):
        row = {name: values[0] for name, values in batch.items()}
        found = {name: [] for name in ("images", "question", "answer", "task", "kind", "answers")}
        try:
            if isinstance(pictures, Joined):
                images = pictures.at(pictures.number(row))
            else:
                images = pictures.read(row)
        except ImageError as error:
            texts.failed(numbers[0], error)
            return found
        for one in texts.questions(row, numbers[0]):
            for name, value in {"images": images, **one}.items():
                found[name].append(value)
        return found

    source = dataset if isinstance(pictures, Joined) else pictures.dataset
    stream = source.map(
        expand, with_indices=True, batched=True, batch_size=1, remove_columns=columns_of(source)
    )
    return stream if limit is None else stream.take(limit)
