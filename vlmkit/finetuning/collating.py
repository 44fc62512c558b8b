"""From rows to batches: pictures and conversations become tensors, with labels on the answers.

Rows may have any of the layouts that `vk.tasks.from_dataset` reads. They go through the processor's
own chat template, as in `vk.ask`, so that a model is trained on the prompts that it will be asked.
The loss counts every answer of a conversation with its end token, and nothing else. Nothing is ever
truncated: image tokens without their picture, or half an answer, would teach nonsense without an
error.
"""

import multiprocessing
from collections import Counter
from itertools import groupby

from vlmkit.backend.losses import IGNORED
from vlmkit.backend.validation import require_among
from vlmkit.errors import FinetuningError, ImageError, TaskError, VlmkitError, public
from vlmkit.evaluation import lacking_columns
from vlmkit.evaluation.prompts import answered_inputs, require_pictures, text_of_turn
from vlmkit.images import check_all, read_all, undecoded
from vlmkit.tasks.published.reading import Pictures
from vlmkit.tasks.published.schemas import find, schema_of

RAISE, SKIP = "raise", "skip"
TOO_LONG, UNREADABLE = "too long", "unreadable"  # the reasons for skipping a sample


class Collator:
    """Makes a batch of rows, for a DataLoader or a Trainer.

    processor: of the model that is trained.
    max_length: the most tokens of a sample, image tokens included; None for no limit but context,
        the model's own.
    too_long, unreadable: what to do with a sample that has more tokens, or one with a picture that
        cannot be read or an empty answer: "raise" an error that names it, or "skip" and count it.

    A batch is a dict of tensors: input_ids, attention_mask and labels, each (samples, tokens) and
    padded on the right, and what else the processor returns. If every sample of a batch is skipped,
    the last good sample is used once more, since a Trainer cannot use an empty batch.
    """

    def __init__(
        self, processor, max_length=None, *, context=None, too_long=RAISE, unreadable=RAISE
    ):
        require_among("too_long", too_long, (RAISE, SKIP))
        require_among("unreadable", unreadable, (RAISE, SKIP))
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise FinetuningError(f"max_length is a number of tokens from 1, not {max_length!r}")
        limits = {"max_length": max_length, "the model's context": context}
        limits = {name: value for name, value in limits.items() if value is not None}
        self.processor, self.max_length = processor, min(limits.values(), default=None)
        self.limit = min(limits, key=limits.get, default=None)
        self.too_long, self.unreadable = too_long, unreadable
        # A DataLoader's worker processes count in memory that they share.
        self._skipped = {why: multiprocessing.Value("q", 0) for why in (TOO_LONG, UNREADABLE)}
        self._last = None  # the last good sample
        self._longest = None  # characters of the longest token

    def __call__(self, rows):
        """The batch of `rows`, dicts in one of `vk.tasks.SCHEMAS`, such as images, question and
        answer, or messages and images. A row with several questions is several samples.

        Raises FinetuningError for a row that lacks a column or has an empty answer and for a sample
        that is too long, ImageError for a picture that cannot be read. If these are skipped, it
        raises only where no sample before was good.
        """
        samples = [sample for row in rows for sample in self._samples(row)]
        made = self._tokenized(samples)
        long = self._too_long(samples, made)
        if long or not samples:
            samples = [s for number, s in enumerate(samples) if number not in long]
            samples = samples or [self._last_good()]
            made = self._tokenized(samples)
        self._last = samples[-1]
        inputs, learnt = made
        labels = inputs["input_ids"].masked_fill(~learnt, IGNORED)
        return dict(inputs) | {"labels": labels}

    @property
    def skipped(self):
        """How many samples were skipped, by reason, as a Counter. It includes what a DataLoader's
        workers read ahead."""
        return Counter({why: n.value for why, n in self._skipped.items() if n.value})

    def _tokenized(self, samples):
        return answered_inputs(self.processor, *zip(*samples, strict=True)) if samples else None

    def _last_good(self):
        if self._last is None:
            raise FinetuningError(
                f"No sample so far could be used; skipped were {dict(self.skipped)}. Without "
                '"skip" the first of them raises an error that says what is wrong with it.'
            )
        return self._last

    def _samples(self, row):
        """(images, conversation) of each question of a row, but for those that are skipped."""
        found = []
        for images, turns, error in _questions(row):
            if error is None and self._is_endless(turns):
                continue
            if error is None:
                try:
                    require_pictures(self.processor, len(images))
                    found.append((read_all(images), turns))
                except ImageError as unreadable:
                    error = ImageError(f"{_asked(turns)!r}: {unreadable}")
            if error is not None:
                self._refuse(self.unreadable, UNREADABLE, error)
        return found

    def _is_endless(self, turns):
        """Whether the text alone is certainly too long. Such a text is not tokenized, which would
        take minutes and gigabytes; the sample is refused."""
        if self.max_length is None:
            return False
        if self._longest is None:
            self._longest = max(map(len, self.processor.tokenizer.get_vocab()))
        characters = sum(len(text_of_turn(turn)) for turn in turns)
        endless = characters > self._longest * self.max_length
        if endless:
            error = FinetuningError(
                f"{_asked(turns)[:80]!r} and its answers have {characters:,} characters, which are "
                f"more tokens than {self.limit}, {self.max_length:,}. Shorten the texts, or skip "
                'such samples: too_long="skip". Nothing is ever cut.'
            )
            self._refuse(self.too_long, TOO_LONG, error)
        return endless

    def _too_long(self, samples, made):
        """Numbers of the samples with more than max_length tokens."""
        if made is None or self.max_length is None:
            return []
        lengths = made[0]["attention_mask"].sum(dim=1).tolist()
        long = [number for number, length in enumerate(lengths) if length > self.max_length]
        for number in long:
            images, turns = samples[number]
            error = FinetuningError(
                f"{_asked(turns)!r} with its {len(images)} image{'s' * (len(images) != 1)} and its "
                f"answer has {lengths[number]:,} tokens, and {self.limit} is {self.max_length:,}. "
                "Raise max_length if the model's context allows it, make the pictures smaller, or "
                'skip such samples: too_long="skip". Nothing is ever cut.'
            )
            self._refuse(self.too_long, TOO_LONG, error)
        return long

    def _refuse(self, way, reason, error):
        if way == RAISE:
            raise error
        with self._skipped[reason].get_lock():
            self._skipped[reason].value += 1


def _questions(row):
    """(images, conversation, None) of each question of a row; or, for one that cannot be used, the
    error in place of None."""
    try:
        found = schema_of(row).questions(row)
    except ImageError as error:
        return [(None, None, error)]
    except TaskError as error:
        lacking = isinstance(row, dict) and lacking_columns(row)
        said = lacking if lacking and not _known(row) else error
        return [(None, None, FinetuningError(f"A row cannot be used: {said}"))]
    return [_question(one, row) for one in found]


def _known(row):
    """Whether a row has the columns of a layout, whatever they hold."""
    try:
        return bool(find(row))
    except TaskError:
        return False


def _question(one, row):
    if isinstance(one, TaskError):
        named = f"the answer to {row.get('question')!r} is empty"
        said = str(one).replace("the answer is empty", named)
        return None, None, FinetuningError(f"A row cannot be used: {said}")
    turns = []
    for turn in one["conversation"].turns:
        if turn["role"] == "assistant":
            parts = [part | {"text": part["text"].strip()} for part in turn["content"]]
            turn = turn | {"content": parts}
        turns.append(turn)
    return one["conversation"].images, turns, None


def _asked(turns):
    """The question of a conversation, for an error."""
    return next(
        (p["text"] for t in turns if t["role"] == "user" for p in t["content"] if "text" in p), ""
    )


def check_rows(rows, processor=None, *, unreadable=RAISE):
    """Look at every row before a training: its layout and texts, and whether its pictures are
    there, without decoding them, and as many as `processor` takes. Returns how many rows cannot be
    used.

    Raises FinetuningError or ImageError with the number of the first such row, unless `unreadable`
    is "skip". A dataset that reads pictures on demand was checked when `vk.tasks.from_dataset`
    made it, and a stream cannot be checked: both return 0.
    """
    layout = getattr(rows, "format", None)  # of a `datasets.Dataset`
    on_demand = isinstance(layout, dict) and layout.get("type") == "custom"
    if on_demand:
        transform = layout["format_kwargs"].get("transform")
        on_demand = not isinstance(transform, Pictures) or transform.decode
    if on_demand or not hasattr(rows, "__len__"):
        return 0
    bad = 0
    for number, row in enumerate(undecoded(rows)):
        try:
            for images, _, error in _questions(row):
                if error is not None:
                    raise error
                if processor is not None:
                    require_pictures(processor, len(images))
                check_all(images)
        except VlmkitError as error:
            bad += 1
            if unreadable == RAISE:
                raise type(error)(f"Row {number}: {error}") from error
    return bad


@public
def token_table(processor, row):
    """The tokens of one sample, in order, as a DataFrame: token (as text), id, repeated, in_loss.

    Equal tokens in a row, such as those of a picture, share one line; `repeated` is their number.
    """
    import pandas

    batch = Collator(processor)([row])
    tokens = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)
    rows = []
    for (token, in_loss), same in groupby((i, label != IGNORED) for i, label in tokens):
        rows.append((processor.tokenizer.decode([token]), token, len(list(same)), in_loss))
    return pandas.DataFrame(rows, columns=["token", "id", "repeated", "in_loss"])
