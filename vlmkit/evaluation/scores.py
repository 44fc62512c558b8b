"""How often answers are right, and how sure that is."""

from dataclasses import dataclass

from vlmkit.evaluation.statistics import bootstrap, wilson
from vlmkit.tables import Table


def normalize(answer):
    """An answer as it is compared: case, outer and repeated spaces and closing punctuation do not
    count, so that "Red." is "red"."""
    return " ".join(answer.split()).casefold().rstrip(".,;:!? ")


@dataclass(frozen=True, eq=False)
class Scores(Table):
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

    def __repr__(self):
        return f"<Scores: {self._headline()}>"

    def _headline(self):
        low, high = self.interval
        found = f"{self.accuracy:.1%} of {self.n:,} answers right"
        if self.metric != "exact_match":
            found = f"mean {self.metric} {self.accuracy:.1%} over {self.n:,} answers"
        return f"{found} (95% interval {low:.1%} to {high:.1%})"

    def table(self):
        return self.by_task

    def _text_table(self):
        table = self.by_task.rename_axis(None)
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
