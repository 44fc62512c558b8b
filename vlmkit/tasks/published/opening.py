"""Opening published data, wherever it is: as a `datasets.Dataset` or `IterableDataset`."""

import os
import re
from pathlib import Path

from vlmkit.errors import TaskError

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Longer names first: "testdev" begins with "test".
_SPLITS = re.compile(r"(?:^|[^a-z])(testdev|train|validation|valid|val|dev|test)(?![a-z])", re.I)


def opened(source, split=None, streaming=False, name=None, **loading):
    """One split of `source`, the folder that its relative image paths start from, and its title.

    Arguments and errors are those of `vlmkit.tasks.from_dataset`.
    """
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return source, None, "the dataset"
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return _one_split(source, split, "the dataset"), None, "the dataset"
    if not isinstance(source, (str, os.PathLike)):
        raise TaskError(
            "A source is a file or folder, a hub id, or an opened dataset of the datasets library; "
            f"this is a {type(source).__name__}. datasets.Dataset.from_list makes one of rows."
        )
    path = Path(source).expanduser()
    if path.exists():
        found = _saved(path, split) if _is_saved(path) else _files(path, split, streaming, loading)
        return found, os.path.abspath(path if path.is_dir() else path.parent), str(source)
    if isinstance(source, os.PathLike) or path.suffix in BUILDERS or not _HUB_ID.fullmatch(source):
        raise TaskError(
            f"There is no file or folder {source}; the current directory is {os.getcwd()}. A hub "
            "id has the form owner/name."
        )
    return _hub(source, split, streaming, name, loading), None, source


def _is_saved(path):
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved(path, split):
    """What `save_to_disk` wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of Arrow, of JSON and of the file system
        raise TaskError(f"The saved dataset {path} cannot be read: {_first_line(error)}") from error
    return _one_split(found, split, str(path)) if isinstance(found, dict) else found


def _files(path, split, streaming, loading):
    """A parquet or JSON-lines file, or a folder of them with the split in their names."""
    import datasets

    files = sorted(p for p in path.rglob("*") if p.suffix in BUILDERS) if path.is_dir() else [path]
    # Beside parquet files, those of JSON are about them rather than more rows.
    builders = [BUILDERS.get(file.suffix) for file in files]
    builder = "parquet" if "parquet" in builders else next(iter(builders), None)
    if builder is None:
        inside = "holds no" if path.is_dir() else "is no"
        raise TaskError(
            f"{path} {inside} file of {', '.join(BUILDERS)}, and no dataset that save_to_disk "
            "wrote. Other formats: open it with the datasets library and give what that returns."
        )
    splits = {}
    for file, own in zip(files, builders, strict=True):
        if own == builder:
            told = _SPLITS.findall(str(file.relative_to(path.parent if path.is_file() else path)))
            # A lone file whose name says nothing is whatever split it is said to be.
            default = split if split and path.is_file() else "train"
            splits.setdefault(told[-1] if told else default, []).append(str(file))
    chosen = _split_named(splits, split, str(path))
    try:
        return datasets.load_dataset(
            builder, data_files=splits[chosen], split="train", streaming=streaming, **loading
        )
    except Exception as error:  # whatever Arrow and the builders raise, wrapped in one another
        cause = error.__cause__ or error
        raise TaskError(f"{path} cannot be read as {builder}: {_first_line(cause)}") from error


def _hub(source, split, streaming, name, loading):
    import datasets

    try:
        if split is None:
            splits = datasets.get_dataset_split_names(source, name, **loading)
            split = _split_named(dict.fromkeys(splits), None, source)
        return datasets.load_dataset(source, name, split=split, streaming=streaming, **loading)
    except TaskError:
        raise
    except Exception as error:  # of the hub, of HTTP, of the builders: told apart by their text
        subset = f" (subset {name})" if name else ""
        raise TaskError(
            f"The dataset {source}{subset} could not be opened: {_first_line(error)} It is no file "
            "or folder here, so it was asked of the hub. Without a network, download it elsewhere "
            "and give its folder; a private one needs a token; a subset is chosen with name=."
        ) from error


def _one_split(found, split, title):
    return found[_split_named(found, split, title)]


def _split_named(splits, split, title):
    if split is None and len(splits) == 1:
        return next(iter(splits))
    if split not in splits:
        asked = f"no split {split!r}" if split else "several splits"
        raise TaskError(f"{title} has {asked}; choose with split= from {', '.join(splits)}.")
    return split


def _first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
