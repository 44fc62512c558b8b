"""Intervals and tests: how sure a share of right answers is, and a difference of two shares."""

from math import ceil

NORMAL = 1.959963984540054  # 95% of the normal distribution lie between minus and plus this
FLIPS = 0.1
"""Share of answers that `needed` supposes to change between right and wrong."""


def wilson(correct, n):
    """95% score interval of a proportion, (low, high), both within 0 and 1.

    Unlike the mean plus or minus two standard errors it holds for few answers and near 0% and 100%
    (Wilson, 1927, JASA 22, pages 209 to 212; recommended for few trials by Brown, Cai and DasGupta,
    2001, Statistical Science 16, pages 101 to 133). Raises ValueError for what is not a proportion.
    """
    from scipy.stats import binomtest

    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} of {n} is not a proportion")
    low, high = binomtest(int(correct), int(n)).proportion_ci(method="wilson")
    return float(low), float(high)


def bootstrap(scores, resamples=10_000):
    """The 95% interval of the mean of `scores`, (low, high), by the percentile bootstrap.

    For scores that are shares, where `wilson` does not apply (Efron and Tibshirani, An Introduction
    to the Bootstrap, 1993, chapter 13). Drawing n scores with replacement is drawing how often each
    distinct score comes, which is quick for many scores of few values. The same scores give the
    same interval every time.
    """
    import numpy as np

    values, counts = np.unique(np.asarray(scores, float), return_counts=True)
    rng = np.random.default_rng(0)
    n = counts.sum()
    chunk = max(1, 10**6 // len(values))  # draws at a time, to keep memory small
    means = [
        rng.multinomial(n, counts / n, size=min(chunk, resamples - start)) @ values / n
        for start in range(0, resamples, chunk)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def paired_interval(lost, gained, n, *, draws=10_000, seed=0):
    """95% paired-bootstrap interval of the difference in accuracy, (low, high).

    lost, gained: how many of `n` questions went from right to wrong, and from wrong to right.
    Percentiles over `draws` resamples of the questions (Efron and Tibshirani, 1993, chapter 13).
    A question's difference is -1, 0 or 1, so that resampling questions is drawing how often each of
    the three comes up.
    """
    import numpy as np

    shares = np.array([lost, gained, n - lost - gained]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=draws)
    low, high = np.percentile((counts[:, 1] - counts[:, 0]) / n, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(lost, gained):
    """Two-sided p of McNemar's exact test (McNemar, 1947, Psychometrika 12): how likely at least
    so uneven a split of the changed answers is if a change is as often for the better."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def needed(width):
    """Questions for a 95% interval of a difference in accuracy no wider than `width`, if FLIPS of
    the answers change: its width is 2 × 1.96 × sqrt(FLIPS / n)."""
    return ceil(FLIPS * (2 * NORMAL / width) ** 2)


def expected_width(n):
    """The width that `needed` counts on for n questions."""
    return 2 * NORMAL * (FLIPS / n) ** 0.5
