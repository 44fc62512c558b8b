"""Runs with pebble that `connectors.py` and `lora_on_vqa.py` record in a CSV file, a row each. The
first column, `weights`, says with which weights of pebble a run was made."""

import csv
import hashlib


def digest():
    """A short digest of pebble's weights."""
    from vlmkit.models import pebble

    return hashlib.sha256((pebble.path() / "model.safetensors").read_bytes()).hexdigest()[:12]


def read(path, weights):
    """The rows of `path` for these weights, as dictionaries of texts; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if row["weights"] == weights]


def write(path, rows):
    """Write `path` with these rows, which is then complete or as it was."""
    from vlmkit.folders import write_whole

    def fill(part):
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, fill)
