"""Exercises on training: adapters, what a head can say, stages and rates."""

from vlmkit.exercises.answers import exercise, kind, require, whole

# --- adapters -------------------------------------------------------------------------------------


@exercise("equal cost")
def equal_cost(answer, trained, rank):
    """The rank of adapters on the vision encoder with as many numbers as `rank` has on the language
    model, within 2%; trained: numbers of each component, at a rank that is the same for both."""
    found = whole(answer, "a rank")
    share = trained["vision_encoder"] / trained["language_model"]
    ratio = found * share / rank
    require(
        found != rank,
        f"at equal ranks the vision encoder has {ratio:.2f} times as many: its layers are fewer "
        "and smaller.",
    )
    require(
        found not in (int(rank * share), round(rank * share)),
        f"{rank} times {share:.2f} is the ratio upside down: the smaller component needs the "
        "larger rank.",
    )
    require(abs(ratio - 1) < 0.02, f"that gives {ratio:.2f} times as many numbers.")
    return f"{ratio:.2f} times as many. A rank is no cost: equal ranks favour the larger component."


@exercise("learnable word")
def learnable_word(answer, tokenizer, head):
    """A word of four small letters or more, none of whose tokens has the head's row of one that
    was never said, such as the colon's."""
    from torch.nn.functional import cosine_similarity

    require(isinstance(answer, str), f"what is asked for is a word, a str; this is {kind(answer)}.")
    require(answer.isalpha(), f"{answer!r} is not one word of letters.")
    require(answer.islower(), f"{answer!r} has capital letters, which pebble has always said.")
    require(len(answer) >= 4, f"{answer!r} has {len(answer)} letters; four are asked for.")
    ids = tokenizer.encode(f" {answer}", add_special_tokens=False)
    colon = head[tokenizer.convert_tokens_to_ids(":")]
    alike = cosine_similarity(head[ids], colon[None]) >= 0.9
    pieces = [tokenizer.decode(i).strip() for i in ids]
    silent = [piece for piece, never in zip(pieces, alike, strict=True) if never]
    require(
        not silent,
        f"its tokens are {', '.join(filter(None, pieces))}, and pebble has never said "
        f"{', '.join(dict.fromkeys(silent))}: to the head they are as the colon. Which words has "
        "it answered with?",
    )
    return "pebble has said every token of it, and the head has a row of its own for each."
