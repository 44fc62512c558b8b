"""The file that a sweep writes while it runs, and continues from after it was stopped.

The file has JSON lines. The first says which model, questions and settings the results belong to.
Each other line is a cell, and is written to the disk when the cell is measured. A sweep that is
killed loses only the cell that it was computing.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from vlmkit.errors import SensitivityError, brief, shown

VERSION = 2  # of the lines: 1 had other names for regressions and fixes


def fingerprint(model, dataset, settings):
    """{name: a hash or a value} of all that the results of a sweep depend on beside its cells."""
    import torch

    weights, questions = hashlib.sha256(), hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        weights.update(flat.view(torch.uint8).numpy())
    for row in dataset:
        rest = {name: value for name, value in row.items() if name != "images"}
        questions.update(json.dumps(rest, sort_keys=True, default=str).encode())
        images = row["images"] if isinstance(row["images"], (list, tuple)) else [row["images"]]
        for image in images:
            questions.update(image.tobytes() if hasattr(image, "tobytes") else str(image).encode())
    return {
        "model": weights.hexdigest()[:16],
        "dataset": questions.hexdigest()[:16],
        "rows": len(dataset),
        "version": VERSION,
        **settings,
    }


class Records:
    """The cells of a result file. `done`: {key: cell}; each cell is a dict.

    path: a file, which is made if there is none, or None to keep nothing. found: its fingerprint.
    Raises SensitivityError if the file belongs to another model, dataset or setting, is not the
    file of a sweep, or cannot be read or written.
    """

    def __init__(self, path, found):
        self.found, self.done = found, {}
        with _as_our_error(path):
            self.path = None if path is None else Path(path).expanduser()
            raw = b""
            if self.path and self.path.exists():
                if not self.path.is_file():  # a device or a pipe may have no end
                    raise OSError("it is no file")
                raw = self.path.read_bytes()
        if not raw:
            return
        lines = [line for line in map(_parsed, raw.split(b"\n")) if line is not None]
        if not lines and b"\n" not in raw and raw.startswith(b'{"fingerprint"'):
            lines = [{"fingerprint": found}]  # the sweep was killed while it wrote the first line
        before = lines[0].get("fingerprint") if lines else None
        if not isinstance(before, dict) or not all(map(_is_cell, lines[1:])):
            raise SensitivityError(
                f"{self.path} is not the result file of a sweep, so it is not overwritten: give "
                "another name."
            )
        self._require_same(before)
        self.done = {tuple(cell["key"]): cell for cell in lines[1:]}
        whole = b"".join(map(_line, lines))
        if whole != raw:  # without lines that are cut off
            with _as_our_error(path):
                beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
                beside.write_bytes(whole)
                os.replace(beside, self.path)

    def _require_same(self, before):
        differs = ", ".join(
            f"{name} (there {before.get(name)}, here {self.found.get(name)})"
            for name in {**before, **self.found}
            if before.get(name) != self.found.get(name)
        )
        if differs:
            raise SensitivityError(
                f"{self.path} holds the results of another sweep, which differs in its {differs}. "
                "Give this sweep a file of its own, or delete that one."
            )

    def begin(self):
        """Make the file if there is none."""
        if self.path and not (self.path.exists() and self.path.stat().st_size):
            with _as_our_error(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"fingerprint": self.found})

    def add(self, cell):
        self.done[tuple(cell["key"])] = cell
        if self.path:
            self._append(cell)

    def _append(self, line):
        # One write to a file open for appending: several processes do not mix their lines
        with (
            _as_our_error(self.path),
            open(self.path, "ab", buffering=0) as file,
        ):
            file.write(_line(line))
            os.fsync(file.fileno())


@contextlib.contextmanager
def _as_our_error(path):
    try:
        yield
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise SensitivityError(
            f"{shown(path)} cannot be the result file of a sweep: {brief(error)}. Name a file that "
            "can be written. Cells that are in the file already are kept."
        ) from error


def _is_cell(line):
    return isinstance(line.get("key"), list)


def _line(cell):
    return (json.dumps(cell) + "\n").encode()


def _parsed(line):
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
