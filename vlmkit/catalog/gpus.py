"""Graphics cards that people have or can rent, with the memory that the maker states.

    vlmkit.catalog.gpus.GPUS["RTX 4090"].bytes          # 24,000,000,000

The sizes are those of the product pages, and a GB is 10^9 bytes here. What PyTorch calls a card's
total capacity is another number. The memory is made in GiB (2^30 bytes), error correction takes a
part of it on some cards, and the driver keeps some hundred MB:

    RTX 4090   23.61 to 23.68 GiB   25.4 x 10^9 bytes   (issues: pinokiofactory/flux-webui 11,
                                                         zai-org/CogVideo 36)
    RTX 5090   31.36 GiB            33.7                 (TrajectoryCrafter/TrajectoryCrafter 20)
    A100 40GB  39.50 GiB            42.4                 (TianheWu/CoSeR 10)
    L40S       44.53 GiB            47.8                 (Wan-Video/Wan2.1 205)
    T4         14.75 GiB            15.8                 (NVIDIA/DALI 1813)
    H200       139.80 GiB           150.1                (measured: benchmarks/results)

So a GB of 10^9 bytes is the careful reading for most cards: an RTX 4090 has 1.4 x 10^9 bytes more
than is counted here. Reading it as 2^30 would give an L40S 3.7 x 10^9 bytes that it does not have.
The careful reading is up to 0.2 GB too much for cards with error correction. Everything that
compares a model with a card (`vk.fit`, `vk.memory.largest`, `vlmkit doctor`, and `vlmkit memory
--budget "RTX 4090"`) takes `RESERVED` off for CUDA and other programs, 1 GB; a process was reported
to need 0.78 GB. So no card of this list is counted with more than it has. If you know what PyTorch
says about your card, give that in place of its name: "23.6 GiB".
"""

from dataclasses import dataclass

from vlmkit.units import GIGABYTE

RESERVED = "1 GB"
"""Memory of a card that PyTorch does not count, by assumption: the CUDA context, the code and
workspaces of its libraries, and the desktop. A process that had computed nothing was reported to
use 0.78 GB (pytorch/pytorch issue 34323). Everything that compares a model with a card takes it
off."""

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
