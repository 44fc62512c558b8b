"""Exercises on bytes: plans, skip lists, the values of a format, ranks that fit."""

from vlmkit.course.exercises.answers import exercise, kind, plan, require, whole

# --- plans ----------------------------------------------------------------------------------------


@exercise("projector kept")
def projector_kept(answer, name, budget):
    """A plan for `name` that takes less than `budget` bytes, with the projector in bf16."""
    from vlmkit.memory import predict

    found = plan(answer)
    require(
        found["projector"] == "bf16" and not found.overrides,
        f"the projector is to stay in bf16; in this plan it is {found['projector']}.",
    )
    now, plain = predict(name, found), predict(name, "bf16")
    wide = [c for c, size in now.by_component.items() if size >= plain.by_component[c]]
    wide = [c for c in wide if c != "projector"]
    require(
        now.total < budget,
        f"{now.total / 1e6:.2f} MB, and {budget / 1e6:.0f} are there. "
        + (f"Still as large as in bf16: {', '.join(wide)}." if wide else "Fewer bits are needed."),
    )
    return (
        f"{now.total / 1e6:.2f} MB, {now.total / plain.total:.0%} of bf16. To leave so small a "
        "projector alone costs next to nothing."
    )


@exercise("the promised GB")
def promised(answer, name, budget):
    """A plan under which the weights of `name` take less than `budget` bytes."""
    from vlmkit.memory import predict

    now = predict(name, plan(answer))
    kinds = now.by_kind
    wide = sum(
        entry.bytes / 1e9
        for entry in now.entries
        if entry.component == "language_model" and entry.kind in ("head", "embedding")
    )
    rest = (
        "There are formats with fewer bits of scales."
        if kinds.get("quantization state", 0) > 2e8
        else "All Linear layers are as small as they get; override what else is large."
    )
    require(
        now.total < budget,
        f"{now.total / 1e9:.2f} GB, of which embedding and head take {wide:.2f}. {rest}",
    )
    return (
        f"{now.total / 1e9:.2f} GB. It takes the head in few bits, too, which no format does by "
        "itself; what that costs in answers is not said here."
    )


@exercise("largest rank")
def largest_rank(answer, name, budget):
    """The largest rank of adapters on the language model for which weights, adapters, gradients and
    AdamW stay within `budget` bytes."""
    from vlmkit.finetuning import LoRA
    from vlmkit.memory import predict

    rank = whole(answer, "a rank")
    one = predict(name, training={"language_model": LoRA(r=1)})
    a_rank = sum(one.by_kind[kind] for kind in ("adapter", "gradient", "optimizer state"))
    weights = one.total - a_rank  # all three grow with the rank
    right = int((budget - weights) // a_rank)
    require(
        rank != int((budget - weights) // one.by_kind["adapter"]),
        "an adapter costs more than its own bytes: there are a gradient and two moments for each "
        "number.",
    )
    require(rank != int(budget // a_rank), "the weights themselves have to fit as well.")
    needed = (weights + rank * a_rank) / 1e9
    require(rank <= right, f"rank {rank} needs {needed:.2f} GB, and {budget / 1e9:.0f} are there.")
    require(rank == right, f"rank {rank} needs {needed:.2f} GB, so a higher one fits as well.")
    return f"{needed:.2f} GB, and one rank more costs {a_rank / 1e6:.1f} MB."


# --- loading --------------------------------------------------------------------------------------


@exercise("skip list")
def skip_list(answer, name, config):
    """Entries for `llm_int8_skip_modules` that keep vision encoder, projector and head of `name`
    out of 4 bits, and nothing else."""
    from vlmkit.linting import lint

    require(
        isinstance(answer, list | tuple) and all(isinstance(entry, str) for entry in answer),
        f"what is asked for is a list of names, each a str; this is {kind(answer)}.",
    )
    rows = lint(name, config | {"llm_int8_skip_modules": list(answer)}).verdicts
    useless = [entry for entry in answer if not any(entry in row.kept_by for row in rows)]
    require(
        not useless,
        f"nothing is protected by {', '.join(useless)}: an entry is compared with the beginning or "
        "the end of a full name, and names here begin with model.",
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
    more = [row.module for row in kept if row.component == "language_model"]
    require(not more, f"this keeps {len(more)} layers of the language model in 16 bits as well.")
    return "full names. Another family has others, and there this list would protect nothing."


@exercise("better than NF4")
def better_levels(answer, scaled, levels):
    """16 values in order, from -1 to 1, that leave less error in `scaled` (weights over their
    block's largest) than `levels`, NF4's."""
    import torch

    asked = "16 numbers in a tensor"
    try:
        mine = torch.as_tensor(answer, dtype=torch.float32)
    except Exception:
        require(False, f"what is asked for is {asked}; this is {kind(answer)}.")
    require(mine.shape == (16,), f"what is asked for is {asked}; the shape is {(*mine.shape,)}.")
    require(mine.isfinite().all(), "some of the values are no finite numbers.")
    require((mine.diff() > 0).all(), "the values have to go up, for the midpoints to lie between.")
    error = {}
    for which, values in (("mine", mine), ("nf4", levels)):
        nearest = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)
        error[which] = (values[nearest] - scaled).norm()
    ratio = (error["mine"] / error["nf4"]).item()
    require(not torch.equal(mine, levels), "these are NF4's own values.")
    steps = mine.diff()
    even = " Even steps put too few values where most weights are." if steps.std() < 1e-3 else ""
    require(ratio < 1, f"{ratio:.3f} times NF4's error.{even}")
    return f"{ratio:.3f} times NF4's error. Equal use of the codes is not least error."
