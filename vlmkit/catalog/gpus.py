"""Graphics cards that people have or can rent, with the memory that the maker states.

    vlmkit.catalog.gpus.GPUS["RTX 4090"].bytes          # 24,000,000,000

The sizes are those of the product pages. A card offers a different number of bytes: makers write GB
and mean GiB (2^30 bytes), and error correction takes a part if it is on. Here a GB is 10^9 bytes,
the smaller reading.
"""

from dataclasses import dataclass

from vlmkit.units import GIGABYTE

_NVIDIA = "https://www.nvidia.com/en-us/"
_GEFORCE = f"{_NVIDIA}geforce/graphics-cards/"


@dataclass(frozen=True)
class Gpu:
    """A card: its nominal memory in GB, and the product page that states it."""

    name: str
    gigabytes: int
    source: str

    @property
    def bytes(self):
        """Nominal memory, a GB read as 10^9 bytes."""
        return self.gigabytes * GIGABYTE


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 4060", 8, f"{_GEFORCE}40-series/rtx-4060-4060ti/"),
        Gpu("RTX 3060", 12, f"{_GEFORCE}30-series/rtx-3060-3060ti/"),
        Gpu("T4", 16, f"{_NVIDIA}data-center/tesla-t4/"),
        Gpu("RTX 4080", 16, f"{_GEFORCE}40-series/rtx-4080-family/"),
        Gpu("L4", 24, f"{_NVIDIA}data-center/l4/"),
        Gpu("RTX 3090", 24, f"{_GEFORCE}30-series/rtx-3090-3090ti/"),
        Gpu("RTX 4090", 24, f"{_GEFORCE}40-series/rtx-4090/"),
        Gpu("RTX 5090", 32, f"{_GEFORCE}50-series/rtx-5090/"),
        Gpu("A100 40GB", 40, f"{_NVIDIA}data-center/a100/"),
        Gpu("L40S", 48, f"{_NVIDIA}data-center/l40s/"),
        Gpu("A100 80GB", 80, f"{_NVIDIA}data-center/a100/"),
        Gpu("H100", 80, f"{_NVIDIA}data-center/h100/"),
        Gpu("H200", 141, f"{_NVIDIA}data-center/h200/"),
    )
}
"""Cards by name, the smallest memory first."""
