"""Exercises on bytes: plans, skip lists, ranks that fit, what an allocator gives out."""

import functools

from vlmkit.course.exercises.answers import (
    below,
    exercise,
    function,
    number,
    of_type,
    plan,
    reject,
    require,
    whole,
)

MEBIBYTE = 2**20


@exercise("bytes of NF4", function)
def nf4_bytes(count):
    """A function of the number of weights of a layer: its bytes in NF4, with a table of values."""
    for n in (64, 4096 * 4096, 1000, 65):
        found = number(count(n), "a number of bytes")
        codes, scales, table = -(-n // 2), 4 * -(-n // 64), 64
        mistakes = {
            codes + scales: "the 16 values of the codes are missing, 4 bytes each.",
            codes + table: "the scales are missing, 4 bytes for each block of 64.",
            codes + scales // 4 + table: "a scale in fp32 takes 4 bytes.",
            codes + scales + 16: "the 16 values are in fp32, 4 bytes each.",
            n + scales + table: "two codes share a byte.",
            4 * n + scales + table: "a code takes 4 bits, not 4 bytes.",
            n // 2 + 4 * (n // 64) + table: f"for {n} weights, the last block or the last code is "
            "left out: round up.",
            8 * (codes + scales + table): "these are bits; a byte has 8.",
        }
        right = codes + scales + table
        mistakes.pop(right, None)  # some mistakes do not show in a round number of weights
        reject(found, mistakes)
        require(found == right, f"for {n:,} weights it returns {found:,g}; it should be {right:,}.")
    return "4.5 bits a weight where a layer is large, and a table that only small layers notice."


@exercise("a KV cache", function)
def kv_cache(count):
    """A function of (layers, heads, head_size, tokens): the bytes of keys and values in bf16."""
    mistakes = {
        2: "keys *and* values are kept: two vectors.",
        4: "these are numbers, not bytes, of one vector: key and value, 2 bytes a number.",
        1 / 8: "these are bits; a byte has 8.",
        1 / 2: "a number in bf16 takes 2 bytes, not 4.",
    }
    for layers, heads, size, tokens in ((3, 5, 7, 11), (32, 32, 128, 576), (28, 4, 128, 999)):
        told = f"{layers} layers, {heads} heads of {size} and {tokens} tokens"
        found = number(count(layers, heads, size, tokens), "a number of bytes")
        right = 4 * layers * heads * size * tokens
        require(found > 0, f"for {told} your function returns {found:g}.")
        ratio = right / found
        reject(
            ratio,
            mistakes
            | {tokens: "this is one token.", layers: "this is one layer."}
            | {heads: "this is one head."},
            same=lambda one, other: abs(one / other - 1) < 1e-6,
        )
        units = abs(ratio / 1e6 - 1) < 1e-6 or abs(ratio / 2**20 - 1) < 1e-6
        require(not units, "these are MB; return bytes.")
        require(ratio == 1, f"for {told} it returns {found:,g}, and {right:,} bytes are kept.")
    return "LLaVA-1.5-7B keeps 524,288 bytes for each token, so 302 MB for a picture."


@exercise("projector kept", plan)
def projector_kept(found, name, budget):
    """A plan for `name` that takes less than `budget` bytes, with the projector in bf16."""
    from vlmkit.memory import predict

    require(
        found["projector"] == "bf16" and not found.overrides,
        f"the projector should stay in bf16; in this plan it is {found['projector']}.",
    )
    now, plain = predict(name, found), predict(name, "bf16")
    wide = [c for c, size in now.by_component.items() if size >= plain.by_component[c]]
    wide = ", ".join(c for c in wide if c != "projector")
    needed = below(now, budget, f"As large as in bf16: {wide}." if wide else "Use fewer bits.")
    share = now.total / plain.total
    return f"{needed}, {share:.0%} of bf16. To keep so small a projector costs next to nothing."


@exercise("the promised GB", plan)
def promised(found, name, budget):
    """A plan under which the weights of `name` take less than `budget` bytes."""
    from vlmkit.memory import predict

    now = predict(name, found)
    wide = sum(
        entry.bytes / 1e9
        for entry in now.entries
        if entry.component == "language_model" and entry.kind in ("head", "embedding")
    )
    rest = (
        "There are formats with fewer bits of scales."
        if now.by_kind.get("quantization state", 0) > 2e8
        else "All Linear layers are as small as they get; override what else is large."
    )
    needed = below(now, budget, f"Embedding and head take {wide:.2f} of it. {rest}")
    return (
        f"{needed}. This takes the head in few bits, too, which no format does by itself; what it "
        "costs in answers is another question."
    )


@functools.lru_cache  # a student may ask many times
def _of_one_rank(name):
    """Bytes of the weights, of adapters of rank 1, and of these with their gradients and AdamW."""
    from vlmkit.adapters import LoRA
    from vlmkit.memory import predict

    ledger = predict(name, training={"language_model": LoRA(r=1)})
    a_rank = sum(ledger.by_kind[kind] for kind in ("adapter", "gradient", "optimizer state"))
    return ledger.total - a_rank, ledger.by_kind["adapter"], a_rank


@exercise("largest rank", whole, "a rank")
def largest_rank(rank, name, budget):
    """The largest rank of adapters on the language model for which weights, adapters, gradients and
    AdamW stay within `budget` bytes."""
    weights, adapter, a_rank = _of_one_rank(name)
    right = int((budget - weights) // a_rank)
    require(
        rank != int((budget - weights) // adapter),
        "an adapter costs more than its own bytes: each of its parameters has a gradient and two "
        "moments.",
    )
    require(rank != int(budget // a_rank), "the weights themselves have to fit as well.")
    needed = (weights + rank * a_rank) / 1e9
    require(rank <= right, f"rank {rank} needs {needed:.2f} GB, the budget is {budget / 1e9:g}.")
    require(rank == right, f"rank {rank} needs {needed:.2f} GB, so a higher one fits as well.")
    return f"{needed:.2f} GB, and one rank more costs {a_rank / 1e6:.1f} MB."


@exercise("skip list", of_type, (list, tuple, set), "a list of names")
def skip_list(answer, name, config):
    """Entries for `llm_int8_skip_modules` that keep vision encoder, projector and head of `name`
    out of 4 bits, and nothing else."""
    from vlmkit.linting import lint

    for entry in answer:
        of_type(entry, str, "a list of names, each a str")
    rows = lint(name, config | {"llm_int8_skip_modules": list(answer)}).verdicts
    useless = ", ".join(entry for entry in answer if not any(entry in row.kept_by for row in rows))
    require(
        not useless,
        f"nothing is protected by {useless}: an entry is compared with the beginning or the end of "
        "a full name, and names here begin with model.",
    )
    small = {(row.component, row.kind) for row in rows if row.quantized}
    for component in ("vision_encoder", "projector"):
        require((component, "linear") not in small, f"the {component} would be in 4 bits.")
    require(
        ("language_model", "head") not in small,
        "the head would be in 4 bits: a list replaces the exceptions that transformers makes by "
        "itself.",
    )
    kept = [row for row in rows if row.convertible and not row.quantized and row.kind == "linear"]
    more = sum(row.component == "language_model" for row in kept)
    require(not more, f"this keeps {more} layers of the language model in 16 bits as well.")
    return "full names. Another family has others, and there this list would protect nothing."


@exercise("a wasted mebibyte", whole, "a number of bytes")
def wasted(size):
    """A size for which an empty allocator gives out at least 1 MiB more."""
    from vlmkit.memory.allocator import CachingAllocator

    require(size > MEBIBYTE, "up to 1 MiB, segments are small ones: a larger tensor.")
    cuda = CachingAllocator()
    given = cuda.allocate(size).size
    more = given - size
    split = "What is left of its segment is more than 1 MiB, and becomes a block of its own."
    few = "Its segment has less than 1 MiB to spare."
    rest = split if cuda.reserved - size > MEBIBYTE else few
    require(more >= MEBIBYTE, f"the block has {more:,} bytes more. {rest}")
    return (
        f"{given:,} bytes for {size:,}. A rest of 1 MiB stays with the block, and nobody else can "
        "use it: this is the most that rounding costs a large tensor."
    )


@exercise("a cache with windows", function)
def windows_in_a_cache(count):
    """A function of (prompt, windows) that returns the tokens that all layers keep right after a
    prompt, and after one more token. A window of None: the layer attends to everything."""
    for prompt, windows in ((2176, [1024] * 29 + [None] * 5), (10, [None] * 3), (7, [8, 4, None])):
        found = count(prompt, list(windows))
        require(
            isinstance(found, tuple | list) and len(found) == 2,
            "it should return two numbers: right after the prompt, and after one more token.",
        )
        now, later = (whole(part, "two numbers of tokens", least=0) for part in found)
        layers = f"{len(windows)} layers, a prompt of {prompt:,} tokens"
        cut = {sum(min(prompt, (w or prompt) - less) for w in windows) for less in (0, 1)}
        hint = f"{layers}: {now:,} tokens right after the prompt are not what is kept."
        if now in cut:
            hint += " A window is a view then, and the whole prompt is still behind it."
        require(now == prompt * len(windows), hint)
        right = sum(prompt + 1 if w is None else min(prompt + 1, w) for w in windows)
        hint = f"{layers}: {later:,} tokens after one more are not what is kept."
        if later > right:
            hint += " Now a layer with a window keeps no more tokens than the window has."
        elif later < right:
            hint += " The new token is kept as well, and some prompts are shorter than a window."
        require(later == right, hint)
    return "the whole prompt in every layer, and after one more token only what the windows need."


@exercise("twelve gigabytes", plan)
def twelve(found, name, budget, **use):
    """A plan under which `name` needs less than `budget` bytes, with its encoder in bf16."""
    from vlmkit.memory import predict

    encoder, cross = found["vision_encoder"], found["cross_attention"]
    require(encoder == "bf16", f"the vision encoder should stay in bf16; here it is {encoder}.")
    ledger = predict(name, found, **use, allocator="cuda")
    kinds = ledger.by_kind
    head = kinds.get("head", 0)
    large = {
        "scales take half a GB, and can be quantized too": kinds.get("quantization state", 0) > 2e8,
        f"cross-attention is in {cross}": cross in ("bf16", "fp16", "fp32"),
        f"the head takes {head / 1e9:.2f} GB, and a plan can name it": head > 5e8,
    }
    wide = "; ".join(text for text, is_large in large.items() if is_large)
    needed = below(ledger, budget, f"Still large: {wide}." if wide else "Use fewer bits elsewhere.")
    return (
        f"{needed}. No plan makes the pictures' activations smaller, "
        f"{kinds['activation'] / 1e9:.1f} GB."
    )
