"""The file that a sweep writes as it goes, and continues from when it was stopped.

JSON lines: the first says of which model, questions and settings, each other is one cell. Lines are
appended whole and put on the disk one by one, so that a sweep that is killed loses the cell it was
at. What it had half written is taken off, and computed again.
"""

import hashlib
import json
import os
from pathlib import Path

from vlmkit.errors import SensitivityError


def fingerprint(model, dataset, settings):
    """{what: a hash or a value} of all that the results of a sweep depend on beside its cells."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(_bytes(tensor))
    questions = hashlib.sha256()
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
        **settings,
    }


def _bytes(tensor):
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


class Records:
    """The cells of a result file. `done`: {key: cell}, a dict each.

    path: a file, which is made where there is none, or None to keep nothing.
    Raises SensitivityError if the file is of another model, dataset or setting, or is something
    else altogether.
    """

    def __init__(self, path, found):
        self.path = None if path is None else Path(path)
        self.found, self.done = found, {}
        if self.path is not None and self.path.exists() and self.path.stat().st_size:
            self._read()

    def _read(self):
        raw = self.path.read_bytes()
        lines = [_parsed(line) for line in raw.split(b"\n")]
        whole = [line for line in lines if line is not None]
        if not whole or "fingerprint" not in whole[0]:
            if b"\n" in raw or not raw.startswith(b'{"fingerprint"'):  # not a first line cut short
                raise SensitivityError(
                    f"{self.path} is not the result file of a sweep, and is not written over: give "
                    "another name."
                )
            whole = [{"fingerprint": self.found}]
        before = whole[0]["fingerprint"]
        differs = [name for name in {**before, **self.found} if _differ(name, before, self.found)]
        if differs:
            what = ", ".join(
                f"{name} (there {before.get(name)}, here {self.found.get(name)})"
                for name in differs
            )
            raise SensitivityError(
                f"{self.path} holds the results of another sweep, which differs in its {what}. "
                "Give this one a file of its own, or delete that one."
            )
        self.done = {_key(cell): cell for cell in whole[1:]}
        if not raw.endswith(b"\n") or len(whole) < raw.count(b"\n"):
            text = "".join(json.dumps(line) + "\n" for line in whole)
            beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.path)

    def begin(self):
        """Make the file where there is none."""
        if self.path is not None and not (self.path.exists() and self.path.stat().st_size):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"fingerprint": self.found})

    def add(self, cell):
        self.done[_key(cell)] = cell
        if self.path is not None:
            self._append(cell)

    def _append(self, line):
        # One write to a file open for appending: processes that share it do not mix their lines.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)


def _parsed(line):
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _differ(name, one, other):
    return one.get(name) != other.get(name)


def _key(cell):
    return tuple(cell["key"])
