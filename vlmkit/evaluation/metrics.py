"""What an answer is worth by the field's metrics, from 0 to 1, and the scores of many answers.

    vk.evaluate(model, processor, dataset, metric="anls")
    vqa_accuracy("2", ["two"] * 3 + ["3"] * 7)  # 0.9

exact_match       1 if the answer is one of the accepted ones, after `normalize`
vqa_accuracy      how many of ten people gave this answer (VQAv2, TextVQA)
direct_answer     the same, without leaving a person out (A-OKVQA)
anls              similarity of spelling (DocVQA, ST-VQA)
relaxed_accuracy  numbers within 5%, other text exactly (ChartQA)

A metric is a function of the predicted answer and the list of accepted answers. The metrics are
written from their definitions. The edit distance is rapidfuzz's. `Scores` has the means of many
answers, with their intervals.
"""

import re
from dataclasses import dataclass

from vlmkit.errors import TaskError, did_you_mean
from vlmkit.evaluation.statistics import bootstrap, wilson
from vlmkit.tables import Table

FULL_MARKS = 4
"""With fewer accepted answers than this, no answer can reach a VQA accuracy of 1."""


def normalize(answer):
    """An answer as it is compared: without upper case, closing punctuation, and outer or repeated
    spaces, so that "Red." is "red"."""
    return " ".join(answer.split()).casefold().rstrip(".,;:!? ")


def exact_match(predicted, accepted):
    """1 if the answer is one of the accepted ones after `normalize`, otherwise 0."""
    return float(normalize(predicted) in map(normalize, accepted))


# --- VQA accuracy ---------------------------------------------------------------------------------

# The contractions of the VQA evaluation. Its table maps each spelling that lacks one apostrophe to
# the right spelling, so the right spellings are enough. Those that it spells with a capital can
# match nothing, since answers are in lower case, and are left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_REPAIRED = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTIONS.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # a mistake in that table, kept so that scores are the same

_ARTICLES = ("a", "an", "the")
_ZERO_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(i) for i, word in enumerate(_ZERO_TO_TEN.split())} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe (girl's) and the colon (2:50)


def normalize_vqa(answer):
    """An answer as the VQA evaluation compares it (visualqa.org/evaluation).

    Lower case. Full stops are removed, decimal points are not. Other punctuation becomes a space;
    it is removed instead if it is next to a space, or if the answer has a comma within a number.
    The words from zero to ten, and "none", become digits. Articles are removed. A contraction that
    lacks an apostrophe gets it.
    """
    answer = answer.strip().replace("\n", " ").replace("\t", " ")
    thousands = re.search(r"\d,\d", answer)
    plain = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        plain = plain.replace(mark, "" if beside_space or thousands else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predicted, accepted):
    """VQA accuracy (Antol et al., 2015, arXiv 1505.00468; as visualqa.org/evaluation has it now).

    accepted: the answers that people gave to the question, ten in VQAv2 and TextVQA. Compared with
    nine of the ten, an answer is worth min(people who gave it / 3, 1). The result is the mean over
    the ten ways to leave one person out: 0.3, 0.6 and 0.9 for an answer that one, two or three
    people gave, and 1 from four people on.

    All answers are normalized by `normalize_vqa`, as the page of the evaluation says. Over the
    years its script has not always normalized the ten answers, or not when all ten agree.
    """
    _require_several(accepted, "VQA accuracy")
    predicted = normalize_vqa(predicted)
    gave_it = [normalize_vqa(answer) == predicted for answer in accepted]
    matches = sum(gave_it)
    return sum(min((matches - one) / 3, 1.0) for one in gave_it) / len(gave_it)


def direct_answer(predicted, accepted):
    """The direct-answer accuracy of A-OKVQA (Schwenk et al., 2022, arXiv 2206.01718).

    min(people who gave that answer / 3, 1), of all ten people. The answers are compared after
    `normalize`; the script of the evaluation compares the strings themselves.
    """
    _require_several(accepted, "direct-answer accuracy")
    predicted = normalize(predicted)
    return min(sum(normalize(answer) == predicted for answer in accepted) / 3, 1.0)


def _require_several(accepted, name):
    if len(accepted) < FULL_MARKS:
        raise TaskError(
            f"{name} counts how many of usually ten people gave an answer, and this row has "
            f"{len(accepted)}: give all answers in the column answers, or use metric='exact_match'."
        )


# --- documents and charts -------------------------------------------------------------------------


def anls(predicted, accepted, threshold=0.5):
    """The normalized Levenshtein similarity of one answer; ANLS is its average (Biten et al., 2019,
    arXiv 1905.13648, equation 1; Mathew et al., 2021, arXiv 2007.00398, for DocVQA).

    1 minus the edit distance divided by the length of the longer text, for the most similar
    accepted answer; 0 below `threshold`, where it is another answer and not a misspelling. Case
    and repeated spaces do not count. A similarity of exactly 0.5 counts as 0.5, as in the
    evaluation of the DocVQA challenge; by the paper's equation it would count as 0.
    """
    from rapidfuzz.distance import Levenshtein

    texts = [" ".join(text.lower().split()) for text in (predicted, *accepted)]
    best = max(Levenshtein.normalized_similarity(texts[0], text) for text in texts[1:])
    return best if best >= threshold else 0.0


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?")


def relaxed_accuracy(predicted, accepted, tolerance=0.05):
    """Relaxed accuracy (Masry et al., 2022, arXiv 2203.10244, section 5.1, after Methani et al.,
    2020): 1 for a number within 5% of an accepted number, or for the same text, in any case.

    As in the evaluation of pix2struct, which later models use too, 12% is the number 0.12, and a
    number with commas is text. Only 0 matches 0.
    """
    return float(any(_relaxed(predicted.strip(), text.strip(), tolerance) for text in accepted))


def _relaxed(predicted, expected, tolerance):
    if _NUMBER.fullmatch(predicted) and _NUMBER.fullmatch(expected):
        expected = _number(expected)
        return abs(_number(predicted) - expected) <= tolerance * abs(expected)
    return predicted.lower() == expected.lower()


def _number(text):
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


# --- choosing a metric ----------------------------------------------------------------------------

METRICS = {
    metric.__name__: metric
    for metric in (exact_match, vqa_accuracy, direct_answer, anls, relaxed_accuracy)
}

OF_TASK = {
    "vqav2": "vqa_accuracy",
    "textvqa": "vqa_accuracy",
    "aokvqa": "direct_answer",
    "docvqa": "anls",
    "chartqa": "relaxed_accuracy",
}
"""The metric that a task's own evaluation uses. For every other task it is exact match."""


def metrics_of(metric, tasks):
    """The metric for each row, as a list of functions. tasks: the task of each row.

    metric: one of `METRICS` or a function (predicted, accepted) -> 0 to 1, for all rows; or None,
    for the metric of each row's task. Raises TaskError for a name that is not a metric.
    """
    if metric is None:
        return [METRICS[OF_TASK.get(task, "exact_match")] for task in tasks]
    if isinstance(metric, str):
        if metric not in METRICS:
            raise TaskError(
                f"{metric!r} is not a metric. {did_you_mean(metric, METRICS)}The metrics are "
                f"{', '.join(METRICS)}."
            )
        metric = METRICS[metric]
    if not callable(metric):
        raise TaskError(
            f"A metric is one of {', '.join(METRICS)}, or a function of an answer and the accepted "
            f"answers; this is a {type(metric).__name__}."
        )
    return [metric] * len(tasks)


# --- the scores of many answers -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scores(Table):
    """What a model answered, and how often it was right.

    answers: a DataFrame with a row per question, in the dataset's order: question, answer (the
    expected one), predicted, correct, task, kind. If the metric has values between 0 and 1, also
    score; correct then says whether the score is 1. If answers ended at the limit of new tokens,
    also at_limit, which says whether this one did.
    metric: the name of the metric, for the headline.
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
    def at_limit(self):
        """How many answers ended at the limit of new tokens, and so may be cut off."""
        return int(self.answers["at_limit"].sum()) if "at_limit" in self.answers else 0

    @property
    def interval(self):
        """The 95% interval of the accuracy, (low, high): `wilson` if every score is 0 or 1, else
        `bootstrap`."""
        return _interval(self._scores)

    @property
    def _scores(self):
        return self.answers["score" if "score" in self.answers else "correct"]

    @property
    def by_task(self):
        """A DataFrame with a row per task: n, accuracy, and its 95% interval, low and high."""
        return self._by("task")

    @property
    def by_kind(self):
        """A row per task and kind of question, with the columns of `by_task`."""
        return self._by(["task", "kind"])

    def _by(self, columns):
        import pandas as pd

        groups = self.answers.groupby(columns, sort=False)[self._scores.name]
        rows = [(len(group), group.mean(), *_interval(group)) for _, group in groups]
        names = ["n", "accuracy", "low", "high"]
        return pd.DataFrame(rows, index=groups.size().index, columns=names)

    def __repr__(self):
        return f"<Scores: {self._headline()}>"

    def _headline(self):
        low, high = self.interval
        found = f"{self.accuracy:.1%} of {self.n:,} answers right"
        if self.metric != "exact_match":
            found = f"mean {self.metric} {self.accuracy:.1%} over {self.n:,} answers"
        found = f"{found} (95% interval {low:.1%} to {high:.1%})"
        if self.at_limit:
            found += f"; {self.at_limit:,} ended at the limit of new tokens (max_new_tokens)"
        return found

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
    """A DataFrame of texts with a row per model and a column per task. "79 [74, 83]" means that 79%
    of the answers are right, with a 95% interval from 74% to 83%.

    scores: {model: Scores}, all of the same tasks.
    """
    import pandas as pd

    def text(share):
        return "{accuracy:.0f} [{low:.0f}, {high:.0f}]".format(**100 * share)

    return pd.DataFrame({name: one.by_task.apply(text, axis=1) for name, one in scores.items()}).T
