"""The column layouts in which questions and conversations are kept: a schema for each.

A schema is recognized by its columns: all that it needs, and at least one of its marks, which other
schemas do not have. To add a schema, write a function that reads one row and decorate it with
`schema`. `layouts.py` reads what the columns hold, and `reading.py` the pictures.
"""

import ast
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from vlmkit.errors import ImageError, TaskError, VlmkitError, did_you_mean
from vlmkit.tasks.published.layouts import (
    conversation,
    picture_columns,
    pictures_in,
    question_and_answer,
    text_of,
)


@dataclass(frozen=True)
class Schema:
    """One layout of columns.

    name: also the `task` of the rows. needs: the columns that must be there, besides one with
    pictures. read: a function of a row (a dict) that returns the row's questions, each a dict with
    question and answer, or a conversation, and with answers, kind and task. marks: to recognize the
    schema without its name, one of these columns must be there. text_alone: whether a row may have
    no picture.
    """

    name: str
    needs: tuple
    read: Callable
    marks: tuple = ()
    joined: str | None = None
    text_alone: bool = False

    def missing(self, columns):
        """What the schema needs and `columns` do not have, as texts."""
        pictured = self.text_alone or picture_columns(columns) or self.joined in columns
        picture = [] if pictured else [self._pictures()]
        return picture + [name for name in self.needs if name not in columns]

    def recognizes(self, columns):
        marked = not self.marks or any(name in columns for name in self.marks)
        return marked and not self.missing(columns)

    def questions(self, row, images=None, prompt=None):
        """The questions of a row, each a dict: conversation, answers, kind and task. In place of a
        question that cannot be used is the TaskError that says why.

        images: its pictures, if they are in another data set. prompt: a text with {question} where
        a question goes; of a caption, the question itself.

        Raises TaskError or ImageError for a row that cannot be used.
        """
        try:
            found = self.read(row)
        except VlmkitError:
            raise
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            what = f"it does not match the schema {self.name}: {type(error).__name__}"
            raise TaskError(f"{what}: {error}.") from error
        if not found:
            raise TaskError("it asks no question.")
        images = pictures_in(row) if images is None else images
        return [self._checked(images, prompt, **one) for one in found]

    def pictures(self, row):
        """The pictures of a row, as stored, in the order of its conversation."""
        talk = self.read(row)[0].get("talk")
        return pictures_in(row) if talk is None else talk.images

    def _checked(self, images, prompt, question=None, answer=None, answers=(), talk=None, **rest):
        try:
            if talk is None:
                if not images and not self.text_alone:
                    raise ImageError("there is no picture.")
                question = self._asked(question, prompt)
                talk = question_and_answer(question, _filled(answer, "answer"), images)
            elif talk.answer is None:
                raise TaskError("its last message is not an answer, so there is none to learn.")
            elif prompt:
                raise TaskError("prompt= is for single questions, and this is a conversation.")
        except TaskError as error:
            return error
        task = text_of(rest.get("task")) or self.name
        kind = text_of(rest.get("kind")) or "all"
        return {"conversation": talk, "answers": list(answers), "kind": kind, "task": task}

    def _asked(self, question, prompt):
        if self.name == "caption":
            if not prompt:
                raise TaskError(
                    "a caption has no question: give it one, such as "
                    "prompt='What is in the picture?'."
                )
            return prompt
        question = _filled(question, "question")
        if prompt and "{question}" not in prompt:
            raise TaskError(f"a prompt needs {{question}} where the question goes: {prompt!r}.")
        return prompt.replace("{question}", question) if prompt else question

    def _pictures(self):
        return " or ".join(("image", self.joined or "images"))

    def __str__(self):
        pictures = () if self.text_alone and self.name != "plain" else (self._pictures(),)
        return f"{self.name}: {', '.join((*pictures, *self.needs))}"


SCHEMAS = {}
"""By name, in the order in which they are tried. The columns are those on the hub up to November
2026. The original files of these data sets, which keep questions, answers and pictures apart, have
other columns."""


LAYOUTS = {}
"""By name, too: conversations and captions. A row of SCHEMAS may have a conversation beside it, so
these are tried first."""


def schema(name, *needs, among=SCHEMAS, **options):
    """A decorator that makes a `Schema` of a function that reads a row."""

    def added(read):
        among[name] = Schema(name, needs, read, **options)
        return read

    return added


def _filled(value, what):
    text = text_of(value)
    if text is None or not text.strip():
        hint = " Test splits are often published without answers." * (what == "answer")
        raise TaskError(f"the {what} is empty.{hint}")
    return text


@schema("messages", "messages", among=LAYOUTS, text_alone=True)
def _messages(row):  # TRL's, and what vlmkit makes of conversations
    return _talk(row, row["messages"])


@schema("conversations", "conversations", among=LAYOUTS, text_alone=True)
def _conversations(row):  # ShareGPT's and LLaVA's
    system = row.get("system")  # ShareGPT may have it beside the turns
    first = [{"role": "system", "content": system}] if system else []
    return _talk(row, [*first, *row["conversations"]])


@schema("prompt_completion", "prompt", "completion", among=LAYOUTS, text_alone=True)
def _prompt_completion(row):  # TRL's, of texts or of messages
    turns = []
    for part, role in ((row["prompt"], "user"), (row["completion"], "assistant")):
        if isinstance(part, (list, tuple)):
            turns += part
        else:
            turns.append({"role": role, "content": part})
    return _talk(row, turns)


def _talk(row, messages):
    talk = conversation(messages, pictures_in(row))
    rest = {name: row.get(name) for name in ("task", "kind")}
    return [{"talk": talk, "answers": _texts(row.get("answers")), **rest}]


@schema("vqav2", "question", "multiple_choice_answer", "answers")
def _vqav2(row):  # lmms-lab/VQAv2
    answers = [record["answer"] for record in _records(row["answers"])]
    return _one(row, answers, row["multiple_choice_answer"], kind=row.get("answer_type"))


@schema("aokvqa", "question", "choices", "direct_answers")
def _aokvqa(row):  # HuggingFaceM4/A-OKVQA, asked without its choices
    answers, choice = _texts(row["direct_answers"]), row.get("correct_choice_idx")
    choices = _texts(row.get("choices"))
    choice = int(choice) if str(choice).isdecimal() else -1  # a file of JSON gives its text
    known = 0 <= choice < len(choices)
    difficult = str(row.get("difficult_direct_answer")).lower() == "true"
    kind = "difficult" if difficult else "direct"
    return _one(row, answers, choices[choice] if known else None, kind)


@schema("chartqa", "query", "label")
def _chartqa(row):  # HuggingFaceM4/ChartQA
    answers = _texts(row["label"])
    origin = row.get("human_or_machine")
    kind = {"0": "human", "1": "machine"}.get(str(origin), origin)
    return _one(row, answers, next(iter(answers), ""), kind, question=row["query"])


@schema("the_cauldron", "texts")
def _cauldron(row):  # HuggingFaceM4/the_cauldron: each turn becomes a row
    return [
        {"question": turn["user"], "answer": turn["assistant"], "kind": turn.get("source")}
        for turn in _records(row["texts"])
    ]


_GQA = ("fullAnswer", "isBalanced", "imageId")


@schema("gqa", "question", "answer", marks=_GQA, joined="imageId")
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


@schema("plain", "question", "answer", text_alone=True)
def _plain(row):  # your own
    found = _one(row, _texts(row.get("answers")), row["answer"], row.get("kind"))
    return [{**one, "task": row.get("task")} for one in found]


@schema("caption", "text", among=LAYOUTS)
def _caption(row):  # imagefolder's metadata: `prompt` is the question
    return [{"question": "", "answer": row["text"]}]


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
    return [text_of(text) for text in value if text is not None] if value is not None else []


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
    columns, schemas = list(columns), LAYOUTS | SCHEMAS
    found = f"the columns {', '.join(map(str, columns))}" if columns else "no columns"
    if name is None:
        for one in schemas.values():
            if one.recognizes(columns):
                return one
        raise TaskError(
            f"No schema matches the rows, which have {found}. {_advice(columns)} What each schema "
            f"needs: {'; '.join(map(str, schemas.values()))}."
        )
    if name not in schemas:
        raise TaskError(
            f"{name!r} is not a schema. {did_you_mean(name, schemas)}The schemas are "
            f"{', '.join(schemas)}."
        )
    missing = schemas[name].missing(columns)
    if missing:
        raise TaskError(
            f"The schema {name!r} needs a column {' and a column '.join(missing)}, and the rows "
            f"have {found}. dataset.rename_column renames a column."
        )
    return schemas[name]


def schema_of(row):
    """The `Schema` of a row, by the columns that it fills, or else by all that it has.

    Raises TaskError if no schema recognizes them, and if the row is no dict.
    """
    if not isinstance(row, dict):
        raise TaskError(f"a row is a dict, and this is a {type(row).__name__}: {row!r:.80}.")
    try:
        return find([name for name, value in row.items() if value is not None])
    except TaskError:
        return find(row)


def _advice(columns):
    fits = [one.name for one in SCHEMAS.values() if not one.missing(columns)]
    if fits:
        return f"They fit {' and '.join(fits)}: name the right one, such as schema={fits[0]!r}."
    nearest = min(SCHEMAS.values(), key=lambda one: len(one.missing(columns)) / len(one.needs))
    return (
        f"The nearest is {nearest.name}, which also needs {' and '.join(nearest.missing(columns))}:"
        " rename the columns (dataset.rename_column), or make rows with images, question and "
        "answer."
    )
