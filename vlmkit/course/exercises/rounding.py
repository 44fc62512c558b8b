"""Exercises on fewer bits: what a difference is worth, formats, plans for layers, repair."""

import math

from vlmkit.course.exercises.answers import exercise, kind, number, require, told, whole

# --- what a difference is worth -------------------------------------------------------------------


@exercise("beyond noise")
def beyond_noise(answer, won, asked):
    """How many answers must be lost, where `won` are won, for lost minus won to exceed twice the
    square root of lost plus won; asked: the number of questions, which does not enter."""
    lost = whole(answer, "a number of answers", least=0)

    def exceeds(lost):
        return lost - won > 2 * math.sqrt(lost + won)

    right = next(n for n in range(won, 10**6) if exceeds(n))
    noise = 2 * math.sqrt(lost + won)
    require(
        lost not in (round(2 * math.sqrt(asked)), math.ceil(2 * math.sqrt(asked))),
        "this counts every question. The noise comes from the answers that changed.",
    )
    require(lost - won != noise, f"that is as large as its noise, {noise:.0f}, and not larger.")
    require(exceeds(lost), f"the noise of {lost + won} changed answers is {noise:.1f}.")
    require(lost == right, f"it is more than noise, but {lost - 1} lost would be, too.")
    return f"{right} in {asked}, or in a million: how many changed is what counts."


@exercise("how many questions")
def how_many(answer, half, changed):
    """Questions for a 95% interval of plus and minus `half`, if a share `changed` of the answers
    changes between right and wrong. Within 1%."""
    found = number(answer, "a number of questions")
    require(found > 0, f"what is asked for is a number of questions; this is {found}.")
    right = changed * (1.96 / half) ** 2
    ratio = found / right
    mistakes = {
        4: f"this gives ± {100 * half / 2:.2f} points: {100 * half:.1f} is each side, not both.",
        1 / 4: f"this gives ± {200 * half:.1f} points.",
        1 / 1.96**2: "this is one standard error; 95% are 1.96 of them.",
        1 - changed: f"{changed} · {1 - changed} is the variance of a share. A changed answer "
        f"counts 1 or −1, so a question's variance is {changed}.",
        1e-4: f"points are not shares: half a point is {half}.",
    }
    for wrong, hint in mistakes.items():
        require(abs(ratio / wrong - 1) > 0.01, hint)
    require(abs(ratio - 1) <= 0.01, f"this gives ± {100 * half / math.sqrt(ratio):.2f} points.")
    return f"about {right:,.0f}. Half the interval takes four times as many."


# --- formats --------------------------------------------------------------------------------------


@exercise("fewer bits")
def fewer_bits(answer, asked, scope, rival):
    """A format for `scope` that takes no more bits than `rival` and has less than half of its
    divergence; asked: (model, processor, questions)."""
    from vlmkit.errors import VlmkitError
    from vlmkit.sensitivity import Swap, sweep

    require(
        isinstance(answer, str), f"what is asked for is a format's name; this is {kind(answer)}."
    )
    try:
        swap = Swap(asked[0], scope, answer)
    except VlmkitError as error:
        require(False, f"{answer!r} is no format that weights are rounded to ({told(error)}).")
    limit, bits = Swap(asked[0], scope, rival).effective_bits, swap.effective_bits
    require(not swap.format.activations, "this rounds activations; the weights keep their bits.")
    require(
        bits <= limit,
        f"{bits:.2f} bits, and {limit:.2f} are there. Each step costs 32 bits for its group; "
        "double quantization (-dq) makes that 8.",
    )
    theirs, mine = sweep(*asked, [rival, answer], [scope], progress=False)["kl"]
    why = ""
    if swap.format.bits < int(rival[3]):
        why = f" {swap.format.bits} bits leave four values at most, however the rest is spent."
    elif not swap.format.asymmetric:
        why = " A zero point would use all codes."
    require(mine < theirs / 2, f"{mine / theirs:.2f} times the divergence of {rival}.{why}")
    return (
        f"{mine / theirs:.2f} times the divergence in {bits:.2f} bits: how bits are spent matters."
    )


# --- plans and repair -----------------------------------------------------------------------------


@exercise("plan by hand")
def plan_by_hand(answer, asked, formats, rival):
    """{layer: format} of the layers that are not in `rival`, for no more bytes than `rival` takes
    for all, and less than half of its divergence; asked: (model, processor, questions)."""
    from vlmkit.planner import Planner

    require(isinstance(answer, dict), f"what is asked for is a dict; this is {kind(answer)}.")
    found = Planner(*asked, formats=formats, by="layer", progress=False)
    uniform = found.parts.uniform()[rival]
    layers = [scope for scope, format in uniform.items() if format == rival]
    strange = [str(layer) for layer in answer if layer not in layers]
    require(not strange, f"there is no layer {', '.join(strange)}; there are {', '.join(layers)}.")
    strange = [str(format) for format in answer.values() if format not in formats]
    require(not strange, f"no format here is {', '.join(strange)}; there are {', '.join(formats)}.")
    mine = uniform | answer
    more = found.parts.total(mine) - found.parts.total(uniform)
    saved = [layer for layer in layers if mine[layer] != rival and "int2" in mine[layer]]
    hint = "" if saved else " Some layers have to give bits up."
    require(more <= 0, f"{more:,} bytes too many.{hint}")
    share = found.joint(mine) / found.joint(uniform)
    eyes = [layer for layer in saved if layer.startswith("vision_encoder")]
    hint = f" Is {', '.join(eyes)} a layer that stands two bits?" if eyes else ""
    require(share < 0.5, f"{share:.0%} of the divergence.{hint}")
    return f"{share:.0%} of the divergence, with {-more:,} bytes to spare."


@exercise("make up for it")
def make_up(answer, net, format):
    """A second weight that loses less than half, once both are rounded; net: (chances, original), a
    function of both weights and a factor, and these weights."""
    import torch

    from vlmkit.formats import rounding

    chances, (first, second) = net
    shape = tuple(second.shape)
    require(isinstance(answer, torch.Tensor), f"a tensor is asked for; this is {kind(answer)}.")
    require(answer.shape != second.T.shape, f"this is transposed; the shape should be {shape}.")
    require(answer.shape == shape, f"the shape should be {shape}; it is {(*answer.shape,)}.")
    require(answer.isfinite().all(), "some of its numbers are not finite.")
    rounded = rounding(format).rounded
    require(
        not torch.allclose(answer, second, atol=1e-3),
        "this is the old weight. Fit to what the rounded first layer gives, not the old one.",
    )
    p, lost = chances(first, second, 20), []
    for weight in (second, answer.detach().to(second.dtype)):
        q = chances(rounded(first), rounded(weight), 20)
        lost.append((p.exp() * (p - q)).sum(-1).mean().item())
    require(lost[1] < lost[0] / 2, f"{lost[1]:.3f} nats; the old weight loses {lost[0]:.3f}.")
    return f"{lost[1]:.3f} nats in place of {lost[0]:.3f}: one rounding can make up for another."
