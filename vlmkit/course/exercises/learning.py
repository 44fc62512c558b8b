"""Exercises on training: adapters, what a head can say, stages and rates."""

import copy

from vlmkit.course.exercises.answers import Hint, called, exercise, kind, number, require, whole

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
    return f"{ratio:.2f} times as many. A rank is no cost: equal ranks favor the larger component."


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


# --- stages ---------------------------------------------------------------------------------------


@exercise("who is passed")
def who_is_passed(answer, model, stages):
    """{stage: components that a gradient flows backward through}, of stages of training."""
    from vlmkit import COMPONENTS
    from vlmkit.anatomy import anatomy_of
    from vlmkit.models.pebble.train import trainable

    require(isinstance(answer, dict), f"what is asked for is a dict; this is {kind(answer)}.")
    require(set(answer) == set(stages), f"its keys should be {' and '.join(map(repr, stages))}.")
    anatomy, trial = anatomy_of(model), copy.deepcopy(model)
    order = [name for name in COMPONENTS if anatomy[name].parameters]  # as a picture passes them
    for name, stage in stages.items():
        found = answer[name]
        require(isinstance(found, set | list | tuple), f"{name}: a set of components is asked for.")
        strange = [str(component) for component in found if component not in order]
        require(not strange, f"no component here is {', '.join(strange)}: {', '.join(order)}.")
        trainable(trial, stage)
        learn = {anatomy.component_of(n) for n, p in trial.named_parameters() if p.requires_grad}
        first = min(order.index(component) for component in learn)
        frozen = [c for c in order[first:] if c not in learn and c not in found]
        require(
            not frozen,
            f"{name}: {', '.join(frozen)} is frozen, but the loss is behind it: what learns gets "
            "its gradient through it.",
        )
        missing = [component for component in order[first:] if component not in found]
        require(not missing, f"{name}: {', '.join(missing)} learns, and is not in your set.")
        more = [component for component in found if order.index(component) < first]
        require(
            not more, f"{name}: the way back ends before {more[0] if more else ''}: it is frozen."
        )
    return (
        "a frozen language model costs its backward pass all the same; a frozen encoder does not."
    )


@exercise("steps to a share")
def steps_to_a_share(answer, runs, column, share):
    """After how many steps in all each of `runs`, logs with a line for every 100 steps, first had
    `share` of the questions right."""
    require(
        isinstance(answer, list | tuple) and len(answer) == len(runs),
        f"what is asked for is a list of {len(runs)} numbers of steps; this is {kind(answer)}.",
    )
    found = [whole(one, "a number of steps", least=0) for one in answer]
    lines = [int((run[column] >= share).to_numpy().argmax()) for run in runs]
    right = [100 * (line + 1) for line in lines]
    mistakes = {
        tuple(lines): "these are numbers of lines; a line stands for 100 steps.",
        tuple(100 * line for line in lines): "lines are counted from 0, and the first is the log "
        "after 100 steps.",
        tuple(int(run["step"].iloc[line]) for run, line in zip(runs, lines, strict=True)): "these "
        "are steps of a stage; those of the stages before it have to be added.",
        tuple(reversed(right)): "these are the right numbers for the other run each.",
    }
    for wrong, hint in mistakes.items():
        require(found == right or tuple(found) != wrong, hint)
    wrong = [number for number, one in enumerate(found) if one != right[number]]
    if wrong:
        run, steps = runs[wrong[0]], found[wrong[0]]
        then = run[column].iloc[max(0, min(len(run), steps // 100) - 1)]
        raise Hint(f"after {steps:,} steps run {wrong[0] + 1} has {then:.0%} right; when first?")
    return "two runs of one recipe, and thousands of steps between them."


@exercise("rate")
def rate(answer, stage):
    """A function of step and stage: the rate, linearly up over 100 steps, then down along a cosine
    to the share `stage.final` of it."""
    from vlmkit.models.pebble.train import WARMUP, rate_at

    last = stage.steps - 1
    late = (WARMUP + 3 * last) // 4
    steps = (0, WARMUP // 2, WARMUP - 1, WARMUP, (WARMUP + last) // 2, late, last)
    found = {step: number(called(answer, step, stage), "a rate") for step in steps}

    def near(step, wanted):
        return abs(found[step] - wanted) <= 1e-6 * stage.rate

    require(not near(0, stage.rate), "the first step has the full rate already.")
    require(not near(0, 0), "the first step has the rate 0, and learns nothing: count it as one.")
    require(not near(last, stage.rate), "it does not come down.")
    at_the_end = stage.final * stage.rate
    require(found[last] > at_the_end / 2, "it comes down to 0; stage.final should be left of it.")
    share = (late - WARMUP) / (stage.steps - WARMUP)
    straight = stage.rate * (1 - share * (1 - stage.final))
    require(not near(late, straight), "it comes down along a line; a cosine is asked for.")
    for step in steps:
        wanted = rate_at(step, stage)
        require(
            near(step, wanted), f"{found[step]:.6g} at step {step}, where {wanted:.6g} is right."
        )
    return "the same at every step that was tried."
