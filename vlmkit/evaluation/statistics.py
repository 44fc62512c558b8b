"""Intervals and tests: how certain a share of right answers is, and a difference of two shares.

All intervals are 95% intervals, given as (low, high).
"""

from dataclasses import dataclass
from math import ceil

from vlmkit.errors import TaskError

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


CHANCE = 0.05
"""Below this p, vlmkit says that two models differ. A custom of the field, and not a law."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions. lost: how many answers changed from right to wrong; won:
    from wrong to right; n: the number of questions. Made by `paired`.

    Judge a difference by these, and never by two intervals that overlap or do not: the intervals
    of two accuracies do not know that the questions were the same.
    """

    lost: int
    won: int
    n: int

    @property
    def difference(self):
        """The second model's accuracy minus the first one's."""
        return (self.won - self.lost) / self.n

    @property
    def interval(self):
        """The 95% interval of the difference: `paired_interval`."""
        return paired_interval(self.lost, self.won, self.n)

    @property
    def p(self):
        """The p of `mcnemar`."""
        return mcnemar(self.lost, self.won)

    @property
    def differ(self):
        """Whether the p is below CHANCE."""
        return self.p < CHANCE

    def __str__(self):
        more = "more than chance would do" if self.differ else "chance alone could do this"
        p = f"{self.p:.3f}" if self.p >= 0.001 else f"{self.p:.0e}"
        return f"{self.lost} lost, {self.won} won of {self.n}: p = {p}, {more}"


def paired(before, after):
    """`Paired` of two models' right and wrong answers to the same questions, in the same order.

    before, after: `Scores`, or arrays of True and False. Raises TaskError if the questions are not
    the same.
    """
    import numpy as np

    asked = [list(one.answers["question"]) for one in (before, after) if hasattr(one, "answers")]
    before, after = (
        np.asarray(one.answers["correct"] if hasattr(one, "answers") else one, bool)
        for one in (before, after)
    )
    if before.shape != after.shape or len(asked) == 2 and asked[0] != asked[1]:
        raise TaskError(
            f"These are not the same questions in the same order ({len(before):,} answers and "
            f"{len(after):,}). A paired test compares two models on the same questions."
        )
    return Paired(int((before & ~after).sum()), int((~before & after).sum()), before.size)


def needed(width):
    """How many questions make the interval of a difference in accuracy no wider than `width`.

    If a share FLIPS of the answers changes, the width is 2 × 1.96 × sqrt(FLIPS / n).
    """
    return ceil(FLIPS * (2 * NORMAL / width) ** 2)


def expected_width(n):
    """The width that `needed` expects for `n` questions."""
    return 2 * NORMAL * (FLIPS / n) ** 0.5
