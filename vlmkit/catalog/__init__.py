"""Catalog: the configs of published vision-language models, without their weights.

    vk.anatomy("Qwen/Qwen2.5-VL-7B-Instruct")                     # no network, no download
    vk.memory.predict("meta-llama/Llama-3.2-11B-Vision-Instruct", plan)

Anatomy and prediction need only a config. Each folder here has the name of a model's id on the hub
and holds the config.json that the model's owner published and, where they were found, the
preprocessor_config.json and the video_preprocessor_config.json. They are as in public copies.
`models.csv` has a line for each:

- parameters: in the published weights; tied weights count once. It is empty where the number was
  not found.
- confidence: how far the files are trusted, from "two sources agree" to "partly reconstructed",
  with the fields that come from elsewhere.
- sources: the repositories and files of the copies.

To add a model, add a folder and a line. The models that come with the course are in
`vlmkit.catalog.bundled`; the folder cobble holds the configs of cobble.
"""

import csv
from pathlib import Path

FOLDER = Path(__file__).parent


def _models():
    with open(FOLDER / "models.csv", encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


MODELS = _models()
"""name -> the line of `models.csv`, a dict of texts."""

PARAMETERS = {
    name: int(row["parameters"]) if row["parameters"] else None for name, row in MODELS.items()
}
"""Number of parameters in each model's published weights, None if it is not known. Tied weights
count once."""

NAMES = tuple(MODELS)


def folder_of(name):
    """The folder with the config of the model `name`, or None if the catalog does not have it."""
    return FOLDER / name if name in MODELS else None
