"""The column layouts in which visual question answering is published: a schema for each.

A schema is recognized by its columns: all that it needs, and at least one of its marks, which other
schemas do not have. This file is about texts only; `reading.py` reads the pictures. To add a
schema, write a function that reads one row and decorate it with `schema`.
"""

import ast
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from vlmkit.errors import TaskError, did_you_mean

PICTURES = ("image", "images")
"""The column that holds a row's pictures: one, or a list of them."""


@dataclass(frozen=True)
class Schema:
    """One layout of columns.

    name: also the `task` of the rows. needs: the columns that must be there, besides one of
    `pictures`. read: a function of a row (a dict) that returns the row's questions, each a dict
    with question, answer, answers and kind. marks: to recognize the schema without its name, one
    of these columns must be there.
    """

    name: str
    needs: tuple
    read: Callable
    marks: tuple = ()
    pictures: tuple = PICTURES

    def missing(self, columns):
        """What the schema needs and `columns` do not have, as texts."""
        picture = [] if set(self.pictures) & set(columns) else [" or ".join(self.pictures)]
        return picture + [name for name in self.needs if name not in columns]

    def recognizes(self, columns):
        marked = not self.marks or any(name in columns for name in self.marks)
        return marked and not self.missing(columns)

    def __str__(self):
        return f"{self.name}: {', '.join((' or '.join(self.pictures), *self.needs))}"


SCHEMAS = {}
"""By name, in the order in which they are tried. The columns are those on the hub up to November
2026. The original files of these data sets, which keep questions, answers and pictures apart, have
other columns."""


def schema(name, *needs, marks=(), pictures=PICTURES):
    """A decorator that makes a `Schema` of a function that reads a row."""

    def added(read):
        SCHEMAS[name] = Schema(name, needs, read, marks, pictures)
        return read

    return added


@schema("vqav2", "question", "multiple_choice_answer", "answers")
def _vqav2(row):  # lmms-lab/VQAv2
    answers = [record["answer"] for record in _records(row["answers"])]
    return _one(row, answers, row["multiple_choice_answer"], kind=row.get("answer_type"))


@schema("aokvqa", "question", "choices", "direct_answers")
def _aokvqa(row):  # HuggingFaceM4/A-OKVQA, asked without its choices
    answers, choice = _texts(row["direct_answers"]), row.get("correct_choice_idx")
    choices = _texts(row.get("choices"))
    known = isinstance(choice, int) and 0 <= choice < len(choices)
    difficult = str(row.get("difficult_direct_answer")).lower() == "true"
    kind = "difficult" if difficult else "direct"
    return _one(row, answers, choices[choice] if known else None, kind)


@schema("chartqa", "query", "label")
def _chartqa(row):  # HuggingFaceM4/ChartQA
    answers = _texts(row["label"])
    origin = row.get("human_or_machine")
    kind = {0: "human", 1: "machine"}.get(origin, origin)
    return _one(row, answers, next(iter(answers), ""), kind, question=row["query"])


@schema("the_cauldron", "texts")
def _cauldron(row):  # HuggingFaceM4/the_cauldron: each turn becomes a row
    return [
        {"question": turn["user"], "answer": turn["assistant"], "kind": turn.get("source")}
        for turn in _records(row["texts"])
    ]


_GQA = ("fullAnswer", "isBalanced", "imageId")


@schema("gqa", "question", "answer", marks=_GQA, pictures=("image", "imageId"))
def _gqa(row):  # lmms-lab/GQA; with imageId, the pictures are in another subset
    return _one(row, [], row["answer"], (row.get("types") or {}).get("structural"))


_DOCVQA = ("docId", "ucsf_document_id", "question_types")


@schema("docvqa", "question", "answers", marks=_DOCVQA)
def _docvqa(row):  # lmms-lab/DocVQA
    answers = _texts(row["answers"])
    # The page of the challenge suggests the first answer where only one can be used.
    return _one(row, answers, next(iter(answers), ""), " + ".join(row.get("question_types") or ()))


_TEXTVQA = ("image_classes", "flickr_original_url", "ocr_tokens", "set_name")


@schema("textvqa", "question", "answers", marks=_TEXTVQA)
def _textvqa(row):  # lmms-lab/textvqa, facebook/textvqa
    return _one(row, _texts(row["answers"]))


@schema("plain", "question", "answer")
def _plain(row):  # your own
    found = _one(row, _texts(row.get("answers")), row["answer"], row.get("kind"))
    return [{**one, "task": row.get("task")} for one in found]


def _one(row, answers, answer=None, kind=None, question=None):
    """A row that asks one question. If it has no answer of its own, the most frequent one is it."""
    if answer is None and answers:
        answer = Counter(answers).most_common(1)[0][0]
    question = row["question"] if question is None else question
    return [{"question": question, "answer": answer, "answers": answers, "kind": kind}]


def _texts(value):
    """A list of texts, also from one text, and from a text that spells a Python list (A-OKVQA)."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.lstrip().startswith("[") else [value]
        except (SyntaxError, ValueError):
            value = [value]
    return [str(text) for text in value or () if text is not None]


def _records(value):
    """A list of dicts, also from a dict of lists, which is how `datasets` may store it."""
    if isinstance(value, dict):
        columns = zip(*value.values(), strict=True)
        return [dict(zip(value, record, strict=True)) for record in columns]
    return list(value or ())


def find(columns, name=None):
    """The `Schema` called `name`, or the first one that recognizes `columns`.

    Raises TaskError for an unknown name, for columns that the named schema needs and that are not
    there, and if no schema recognizes the columns.
    """
    columns = list(columns)
    found = f"the columns {', '.join(columns)}" if columns else "no columns"
    if name is None:
        for one in SCHEMAS.values():
            if one.recognizes(columns):
                return one
        raise TaskError(
            f"No schema matches the rows, which have {found}. {_advice(columns)} What each schema "
            f"needs: {'; '.join(map(str, SCHEMAS.values()))}."
        )
    if name not in SCHEMAS:
        raise TaskError(
            f"{name!r} is not a schema. {did_you_mean(name, SCHEMAS)}The schemas are "
            f"{', '.join(SCHEMAS)}."
        )
    missing = SCHEMAS[name].missing(columns)
    if missing:
        raise TaskError(
            f"The schema {name!r} needs a column {' and a column '.join(missing)}, and the rows "
            f"have {found}. dataset.rename_column renames a column."
        )
    return SCHEMAS[name]


def _advice(columns):
    fits = [one.name for one in SCHEMAS.values() if not one.missing(columns)]
    if fits:
        return f"They fit {' and '.join(fits)}: name the right one, such as schema={fits[0]!r}."
    nearest = min(SCHEMAS.values(), key=lambda one: len(one.missing(columns)))
    return (
        f"The nearest is {nearest.name}, which also needs {' and '.join(nearest.missing(columns))}:"
        " rename the columns (dataset.rename_column), or make rows with images, question and "
        "answer."
    )
