"""Graphics cards that people have or can rent, with the memory that `nvidia-smi` shows for them.

    vlmkit.catalog.gpus.GPUS["RTX 4090"].bytes          # 24,564 MiB = 25,757,220,864

What is printed on the box is neither 10^9 nor 2^30 bytes a GB: an RTX 4090 of "24 GB" has 24,564
MiB (25.8 x 10^9 bytes), an L40S of "48 GB" has 46,068 MiB (48.3 x 10^9), because error correction
takes a part. So each card has the number that its driver reports, and where this number was read.
A size that you give is what it says: "24 GB" is 24 x 10^9 bytes and "24 GiB" is 24 x 2^30.

PyTorch gets less. The driver keeps 0.3 to 0.65 GB: PyTorch says 23.61 to 23.68 GiB for an RTX 4090,
31.36 for an RTX 5090, 39.50 for an A100 40GB, 44.53 for an L40S, 14.75 for a T4, 139.80 for an H200
(issues pinokiofactory/flux-webui 11, TrajectoryCrafter/TrajectoryCrafter 20, TianheWu/CoSeR 10,
Wan-Video/Wan2.1 205, NVIDIA/DALI 1813; the H200 was measured here). The context and the libraries
of CUDA take some hundred MB more. Everything that compares a model with a card (`vk.fit`,
`vk.memory.largest`, `vlmkit doctor`, the explorer, and `vlmkit memory --budget "RTX 4090"`) takes
`RESERVED` off for both. On the largest cards that is tight: on an H200 it leaves 0.35 GB for the
context. If you know what PyTorch says about your card, give that in place of its name: "23.6 GiB".
"""

from dataclasses import dataclass

RESERVED = "1 GB"
"""Memory of a card that a model cannot have, by assumption: what the driver keeps, the context of
CUDA, the code and workspaces of its libraries, and the desktop. Everything that compares a model
with a card takes it off."""

_LIST = "https://github.com/modal-labs/modal-client/pull/2797"
_SEEN = "outputs of nvidia-smi in public repositories"
_MEASURED = "measured: benchmarks/results, and outputs of nvidia-smi in public repositories"


@dataclass(frozen=True)
class Gpu:
    """A card: the GB that it is sold with, the MiB that nvidia-smi shows, and where these were
    read."""

    name: str
    gigabytes: int
    mebibytes: int
    source: str

    @property
    def bytes(self):
        """What nvidia-smi shows."""
        return self.mebibytes * 2**20


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX 4060", 8, 8188, _SEEN),
        Gpu("RTX 3060", 12, 12288, _SEEN),
        Gpu("T4", 16, 15360, _LIST),
        Gpu("RTX 4080", 16, 16376, _SEEN),
        Gpu("L4", 24, 23034, _LIST),
        Gpu("RTX 4090", 24, 24564, _SEEN),
        Gpu("RTX 3090", 24, 24576, _SEEN),
        Gpu("RTX 5090", 32, 32607, _SEEN),
        Gpu("A100 40GB", 40, 40960, _LIST),
        Gpu("L40S", 48, 46068, _LIST),
        Gpu("H100", 80, 81559, _LIST),
        Gpu("A100 80GB", 80, 81920, _LIST),
        Gpu("H200", 141, 143771, _MEASURED),
    )
}
"""Cards by name, the smallest memory first."""
