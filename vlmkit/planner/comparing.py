"""A plan against the unquantized model, and against another plan, on the same questions."""

from vlmkit.evaluation import wilson
from vlmkit.planner.results import Measured
from vlmkit.sensitivity import paired_interval


def summary(baseline, outcome):
    """The Measured of an Outcome of `baseline`'s questions."""
    before = baseline.scores.answers["correct"].to_numpy()
    return Measured(
        outcome.kl.mean().item(),
        _bootstrap(outcome.kl),
        outcome.correct.mean().item(),
        wilson(int(outcome.correct.sum()), len(before)),
        *_paired(before, outcome.correct),
        len(before),
        outcome,
    )


def _paired(before, after):
    """(difference in accuracy, its interval)"""
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    n = len(before)
    return (gained - lost) / n, paired_interval(lost, gained, n)


def _bootstrap(values, draws=2_000, seed=0):
    """95% percentile-bootstrap interval of a mean over questions."""
    import numpy as np

    n = len(values)
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _against(chosen, uniform):
    """(accuracy difference, interval, divergence difference, interval): chosen minus uniform, on
    the same held-out questions."""
    ours, theirs = chosen.measured.outcome, uniform.measured.outcome
    kl = ours.kl - theirs.kl
    return (*_paired(theirs.correct, ours.correct), kl.mean().item(), _bootstrap(kl))


def is_worse(chosen, uniform):
    """Whether the uniform plan is better beyond its interval: in accuracy, or where that does not
    decide, in divergence."""
    _, (low, high), _, (kl_low, _) = _against(chosen, uniform)
    return high < 0 or low <= 0 and kl_low > 0


def reason(chosen, uniform):
    """Which of two Trials is returned, in words, with the numbers."""
    if uniform is None:
        return "No uniform plan fits into the budget: there is nothing to compare the plan with."
    if chosen.assignment == uniform.assignment:
        return f"The best plan found is the uniform one, {uniform.name.removeprefix('uniform ')}."
    difference, (low, high), kl, (kl_low, kl_high) = _against(chosen, uniform)
    measured = (
        f"accuracy {difference:+.1%} [{low:+.1%}, {high:+.1%}], divergence {kl:+.4f} "
        f"[{kl_low:+.4f}, {kl_high:+.4f}] nats a token against {uniform.name}, on the same "
        f"{chosen.measured.n:,} held-out questions"
    )
    if is_worse(chosen, uniform):
        return f"The uniform plan is returned: what was planned is worse ({measured})."
    if low > 0:
        return f"The plan answers more questions right than the best uniform one: {measured}."
    if kl_high < 0:
        return (
            "The plan is closer to the unquantized model than the best uniform one, and its "
            f"accuracy is the same within the interval: {measured}."
        )
    return f"The plan is as good as the best uniform one, within the interval: {measured}."
