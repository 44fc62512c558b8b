"""What a comparison of two models on the same questions is worth: intervals and tests for pairs."""

from math import ceil

_Z = 1.959963984540054  # 95% of the normal distribution lie within plus and minus
FLIPS = 0.1
"""Share of answers that `needed` supposes to change between right and wrong."""


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
    return ceil(FLIPS * (2 * _Z / width) ** 2)


def expected_width(n):
    """The width that `needed` counts on for n questions."""
    return 2 * _Z * (FLIPS / n) ** 0.5
