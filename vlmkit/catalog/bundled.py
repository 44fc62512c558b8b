"""The models that come with the course: their names, their folders, what to do if one is missing.

The checkpoint of pebble lies in the package. The checkpoints of cobble lie in vlmkit's cache, where
`vlmkit fetch cobble` puts them together from weights in the package and a language model that it
downloads. Their configs lie here, beside those of published models, so that anatomy and predictions
of memory need no download. Beside them lie the settings of their processor, which `fetch` writes.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vlmkit.errors import CheckpointError
from vlmkit.folders import cache_folder

MODELS = Path(__file__).parent.parent / "models"
WEIGHTS = "cobble/weights"
"""The folder in MODELS with the weights of cobble that were trained here."""

PROCESSOR = ("processor_config.json", "tokenizer_config.json", "chat_template.jinja")
MADE_OF = "made_of.json"
"""A file in the folder of a fetched checkpoint: what it was made of, as `Bundled.made_of` says it,
and the sizes of its own files."""

FORMAT = 1
"""Add 1 if `fetch` writes something else, and neither config, processor nor weights show it."""


@dataclass(frozen=True)
class Bundled:
    """A model that comes with the course.

    parameters: their number, without adapters. Tied weights count once.
    fetched: whether its checkpoint is put together in the cache.
    trained_with: the format in which the language model was while the projector was trained.
    has_adapters: whether adapters on the language model come with it.
    """

    name: str
    parameters: int
    fetched: bool = False
    trained_with: str = "bf16"
    has_adapters: bool = False

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
    def adapters(self):
        """The folder in the package with its adapters, as peft wrote it; None if it has none."""
        return MODELS / WEIGHTS / "adapters" if self.has_adapters else None

    @property
    def weights(self):
        """The files in the package that a fetched checkpoint takes its weights from."""
        files = ["vision_encoder.safetensors", f"projector-{self.trained_with}.safetensors"]
        if self.has_adapters:
            own = ("adapter_config.json", "adapter_model.safetensors")
            files += [f"adapters/{file}" for file in (*own, "trained_in_full.safetensors")]
            files.append("adapters/vlmkit.json")
        return [MODELS / WEIGHTS / file for file in files]

    def made_of(self):
        """{what a fetched checkpoint is made of: its sha256}, of the package as it is now.

        These are config, processor and weights, by their content: the code that puts them together
        may change. Raises OSError if a file is missing.
        """
        config = json.loads((self.config_folder / "config.json").read_text(encoding="utf-8"))
        config.pop("transformers_version", None)  # of whoever wrote the file
        texts = [(self.config_folder.parent / n).read_text(encoding="utf-8") for n in PROCESSOR]
        written = json.dumps([FORMAT, config, texts], sort_keys=True).encode()
        found = {"config and processor": hashlib.sha256(written).hexdigest()}
        for path in self.weights:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(MODELS).as_posix()] = digest
        return found

    @property
    def is_current(self):
        """Whether its checkpoint is complete, and made of what the package has."""
        if not self.fetched:
            return self.folder.is_dir()
        try:
            made = json.loads((self.folder / MADE_OF).read_text(encoding="utf-8"))
            held = sizes(self.folder)
            return made["files"].items() <= held.items() and made["of"] == self.made_of()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
        Bundled("cobble-chat", 136_782_976, True, "nf4", has_adapters=True),
    )
}


def sizes(folder):
    """{name: bytes} of all files in `folder`, without MADE_OF itself."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {name: size for name, size in found.items() if name != MADE_OF}
