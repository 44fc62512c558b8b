"""Questions and answers about pictures, for training cobble and for testing it.

A question has a phrasing that training uses (`USED`) or one that it never sees (`UNSEEN`). An
answer is a sentence, or one word where the question asks for one word.
"""

import re

from vlmkit.tasks.questions import article
from vlmkit.tasks.real import DIGITS, THINGS

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
FLYING = ("airplane", "bird")
LEGS = {thing: "four legs" if thing in ANIMALS else "no legs" for thing in THINGS}
LEGS["bird"] = "two legs"

SENTENCE, WORD, CAPTION, YES_NO, YES_NO_WORD = (
    "sentence",
    "word",
    "caption",
    "yes_no",
    "yes_no_word",
)

USED = {
    SENTENCE: (
        "What is in the picture?",
        "What is this?",
        "What do you see?",
        "What does the photo show?",
        "Name the thing in this picture.",
        "What can you see in the photo?",
        "Tell me what is in this photo.",
        "What is shown here?",
        "Can you tell me what this is?",
        "What am I looking at?",
        "Identify the object in the image.",
        "What is the main subject of this picture?",
        "Which animal or vehicle is this?",
        "Please say what the image shows.",
        "What object does the picture show?",
        "Look at the image. What is it?",
        "Do you know what this is?",
        "What is visible in this image?",
        "Please identify what is in the photograph.",
        "What kind of thing is in this picture?",
        "What is this a photo of?",
        "State what you see in the picture.",
        "I cannot see the photo. What does it show?",
        "Who or what is in the picture?",
        "Help me: what is in this photograph?",
        "Which of the things you know is this?",
    ),
    WORD: (
        "What is in the picture? Answer in one word.",
        "What is this? Answer with a single word.",
        "Answer with one word: what do you see?",
        "Give one word for the thing in the photo.",
        "What does the photo show? Answer the question using a single word or phrase.",
        "Which animal or vehicle is this? One word, please.",
        "Name it in one word.",
        "Say in a single word what the image shows.",
        "What is this a picture of? One word only.",
        "Use one word to name what you see.",
        "Your answer should be one word: what is in the image?",
        "What is it? Just the name.",
        "Label this photo with one word.",
        "Which thing is it? Answer briefly, with one word.",
        "What do you see here? Keep it to one word.",
        "Name the main subject. Use a single word.",
    ),
    CAPTION: (
        "Describe the picture.",
        "Write a caption for this photo.",
        "Give the image a short title.",
        "Finish the sentence: This is a photo of",
        "Complete: Here we see",
        "Continue the sentence: The image shows",
        "Finish this sentence: In the photo there is",
        "Complete the caption: A photo of",
        "Fill in the rest: This picture shows",
        "Caption this.",
        "Suggest a caption for the picture.",
        "Describe this image in a few words.",
        "Write a short description of the photo.",
    ),
    YES_NO: (
        "Is there {a} in the picture?",
        "Does the photo show {a}?",
        "Is this {a}?",
        "Can you see {a} here?",
        "Do you see {a} in this image?",
        "Is it {a}?",
        "Does this look like {a}?",
        "Is {a} in this photo?",
        "Would you call this {a}?",
        "Does the picture contain {a}?",
        "Is the thing in the photo {a}?",
        "Am I looking at {a}?",
        "Could this be {a}?",
        "Is {a} visible here?",
        "Do we see {a} in the image?",
        "Is the subject of the photo {a}?",
        "I think this is {a}. Is that right?",
        "Tell me, is that {a}?",
    ),
    YES_NO_WORD: (
        "Is there {a} in the picture? Answer yes or no.",
        "Yes or no: does the photo show {a}?",
        "Is this {a}? Answer in one word.",
        "Does the image have {a} in it? Answer the question using a single word or phrase.",
        "Is {a} visible? Just say yes or no.",
        "Does this show {a}? Yes or no.",
        "Answer yes or no: is this {a}?",
        "Do you see {a}? One word, please.",
        "Is it {a}? Say yes or no.",
        "Yes or no, is there {a} here?",
    ),
}
UNSEEN = {
    SENTENCE: (
        "Tell me which object or animal this photo shows.",
        "What would you call the thing in this image?",
        "Do you recognize what is pictured here?",
    ),
    WORD: ("In one word, what is shown here?", "What is pictured? Reply with just one word."),
    CAPTION: ("Complete the sentence: The photo shows", "How would you caption this image?"),
    YES_NO: ("Is {a} shown in the photo?", "Would you say that this is {a}?"),
    YES_NO_WORD: ("Is {a} what you see here? Reply with yes or no.",),
}
DIGIT_QUESTIONS = {
    SENTENCE: (
        "Which digit is this?",
        "What number is written here?",
        "Read the handwritten digit.",
        "Which number do you see?",
    ),
    WORD: (
        "Which digit is this? Answer with the digit alone.",
        "What number is written here? Answer in one word.",
        "Read the digit. Answer the question using a single word or phrase.",
    ),
    YES_NO: ("Is this the digit {n}?", "Does it say {n}?"),
    YES_NO_WORD: ("Is this a {n}? Answer yes or no.",),
}
SHARES = {SENTENCE: 4, WORD: 3, CAPTION: 2, YES_NO: 5, YES_NO_WORD: 3}
"""How often a kind of question is asked in training. Yes/no questions are learned last."""

KNOWLEDGE = {
    "Tell me a fact about it.": "Tell me a fact about {things}.",
    "Where would you find it?": "Where would you find {a}?",
    "What is it known for?": "What is {a} known for?",
    "Write one sentence about the thing in the picture.": "Write one sentence about {a}.",
    "What does it need?": "What does {a} need?",
    "Why do people like it?": "Why do people like {things}?",
}
"""{question about a picture: the same question with the thing's name}. The language model answers
the second before it is quantized, and learns to answer the first in the same words."""

FACTS = {
    "Is this an animal or a vehicle?": lambda thing: (
        f"It is {'an animal' if thing in ANIMALS else 'a vehicle'}."
    ),
    "Can it fly?": lambda thing: (
        f"{'Yes' if thing in FLYING else 'No'}, {article(thing)} "
        f"{'can' if thing in FLYING else 'cannot'} fly."
    ),
    "How many legs does it have?": lambda thing: (
        f"{article(thing).capitalize()} has {LEGS[thing]}."
    ),
}

_NOUNS = (
    "river", "mountain", "bridge", "library", "garden", "kitchen", "market", "school",
    "hospital", "island", "forest", "desert", "teacher", "farmer", "doctor", "sailor",
    "painter", "baker", "engineer", "writer", "piano", "guitar", "drum", "violin", "bread",
    "cheese", "apple", "lemon", "tea", "coffee", "sugar", "salt", "window", "door", "roof",
    "ladder", "bicycle", "train", "balloon", "rocket", "compass", "telescope", "camera",
    "clock", "lamp", "candle", "rain", "snow", "wind", "thunder", "spring", "summer", "autumn",
    "winter", "Monday", "music", "poetry", "history", "science", "mathematics",
)  # fmt: skip
_PROMPTS = (
    "What is {a}?",
    "Write a sentence with the word {n}.",
    "Tell me something interesting about the word {n}.",
    "Why is {n} important?",
    "Give me a short definition of {n}.",
)
_LANDS = ("Spain", "Italy", "Egypt", "Peru", "Japan")

TEXT_PROMPTS = (
    *(prompt.format(a=article(noun), n=noun) for noun in _NOUNS for prompt in _PROMPTS),
    *(f"What is the capital of {land}?" for land in _LANDS),
)
"""Questions without a picture. The language model's own answers to them keep it talking."""


def kinds(rng, shares=SHARES):
    """One kind of question, drawn by its share."""
    return rng.choices(list(shares), list(shares.values()))[0]


def about_photograph(label, rng, kind=None, phrasings=USED):
    """(question, answer) about a photograph of THINGS[label]. Half of the answers to yes/no
    questions are yes."""
    kind = kind or kinds(rng)
    thing = THINGS[label]
    question, yes, asked = _phrased(rng, phrasings[kind], thing, THINGS)
    question = question.format(a=article(asked))
    if kind in (YES_NO, YES_NO_WORD):
        return question, _yes_no(kind, yes, article(thing))
    if kind == WORD:
        return question, thing
    if kind == CAPTION:
        unfinished = question[-1].isalpha()
        return question, f"{article(thing)}." if unfinished else f"A photo of {article(thing)}."
    return question, f"This is {article(thing)}."


def about_digit(label, rng, kind=None):
    """(question, answer) about a handwritten digit."""
    shares = {kind: SHARES[kind] for kind in DIGIT_QUESTIONS}
    kind = kind or kinds(rng, shares)
    question, yes, asked = _phrased(rng, DIGIT_QUESTIONS[kind], DIGITS[label], DIGITS)
    question = question.format(n=asked)
    if kind in (YES_NO, YES_NO_WORD):
        return question, _yes_no(kind, yes, f"the digit {DIGITS[label]}")
    return question, DIGITS[label] if kind == WORD else f"This is the digit {DIGITS[label]}."


def _phrased(rng, phrasings, true, possible):
    """(phrasing, whether the right answer is yes, the name to ask about)."""
    yes = rng.random() < 0.5
    asked = true if yes else rng.choice([name for name in possible if name != true])
    return rng.choice(phrasings), yes, asked


def _yes_no(kind, yes, true):
    word = "Yes" if yes else "No"
    return f"{word}, this is {true}." if kind == YES_NO else word.lower()


def about_facts(label, rng, answers):
    """(question, answer) about a photograph that asks for more than a name.

    answers: {question with a thing's name: the language model's answer}.
    """
    thing = THINGS[label]
    question = rng.choice([*KNOWLEDGE, *FACTS])
    if question in FACTS:
        return question, FACTS[question](thing)
    return question, answers[_named(question, thing)]


def _named(question, thing):
    several = thing if thing == "deer" else f"{thing}s"
    return KNOWLEDGE[question].format(a=article(thing), things=several)


def knowledge_prompts():
    """Every question of `KNOWLEDGE` with every thing's name."""
    return [_named(question, thing) for question in KNOWLEDGE for thing in THINGS]


def is_right(answer, true, possible=THINGS):
    """Whether an answer in free text names `true` and none of the other `possible` names."""
    words = set(re.findall(r"[a-z0-9]+", answer.lower()))
    words |= {word.removesuffix("s") for word in words}
    return words & set(possible) == {true}


def says_yes(answer):
    """True for an answer that begins with yes, False for no, None for anything else."""
    word = re.match(r"\W*(yes|no)\b", answer.lower())
    return word and word[1] == "yes"
