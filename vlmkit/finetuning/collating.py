"""From rows to batches: pictures, questions and answers as tensors, with the loss on the answers.

A row's prompt and answer go through the processor's own chat template, as in `vk.ask`, so that a
model is trained on what it will be asked. The loss sees the answer and the mark that ends it, and
nothing else. Nothing is ever cut: a picture's tokens without their picture, or half an answer,
teach nonsense without an error.
"""

import multiprocessing
from collections import Counter

from vlmkit.errors import FinetuningError, ImageError, QuestionError
from vlmkit.evaluation import COLUMNS, check_question
from vlmkit.evaluation.prompts import answered_inputs
from vlmkit.images import read_all

IGNORED = -100
"""The label of a token that the loss does not see, as in torch.nn.functional.cross_entropy."""

RAISE, SKIP = "raise", "skip"
TOO_LONG, UNREADABLE = "too long", "unreadable"  # why a sample is skipped


class Collator:
    """Makes a batch of rows; to be given to a DataLoader or a Trainer.

    processor: of the model that is trained. max_length: most tokens of a sample, visual tokens
        counted; None for no limit.
    too_long, unreadable: what to do about a sample that has more tokens, and one with a picture
        that cannot be read or an answer that is empty: "raise" an error that names it, or "skip"
        it, which `skipped` counts by reason.

    A batch is a dict of tensors: input_ids, attention_mask and labels, each (samples, tokens),
    padded on the right, with what else the processor makes. A batch of which everything is skipped
    asks the last good sample once more, as a Trainer has no use for an empty one.
    """

    def __init__(self, processor, max_length=None, *, too_long=RAISE, unreadable=RAISE):
        for name, way in (("too_long", too_long), ("unreadable", unreadable)):
            if way not in (RAISE, SKIP):
                raise FinetuningError(f'{name} is "raise" or "skip", not {way!r}')
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise FinetuningError(f"max_length is a number of tokens from 1, not {max_length!r}")
        self.processor, self.max_length = processor, max_length
        self.too_long, self.unreadable = too_long, unreadable
        # Memory that the processes share which a DataLoader reads with.
        self._skipped = {why: multiprocessing.Value("q", 0) for why in (TOO_LONG, UNREADABLE)}
        self._last = None  # a sample that could be used

    def __call__(self, rows):
        """The batch of `rows`, dicts with images, question and answer (see `vk.tasks.dataset`).

        Raises FinetuningError for a row that lacks one of them or whose answer is empty, and for a
        sample that is too long; ImageError for a picture that cannot be read. Skipped, they raise
        only where no sample before could be used.
        """
        samples = [sample for sample in map(self._read, rows) if sample]
        made = self._made(samples)
        long = self._too_long(samples, made)
        if long:
            samples = [s for number, s in enumerate(samples) if number not in long]
            made = self._made(samples)
        if not samples:
            if self._last is None:
                raise FinetuningError(
                    f"No sample so far could be used; skipped were {dict(self.skipped)}. Without "
                    '"skip" the first of them is an error that says what is wrong with it.'
                )
            samples = [self._last]
            made = self._made(samples)
        self._last = samples[-1]
        inputs, ends = made
        return dict(inputs) | {"labels": _labels(inputs, ends)}

    @property
    def skipped(self):
        """How many samples were skipped, by reason, as a Counter. What a DataLoader's workers read
        ahead counts too."""
        return Counter({why: n.value for why, n in self._skipped.items() if n.value})

    def _made(self, samples):
        return answered_inputs(self.processor, *zip(*samples, strict=True)) if samples else None

    def _read(self, row):
        """(images, question, answer) of a row; None if it is skipped."""
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise FinetuningError(
                f"A row lacks {' and '.join(missing)}; it has {', '.join(row) or 'nothing'}. Rows "
                "have images (a list), question and answer: vk.tasks.dataset makes such."
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
                f"answer takes {lengths[number]:,} tokens, and max_length is {self.max_length:,}. "
                'Raise it, make the pictures smaller, or skip such samples: too_long="skip". None '
                "is ever cut."
            )
            self._refuse(self.too_long, TOO_LONG, error)
        return long

    def _refuse(self, way, reason, error):
        if way == RAISE:
            raise error
        with self._skipped[reason].get_lock():
            self._skipped[reason].value += 1


def _labels(inputs, ends):
    """Token ids where the loss looks, IGNORED elsewhere: (samples, tokens)."""
    labels = inputs["input_ids"].new_full(inputs["input_ids"].shape, IGNORED)
    for row, mask, end in zip(labels, inputs["attention_mask"], ends, strict=True):
        last = int(mask.sum())  # padding is on the right
        row[last - len(end) : last] = row.new_tensor(end)
    return labels


def token_table(processor, row):
    """The tokens of one sample, in order, as a DataFrame: token (as text), id, and in_loss.

    A picture's tokens stand in one row, with how many there are in `repeated`.
    """
    from itertools import groupby

    import pandas

    batch = Collator(processor)([row])
    tokens = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)
    rows = []
    for (token, in_loss), same in groupby((i, label != IGNORED) for i, label in tokens):
        text = processor.tokenizer.decode([token])
        rows.append((text, token, len(list(same)), in_loss))
    return pandas.DataFrame(rows, columns=["token", "id", "repeated", "in_loss"])


def undecoded(dataset):
    """A datasets.Dataset with its pictures as bytes or paths, so that the Collator reads them: what
    `datasets` reads itself, and cannot, is an error that names nothing."""
    import datasets

    features = getattr(dataset, "features", None)
    feature = (features or {}).get("images")
    if not isinstance(getattr(feature, "feature", None), datasets.Image):
        return dataset
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # of a cast that only changes what the column is said to hold
    try:
        return dataset.cast_column("images", datasets.List(datasets.Image(decode=False)))
    finally:
        if bars:
            datasets.enable_progress_bars()
