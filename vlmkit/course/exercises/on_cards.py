"""Exercises on graphics cards: what an allocator gives out, and what fits."""

from vlmkit.course.exercises.answers import exercise, plan, require, whole

MEBIBYTE = 2**20


@exercise("a hole of a mebibyte")
def hole(answer):
    """A size for which an empty allocator gives out at least 1 MiB more."""
    from vlmkit.memory.allocator import CachingAllocator

    size = whole(answer, "a number of bytes")
    require(size > MEBIBYTE, "up to 1 MiB, segments are small ones: a larger tensor.")
    cuda = CachingAllocator()
    given = cuda.allocate(size).size
    more = given - size
    split = "What is left of its segment is more than 1 MiB, and becomes a block of its own."
    few = "Its segment has less than 1 MiB to spare."
    require(
        more >= MEBIBYTE,
        f"the block has {more:,} bytes more. "
        + (split if cuda.reserved - size > MEBIBYTE else few),
    )
    return (
        f"{given:,} bytes for {size:,}. A rest of 1 MiB stays with the block, so that nobody has "
        "it: this is what rounding costs a large tensor at most."
    )


@exercise("twelve gigabytes")
def twelve(answer, name, budget, **use):
    """A plan under which `name` needs less than `budget` bytes, with its encoder in bf16."""
    from vlmkit.memory import predict

    found = plan(answer)
    require(
        found["vision_encoder"] == "bf16",
        f"the vision encoder is to stay in bf16; in this plan it is {found['vision_encoder']}.",
    )
    ledger = predict(name, found, **use, allocator="cuda")
    kinds = ledger.by_kind
    head = kinds.get("head", 0)
    wide = []
    if kinds.get("quantization state", 0) > 2e8:
        wide.append("scales take half a GB, and can be quantized too")
    if found["cross_attention"] in ("bf16", "fp16", "fp32"):
        wide.append(f"cross-attention is in {found['cross_attention']}")
    if head > 5e8:
        wide.append(f"the head takes {head / 1e9:.2f} GB, and a plan can name it")
    require(
        ledger.total < budget,
        f"{ledger.total / 1e9:.2f} GB are needed, and {budget / 1e9:.1f} are there. "
        + (f"Still large: {'; '.join(wide)}." if wide else "Fewer bits are needed elsewhere."),
    )
    return (
        f"{ledger.total / 1e9:.2f} GB. No plan makes the pictures' activations smaller, "
        f"{kinds['activation'] / 1e9:.1f} GB."
    )
