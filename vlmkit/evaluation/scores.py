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


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model answered, and how often it was right.

    answers: a DataFrame with a row per question, in the dataset's order: question, answer (the
    expected one), predicted, correct, task, kind.
    """

    answers: object

    @property
    def n(self):
        return len(self.answers)

    @property
    def accuracy(self):
        """The share of right answers, from 0 to 1."""
        return float(self.answers["correct"].mean())

    @property
    def interval(self):
        """The 95% interval of the accuracy, (low, high): see `wilson`."""
        return wilson(int(self.answers["correct"].sum()), self.n)

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

        counts = self.answers.groupby(columns, sort=False)["correct"].agg(["size", "sum"])
        rows = [
            (n, correct / n, *wilson(correct, n))
            for n, correct in counts.itertuples(index=False, name=None)
        ]
        return pd.DataFrame(rows, index=counts.index, columns=["n", "accuracy", "low", "high"])

    def __str__(self):
        table = self._table().to_string(index_names=False)
        return f"{self._headline()}\n{table}"

    def __repr__(self):
        return f"<Scores: {self._headline()}>"

    def _repr_html_(self):
        return f"<p>{self._headline()}</p>{self._table().to_html(index_names=False)}"

    def _headline(self):
        low, high = self.interval
        return (
            f"{self.accuracy:.1%} of {self.n:,} answers right "
            f"(95% interval {low:.1%} to {high:.1%})"
        )

    def _table(self):
        table = self.by_task
        for column in ("accuracy", "low", "high"):
            table[column] = table[column].map("{:.1%}".format)
        return table


def compared(scores):
    """A DataFrame of texts, a row per model, a column per task: "79 [74, 83]" is 79% of the answers
    right, with a 95% interval from 74% to 83%.

    scores: {model: Scores}, of the same tasks.
    """
    import pandas as pd

    def text(share):
        return "{accuracy:.0f} [{low:.0f}, {high:.0f}]".format(**100 * share)

    return pd.DataFrame({name: one.by_task.apply(text, axis=1) for name, one in scores.items()}).T
