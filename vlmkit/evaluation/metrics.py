"""The field's metrics: how much an answer is worth against the accepted ones, from 0 to 1.

    vk.evaluate(model, processor, dataset, metric="anls")
    vqa_accuracy("2", ["two"] * 3 + ["3"] * 7)  # 0.9

  exact_match       the expected answer, or one of several, after `normalize`
  vqa_accuracy      how many of ten people gave that answer (VQAv2, TextVQA)
  direct_answer     the same without leaving a person out (A-OKVQA)
  anls              likeness of spelling (DocVQA, ST-VQA)
  relaxed_accuracy  numbers within 5%, other text exactly (ChartQA)

A metric is a function of the predicted answer and the list of accepted ones. They are written from
their definitions; the edit distance is rapidfuzz's.
"""

import difflib
import re

from vlmkit.errors import TaskError
from vlmkit.evaluation.scores import normalize

FULL_MARKS = 4
"""Fewer answers than this to a question, and no answer can reach a VQA accuracy of 1."""


def exact_match(predicted, accepted):
    """1 if the answer is one of the accepted ones after `normalize`, otherwise 0."""
    return float(normalize(predicted) in map(normalize, accepted))


# --- VQA accuracy ---------------------------------------------------------------------------------

# Contractions of the VQA evaluation, spelt right. The evaluation's table gives each with the
# spellings that lack one of its apostrophes, so the right ones say it all; those that it spells
# with a capital can match nothing, since answers are in lower case, and are left out here.
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
} | {"somebody'd": "somebodyd"}  # the table's own slip, kept so that scores are the same

_ARTICLES = ("a", "an", "the")
_ZERO_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(i) for i, word in enumerate(_ZERO_TO_TEN.split())} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe (girl's) and the colon (2:50)


def normalize_vqa(answer):
    """An answer as the VQA evaluation compares it (visualqa.org/evaluation).

    Lower case; full stops removed except decimal points; punctuation replaced by a space, or
    removed where a space is next to it or where the answer has a comma within a number; number
    words from zero to ten, and "none", as digits; articles removed; a contraction that lacks an
    apostrophe gets it.
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

    accepted: the answers that people gave to the question, ten in VQAv2 and TextVQA. Against nine
    of the ten, an answer is worth the share min(those who gave it / 3, 1); the result is the mean
    over the ten ways to leave one out: 0.3, 0.6 and 0.9 for an answer that one, two or three gave,
    and 1 from four on.

    All answers pass through `normalize_vqa`, as the evaluation's page says. Its script has changed
    over the years in whether it does so where all ten agree, and whether to the ten in full.
    """
    _require_several(accepted, "VQA accuracy")
    predicted = normalize_vqa(predicted)
    gave_it = [normalize_vqa(answer) == predicted for answer in accepted]
    matches = sum(gave_it)
    return sum(min((matches - one) / 3, 1.0) for one in gave_it) / len(gave_it)


def direct_answer(predicted, accepted):
    """The direct-answer accuracy of A-OKVQA (Schwenk et al., 2022, arXiv 2206.01718).

    min(people who gave that answer / 3, 1), over all ten. The answers are compared after
    `normalize`, where the evaluation's script asks for equal strings.
    """
    _require_several(accepted, "direct-answer accuracy")
    predicted = normalize(predicted)
    return min(sum(normalize(answer) == predicted for answer in accepted) / 3, 1.0)


def _require_several(accepted, name):
    if len(accepted) < FULL_MARKS:
        raise TaskError(
            f"{name} counts how many people gave an answer, usually of ten, and "
            f"here there {'is' if len(accepted) == 1 else 'are'} {len(accepted)}: give them all in "
            "the column answers, or use metric='exact_match'."
        )


# --- documents and charts -------------------------------------------------------------------------


def anls(predicted, accepted, threshold=0.5):
    """Average normalized Levenshtein similarity, of one answer (Biten et al., 2019, arXiv
    1905.13648, equation 1; Mathew et al., 2021, arXiv 2007.00398, for DocVQA).

    1 minus the edit distance over the longer text's length, in the best case over the accepted
    answers; 0 below `threshold`, where it is another answer rather than a misspelt one. Case and
    repeated spaces do not count. At 0.5 exactly the answer keeps its 0.5, as in the evaluation of
    the DocVQA challenge; the paper's equation has it at 0.
    """
    from rapidfuzz.distance import Levenshtein

    texts = [" ".join(text.lower().split()) for text in (predicted, *accepted)]
    best = max(Levenshtein.normalized_similarity(texts[0], text) for text in texts[1:])
    return best if best >= threshold else 0.0


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?")


def relaxed_accuracy(predicted, accepted, tolerance=0.05):
    """Relaxed accuracy (Masry et al., 2022, arXiv 2203.10244, section 5.1, after Methani et al.,
    2020): 1 for a number within 5% of an accepted one, or for the same text whatever its case.

    As in pix2struct's evaluation, which later models report with, 12% is the number 0.12, and a
    number with commas in it is text. A 0 is met only by a 0.
    """
    return float(any(_relaxed(predicted.strip(), text.strip(), tolerance) for text in accepted))


def _relaxed(predicted, expected, tolerance):
    if _NUMBER.fullmatch(predicted) and _NUMBER.fullmatch(expected):
        expected = _number(expected)
        return abs(_number(predicted) - expected) <= tolerance * abs(expected)
    return predicted.lower() == expected.lower()


def _number(text):
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


# --- which one ------------------------------------------------------------------------------------

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
"""The metric of a task's own evaluation; every other task's is exact match."""


def chosen(metric, tasks):
    """The metric for each row, as functions: `metric` for all, or where it is None by task.

    metric: one of `METRICS`, a function (predicted, accepted) -> from 0 to 1, or None.
    Raises TaskError for a name that is none of them.
    """
    if metric is None:
        return [METRICS[OF_TASK.get(task, "exact_match")] for task in tasks]
    if isinstance(metric, str):
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TaskError(f"There is no metric {metric!r}{hint} There are {', '.join(METRICS)}.")
        metric = METRICS[metric]
    if not callable(metric):
        raise TaskError(
            f"A metric is one of {', '.join(METRICS)}, or a function of an answer and the accepted "
            f"ones; this is a {type(metric).__name__}."
        )
    return [metric] * len(tasks)
