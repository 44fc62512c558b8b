"""One form for all rows: the layouts in which people keep conversations and pictures.

    one = conversation(row["messages"], pictures_in(row))
    one.turns     # [{"role": "user", "content": [{"type": "image"}, {"type": "text", ...}]}, ...]
    one.images    # as stored, in the order of the image parts

This file reads TRL's `messages` (texts, typed parts, pictures inside), ShareGPT's and LLaVA's
`conversations` with `<image>`, and what a picture and a text are in a file. `schemas.py` says which
columns a row needs.
"""

import datetime
import json
import re
from dataclasses import dataclass

from vlmkit.errors import ImageError, TaskError

PICTURES = ("images", "image", "file_names", "file_name")
"""Columns that hold a row's pictures, one or a list of them. `file_name` is imagefolder's. It may
also have a prefix, as in left_file_name."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
WEIGHTS = ("weight", "loss", "loss_weight", "train", "training")
"""Keys by which other tools take an answer out of the loss, with one of the values `NOTHING`."""

NOTHING = ("0", "0.0", "false")

_PLACEHOLDER = re.compile(r"\n?<image>\n?")  # the template breaks the line itself, if at all


@dataclass(frozen=True)
class Conversation:
    """Turns, in the form that `vlmkit.evaluation.prompts` explains, and the pictures of their image
    parts, as stored."""

    turns: list
    images: list

    @property
    def question(self):
        """The text of the last turn of the user, without its pictures."""
        return next((_text(turn) for turn in reversed(self.turns) if turn["role"] == "user"), None)

    @property
    def answer(self):
        """The text of the last turn, if it is an answer."""
        last = self.turns[-1] if self.turns else {"role": None}
        return _text(last) if last["role"] == "assistant" else None

    @property
    def is_plain(self):
        """Whether this is one question, after its pictures, and one answer."""
        kinds = [part["type"] for turn in self.turns[:1] for part in turn["content"]]
        return (
            [turn["role"] for turn in self.turns] == ["user", "assistant"]
            and kinds.count("text") == 1
            and kinds[-1] == "text"
        )


def _text(turn):
    return " ".join(
        part["text"].strip() for part in turn["content"] if part["type"] == "text"
    ).strip()


def text_of(value):
    """A value of a file as text, as JSON writes it; a text, and None, are left as they are. A day
    is written as 2019-05-01."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()  # of numpy
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise TaskError(
                f"a text has half a character ({error.reason}): {value!r:.80}."
            ) from error
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()  # a reader that guesses types has made a time of a day
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (list, tuple, dict, set, bytes)):
        raise TaskError(f"a text is expected, and this is a {type(value).__name__}: {value!r:.80}.")
    return str(value)


def picture_columns(columns):
    """Those of the columns that hold pictures."""
    named = [name for name in PICTURES if name in columns]
    prefixed = [c for c in columns if str(c).endswith(("_file_name", "_file_names"))]
    return named + prefixed


def pictures_in(row):
    """The pictures of a row, as stored: a list, empty if its columns are empty or not there.

    The first of `PICTURES` that is filled counts; columns with a prefix count together.
    """
    columns = picture_columns(row)
    for name in columns:
        cell = row[name]
        if cell is None:
            continue
        if name in PICTURES:
            return list(cell) if isinstance(cell, (list, tuple)) else [cell]
        cells = [row[c] for c in columns if c not in PICTURES and row[c] is not None]
        return [one for c in cells for one in (c if isinstance(c, (list, tuple)) else [c])]
    return []


def conversation(messages, images):
    """The Conversation of the messages of a row, and of its pictures.

    messages: a list of dicts with role and content (or from and value), or its JSON. A content is a
    text, in which `<image>` stands for a picture, or a list of parts. images: pictures beside the
    messages. Without placeholders they come before the first question, as in TRL.

    Raises TaskError for a message that cannot be used, and ImageError if the numbers of pictures
    and placeholders differ.
    """
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise TaskError(f"its messages are a text that is not JSON: {error}.") from error
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TaskError("it has no messages.")
    turns = [_turn(message, number) for number, message in enumerate(messages, start=1)]
    _place(turns, list(images))
    found = [part.pop("image") for turn in turns for part in turn["content"] if "image" in part]
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant" and any(p["type"] == "image" for p in turn["content"]):
            raise TaskError(f"message {number} is an answer with a picture, and answers are text.")
        if not any(p["type"] == "image" or p["text"].strip() for p in turn["content"]):
            raise TaskError(f"message {number} ({turn['role']}) is empty.")
    roles = [turn["role"] for turn in turns]
    if "user" not in roles:
        raise TaskError("it asks no question: none of its messages is a user's.")
    return Conversation(turns, found)


def question_and_answer(question, answer, images):
    """The Conversation of a question, an answer and pictures, which come first or where `<image>`
    is in the question."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return conversation(messages, images)


def _turn(message, number):
    """A message as a turn. Its image parts have a key image: the picture, or None for one of those
    beside the messages, or an index into these."""
    if not isinstance(message, dict):
        raise TaskError(f"message {number} is no message: {message!r:.80}.")
    role = message.get("role", message.get("from"))
    if role not in ROLES:
        raise TaskError(
            f"message {number} has the role {role!r}, and the roles are {', '.join(ROLES)}."
        )
    role, content = ROLES[role], message.get("content", message.get("value"))
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise TaskError(f"message {number} has {key}, and vlmkit reads text and pictures only.")
    if role == "assistant" and any(str(message.get(k, 1)).lower() in NOTHING for k in WEIGHTS):
        raise TaskError(
            f"message {number} is an answer that is not to be learned, and vlmkit learns every "
            "answer of a row: leave the row out, or write the turns up to it as one question."
        )
    parts = content if isinstance(content, (list, tuple)) else [content]
    made = [one for part in parts for one in _parts(part, role, number)]
    thoughts = message.get("reasoning_content") or message.get("thinking")
    if role == "assistant":
        if all(part["type"] == "text" for part in made):
            made = [{"type": "text", "text": "".join(part["text"] for part in made)}]
        if thoughts:
            answer = f"<think>\n{text_of(thoughts).strip()}\n</think>\n\n{made[0]['text']}"
            made[0] = {"type": "text", "text": answer}
    return {"role": role, "content": made}


def _parts(part, role, number):
    """A part of a message as one part, or as several where a text has placeholders."""
    if not isinstance(part, dict):
        text = text_of(part)
        if text is None:
            raise TaskError(f"message {number} ({role}) is empty.")
        if role == "assistant" or "<image>" not in text:
            return [{"type": "text", "text": text}]
        pieces = _PLACEHOLDER.split(text)
        made = []
        for i, piece in enumerate(pieces):
            made += [{"type": "image", "image": None}] * (i > 0)
            made += [{"type": "text", "text": piece}] * bool(piece.strip())
        return [dict(one) for one in made]
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in ("image", "image_url", "text") if part.get(key)), None)
    if kind in ("text", "input_text", "output_text"):
        return [{"type": "text", "text": text_of(part.get("text")) or ""}]
    if kind in ("image", "image_url", "input_image"):
        keys = ("image", "image_url", "url", "path", "base64", "content")
        inside = next((part[key] for key in keys if part.get(key) is not None), None)
        if isinstance(inside, dict) and "url" in inside:
            inside = inside["url"]
        if part.get("base64") is not None and inside is part["base64"]:
            inside = f"data:image;base64,{inside}"
        index = str(part.get("index"))
        if inside is None and index.isdecimal():
            inside = int(index)
        return [{"type": "image", "image": inside}]
    raise TaskError(
        f"message {number} has a part of type {kind!r}, and vlmkit reads text and image."
    )


def _place(turns, images):
    """Put the pictures beside the messages into the image parts that wait for one."""
    open_parts = [
        part
        for turn in turns
        for part in turn["content"]
        if part["type"] == "image" and (part["image"] is None or type(part["image"]) is int)
    ]
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    inside = any(part["type"] == "image" for turn in turns for part in turn["content"])
    if images and first and not inside:
        first["content"][:0] = [{"type": "image", "image": image} for image in images]
        return
    if len(open_parts) != len(images):
        raise ImageError(
            f"it has {len(images)} picture{'s' * (len(images) != 1)} and "
            f"{len(open_parts)} place{'s' * (len(open_parts) != 1)} for them: each <image> and "
            "each image part stands for one picture."
        )
    for number, part in enumerate(open_parts):
        index = number if part["image"] is None else part["image"]
        if not 0 <= index < len(images):
            raise ImageError(f"it has no picture number {index}.")
        part["image"] = images[index]
