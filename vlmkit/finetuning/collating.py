"""From rows to batches: pictures, questions and answers become tensors, with labels on the answers.

Prompt and answer go through the processor's own chat template, as in `vk.ask`, so that a model is
trained on the prompts that it will be asked. The loss counts the answer and its end token, nothing
else. Nothing is ever truncated: image tokens without their picture, or half an answer, would teach
nonsense without an error.
"""

import multiprocessing
from collections import Counter
from itertools import groupby

from vlmkit.backend.validation import require_among
from vlmkit.errors import FinetuningError, ImageError, QuestionError
from vlmkit.evaluation import COLUMNS, check_question
from vlmkit.evaluation.prompts import answered_inputs
from vlmkit.images import read_all

IGNORED = -100
"""The label of a token that the loss ignores, as in torch.nn.functional.cross_entropy."""

RAISE, SKIP = "raise", "skip"
TOO_LONG, UNREADABLE = "too long", "unreadable"  # the reasons for skipping a sample


class Collator:
    """Makes a batch of rows, for a DataLoader or a Trainer.

    processor: of the model that is trained.
    max_length: the most tokens of a sample, image tokens included; None for no limit.
    too_long, unreadable: what to do with a sample that has more tokens, or one with a picture that
        cannot be read or an empty answer: "raise" an error that names it, or "skip" and count it.

    A batch is a dict of tensors: input_ids, attention_mask and labels, each (samples, tokens) and
    padded on the right, and what else the processor returns. If every sample of a batch is skipped,
    the last good sample is used once more, since a Trainer cannot use an empty batch.
    """

    def __init__(self, processor, max_length=None, *, too_long=RAISE, unreadable=RAISE):
        require_among("too_long", too_long, (RAISE, SKIP))
        require_among("unreadable", unreadable, (RAISE, SKIP))
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise FinetuningError(f"max_length is a number of tokens from 1, not {max_length!r}")
        self.processor, self.max_length = processor, max_length
        self.too_long, self.unreadable = too_long, unreadable
        # A DataLoader's worker processes count in memory that they share.
        self._skipped = {why: multiprocessing.Value("q", 0) for why in (TOO_LONG, UNREADABLE)}
        self._last = None  # the last good sample

    def __call__(self, rows):
        """The batch of `rows`, dicts with images, question and answer (see `vk.tasks.dataset`).

        Raises FinetuningError for a row that lacks a column or has an empty answer and for a sample
        that is too long, ImageError for a picture that cannot be read. If these are skipped, it
        raises only where no sample before was good.
        """
        samples = [sample for sample in map(self._sample, rows) if sample]
        made = self._tokenized(samples)
        long = self._too_long(samples, made)
        if long or not samples:
            samples = [s for number, s in enumerate(samples) if number not in long]
            samples = samples or [self._last_good()]
            made = self._tokenized(samples)
        self._last = samples[-1]
        inputs, ends = made
        return dict(inputs) | {"labels": _labels(inputs, ends)}

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

    def _sample(self, row):
        """(images, question, answer) of a row; None if the row is skipped."""
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise FinetuningError(
                f"A row lacks {' and '.join(missing)}; it has {', '.join(row) or 'nothing'}. A row "
                "has images (a list), question and answer: vk.tasks.dataset makes such rows."
            )
        question, answer = row["question"], row["answer"]
        try:
            check_question(question)
            if not isinstance(answer, str) or not answer.strip():
                raise FinetuningError(f"The answer to {question!r} is empty: {answer!r}.")
            return read_all(list(row["images"])), question, answer.strip()
        except ImageError as error:
            self._refuse(self.unreadable, UNREADABLE, ImageError(f"{question!r}: {error}"))
        except (FinetuningError, QuestionError) as error:
            self._refuse(self.unreadable, UNREADABLE, error)

    def _too_long(self, samples, made):
        """Numbers of the samples with more than max_length tokens."""
        if made is None or self.max_length is None:
            return []
        lengths = made[0]["attention_mask"].sum(dim=1).tolist()
        long = [number for number, length in enumerate(lengths) if length > self.max_length]
        for number in long:
            images, question, _ = samples[number]
            error = FinetuningError(
                f"{question!r} with its {len(images)} image{'s' * (len(images) != 1)} and its "
                f"answer has {lengths[number]:,} tokens, and max_length is {self.max_length:,}. "
                'Raise max_length, make the pictures smaller, or skip such samples: too_long="skip"'
                ". Nothing is ever cut."
            )
            self._refuse(self.too_long, TOO_LONG, error)
        return long

    def _refuse(self, way, reason, error):
        if way == RAISE:
            raise error
        with self._skipped[reason].get_lock():
            self._skipped[reason].value += 1


def _labels(inputs, ends):
    """Labels of a batch, (samples, tokens): token ids of the answers, IGNORED elsewhere."""
    labels = inputs["input_ids"].new_full(inputs["input_ids"].shape, IGNORED)
    for row, mask, end in zip(labels, inputs["attention_mask"], ends, strict=True):
        last = int(mask.sum())  # padding is on the right
        row[last - len(end) : last] = row.new_tensor(end)
    return labels


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
