"""The layouts in which VQA data is published, and how a row of each is read.

A layout is recognized by its columns: those that it needs, and one at least of its marks, which
others lack. Everything here is text; pictures are `reading.py`'s.
"""

import ast
import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from vlmkit.errors import TaskError

PICTURES = ("images", "image")
"""The column that holds a row's pictures, a list of them or one."""


@dataclass(frozen=True)
class Schema:
    """name: the layout's, and the `task` of its rows. needs: columns that it cannot do without.
    marks: columns of which at least one must be there to recognize it unnamed.
    read: a row as a dict -> its questions, each a dict with question, answer, answers and kind."""

    name: str
    needs: tuple
    read: Callable
    marks: tuple = ()
    picture: str = " or ".join(reversed(PICTURES))

    def missing(self, columns):
        """What the layout needs and `columns` lack, as text; empty where nothing is missing."""
        lacking = [name for name in self.needs if name not in columns]
        if not any(name in columns for name in self.picture.split(" or ")):
            lacking.insert(0, self.picture)
        return lacking

    def recognizes(self, columns):
        marked = not self.marks or any(name in columns for name in self.marks)
        return marked and not self.missing(columns)


def _vqav2(row):
    answers = [record["answer"] for record in _records(row["answers"])]
    return _one(row, answers, row["multiple_choice_answer"], kind=row.get("answer_type"))


def _textvqa(row):
    return _one(row, _texts(row["answers"]))


def _docvqa(row):
    answers = _texts(row["answers"])
    # The challenge's page suggests the first answer where only one can be used.
    return _one(row, answers, next(iter(answers), ""), " + ".join(row.get("question_types") or ()))


def _chartqa(row):
    answers = _texts(row["label"])
    origin = row.get("human_or_machine")
    kind = {0: "human", 1: "machine"}.get(origin, origin)
    return _one(row, answers, next(iter(answers), ""), kind, question=row["query"])


def _gqa(row):
    return _one(row, [], row["answer"], (row.get("types") or {}).get("structural"))


def _aokvqa(row):
    answers, choice = _texts(row["direct_answers"]), row.get("correct_choice_idx")
    choices = _texts(row.get("choices"))
    known = isinstance(choice, int) and 0 <= choice < len(choices)
    kind = "difficult" if _true(row.get("difficult_direct_answer")) else "direct"
    return _one(row, answers, choices[choice] if known else None, kind)


def _cauldron(row):
    return [
        {"question": turn["user"], "answer": turn["assistant"], "kind": turn.get("source")}
        for turn in _records(row["texts"])
    ]


def _plain(row):
    found = _one(row, _texts(row.get("answers")), row["answer"], row.get("kind"))
    return [{**one, "task": row.get("task")} for one in found]


def _one(row, answers, answer=None, kind=None, question=None):
    """A row that asks one question. Without an answer of its own, the most frequent one is it."""
    if answer is None and answers:
        answer = Counter(answers).most_common(1)[0][0]
    question = row["question"] if question is None else question
    return [{"question": question, "answer": answer, "answers": answers, "kind": kind}]


def _texts(value):
    """A list of texts. A text that spells a Python list, as A-OKVQA's direct answers do, is one."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.lstrip().startswith("[") else [value]
        except (SyntaxError, ValueError):
            value = [value]
    return [str(text) for text in value or () if text is not None]


def _records(value):
    """A list of dicts, which `datasets` also stores as a dict of lists."""
    if isinstance(value, dict):
        columns = zip(*value.values(), strict=True)
        return [dict(zip(value, record, strict=True)) for record in columns]
    return list(value or ())


def _true(value):
    return value is True or str(value).lower() == "true"


SCHEMAS = {
    schema.name: schema
    for schema in (
        Schema("vqav2", ("question", "multiple_choice_answer", "answers"), _vqav2),
        Schema("aokvqa", ("question", "choices", "direct_answers"), _aokvqa),
        Schema("chartqa", ("query", "label"), _chartqa),
        Schema("the_cauldron", ("texts",), _cauldron),
        Schema(
            "gqa",
            ("question", "answer"),
            _gqa,
            marks=("fullAnswer", "isBalanced", "imageId"),
            picture="image or imageId",
        ),
        Schema(
            "docvqa",
            ("question", "answers"),
            _docvqa,
            marks=("docId", "ucsf_document_id", "question_types"),
        ),
        Schema(
            "textvqa",
            ("question", "answers"),
            _textvqa,
            marks=("image_classes", "flickr_original_url", "ocr_tokens", "set_name"),
        ),
        Schema("plain", ("question", "answer"), _plain),
    )
}
"""By name, in the order in which they are tried."""


def find(columns, name=None):
    """The `Schema` called `name`, or the first that recognizes `columns`.

    Raises TaskError for a name that does not exist, for columns that the layout named lacks, and
    where no layout is recognized: with what was found, what each needs, and the nearest.
    """
    columns = list(columns)
    if name is None:
        for schema in SCHEMAS.values():
            if schema.recognizes(columns):
                return schema
        raise TaskError(_unknown(columns))
    if name not in SCHEMAS:
        near = difflib.get_close_matches(str(name).lower(), SCHEMAS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise TaskError(f"There is no schema {name!r}{hint} There are {', '.join(SCHEMAS)}.")
    missing = SCHEMAS[name].missing(columns)
    if missing:
        raise TaskError(
            f"The schema {name!r} needs a column {' and a column '.join(missing)}, and the rows "
            f"have {_listed(columns)}. dataset.rename_column gives a column its name."
        )
    return SCHEMAS[name]


def _unknown(columns):
    nearest = min(SCHEMAS.values(), key=lambda schema: len(schema.missing(columns)))
    lacking = nearest.missing(columns)
    fits = [schema.name for schema in SCHEMAS.values() if not schema.missing(columns)]
    if fits:
        advice = f"They would do for {' or '.join(fits)}: say which, with schema={fits[0]!r}."
    else:
        advice = (
            f"Nearest is {nearest.name}, which lacks {' and '.join(lacking)}: rename the columns "
            "(dataset.rename_column), or make rows with images, question and answer."
        )
    needs = "; ".join(
        f"{schema.name}: {', '.join((schema.picture, *schema.needs))}"
        for schema in SCHEMAS.values()
    )
    return (
        f"The rows have {_listed(columns)}, which is no layout that vlmkit recognizes. {advice} "
        f"What each needs: {needs}."
    )


def _listed(columns):
    return f"the columns {', '.join(columns)}" if columns else "no columns"
