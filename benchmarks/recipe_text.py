"""What quantization does to the language model's own text, which no projector can heal.

    python benchmarks/recipe_text.py                          # the recorded results, seven minutes
    python benchmarks/recipe_text.py --n 20 --output trial.csv

Asks cobble without a picture, in six formats of its language model and with the adapters of
cobble-chat, which were trained in NF4:

- the next token of a fixed English text: the paragraphs of prose in scikit-learn's descriptions of
  data sets. Perplexity, and against bf16 the mean Kullback-Leibler divergence in nats and the share
  of tokens after which the same next token is the most probable one;
- the 200 questions of text_questions.csv, greedy. An answer is right if its first sentence has an
  accepted word; for a sum, if the last number of that sentence is the right one.

The result is notebooks/data/06_text.csv, with a row for each format.
"""

import argparse
import csv
import hashlib
import math
import re
import sys
import time
import warnings
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "text_questions.csv"
OUTPUT = HERE.parent / "notebooks" / "data" / "06_text.csv"
TEXT = "f27411e7bf7b"  # how the sha256 of the recorded text begins
FORMATS = ("bf16", "int8", "nf4", "nf4-dq", "int4", "int3")
CHAT = "cobble-chat"
COLUMNS = ("format", "perplexity", "kl", "same_next_token", "questions", "right")
NUMBER, WORD = r"\d+", r"\w+"


def english():
    """Paragraphs of prose: 25 words or more, nearly all characters letters or spaces."""
    folder = resources.files("sklearn.datasets.descr")
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".rst"):
            for text in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
                text = " ".join(text.split())
                letters = sum(letter.isalpha() or letter == " " for letter in text)
                if len(text.split()) >= 25 and letters > 0.92 * len(text):
                    found.append(text)
    return "\n\n".join(found)


def is_right(kind, right, answer):
    first = re.split(r"(?<=[a-z0-9])[.!?](?:\s|$)|\n", answer.strip())[0].lower()
    if kind == "sum":
        return re.findall(NUMBER, first)[-1:] == [right]
    sentence = f" {' '.join(re.findall(WORD, first))} "
    return any(f" {one.lower()} " in sentence for one in right.split("|"))


def next_tokens(model, ids):
    """(tokens, vocabulary) float32: log-probabilities of the next token."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)


def row(name, model, tokenizer, questions, ids, reference):
    """One row of the result, and the log-probabilities it comes from."""
    from vlmkit.models.cobble import tensors

    began = time.perf_counter()
    found = next_tokens(model, ids)
    loss = -found.gather(1, ids[0, 1:, None]).mean().item()
    reference = found if reference is None else reference
    kl = (reference.exp() * (reference - found)).sum(-1).mean().item()
    same = (reference.argmax(-1) == found.argmax(-1)).float().mean().item()
    asked = [question["question"] for question in questions]
    answers = tensors.answers(model, tokenizer, asked, None, max_new_tokens=24, batch_size=50)
    right = dict.fromkeys((question["kind"] for question in questions), 0)
    for question, answer in zip(questions, answers, strict=True):
        right[question["kind"]] += is_right(question["kind"], question["right"], answer)
    numbers = f"{math.exp(loss):.2f}", f"{kl:.4f}", f"{same:.4f}", len(asked), sum(right.values())
    print(name, *numbers, right, f"{time.perf_counter() - began:.0f} s", flush=True)
    return dict(zip(COLUMNS, (name, *numbers), strict=True)) | right, found, answers


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, help="ask this many questions, spread over the kinds")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--answers", type=Path, help="write every answer to this file")
    given = parser.parse_args(argv)

    import torch

    import vlmkit as vk
    from vlmkit.models.cobble import train

    with QUESTIONS.open(newline="", encoding="utf-8") as stream:
        questions = list(csv.DictReader(stream))
    if given.n:
        questions = questions[:: max(1, len(questions) // given.n)]
    text = english()
    digest = hashlib.sha256(text.encode()).hexdigest()
    if not digest.startswith(TEXT):
        print(f"This scikit-learn has another text ({digest[:12]}): not the recorded numbers.")
    model, processor = vk.load("cobble-bf16", "bf16")
    tokenizer = processor.tokenizer
    ids = torch.tensor([tokenizer.encode(text)])
    print(f"{ids.shape[1]:,} tokens of text, sha256 {digest[:12]}", flush=True)
    rows, said, reference = [], [], None
    language_model = model.model.language_model
    kept = {key: tensor.clone() for key, tensor in language_model.state_dict().items()}
    for name in FORMATS:
        language_model.load_state_dict(kept)
        train.round_linear_layers(language_model, name)
        found = row(name, model, tokenizer, questions, ids, reference)
        reference = found[1] if name == "bf16" else reference
        rows.append(found[0])
        said.append(found[2])
    model, _ = vk.load(CHAT)
    found = row(CHAT, model, tokenizer, questions, ids, reference)
    rows.append(found[0])
    said.append(found[2])
    _write(given.output, list(rows[0]), [list(row.values()) for row in rows])
    if given.answers:
        head = ["question", "right", *FORMATS, CHAT]
        answers = zip(*said, strict=True)
        _write(given.answers, head, [
            [q["question"], q["right"], *a] for q, a in zip(questions, answers, strict=True)
        ])  # fmt: skip
    return 0


def _write(file, head, rows):
    import pandas as pd

    from vlmkit.folders import write_whole

    table = pd.DataFrame(rows, columns=head)
    write_whole(file, lambda path: table.to_csv(path, index=False, lineterminator="\n"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
