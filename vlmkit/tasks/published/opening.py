"""Opens published data, wherever it is, as a `datasets.Dataset` or `IterableDataset`."""

import os
import re
from pathlib import Path

from vlmkit.errors import TaskError, brief

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Longer names first: "testdev" begins with "test".
_SPLITS = re.compile(r"(?:^|[^a-z])(testdev|train|validation|valid|val|dev|test)(?![a-z])", re.I)


def opened(source, split=None, streaming=False, name=None, **loading):
    """One split of `source`, the folder that relative paths of pictures start from, and a title.

    Arguments and errors are those of `vlmkit.tasks.from_dataset`.
    """
    import datasets

    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return source, None, "the dataset"
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return source[_split_named(source, split, "the dataset")], None, "the dataset"
    if not isinstance(source, (str, os.PathLike)):
        raise TaskError(
            "A source is a file or folder, a hub id, or an opened dataset of the datasets library; "
            f"this is a {type(source).__name__}. datasets.Dataset.from_list makes one from rows."
        )
    path = Path(source).expanduser()
    if path.exists():
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        found = _saved(path, split) if saved else _files(path, split, streaming, loading)
        return found, os.path.abspath(path if path.is_dir() else path.parent), str(source)
    if isinstance(source, os.PathLike) or path.suffix in BUILDERS or not _HUB_ID.fullmatch(source):
        raise TaskError(
            f"There is no file or folder {source}; the current directory is {os.getcwd()}. A hub "
            "id has the form owner/name."
        )
    return _hub(source, split, streaming, name, loading), None, source


def _saved(path, split):
    """What `save_to_disk` wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # from Arrow, from JSON or from the file system
        raise TaskError(f"The saved dataset {path} cannot be read: {brief(error)}.") from error
    return found[_split_named(found, split, str(path))] if isinstance(found, dict) else found


def _files(path, split, streaming, loading):
    """A parquet or JSON file, or a folder of them with the split in their names."""
    import datasets

    files = sorted(p for p in path.rglob("*") if p.suffix in BUILDERS) if path.is_dir() else [path]
    kinds = {BUILDERS.get(file.suffix) for file in files}
    # JSON files beside parquet files describe them, and hold no rows.
    builder = "parquet" if "parquet" in kinds else next(iter(kinds), None)
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
            splits.setdefault(named[-1] if named else default, []).append(str(file))
    files = splits[_split_named(splits, split, str(path))]
    try:
        return datasets.load_dataset(
            builder, data_files=files, split="train", streaming=streaming, **loading
        )
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
