"""Catalog: the configs of published vision-language models, without their weights.

    vk.anatomy("Qwen/Qwen2.5-VL-7B-Instruct")                     # no network, no download
    vk.memory.predict("meta-llama/Llama-3.2-11B-Vision-Instruct", plan)

Anatomy and prediction need only a config. Each folder here has the name of a model's id on the hub
and holds the config.json that the model's owner published. The models that come with the course are
in `vlmkit.catalog.bundled`; the folder cobble holds the configs of cobble.
"""

from pathlib import Path

PARAMETERS = {
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10_670_220_835,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "google/paligemma-3b-mix-224": 2_923_466_480,
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2_246_784_880,
}
"""Number of parameters in each model's published weights. Tied weights count once."""

NAMES = tuple(PARAMETERS)


def folder_of(name):
    """The folder with the config of the model `name`, or None if the catalog does not have it."""
    return Path(__file__).parent / name if name in PARAMETERS else None
