"""The unquantized model's answers, and one forward pass that compares a changed model with them.

Greedy decoding repeats the unquantized model's answer if each of its tokens is the most probable
one after those before it. One forward pass over prompt and answer shows that for all tokens. If
another token is more probable, the first such token usually shows that the new answer is wrong.
The few questions that stay open are asked as `vk.evaluate` asks them, in the same batches, so that
right and wrong are the same as there.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vlmkit.errors import SensitivityError
from vlmkit.evaluation import batches, naming_rows, normalize, scored
from vlmkit.evaluation.asking import generated, in_evaluation_mode, prepared, texts_of
from vlmkit.rows import EMBEDDING, TIED
from vlmkit.sensitivity.teacher_forcing import (
    VisualFeatures,
    end_tokens,
    logits_by_steps,
    logits_of_answers,
    rows_of,
)

AGREEMENT = 0.99
"""One forward pass has to give this share of the unquantized model's own tokens again. It does not
in a model whose tokens attend to later ones. Then answers and divergence come from generating."""
AFTER_VISION = ("language_model", "cross_attention")


@dataclass(frozen=True, eq=False)
class AskedBatch:
    """Questions that are asked together, and the unquantized model's answers to them.

    tokens: (batch, tokens). own: which of these belong to an answer, the token that ends it
    included. logits: the unquantized model's, (number of own tokens, vocabulary).
    """

    rows: list
    inputs: dict
    tokens: object
    own: object
    logits: object


@dataclass(frozen=True, eq=False)
class Outcome:
    """A changed model on the dataset: numpy arrays with an entry for each question.

    correct: whether the answer is the expected one. kl: the Kullback-Leibler divergence in nats,
    sum of p log(p / q), of its next-token probabilities q from the unquantized model's p, averaged
    over the tokens of the unquantized model's answer. asked: how many questions were asked again.
    Without answers, correct is None.
    """

    correct: object
    kl: object
    asked: int


class Baseline:
    """The unquantized model on a dataset. `scores`: its vlmkit.evaluation.Scores."""

    def __init__(self, model, processor, dataset, *, batch_size, max_new_tokens):
        import torch

        self.model, self.processor, self.dataset = model, processor, dataset
        self.max_new_tokens = max_new_tokens
        self.ends = end_tokens(model)
        self.features = VisualFeatures(model)
        self.batches, self.noise, agreed, texts = [], 0.0, [], [None] * len(dataset)
        for rows, images, questions in batches(dataset, batch_size):
            with naming_rows(rows):
                inputs = prepared(model, processor, images, questions, max_new_tokens)
            with self.features.used(keep=True):
                batch, noise, agrees = self._first(rows, inputs)
            self.batches.append(batch)
            self.noise = max(self.noise, noise)
            agreed.append(agrees)
            for row, text in zip(rows, self._texts(batch.tokens), strict=True):
                texts[row] = text
        self.one_pass = bool(torch.cat(agreed).float().mean() >= AGREEMENT)
        self.scores = scored(dataset, texts)
        self.expected = [normalize(answer) for answer in self.scores.answers["answer"]]

    def require_right_answers(self):
        """Raise SensitivityError if the unquantized model gets every question wrong."""
        answers = self.scores.answers
        if not answers["correct"].any():
            first = answers.iloc[0]
            raise SensitivityError(
                f"The unquantized model answers none of the {len(answers):,} questions right, so "
                "quantizing cannot break anything. The first answer is "
                f"{first['predicted']!r}, and {first['answer']!r} was expected: does the model fit "
                "the questions, and are the expected answers in its words?"
            )

    def _first(self, rows, inputs):
        """An AskedBatch, the largest difference between the logits of decoding and of one pass, and
        for each token whether it is the most probable one in one pass, too."""
        import torch

        result = generated(
            self.model,
            self.processor,
            inputs,
            self.max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(result.logits, dim=1)
        tokens = result.sequences[:, -logits.shape[1] :]
        ended = torch.isin(tokens, self.ends.to(tokens.device))
        own = ended.cumsum(1) - ended.long() == 0
        logits = logits[own]
        with in_evaluation_mode(self.model):
            forced = logits_of_answers(self.model, inputs, tokens)[own]
        noise = float((forced.float() - logits).abs().amax())
        agrees = forced.argmax(-1) == tokens[own]
        # Those of one pass if they are right, so that rounding does not look like a divergence
        kept = forced if agrees.float().mean() >= AGREEMENT else logits.to(forced.dtype)
        return AskedBatch(list(rows), inputs, tokens.clone(), own, kept.clone()), noise, agrees

    def _texts(self, tokens):
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def compare(self, changed=None, *, as_asked=False, by_steps=False, answers=True):
        """The Outcome of the model as it is now, changed.

        changed: the changed weights, a list of `vlmkit.sensitivity.scopes.Weight`, if nothing else
        is changed. If all of them are layers of the language model, the visual features are not
        computed again.
        as_asked: ask every question as `vk.evaluate` does, which is slower. If activations are
        rounded, the last bit of a number can decide between two steps that are far apart.
        by_steps: take the divergence from generating, too. Use it if a token's logits depend on the
        tokens that are computed together with it.
        """
        import numpy as np

        correct = np.zeros(len(self.dataset), dtype=bool)
        kl = np.zeros(len(self.dataset))
        by_steps = by_steps or not self.one_pass
        ask_all, asked = as_asked or by_steps, 0
        # Some models embed their image tokens as words
        same_features = changed is not None and all(
            weight.component in AFTER_VISION and weight.kind not in (EMBEDDING, TIED)
            for weight in changed
        )
        features = self.features.used() if same_features else contextlib.nullcontext()
        with in_evaluation_mode(self.model), features:
            read = self._for_each_batch(lambda batch: self._read(batch, ask_all, by_steps))
        for batch, (right, divergence) in zip(self.batches, read, strict=True):
            kl[batch.rows] = divergence
            if not answers:
                continue
            still_open = [place for place, one in enumerate(right) if one is None]
            asked += len(still_open)
            for place, one in zip(still_open, self._ask(batch, still_open), strict=True):
                right[place] = one
            correct[batch.rows] = right
        return Outcome(correct if answers else None, kl, asked)

    def _for_each_batch(self, work):
        """`work` of every batch. On a CPU each core takes a batch of its own: if the cores shared a
        batch, they would wait for each other after every layer."""
        import torch

        before = torch.get_num_threads()
        workers = min(before, len(self.batches))
        if workers < 2 or self.model.device.type != "cpu":
            return [work(batch) for batch in self.batches]
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as p:
                return list(p.map(work, self.batches))
        finally:
            torch.set_num_threads(before)

    def _read(self, batch, ask_all, by_steps):
        """(for each row whether its answer is right, or None if that is open; its divergence)"""
        import torch

        if by_steps:
            logits = logits_by_steps(self.model, self.processor, batch.inputs, batch.tokens)
        else:
            logits = logits_of_answers(self.model, batch.inputs, batch.tokens)
        logits = logits[batch.own].float()
        q, p = logits.log_softmax(-1), batch.logits.float().log_softmax(-1)
        divergence = torch.zeros(batch.own.shape, device=q.device)
        divergence[batch.own] = (p.exp() * (p - q)).sum(-1)
        divergence = (divergence.sum(1) / batch.own.sum(1)).cpu().numpy()
        if ask_all:
            return [None] * len(batch.rows), divergence
        best = logits.topk(2, dim=-1).values
        likeliest = batch.tokens.clone()
        likeliest[batch.own] = logits.argmax(-1)
        # If two logits are this close, decoding may put them in the other order
        close = torch.zeros_like(batch.own)
        close[batch.own] = best[:, 0] - best[:, 1] < 4 * self.noise
        columns = (batch.tokens, likeliest, close, batch.own.sum(1))
        answers = zip(batch.rows, *(column.tolist() for column in columns), strict=True)
        return [self._is_right(*answer) for answer in answers], divergence

    def _is_right(self, row, tokens, likeliest, close, own):
        """Whether the answer to the question `row` is right, or None if this is open."""
        other = next((i for i in range(own) if tokens[i] != likeliest[i]), None)
        if any(close[: own if other is None else other + 1]):
            return None
        if other is None:
            return bool(self.scores.answers["correct"].iat[row])
        text = self._texts([[*tokens[:other], likeliest[other]]])[0]
        if likeliest[other] in self.ends or other + 1 == self.max_new_tokens:
            return normalize(text) == self.expected[row]
        return None if could_become(text, self.expected[row]) else False

    def _ask(self, batch, places):
        """Whether the answers to some questions of a batch are right, generated with the same
        padding. The padding can decide between two tokens that are almost equally probable; the
        other questions of the batch cannot."""
        if not places:
            return []
        inputs = rows_of(batch.inputs, places)
        if inputs is None:
            inputs, given = batch.inputs, range(len(batch.rows))
        else:
            given = places
        stop = self._until_decided(inputs, [self.expected[batch.rows[place]] for place in given])
        tokens = generated(
            self.model, self.processor, inputs, self.max_new_tokens, stopping_criteria=stop
        )
        texts = dict(zip(given, texts_of(self.processor, inputs, tokens), strict=True))
        return [normalize(texts[place]) == self.expected[batch.rows[place]] for place in places]

    def _until_decided(self, inputs, expected):
        """Stops each answer as soon as nothing that follows can make it right."""
        import torch
        from transformers import StoppingCriteriaList

        prompt = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]

        def is_wrong(input_ids, scores, **_):
            texts = zip(self._texts(input_ids[:, prompt:]), expected, strict=True)
            wrong = [not could_become(text, right) for text, right in texts]
            return torch.tensor(wrong, device=input_ids.device)

        return StoppingCriteriaList([is_wrong])


def could_become(start, expected):
    """Whether a text that begins with `start` can become `expected`, a normalized answer.

    The comparison leaves out spaces and characters that are not complete yet."""
    start = "".join(start.replace("\ufffd", "").split()).casefold().rstrip(".,;:!?")
    return "".join(expected.replace("\ufffd", "").split()).startswith(start)
