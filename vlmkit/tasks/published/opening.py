"""Opens data, wherever they are: as rows of a file, or as a dataset of the `datasets` library.

JSON and CSV are read here, because a reader that guesses types loses what stands in the file: it
makes a time of "2019-05-01" and 3.0 of 3.
"""

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path

from vlmkit.errors import TaskError, brief

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Longer names first: "testdev" begins with "test".
_SPLITS = re.compile(r"(?:^|[^a-z])(testdev|train|validation|valid|val|dev|test)(?![a-z])", re.I)


class FileRow(dict):
    """A row of a file. folder: the file's, from which relative paths of pictures start."""

    folder = None


class FileRows:
    """The rows of files of JSON or CSV, in order, read anew for each pass. A row that cannot be
    read is a TaskError."""

    def __init__(self, files, field=None):
        self.files, self.field = files, field

    def __iter__(self):
        for file in self.files:
            read = _csv if BUILDERS.get(file.suffix) == "csv" else _json
            folder = os.path.abspath(file.parent)
            try:
                for row in read(file, self.field):
                    if isinstance(row, dict):
                        row = FileRow(row)
                        row.folder = folder
                    elif not isinstance(row, TaskError):
                        row = TaskError(f"it is no object with named values: {row!r:.80}.")
                    yield row
            except UnicodeError as error:
                raise TaskError(
                    f"{file} is not text in UTF-8: save it so. {brief(error)}."
                ) from error
            except (OSError, csv.Error) as error:
                raise TaskError(f"{file} cannot be read: {brief(error)}.") from error


def _csv(file, field):
    with open(file, encoding="utf-8-sig", newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        # A spreadsheet separates by what its country does not use in numbers.
        separator = max(",;\t", key=header.count)
        rows = csv.DictReader(lines, delimiter=separator, strict=True)  # strict: closed quotes
        twice = [name for name, times in Counter(rows.fieldnames or ()).items() if times > 1]
        if twice:
            raise TaskError(f"{file} has the column {twice[0]} twice. Rename one of them.")
        for row in rows:
            more = row.pop(None, ())  # cells without a name
            if any(more):
                yield TaskError(
                    f"it has more cells than columns ({more[0]!r:.80} has no column). A cell with "
                    f"{separator!r} in it needs quotes around it."
                )
            else:
                yield {name: value or None for name, value in row.items()}  # empty: missing


def _json(file, field):
    with open(file, encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if file.suffix == ".json" or first.lstrip("\ufeff ").startswith("["):
            try:
                whole = _loaded(lines.read())
            except TaskError as error:
                if "Extra data" not in str(error):  # more than one piece of JSON
                    raise TaskError(f"{file} {str(error).removeprefix('it ')}") from error
                lines.seek(0)  # a line for each row, in spite of the name
            else:
                yield from _table(whole, field, file)
                return
        for line in lines:
            if line.strip():
                try:
                    yield _loaded(line)
                except TaskError as error:
                    yield error


def _loaded(text):
    """JSON with numbers as they are written: 3, 2.50 and NaN become texts."""
    try:
        return json.loads(
            text.lstrip("\ufeff"), parse_int=str, parse_float=str, parse_constant=str,
            object_pairs_hook=_each_once,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise TaskError(f"it cannot be read as json: {brief(error)}.") from error


def _each_once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _table(whole, field, file):
    """The rows in a file that is one piece of JSON: a list, or an object with a list of them."""
    if isinstance(whole, dict):
        lists = [name for name, value in whole.items() if isinstance(value, list)]
        tables = [n for n in lists if whole[n] and all(isinstance(x, dict) for x in whole[n])]
        if field is None and len(whole) > 1 and not (len(tables) == 1 and tables == lists):
            return [whole]  # one row
        field = field or next(iter(tables), None)
        if field is None:
            return [whole]
        if field not in whole:
            raise TaskError(f"{file} has no field {field!r}; it has {', '.join(whole)}.")
        whole = whole[field]
    return whole if isinstance(whole, list) else [whole]


def opened(source, split=None, streaming=False, name=None, **loading):
    """One split of `source`, the folders that relative paths of pictures start from, and a title.

    The split is a dataset, a list of rows, or FileRows. Arguments and errors are those of
    `vlmkit.tasks.from_dataset`.
    """
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return source, (), "the dataset"
    if isinstance(source, (list, tuple)):
        return list(source), (), "the dataset"
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return source[_split_named(source, split, "the dataset")], (), "the dataset"
    if not isinstance(source, (str, os.PathLike)):
        raise TaskError(
            "A source is a file or folder, a hub id, an opened dataset of the datasets library, or "
            f"a list of rows; this is a {type(source).__name__}."
            + (" Give its rows: to_dict('records')." if hasattr(source, "to_dict") else "")
        )
    path = Path(source).expanduser()
    if path.exists():
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        root = os.path.abspath(path if path.is_dir() else path.parent)
        if saved:
            return _saved(path, split), (root,), str(source)
        found, folder = _files(path, split, streaming, loading)
        return found, tuple(dict.fromkeys((folder or root, root))), str(source)
    if isinstance(source, os.PathLike) or path.suffix in BUILDERS or not _HUB_ID.fullmatch(source):
        raise TaskError(
            f"There is no file or folder {source}; the current directory is {os.getcwd()}. A hub "
            "id has the form owner/name."
        )
    return _hub(source, split, streaming, name, loading), (), source


def _saved(path, split):
    """What `save_to_disk` wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # from Arrow, from JSON or from the file system
        raise TaskError(f"The saved dataset {path} cannot be read: {brief(error)}.") from error
    return found[_split_named(found, split, str(path))] if isinstance(found, dict) else found


def _files(path, split, streaming, loading):
    """The rows of a file, or of a folder of files with the split in their names; and the folder of
    these files, if it is one."""
    import datasets

    if not path.is_dir() and not path.is_file():
        raise TaskError(f"{path} is not a regular file.")
    files = sorted(p for p in path.rglob("*") if p.suffix in BUILDERS) if path.is_dir() else [path]
    # An imagefolder has its rows in files of this name.
    files = [file for file in files if file.stem == "metadata"] or files
    kinds = {BUILDERS.get(file.suffix) for file in files}
    # JSON files beside parquet files describe them, and hold no rows.
    builder = next((kind for kind in ("parquet", "json", "csv") if kind in kinds), None)
    if builder is None:
        inside = "holds no" if path.is_dir() else "is no"
        raise TaskError(
            f"{path} {inside} file of {', '.join(BUILDERS)}, and not a dataset that save_to_disk "
            "wrote. Open other formats with the datasets library and give the opened dataset."
        )
    splits = {}
    for file in files:
        if BUILDERS[file.suffix] == builder:
            named = _SPLITS.findall(str(file.relative_to(path.parent if path.is_file() else path)))
            # A single file whose name says no split is the split that is asked for.
            default = split if split and path.is_file() else "train"
            splits.setdefault(named[-1] if named else default, []).append(file)
    files = splits[_split_named(splits, split, str(path))]
    folders = {os.path.abspath(file.parent) for file in files}
    folder = folders.pop() if len(folders) == 1 else None
    if builder != "parquet":
        field = loading.pop("field", None)
        if loading:
            raise TaskError(f"{', '.join(loading)} would have no effect on files of {builder}.")
        rows = FileRows(files, field)
        return (rows if streaming else list(rows)), folder
    try:
        found = datasets.load_dataset(
            builder,
            data_files=[str(file) for file in files],
            split="train",
            streaming=streaming,
            **loading,
        )
        return found, folder
    except Exception as error:  # from Arrow or a builder, wrapped in one another
        cause = error.__cause__ or error
        raise TaskError(f"{path} cannot be read as {builder}: {brief(cause)}.") from error


def _hub(source, split, streaming, name, loading):
    import datasets

    try:
        if split is None:
            splits = datasets.get_dataset_split_names(source, name, **loading)
            split = _split_named(splits, None, source)
        return datasets.load_dataset(source, name, split=split, streaming=streaming, **loading)
    except TaskError:
        raise
    except Exception as error:  # from the hub, from HTTP or from a builder: the text says which
        subset = f" (subset {name})" if name else ""
        raise TaskError(
            f"The dataset {source}{subset} could not be opened: {brief(error)}. There is no "
            "such file or folder here, so vlmkit asked the hub. Without a network, download the "
            "dataset elsewhere and give its folder. A private one needs a token. name= chooses a "
            "subset."
        ) from error


def _split_named(splits, split, title):
    """The name of the split to take: `split`, or the only one of `splits`."""
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split not in splits:
        found = f"no split {split!r}" if split else "several splits"
        raise TaskError(f"{title} has {found}; choose with split= from {', '.join(splits)}.")
    return split
