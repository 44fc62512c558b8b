"""How often answers are right, and how sure that is."""

from dataclasses import dataclass

_Z = 1.959963984540054  # 97.5% of the normal distribution lie below it, 95% within plus and minus


def normalise(answer):
    """An answer as it is compared: case, outer and repeated spaces and closing punctuation do not
    count, so that "Red." is "red"."""
    return " ".join(answer.split()).casefold().rstrip(".,;:!? ")


def wilson(correct, n):
    """The 95% score interval of a proportion, (low, high), both within 0 and 1.

    Unlike the mean plus or minus two standard errors it holds for few answers and near 0% and 100%
    (Wilson, 1927, JASA 22, pages 209 to 212; recommended for few trials by Brown, Cai and DasGupta,
    2001, Statistical Science 16, pages 101 to 133).
    """
    if not 0 <= correct <= n or n < 1:
        raise ValueError(f"{correct} of {n} is not a proportion")
    share, spread = correct / n, _Z**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


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


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model answered, and how often it was right.

    answers: a DataFrame with a row per question, in the dataset's order: question, answer (the
    expected one), predicted, correct, task, kind. Where the metric has degrees between wrong and
    right, also score, from 0 to 1; correct is then whether it is 1.
    metric: what the scores are, in the headline.
    """

    answers: object
    metric: str = "exact_match"

    @property
    def n(self):
        return len(self.answers)

    @property
    def accuracy(self):
        """The share of right answers, or the mean score: from 0 to 1."""
        return float(self._scores.mean())

    @property
    def interval(self):
        """The 95% interval of the accuracy, (low, high): `wilson` where every score is 0 or 1, and
        otherwise `bootstrap`."""
        return _interval(self._scores)

    @property
    def _scores(self):
        return self.answers["score" if "score" in self.answers else "correct"]

    @property
    def by_task(self):
        """A row per task: n, accuracy, and its 95% interval, low and high."""
        return self._by("task")

    @property
    def by_kind(self):
        """A row per task and kind of question, with the columns of `by_task`."""
        return self._by(["task", "kind"])

    def _by(self, columns):
        import pandas as pd

        groups = self.answers.groupby(columns, sort=False)[self._scores.name]
        rows = [(len(group), group.mean(), *_interval(group)) for _, group in groups]
        return pd.DataFrame(
            rows, index=groups.size().index, columns=["n", "accuracy", "low", "high"]
        )

    def __str__(self):
        table = self._table().to_string(index_names=False)
        return f"{self._headline()}\n{table}"

    def __repr__(self):
        return f"<Scores: {self._headline()}>"

    def _repr_html_(self):
        return f"<p>{self._headline()}</p>{self._table().to_html(index_names=False)}"

    def _headline(self):
        low, high = self.interval
        found = f"{self.accuracy:.1%} of {self.n:,} answers right"
        if self.metric != "exact_match":
            found = f"mean {self.metric} {self.accuracy:.1%} over {self.n:,} answers"
        return f"{found} (95% interval {low:.1%} to {high:.1%})"

    def _table(self):
        table = self.by_task
        for column in ("accuracy", "low", "high"):
            table[column] = table[column].map("{:.1%}".format)
        return table


def _interval(scores):
    if scores.isin([0, 1]).all():
        return wilson(int(scores.sum()), len(scores))
    return bootstrap(scores)


def compared(scores):
    """A DataFrame of texts, a row per model, a column per task: "79 [74, 83]" is 79% of the answers
    right, with a 95% interval from 74% to 83%.

    scores: {model: Scores}, of the same tasks.
    """
    import pandas as pd

    def text(share):
        return "{accuracy:.0f} [{low:.0f}, {high:.0f}]".format(**100 * share)

    return pd.DataFrame({name: one.by_task.apply(text, axis=1) for name, one in scores.items()}).T
