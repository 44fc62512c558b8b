"""The unquantized model's answers, and how a changed model's are told from them in one pass.

Greedy decoding gives the unquantized model's answer again exactly where each of its tokens is the
most probable one after those before it, and one forward pass over prompt and answer tells that for
all of them. Where it is not, the first other token mostly settles that the new answer is wrong. The
few questions that are left are asked as `vk.evaluate` asks them, in the batches that it makes, so
that right and wrong come out as there.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vlmkit.evaluation import batches, naming_rows, normalize, scored
from vlmkit.evaluation.asking import generated, in_evaluation_mode, prepared, texts_of
from vlmkit.sensitivity.forcing import logits_by_steps, logits_of_answers, rows_of
from vlmkit.sensitivity.replaying import Replays

AGREEMENT = 0.99
"""Share of the unquantized model's own tokens that one forward pass has to give again for it to be
used at all: it does not in a model whose answers see what follows them, for one."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions asked together. tokens: the unquantized model's answers, (batch, tokens), and
    `own`, which of these belong to the answer, up to and with the token that ends it. logits: the
    unquantized model's for each of its own tokens, (number of own tokens, vocabulary)."""

    rows: list
    inputs: dict
    tokens: object
    own: object
    logits: object


@dataclass(frozen=True, eq=False)
class Outcome:
    """A changed model on the dataset: numpy arrays with an entry a question.

    correct: whether the answer is the expected one. kl: the Kullback-Leibler divergence in nats,
    sum of p log(p / q), of its next-token probabilities q from the unquantized model's p, averaged
    over the tokens of the unquantized model's answer. asked: how many were asked once more.
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
        self.ends = _ends(model)
        self.batches, texts, self.noise, agreed = [], [None] * len(dataset), 0.0, []
        for rows, images, questions in batches(dataset, batch_size):
            with naming_rows(rows):
                inputs = prepared(model, processor, images, questions, max_new_tokens)
            batch, found, noise, agrees = self._first(rows, inputs)
            self.batches.append(batch)
            for row, text in zip(rows, found, strict=True):
                texts[row] = text
            self.noise = max(self.noise, noise)
            agreed.append(agrees)
        self.replays = Replays(model)
        self.one_pass = bool(torch.cat(agreed).float().mean() >= AGREEMENT)
        self.scores = scored(dataset, texts)
        self.expected = [normalize(answer) for answer in self.scores.answers["answer"]]

    def _first(self, rows, inputs):
        """A Batch, its answers as text, the largest difference between the logits of decoding and
        of one pass, and whether the most probable token is the same, for each token."""
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
        forced = self._one_pass(inputs, tokens)[own]
        noise = float((forced.float() - logits).abs().amax())
        agrees = forced.argmax(-1) == tokens[own]
        # Those of one pass, so that no rounding is taken for a divergence, where they are right
        kept = forced if agrees.float().mean() >= AGREEMENT else logits.to(forced.dtype)
        texts = self._texts(tokens)
        return Batch(list(rows), inputs, tokens.clone(), own, kept.clone()), texts, noise, agrees

    def _one_pass(self, inputs, tokens):
        with in_evaluation_mode(self.model):
            return logits_of_answers(self.model, inputs, tokens)

    def _texts(self, tokens):
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def compare(self, changed=None, *, as_asked=False, by_steps=False):
        """The Outcome of the model as it is now, changed.

        changed: the parameters that are, if no others are: what they do not reach is computed once
        for all comparisons. They must be changed when this is called.
        as_asked: ask every question as `vk.evaluate` does, which is slower. Where activations are
        rounded, the last bit of a number can decide between two steps far apart.
        by_steps: take the divergence from generating, too, where a token's logits depend on what
        they are computed together with.
        """
        import numpy as np

        correct = np.zeros(len(self.dataset), dtype=bool)
        kl = np.zeros(len(self.dataset))
        by_steps = by_steps or not self.one_pass
        whole, asked = as_asked or by_steps, 0
        with in_evaluation_mode(self.model), self._replayed(changed):
            read = self._each(lambda number: self._read(number, whole, by_steps))
        for batch, (right, divergence) in zip(self.batches, read, strict=True):
            kl[batch.rows] = divergence
            still_open = [place for place, one in enumerate(right) if one is None]
            asked += len(still_open)
            for place, one in zip(still_open, self._ask(batch, still_open), strict=True):
                right[place] = one
            correct[batch.rows] = right
        return Outcome(correct, kl, asked)

    def _replayed(self, changed):
        if changed is None or not self.one_pass:
            return contextlib.nullcontext()
        return self.replays.without(changed)

    def _ask(self, batch, places):
        """Whether the answers to some questions of a batch are right, generated with the padding
        that they have in it: what an answer is padded with can decide between two tokens that are
        all but equally probable, what it is batched with does not."""
        if not places:
            return []
        inputs = rows_of(batch.inputs, places)
        whole = inputs is None
        inputs = batch.inputs if whole else inputs
        rows = batch.rows if whole else [batch.rows[place] for place in places]
        settled = self._settled(inputs, rows)
        tokens = generated(
            self.model, self.processor, inputs, self.max_new_tokens, stopping_criteria=settled
        )
        texts = texts_of(self.processor, inputs, tokens)
        if whole:
            rows, texts = places_of(batch.rows, places), places_of(texts, places)
        return [
            normalize(text) == self.expected[row] for row, text in zip(rows, texts, strict=True)
        ]

    def _settled(self, inputs, rows):
        """Stops each answer where nothing that follows could make it right."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        prompt = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        expected, texts = [self.expected[row] for row in rows], self._texts

        class Settled(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                wrong = [
                    not could_become(text, right)
                    for text, right in zip(texts(input_ids[:, prompt:]), expected, strict=True)
                ]
                return torch.tensor(wrong, device=input_ids.device)

        return StoppingCriteriaList([Settled()])

    def _each(self, work):
        """`work` of every batch. On a CPU a batch a core at a time: half a batch on each core
        would leave them waiting for each other after every layer."""
        import torch

        numbers = range(len(self.batches))
        workers = min(torch.get_num_threads(), len(numbers))
        if workers < 2 or self.model.device.type != "cpu":
            return [work(number) for number in numbers]
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as p:
                return list(p.map(work, numbers))
        finally:
            torch.set_num_threads(before)

    def _read(self, number, whole, by_steps):
        """(for each row whether its answer is right, or None where that is open; its divergence)"""
        import torch

        batch = self.batches[number]
        if by_steps:
            logits = logits_by_steps(self.model, self.processor, batch.inputs, batch.tokens)
        else:
            with self.replays.batch(number):
                logits = logits_of_answers(self.model, batch.inputs, batch.tokens)
        logits = logits[batch.own].float()
        q, p = logits.log_softmax(-1), batch.logits.float().log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)
        divergence = torch.zeros(batch.own.shape, device=each.device)
        divergence[batch.own] = each
        divergence = (divergence.sum(1) / batch.own.sum(1)).cpu().numpy()
        if whole:
            return [None] * len(batch.rows), divergence
        best = logits.topk(2, dim=-1).values
        likeliest = batch.tokens.clone()
        likeliest[batch.own] = logits.argmax(-1)
        # Logits so close that decoding may round them the other way round
        close = torch.zeros_like(batch.own)
        close[batch.own] = best[:, 0] - best[:, 1] < 4 * self.noise
        right = [
            self._is_right(row, *answer)
            for row, *answer in zip(
                batch.rows,
                batch.tokens.tolist(),
                likeliest.tolist(),
                close.tolist(),
                batch.own.sum(1).tolist(),
                strict=True,
            )
        ]
        return right, divergence

    def _is_right(self, row, tokens, likeliest, close, own):
        """Whether the answer to the question `row` is right, or None where this is open."""
        other = next((i for i in range(own) if tokens[i] != likeliest[i]), None)
        if any(close[: own if other is None else other + 1]):
            return None
        if other is None:
            return bool(self.scores.answers["correct"].iat[row])
        start = [*tokens[:other], likeliest[other]]
        text = self._texts([start])[0]
        if likeliest[other] in self.ends or len(start) == self.max_new_tokens:
            return normalize(text) == self.expected[row]
        return None if could_become(text, self.expected[row]) else False


def places_of(values, places):
    return [values[place] for place in places]


def could_become(start, expected):
    """Whether a text that begins with `start` can be `expected`, a normalized answer. Spaces are
    left out of the comparison, and what is not a whole character yet."""
    start = "".join(start.replace("\ufffd", "").split()).casefold().rstrip(".,;:!?")
    return "".join(expected.replace("\ufffd", "").split()).startswith(start)


def _ends(model):
    import torch

    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends])
