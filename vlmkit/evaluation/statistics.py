"""Intervals and tests: how certain a share of right answers is, and a difference of two shares.

All intervals are 95% intervals, given as (low, high).
"""

from math import ceil

NORMAL = 1.959963984540054  # 95% of the normal distribution lie between minus and plus this
FLIPS = 0.1
"""`needed` assumes that this share of the answers changes between right and wrong."""


def wilson(correct, n):
    """The score interval of a proportion, `correct` of `n`. Both ends are within 0 and 1.

    Unlike the mean plus or minus two standard errors, this interval is also right for few answers
    and near 0% and 100% (Wilson, 1927, JASA 22, pages 209 to 212; recommended for few trials by
    Brown, Cai and DasGupta, 2001, Statistical Science 16, pages 101 to 133). Raises ValueError for
    numbers that are not a proportion.
    """
    from scipy.stats import binomtest

    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} of {n} is not a proportion")
    low, high = binomtest(int(correct), int(n)).proportion_ci(method="wilson")
    return float(low), float(high)


def bootstrap(values, draws=10_000, *, one_by_one=False):
    """The percentile-bootstrap interval of the mean of `values`, a number for each question.

    Use it for scores that are not just right or wrong, where `wilson` does not apply (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). The same values give the same
    interval every time.

    draws: how many resamples of the questions. one_by_one: draw every question of a resample.
    Otherwise draw how often each distinct value appears in a resample. This is the same
    distribution, and faster for many questions with few distinct values.
    """
    import numpy as np

    values = np.asarray(values, float)
    if one_by_one:
        n = len(values)
        drawn = np.random.default_rng(0).integers(n, size=(draws, n))
        return _percentiles(values[drawn].mean(1))
    return _percentiles(_resampled_means(*np.unique(values, return_counts=True), draws))


def paired_interval(regressions, fixes, n, *, draws=10_000, seed=0):
    """The paired-bootstrap interval of the difference in accuracy of two models.

    regressions, fixes: how many of the `n` questions changed from right to wrong, and from wrong to
    right. The percentiles are over `draws` resamples of the questions (Efron and Tibshirani, 1993,
    chapter 13).
    """
    counts = (regressions, fixes, n - regressions - fixes)
    return _percentiles(_resampled_means((-1, 1, 0), counts, draws, seed))


def _resampled_means(values, counts, draws, seed=0):
    """The means of `draws` resamples, of data that hold `values` so many times as `counts` says."""
    import numpy as np

    values, counts = np.asarray(values), np.asarray(counts)
    rng, n = np.random.default_rng(seed), counts.sum()
    chunk = max(1, 10**6 // len(values))  # resamples at a time, to use little memory
    return np.concatenate(
        [
            rng.multinomial(n, counts / n, size=min(chunk, draws - start)) @ values / n
            for start in range(0, draws, chunk)
        ]
    )


def _percentiles(means):
    import numpy as np

    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(regressions, fixes):
    """The two-sided p of McNemar's exact test (McNemar, 1947, Psychometrika 12).

    It is the probability of a split of the changed answers that is at least as uneven, if each
    change is as likely a fix as a regression.
    """
    from scipy.stats import binomtest

    changed = regressions + fixes
    return float(binomtest(regressions, changed).pvalue) if changed else 1.0


def needed(width):
    """How many questions make the interval of a difference in accuracy no wider than `width`.

    If a share FLIPS of the answers changes, the width is 2 × 1.96 × sqrt(FLIPS / n).
    """
    return ceil(FLIPS * (2 * NORMAL / width) ** 2)


def expected_width(n):
    """The width that `needed` expects for `n` questions."""
    return 2 * NORMAL * (FLIPS / n) ** 0.5
