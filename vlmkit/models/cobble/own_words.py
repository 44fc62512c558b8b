"""What the language model says by itself, and a loss that keeps it talking while it learns.

Adapters that learn from questions about pictures forget how to write. So they also learn to give,
for each next token, the probabilities of the language model before it was quantized. The texts for
that are its own: none has to be collected (LLM-QAT, Liu et al., 2023, arXiv 2305.17888, section
3.1, "Data-free distillation").
"""

import json
import random

import torch
import torch.nn.functional as F

from vlmkit.folders import write_whole
from vlmkit.models.cobble import instructions, tensors
from vlmkit.models.cobble.arrays import write_json

TEXTS, LENGTH = 4_000, 64
"""How many texts, and how many tokens each has."""

SHARES = {"answers": 12, "texts": 12}
"""Rows of text for every 128 rows about pictures."""

NEW_DOCUMENT = 0
"""The token <|endoftext|>, which stands before every document in SmolLM2's pretraining."""


def own_answers(file, model, tokenizer):
    """{question: the language model's own answer}, without pictures, from `file` if it exists.

    Asked before the language model is quantized. An answer ends with its last whole sentence.
    """
    if not file.exists():
        questions = [*instructions.knowledge_prompts(), *instructions.TEXT_PROMPTS]
        found = tensors.answers(model, tokenizer, questions, max_new_tokens=48, batch_size=250)
        ends = [max(answer.rfind(mark) for mark in ".!?") + 1 for answer in found]
        kept = {
            question: answer[: end or None].strip()
            for question, answer, end in zip(questions, found, ends, strict=True)
        }
        write_whole(file, lambda path: write_json(path, kept))
    return json.loads(file.read_text(encoding="utf-8"))


@torch.no_grad()
def own_texts(file, model, seed=0):
    """(TEXTS, LENGTH) token ids of texts that the language model has made up, from `file` if it
    exists. Each token is drawn from the 50 most probable ones."""
    if not file.exists():
        torch.manual_seed(seed)
        parts, length = [], {"max_new_tokens": LENGTH - 1, "min_new_tokens": LENGTH - 1}
        for start in range(0, TEXTS, 1_000):
            size = min(1_000, TEXTS - start)
            begun = torch.full((size, 1), NEW_DOCUMENT, device=model.device)
            mask = torch.ones_like(begun)
            drawn = {"do_sample": True, "top_k": 50, "temperature": 1.0}
            parts.append(
                model.generate(input_ids=begun, attention_mask=mask, **drawn, **length).cpu()
            )
        write_whole(file, lambda path: torch.save(torch.cat(parts), path))
    return torch.load(file)


class OwnWords:
    """Batches of the language model's own words, and the loss on them.

    reference: the language model before it was quantized, on the device that trains, which this
        keeps. answers: of `own_answers`. texts: of `own_texts`.
    """

    def __init__(self, reference, tokenizer, answers, texts, batch_size):
        self.reference = reference.eval().requires_grad_(False)
        self.prompts, self.texts = tensors.Prompts(tokenizer), texts
        self.answers = [(q, answers[q], False) for q in instructions.TEXT_PROMPTS]
        self.sizes = {name: max(1, rows * batch_size // 128) for name, rows in SHARES.items()}

    def batch(self, rng: random.Random, device):
        """(token ids, whether a position has one), each (rows, tokens), padded on the right."""
        asked = [rng.choice(self.answers) for _ in range(self.sizes["answers"])]
        spoken = self.prompts.training_batch(asked, device)
        chosen = [rng.randrange(len(self.texts)) for _ in range(self.sizes["texts"])]
        texts = self.texts[torch.tensor(chosen)].to(device)
        missing = spoken["input_ids"].shape[1] - texts.shape[1]
        both = [(spoken["input_ids"], texts), (spoken["attention_mask"], torch.ones_like(texts))]
        wide = [
            torch.cat([F.pad(first, (0, max(0, -missing))), F.pad(second, (0, max(0, missing)))])
            for first, second in both
        ]
        return wide[0], wide[1].bool()

    def loss(self, model, rng, device):
        """The mean over all tokens of the Kullback-Leibler divergence, in nats, of the next token's
        probabilities from those of the reference."""
        ids, filled = self.batch(rng, device)

        def log_probabilities(language_model):
            states = language_model(input_ids=ids, attention_mask=filled, use_cache=False)
            return model.lm_head(states.last_hidden_state[filled]).float().log_softmax(-1)

        with torch.no_grad():
            wanted = log_probabilities(self.reference)
        found = log_probabilities(model.model.language_model)
        return F.kl_div(found, wanted, log_target=True, reduction="batchmean")
