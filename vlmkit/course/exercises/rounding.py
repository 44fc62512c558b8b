"""Exercises on fewer bits: what a difference is worth, formats, plans for layers, repair."""

import itertools
import math

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
from vlmkit.errors import VlmkitError, brief
from vlmkit.evaluation.statistics import CHANCE, mcnemar


@exercise("beyond noise", whole, "a number of answers", least=0)
def beyond_noise(lost, won, asked):
    """How few answers must be lost, where `won` are won, so that more are lost and the p of the
    exact paired test is below 0.05; asked: the number of questions, which does not matter."""
    right = next(n for n in range(won, 10**6) if mcnemar(n, won) < CHANCE)
    of_all = 2 * math.sqrt(asked)
    require(
        lost == right or lost not in (round(of_all), math.ceil(of_all)),
        "this counts every question. Only the answers that changed matter.",
    )
    p = mcnemar(lost, won)
    require(
        lost > won or p >= CHANCE,
        f"with {lost} lost and {won} won, the plan is better than bf16, and not worse.",
    )
    require(
        lost >= right,
        f"with {lost} lost and {won} won, p = {p:.3g}: chance alone splits the changed answers at "
        f"least so unevenly {p:.1%} of the time.",
    )
    require(lost == right, f"it is more than chance would do, but {lost - 1} lost would be, too.")
    return f"p = {p:.3f} in {asked} or in a million: how many answers changed is what counts."


@exercise("exact paired test", function)
def exact_paired_test(p):
    """A function of (lost, won) that returns the two-sided p of the exact paired test."""

    def near(lost, won, wanted):  # as near as a float of 32 bits comes
        return math.isclose(number(p(lost, won), "a probability"), wanted, rel_tol=1e-5)

    changed = math.comb(9, 2) / 2**9
    one_side = mcnemar(7, 2) / 2
    mistakes = {
        one_side: "this is one side only. 2 lost and 7 won are as uneven as 7 and 2.",
        changed: "this is the probability of exactly this result. Add up all results that are at "
        "least as uneven.",
        2 * changed: "this is the probability of exactly this result, to either side. Add up all "
        "results that are at least as uneven.",
    }
    for wrong, hint in mistakes.items():
        require(not near(7, 2, wrong), hint)
    same = not near(7, 2, mcnemar(7, 2)) or near(2, 7, mcnemar(2, 7))
    require(same, "2 lost and 7 won should give the same p as 7 and 2.")
    for lost, won in ((7, 2), (4, 4), (0, 0), (6, 0), (1, 0), (40, 23), (200, 230)):
        found, right = number(p(lost, won), "a probability"), mcnemar(lost, won)
        more = " A probability cannot be more than 1." if found > 1 else ""
        hint = f"{lost} lost and {won} won give p = {found:.4g}; it should be {right:.4g}.{more}"
        require(near(lost, won, right), hint)
    return "the same as vk.evaluation.mcnemar, for every result that was tried."


@exercise("with a zero point", function)
def with_a_zero_point(rounded):
    """A function of (weight, bits, group) that rounds each group to 2^bits values between its
    smallest weight and its largest. It may store a zero point or the smallest weight."""
    import torch

    from vlmkit.formats import rounding

    for bits, group, shift in ((2, 64, 0.0), (4, 32, 0.0), (3, 16, 1.0)):
        weight = torch.randn(8, 128, generator=torch.manual_seed(bits)) + shift
        found = tensor(rounded(weight.clone(), bits, group), "the result").float()
        require(
            found.shape == weight.shape,
            f"the shape is {(*found.shape,)}; it should be the weight's, {(*weight.shape,)}.",
        )
        require(found.isfinite().all(), "some of the values are not finite numbers.")
        most = max(len(part.unique()) for part in found.float().round(decimals=5).view(-1, group))
        require(
            most <= 2**bits,
            f"{bits} bits are {2**bits} codes, and a group of {group} has {most} different values. "
            "Round to whole codes, with a step for each group.",
        )

        def error(values, weight=weight):
            return (values - weight).norm().item()

        right = error(rounding(f"int{bits}-g{group}-asym").rounded(weight))
        plain = error(rounding(f"int{bits}-g{group}").rounded(weight))
        wide = error(rounding(f"int{bits}-g128-asym").rounded(weight))
        mine = error(found)
        if mine > 1.02 * right:
            times = f"in {bits} bits your error is {mine / right:.1f} times that of a zero point"
            reject(
                mine,
                {
                    plain: f"{times}: these are codes around zero, and one code stays unused.",
                    wide: f"{times}: each row has one step, not each group.",
                },
                same=lambda one, other: abs(one / other - 1) < 0.01,
            )
            raise Hint(f"{times}. With n codes there are n − 1 gaps. Is the low end added again?")
    return "every code is used, from the smallest weight of a group to the largest."


@exercise("paired test", function)
def paired_test(p_of):
    """A function of (before, after), arrays of right and wrong answers, that returns the two-sided
    p of the exact paired test."""
    import numpy as np
    from scipy.stats import binomtest

    for lost, won, right, wrong in ((5, 0, 60, 35), (6, 0, 10, 4), (3, 12, 40, 5), (0, 0, 5, 5)):
        before = np.repeat([True, False, True, False], [lost, won, right, wrong])
        after = np.repeat([False, True, True, False], [lost, won, right, wrong])
        changed, n = lost + won, len(before)
        told = f"{lost} lost and {won} won of {n}"
        if not changed:
            found = p_of(before, after)
            real = isinstance(found, (int, float, np.floating)) and not isinstance(found, bool)
            require(real and found == 1, f"{told}: nothing changed, so p is 1.")
            continue
        found = number(p_of(before, after), "a p")
        exact = binomtest(lost, changed).pvalue
        if abs(found - exact) > 1e-6:
            mistakes = {
                exact / 2: "this is one-sided. A coin can be uneven in both directions: double it.",
                binomtest(lost, n).pvalue: f"{told}: all {n} questions are counted. Only the "
                "answers that changed are tosses of the coin.",
            }
            reject(found, mistakes, same=lambda one, other: abs(one - other) < 1e-9)
            raise Hint(
                f"{told}: {found:.4f}, and a fair coin gives {exact:.4f}. (Approximations such as "
                "chi-squared need many changed answers.)"
            )
    return "only the changed answers count, and the test is exact however few they are."


@exercise("how many questions", number, "a number of questions")
def how_many(found, half, changed):
    """Questions for a 95% interval of plus and minus `half`, within 1%, if a share `changed` of the
    answers changes between right and wrong."""
    require(found > 0, f"the answer should be a number of questions; this is {found}.")
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
    reject(ratio, mistakes, same=lambda one, other: abs(one / other - 1) <= 0.01)
    require(abs(ratio - 1) <= 0.01, f"this gives ± {100 * half / math.sqrt(ratio):.2f} points.")
    return f"about {right:,.0f}. Half the interval takes four times as many."


@exercise("better than NF4", lambda answer: answer)
def better_levels(answer, scaled, levels):
    """16 values in order, from -1 to 1, that leave less error in `scaled` (weights divided by the
    largest of their block) than `levels`, those of NF4."""
    import torch

    asked = "the answer should be 16 numbers in a tensor"
    try:
        mine = tensor(answer, asked).float().squeeze()
    except Hint:
        raise Hint(f"{asked}; this is {kind(answer)}.") from None
    require(mine.shape == (16,), f"{asked}; the shape is {(*mine.shape,)}.")
    require(mine.isfinite().all(), "some of the values are not finite numbers.")
    steps = mine.diff()
    require((steps > 0).all(), "the values have to go up, so that midpoints lie between them.")
    require(not torch.equal(mine, levels), "these are NF4's own values.")

    def error(values):
        nearest = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2)
        return (values[nearest] - scaled).norm()

    ratio = (error(mine) / error(levels)).item()
    even = " Even steps put too few values where most weights are." if steps.std() < 1e-3 else ""
    require(ratio < 1, f"{ratio:.3f} times NF4's error.{even}")
    return f"{ratio:.3f} times NF4's error. Equal use of the codes is not the least error."


@exercise("fewer bits", of_type, str, "the name of a format")
def fewer_bits(answer, asked, scope, rival):
    """A format for `scope` that takes no more bits than `rival` and has less than half of its
    divergence; asked: (model, processor, questions)."""
    from vlmkit.sensitivity import Rounded, sweep

    try:
        rounded = Rounded(asked[0], scope, answer)
    except VlmkitError as error:
        raise Hint(f"{answer!r} is not a format for weights ({brief(error)}).") from None
    limit = Rounded(asked[0], scope, rival).effective_bits
    format, bits = rounded.format, rounded.effective_bits
    require(not format.activations, "this rounds activations; the weights keep their bits.")
    require(
        bits <= limit,
        f"{bits:.2f} bits, and the limit is {limit:.2f}. Each group has a scale of 32 bits; double "
        "quantization (-dq) makes that 8.",
    )
    theirs, mine = sweep(*asked, [rival, answer], [scope], progress=False)["kl"]
    why = ""
    if format.bits < int(rival[3]):
        why = f" {format.bits} bits leave four values at most, however the rest is spent."
    elif not format.asymmetric:
        why = " A zero point would use all codes."
    require(mine < theirs / 2, f"{mine / theirs:.1f} times the divergence of {rival}.{why}")
    return f"{mine / theirs:.1f} times the divergence in {bits:.2f} bits: their use matters."


@exercise("plan by hand", of_type, dict, "a dict")
def plan_by_hand(answer, asked, formats, rival):
    """{layer: format} of the layers that are not in `rival`, for no more bytes than `rival` takes
    for all, and less than half of its divergence; asked: (model, processor, questions)."""
    from vlmkit.planner import Planner

    found = Planner(*asked, formats=formats, by="layer", progress=False)
    choices = found.choices
    uniform = choices.uniform()[rival]
    layers = [scope for scope, format in uniform.items() if format == rival]
    known(answer, layers, "layer")
    known(answer.values(), formats, "format")
    mine = uniform | answer
    more = choices.total(mine) - choices.total(uniform)
    saved = [layer for layer in layers if mine[layer] != rival and "int2" in mine[layer]]
    hint = "" if saved else " Some layers have to give bits up."
    require(more <= 0, f"{more:,} bytes too many.{hint}")
    share = found.joint(mine) / found.joint(uniform)
    vision = ", ".join(layer for layer in saved if layer.startswith("vision_encoder"))
    hint = f" Does {vision} do well with two bits?" if vision else ""
    require(share < 0.5, f"{share:.0%} of the divergence.{hint}")
    return f"{share:.0%} of the divergence, with {-more:,} bytes to spare."


@exercise("the best of both", of_type, dict, "a dict")
def best_of_both(answer, layers, room):
    """{layer: format} of the layers that are not in NF4, for at most `room` bytes in all, and a sum
    of both damages within 1% of the least one; layers: a DataFrame with a row for each layer and
    format, and columns scope, format, bytes, kl_digits and kl_text."""
    from vlmkit.planner import least_damage

    both = layers.assign(kl_both=layers["kl_digits"] + layers["kl_text"])

    def options(column):
        return {
            scope: dict(zip(rows["format"], rows[column], strict=True))
            for scope, rows in both.groupby("scope", sort=False)
        }

    sizes = options("bytes")
    known(answer, sizes, "layer")
    known(answer.values(), set(both["format"]), "format")
    mine = dict.fromkeys(sizes, "nf4") | answer
    more = sum(sizes[scope][name] for scope, name in mine.items()) - room
    require(more <= 0, f"{more:,} bytes too many.")

    def damage(choice, column):
        return sum(options(column)[scope][name] for scope, name in choice.items())

    least = damage(least_damage(sizes, options("kl_both"), room), "kl_both")
    found = damage(mine, "kl_both")
    alone = ""
    for name, what in {"kl_text": "text", "kl_digits": "digits"}.items():
        if mine == least_damage(sizes, options(name), room):
            alone = f" This is the plan for {what} alone."
    require(
        found <= 1.01 * least, f"{found:.4f} nats are {found / least:.2f} times the least.{alone}"
    )
    return f"{found:.4f} nats, and the least is {least:.4f}. A sum of damages is a damage, too."


@exercise("make up for it", lambda answer: answer)
def make_up(answer, net, format):
    """A second weight that loses less than half, once both are rounded; net: (chances, original), a
    function of both weights and a factor, and these weights."""
    import torch

    from vlmkit.formats import rounding

    chances, (first, second) = net
    shape = tuple(second.shape)
    of_type(answer, torch.Tensor, "a tensor")
    require(answer.shape != second.T.shape, f"this is transposed; the shape should be {shape}.")
    require(answer.shape == shape, f"the shape should be {shape}; it is {(*answer.shape,)}.")
    require(answer.isfinite().all(), "some of its numbers are not finite.")
    require(
        not torch.allclose(answer, second, atol=1e-3),
        "this is the old weight. Fit to what the rounded first layer gives, not the old one.",
    )
    rounded = rounding(format).rounded
    p, losses = chances(first, second, 20), []
    for weight in (second, answer.detach().to(second.dtype)):
        q = chances(rounded(first), rounded(weight), 20)
        losses.append((p.exp() * (p - q)).sum(-1).mean().item())
    old, new = losses
    require(new < old / 2, f"{new:.3f} nats; the old weight loses {old:.3f}.")
    return f"{new:.3f} nats instead of {old:.3f}: one rounding can make up for another."


@exercise("who can share", function)
def who_can_share(pairs, means):
    """A function of (means, points) that returns the pairs of formats that can share a projector:
    trained in one and asked in the other, in both directions, it loses at most `points` against the
    projector that was trained there. means: a DataFrame of percents, with a row for each format of
    a training and a column for each format asked in."""
    import numpy as np
    import pandas as pd

    def sharing(table, points, directions=all, best=lambda trained, asked: asked):
        """The pairs. directions: `any` if one is enough. best: whose own percent counts."""

        def near(trained, asked):
            own = best(trained, asked)
            return table.loc[own, own] - table.loc[trained, asked] <= points

        both = itertools.combinations(table.index, 2)
        return {frozenset(p) for p in both if directions(near(*order) for order in (p, p[::-1]))}

    def said(found):
        return "; ".join(" and ".join(sorted(pair)) for pair in sorted(found, key=sorted)) or "none"

    names, draw = list("pqrst"), np.random.default_rng(34)
    for points in (2, 5, None):  # two new tables, whose pairs are others with each mistake
        loss = draw.choice([0, 2, 5, 6, 30], (5, 5)) * (1 - np.eye(5, dtype=int))
        table = pd.DataFrame(draw.integers(70, 95, 5) - loss, names, names)[names[::-1]]
        table, points = (means, 2) if points is None else (table, points)
        found = pairs(table.copy(), points)
        require(found is not None, "the result is None: is the `return` missing?")
        found = of_type(found, (list, tuple, set, frozenset), "a set of pairs of formats")
        pair = (list, tuple, set, frozenset), "a set whose elements are pairs such as ('a', 'b')"
        found = {frozenset(of_type(one, *pair)) for one in found}
        known([name for one in found for name in one], list(table.index), "format")
        require(all(len(one) == 2 for one in found), "a pair has two different formats.")
        right = sharing(table, points)
        mistakes = {
            "one direction is not enough: each of the two has to do in the other one's format.": (
                sharing(table, points, any)
            ),
            "compare with the projector that was trained in the format that is asked in: the same "
            "column, and the row of that name.": sharing(table, points, best=lambda t, a: t),
            "rows and columns can be in another order. Take them by their names.": sharing(
                table.set_axis(table.index, axis=1), points
            ),
        }
        if found != right:
            for hint, wrong in mistakes.items():
                require(found != wrong, hint)
            raise Hint(f"in a table tried here, {said(right)} can share; you found {said(found)}.")
    return f"in the record, within 2 points, {said(right)}: nearly the same weights."
