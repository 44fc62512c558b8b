"""The models that come with the course: their names, their folders, what to do if one is missing.

The checkpoint of pebble lies in the package. The checkpoints of cobble lie in vlmkit's cache, where
`vlmkit fetch cobble` puts them together from weights in the package and a language model that it
downloads. Their configs lie here, beside those of published models, so that anatomy and predictions
of memory need no download.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vlmkit.errors import CheckpointError
from vlmkit.folders import cache_folder

MODELS = Path(__file__).parent.parent / "models"
MADE_OF = "made_of.json"
"""A file in the folder of a fetched checkpoint: of which files of the package it was made, with
their sha256, and the sizes of its own files."""


@dataclass(frozen=True)
class Bundled:
    """A model that comes with the course.

    parameters: their number. Tied weights count once.
    fetched: whether its checkpoint is put together in the cache.
    trained_with: the format in which the language model was while the projector was trained.
    """

    name: str
    parameters: int
    fetched: bool = False
    trained_with: str = "bf16"

    @property
    def folder(self):
        """Where its checkpoint lies, or should lie."""
        if self.fetched:
            return cache_folder() / "cobble" / self.name
        return MODELS / self.name / "checkpoint"

    @property
    def config_folder(self):
        """A folder of the package with its config.json."""
        return Path(__file__).parent / "cobble" / self.name if self.fetched else self.folder

    @property
    def is_current(self):
        """Whether its checkpoint is complete and was made of the weights that the package has."""
        if not self.fetched:
            return self.folder.is_dir()
        try:
            made = json.loads((self.folder / MADE_OF).read_text(encoding="utf-8"))
            held = sizes(self.folder)
            return made["files"].items() <= held.items() and made["of"] == digests(made["of"])
        except (OSError, ValueError, KeyError):
            return False

    def find(self, weights=True):
        """The folder of its checkpoint or, without `weights`, of its config. Raises CheckpointError
        if the checkpoint is not there."""
        folder = self.folder if weights else self.config_folder
        if folder == self.config_folder and folder.is_dir() or self.is_current:
            return folder
        if not self.fetched:
            raise CheckpointError(
                f"{self.name!r} is bundled with vlmkit, but {folder} is not there. This "
                "installation is incomplete. Install vlmkit again, or train pebble: "
                "python -m vlmkit.models.pebble.train"
            )
        if folder.is_dir():
            raise CheckpointError(
                f"{self.name!r} in {folder} is incomplete, or was put together from other weights "
                "than this vlmkit has. Put it together again: vlmkit fetch cobble"
            )
        raise CheckpointError(
            f"{self.name!r} is not in {folder}. Fetch it once, which downloads 93 MB: "
            'vlmkit fetch cobble. Without it, vk.load("pebble") works.'
        )


BUNDLED = {
    bundled.name: bundled
    for bundled in (
        Bundled("pebble", 3_794_752),
        Bundled("cobble", 136_782_976, True, "nf4"),
        Bundled("cobble-bf16", 136_782_976, True),
        Bundled("cobble-int8", 136_782_976, True, "int8"),
        Bundled("cobble-nf4-dq", 136_782_976, True, "nf4-dq"),
        Bundled("cobble-int3", 136_782_976, True, "int3"),
        Bundled("cobble-chat", 136_782_976, True, "nf4"),
    )
}


def digests(names):
    """{name: sha256} of files in vlmkit/models. Raises OSError if one is missing."""
    found = {}
    for name in names:
        with (MODELS / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def sizes(folder):
    """{name: bytes} of all files in `folder`, without MADE_OF itself."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in found.items() if name != MADE_OF}
