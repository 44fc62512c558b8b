"""Exercises on training: adapters, what a head can say, stages and learning rates."""

import copy

from vlmkit.course.exercises.answers import (
    Hint,
    exercise,
    function,
    kind,
    known,
    number,
    of_type,
    reject,
    require,
    tensor,
    whole,
)


@exercise("equal cost", whole, "a rank")
def equal_cost(found, trained, rank):
    """The rank of adapters on the vision encoder with as many parameters as `rank` has on the
    language model, within 2%; trained: parameters of each component, at one rank for both."""
    share = trained["vision_encoder"] / trained["language_model"]
    ratio = found * share / rank
    upside_down = (
        f"{rank} times {share:.2f} is the ratio upside down: the smaller component needs the "
        "larger rank."
    )
    mistakes = {
        rank: f"at equal ranks the vision encoder has {ratio:.2f} times as many: its layers are "
        "fewer and smaller.",
        int(rank * share): upside_down,
        round(rank * share): upside_down,
    }
    reject(found, mistakes)
    require(abs(ratio - 1) < 0.02, f"that gives {ratio:.2f} times as many parameters.")
    return f"{ratio:.2f} times as many. A rank is not a cost: equal ranks favor the larger part."


@exercise("merge an adapter", function)
def merge_an_adapter(answer):
    """A function (W, A, B, r, alpha) that returns the weight of a layer with its LoRA merged in,
    W + (alpha / r) B A, and leaves W as it is."""
    import torch

    generator = torch.Generator().manual_seed(0)
    r, alpha = 2, 6
    shapes = ((5, 4), (r, 4), (5, r))
    W, A, B = (torch.randn(*shape, generator=generator) for shape in shapes)
    kept, update = W.clone(), B @ A
    with torch.no_grad():
        found = tensor(answer(W, A, B, r, alpha), "the result").float()
    shape = tuple(found.shape)
    require(shape == (5, 4), f"it returns the shape {shape}; W has the shape (5, 4).")
    require(torch.equal(W, kept), "your function changes W itself. Return a new tensor.")

    def is_it(scale, start):
        return torch.allclose(found.float(), start + scale * update, atol=1e-5)

    require(not is_it(1, kept), "the scale is missing: alpha / r.")
    require(not is_it(r / alpha, kept), "the scale is upside down: it is alpha / r.")
    require(not is_it(alpha, kept), "you multiply by alpha, but do not divide by r.")
    require(not is_it(alpha / r, 0), "this is what is added. Add it to W.")
    require(is_it(alpha / r, kept), "the shape is right, but it is not W + (alpha / r) B A.")
    return "after merging, the layer is a plain Linear layer again, and costs nothing extra."


@exercise("mix old into new", function)
def mix_old_into_new(answer):
    """A function (new, old, share) that returns all rows of `new`, and between them so many rows of
    `old` that these are `share` of the result."""
    new, old, share = [f"new {i}" for i in range(60)], [f"old {i}" for i in range(90)], 0.25
    found = answer(list(new), list(old), share)
    found = list(of_type(found, (list, tuple), "a list of rows"))
    strange = [row for row in found if row not in {*new, *old}]
    require(not strange, "the result has something that is no row of new or old.")
    taken = [row for row in found if row in set(old)]
    missing = len(set(new) - set(found))
    require(not missing, f"{missing} of the 60 new rows are missing.")
    require(len(set(found)) == len(found), "some rows are there twice.")
    fifteen = f"{len(taken)} old rows beside 60 new ones are {len(taken) / len(found):.0%}, not 25%"
    require(abs(len(taken) - 20) <= 1, f"{fifteen}: a quarter of the *result*, not of new.")
    half = sum(row in set(old) for row in found[: len(found) // 2])
    require(
        0.2 <= half / len(taken) <= 0.8,
        "the old rows are all on one side. A training that meets them late forgets before. "
        "Spread them.",
    )
    return "every part of the training now asks for the old answers as well."


@exercise("learnable word", of_type, str, "a word, a str")
def learnable_word(word, tokenizer, head):
    """A word of at least four small letters whose tokens have all been said in training: the head's
    row of a token never said is like that of the colon."""
    from torch.nn.functional import cosine_similarity

    require(word.isalpha(), f"{word!r} is not one word of letters.")
    require(word.islower(), f"{word!r} has capital letters, which pebble has always said.")
    require(len(word) >= 4, f"{word!r} has {len(word)} letters; it should have four or more.")
    ids = tokenizer.encode(f" {word}", add_special_tokens=False)
    colon = head[tokenizer.convert_tokens_to_ids(":")]
    never = cosine_similarity(head[ids], colon[None]) >= 0.9
    pieces = [tokenizer.decode(i).strip() for i in ids]
    silent = dict.fromkeys(piece for piece, one in zip(pieces, never, strict=True) if one)
    require(
        not silent,
        f"its tokens are {', '.join(filter(None, pieces))}, and pebble has never said "
        f"{', '.join(silent)}: for the head they are like the colon. Which words has it answered?",
    )
    return "pebble has said every token of it, and the head has a row of its own for each."


@exercise("who is passed", of_type, dict, "a dict")
def who_is_passed(flows, model, stages):
    """{stage of training: components through which a gradient flows backward}."""
    from vlmkit import COMPONENTS
    from vlmkit.anatomy import anatomy_of
    from vlmkit.models.pebble.train import trainable

    require(set(flows) == set(stages), f"its keys should be {' and '.join(map(repr, stages))}.")
    anatomy, trial = anatomy_of(model), copy.deepcopy(model)
    order = [name for name in COMPONENTS if anatomy[name].parameters]  # as a picture passes them
    for name, stage in stages.items():
        found = of_type(flows[name], (set, list, tuple), f"a set of components for {name}")
        known(found, order, "component")
        trainable(trial, stage)
        learn = {anatomy.component_of(n) for n, p in trial.named_parameters() if p.requires_grad}
        first = min(order.index(component) for component in learn)
        missing = [c for c in order[first:] if c not in found]
        frozen = ", ".join(c for c in missing if c not in learn)
        require(
            not frozen,
            f"{name}: {frozen} is frozen, but lies between the loss and what learns: the gradient "
            "flows through it.",
        )
        require(not missing, f"{name}: {', '.join(missing)} learns, and is not in your set.")
        for component in found:
            passed = order.index(component) >= first
            require(passed, f"{name}: the way back ends before {component}, which is frozen.")
    return "a frozen language model still costs its backward pass; a frozen encoder does not."


@exercise("steps to a share", of_type, (list, tuple), "a list of numbers of steps")
def steps_to_a_share(answer, runs, column, share):
    """For each of `runs`, logs with a line for every 100 steps, the number of steps after which the
    share of right answers first reached `share`."""
    require(len(answer) == len(runs), f"the answer should be a list of {len(runs)} numbers.")
    found = tuple(whole(one, "a number of steps", least=0) for one in answer)
    lines = [int((run[column] >= share).to_numpy().argmax()) for run in runs]
    right = tuple(100 * (line + 1) for line in lines)
    in_stage = (int(run["step"].iloc[line]) for run, line in zip(runs, lines, strict=True))
    mistakes = {
        tuple(lines): "these are numbers of lines; a line stands for 100 steps.",
        tuple(100 * line for line in lines): "lines are counted from 0, and the first is the log "
        "after 100 steps.",
        tuple(in_stage): "these are steps of a stage; add those of the stages before it.",
        right[::-1]: "each number is right for the other run.",
    }
    if found == right:
        apart = max(right) - min(right)
        return f"two runs of one recipe, and {apart:,} steps between them."
    reject(found, mistakes)
    one = next(n for n, steps in enumerate(found) if steps != right[n])
    then = runs[one][column].ffill().iloc[max(0, min(len(runs[one]), found[one] // 100) - 1)]
    has = f"has {then:.0%} right" if then == then else "was not asked yet"  # NaN in the log
    raise Hint(f"after {found[one]:,} steps run {one + 1} {has}; when first?")


@exercise("rate", function)
def rate(answer, stage):
    """A function of step and stage: the learning rate, linearly up over 100 steps, then down along
    a cosine to its share `stage.final`."""
    from vlmkit.models.pebble.train import WARMUP_STEPS, learning_rate_at

    highest, last = stage.learning_rate, stage.max_steps - 1
    late = (WARMUP_STEPS + 3 * last) // 4
    middle = (WARMUP_STEPS + last) // 2
    steps = (0, WARMUP_STEPS // 2, WARMUP_STEPS - 1, WARMUP_STEPS, middle, late, last)
    found = {step: number(answer(step, stage), "a rate") for step in steps}

    def near(step, wanted):
        return abs(found[step] - wanted) <= 1e-6 * highest

    require(not near(0, highest), "the first step has the full rate already.")
    require(not near(0, 0), "the first step has the rate 0, and learns nothing: count it as one.")
    require(not near(last, highest), "it does not come down.")
    at_the_end = stage.final * highest
    require(found[last] > at_the_end / 2, "it comes down to 0; stage.final should be left of it.")
    share = (late - WARMUP_STEPS) / (stage.max_steps - WARMUP_STEPS)
    straight = highest * (1 - share * (1 - stage.final))
    require(not near(late, straight), "it comes down along a line; it should be a cosine.")
    for step in steps:
        right = learning_rate_at(step, stage)
        require(near(step, right), f"{found[step]:.6g} at step {step}, where {right:.6g} is right.")
    return "the same at every step that was tried."


@exercise("how far it moved", function)
def how_far(moved):
    """A function of two tensors (layers, tokens, width): the length of the difference as a share of
    the second one's length, for each layer and token."""
    import torch

    generator = torch.Generator().manual_seed(0)
    reference = (
        torch.randn(3, 5, 8, generator=generator) * torch.tensor([1.0, 4, 16])[:, None, None]
    )
    states = reference + torch.randn(3, 5, 8, generator=generator)
    found = tensor(moved(states, reference), "the result").float()
    wanted = "(layers, tokens), here (3, 5)"
    require(found.shape == (3, 5), f"the shape is {(*found.shape,)}; it should be {wanted}.")
    difference, length = (states - reference).norm(dim=-1), reference.norm(dim=-1)
    for mistake, hint in (
        (difference, "these are lengths. Divide them by the length of the reference vector."),
        (difference / states.norm(dim=-1), "this divides by the new vector's length."),
        (difference / reference.norm(), "this divides by the length of everything together."),
        ((states.norm(dim=-1) / length - 1).abs(), "this compares lengths; a turned vector keeps "
         "its length and has moved all the same."),
    ):  # fmt: skip
        require(not torch.allclose(found, mistake), hint)
    require(torch.allclose(found, difference / length, atol=1e-4), "these are other numbers.")
    return "each vector is compared with its own length, so that layers can be compared."


@exercise("is it named", function)
def is_it_named(rule):
    """A function of (answer, thing, things) that is true if a free text names `thing` and none of
    the other things."""
    from vlmkit.tasks.real import THINGS

    told = {
        ("This is a cat.", "cat"): (True, "the plain sentence"),
        ("Cat", "cat"): (True, "upper case should not matter"),
        ("A photo of a ship, at sea", "ship"): (True, "punctuation should not matter"),
        ("a truck", "car"): (False, "it names another thing"),
        ("a big catfish", "cat"): (False, "a catfish is no cat: compare whole words"),
        ("a cat or a dog", "cat"): (False, "it names two things, and a guess of two is no answer"),
        ("What do you see?", "bird"): (False, "it names nothing"),
    }
    for (answer, thing), (wanted, why) in told.items():
        found = rule(answer, thing, THINGS)
        require(
            str(found) in ("True", "False"),
            f"the function should return True or False; for {answer!r} it returns {kind(found)}.",
        )
        require(bool(found) == wanted, f"{answer!r} and {thing!r} should be {wanted}: {why}.")
    return "whole words, whatever their case, and one of the ten things only."


@exercise("train where it is used", lambda answer: answer)
def train_where_it_is_used(model, processor, digits):
    """cobble-int3 with its language model in NF4, after a training of the projector alone with
    which it reads four of five of `digits`."""
    from transformers import PreTrainedModel

    from vlmkit.evaluation import evaluate
    from vlmkit.loading import plan_of

    of_type(model, PreTrainedModel, "the trained model")
    trained_with = getattr(model.config, "projector_trained_with", {}).get("language_model")
    require(
        trained_with == "int3",
        f"this model came with a projector trained in {trained_with}; begin with cobble-int3.",
    )
    plan = plan_of(model)
    require(
        plan["language_model"] == "nf4",
        f"its language model is in {plan['language_model']}, and the projector is for NF4.",
    )
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    other = [name for name in learning if "projector" not in name]
    model.eval()
    found = evaluate(model, processor, digits)
    right, n = int(found.answers["correct"].sum()), len(digits)
    require(right, f"it reads 0 of {n}, as before a training. Train its projector first.")
    require(not other, f"not only the projector was trained, but also {len(other)} other tensors.")
    require(right >= 0.8 * n, f"it reads {right} of {n}. More steps, or a higher rate?")
    return "it reads more than four of five. So few digits are enough to connect what is there."


@exercise("only the projector", function)
def only_the_projector(freeze, model):
    """A function that gets a model and lets its projector learn, and nothing else."""
    from vlmkit.anatomy import anatomy_of

    component_of = anatomy_of(model).component_of
    for start in (True, False):  # what learned before must not matter
        trial = copy.deepcopy(model)
        trial.requires_grad_(start)
        given = freeze(trial)
        trial = trial if given is None or not hasattr(given, "named_parameters") else given
        learns = {True: set(), False: set()}
        for name, parameter in trial.named_parameters():
            learns[parameter.requires_grad].add(component_of(name))
        others = ", ".join(sorted(learns[True] - {"projector"}))
        require(not others, f"{others} would learn as well, if all of the model learned before.")
        require(
            "projector" not in learns[False],
            "the projector would not learn, or not all of it, if the model was frozen before.",
        )
    return "the projector learns, and nothing else, whatever learned before."
