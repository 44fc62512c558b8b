"""Exercises on how a picture becomes an answer: patches, attention, merging, generation.

The checks run what the reader wrote on new tensors, and look only at what comes out.
"""

import contextlib

from vlmkit.course.exercises.answers import Hint, exercise, function, kind, require, tensor


def shaped(found, shape, what):
    """`found` as a tensor of floats of this shape, or a Hint. what: a sentence on what it is."""
    require(found is not None, f"your function returns nothing. {what}")
    try:
        found = tensor(found, "the result").float()
    except Hint:
        raise Hint(f"{what} Yours returns {kind(found)}.") from None
    require(tuple(found.shape) == shape, f"{what} Yours has the shape {tuple(found.shape)}.")
    return found


def is_near(one, other):
    import torch

    return one.shape == other.shape and torch.allclose(one, other.float(), atol=1e-5)


def random(*shape, seed=0):
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("patches", function)
def patches(cut):
    """A function of a picture (3, height, width) and a side that returns its patches, row by row:
    (patches, 3 * side * side)."""
    for (rows, columns), side in (((2, 3), 4), ((5, 2), 3), ((7, 7), 12)):
        picture = random(3, rows * side, columns * side, seed=side)
        count, numbers = rows * columns, 3 * side * side
        blocks = picture.unflatten(2, (columns, side)).unflatten(1, (rows, side))
        right = blocks.permute(1, 3, 0, 2, 4)  # rows, columns, colors, height, width
        mistakes = {
            "the patches go down the columns. Go along the rows first, as you read.": (1, 0),
            "the three colors of a pixel are side by side. All numbers of the first color come "
            "first, then those of the second.": (0, 1, 3, 4, 2),
            "inside a patch, the pixels go down the columns. Go along the rows.": (0, 1, 2, 4, 3),
        }
        shape = (count, numbers)
        asked = (
            f"A picture of {columns * side} × {rows * side} pixels has {count} patches of {side} × "
            f"{side} pixels, so the shape should be {shape}."
        )
        found = cut(picture.clone(), side)
        if getattr(found, "shape", None) == (numbers, count):
            raise Hint(f"each patch should be a row, and here it is a column. {asked}")
        found = shaped(found, shape, asked)
        require(
            not is_near(found, picture.reshape(shape)),
            "this takes pixels one after another, and not squares: split the height and the width "
            "in two first, then move the axes.",
        )
        for hint, order in mistakes.items():
            order = (*order, *range(len(order), 5))
            require(not is_near(found, right.permute(order).reshape(shape)), hint)
        require(
            is_near(found, right.reshape(shape)),
            "the shape is right, but the numbers are in other places. Look at the first patch: it "
            "should be picture[:, :side, :side].",
        )
    return "squares of three sizes, all in the right order."


def attended(q, k, v, mask=0.0):
    return (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v


@exercise("attention", function)
def attention(attend):
    """A function of queries (n, d), keys (m, d), values (m, e) and a mask that is added to the
    scores: attention of one head, (n, e)."""
    import torch

    for seed, (n, m, d, e) in enumerate(((3, 5, 16, 4), (4, 4, 8, 8))):
        q, k, v = random(n, d, seed=seed), random(m, d, seed=seed + 9), random(m, e, seed=seed + 5)
        mask = torch.zeros(n, m)
        mask[:-1, -1] = float("-inf")  # the last row may see all keys
        asked = f"{n} queries and values of {e} numbers should give the shape {(n, e)}."
        found = attend(q.clone(), k.clone(), v.clone(), torch.zeros(n, m))
        if getattr(found, "shape", None) == (n, m) and m != e:
            raise Hint(
                f"this has a number for each key. Multiply the weights by the values. {asked}"
            )
        found, scores = shaped(found, (n, e), asked), q @ k.T
        mistakes = {
            "the scores are not divided by the square root of d.": scores.softmax(-1),
            "the scores are divided by d; divide by its square root.": (scores / d).softmax(-1),
            "the scores are multiplied by the square root of d; divide.": (scores * d**0.5).softmax(
                -1
            ),
            "softmax goes over the queries. The weights of one query, over all keys, should add up "
            "to 1: dim=-1.": (scores / d**0.5).softmax(0),
            "softmax is missing.": scores / d**0.5,
        }
        for tokens in {n, m} - {d}:
            mistakes[
                f"the scores are divided by the square root of {tokens}, a number of tokens. d is "
                f"the length of a key, here {d}."
            ] = (scores / tokens**0.5).softmax(-1)
        for hint, weights in mistakes.items():
            require(not is_near(found, weights @ v), hint)
        require(
            is_near(found, attended(q, k, v)),
            f"the shape is right, the numbers are not ({n} queries, {m} keys, d = {d}).",
        )
        found = shaped(attend(q, k, v, mask), (n, e), asked)
        require(not is_near(found, attended(q, k, v)), "the mask changes nothing. Add it.")
        require(
            is_near(found, attended(q, k, v, mask)),
            "without a mask it is right, with a mask it is not. Add the mask before softmax.",
        )
    return "the weights of each query add up to 1, and the mask hides what it should."


@exercise("heads", function)
def heads_of_attention(attend):
    """A function of queries, keys, values, all (n, width), a number of heads and a mask: attention
    in heads of neighboring numbers, (n, width)."""
    import torch

    n, width, heads = 5, 24, 4
    q, k, v = (random(n, width, seed=seed) for seed in (1, 2, 3))
    mask, each = torch.full((n, n), float("-inf")).triu(1), width // heads
    asked = f"{n} tokens of {width} numbers should give the shape {(n, width)}."
    found = shaped(
        attend(q.clone(), k.clone(), v.clone(), heads, torch.zeros(n, n)), (n, width), asked
    )

    def split(x):
        return x.unflatten(-1, (heads, each)).transpose(0, 1)  # (heads, n, each)

    apart = attended(*map(split, (q, k, v)))
    right = apart.transpose(0, 1).flatten(1)
    scale = (each / width) ** 0.5
    mixed = [x.reshape(heads, n, each) for x in (q, k, v)]
    every = [x.unflatten(-1, (each, heads)).permute(2, 0, 1) for x in (q, k, v)]
    mistakes = {
        "this is a single head. Split the numbers of each token into heads.": attended(q, k, v),
        "the heads are right, but they are put together wrongly: move the tokens to the front "
        "again before you join the heads.": apart.reshape(n, width),
        "the heads are right, but their numbers take turns. Put all numbers of the first head "
        "first, then those of the second.": apart.permute(1, 2, 0).flatten(1),
        "reshape alone mixes the tokens. Split the last axis into (heads, numbers), then swap it "
        "with the tokens.": attended(*mixed).reshape(n, width),
        "reshape alone mixes the tokens. Split the last axis first.": attended(*mixed)
        .transpose(0, 1)
        .flatten(1),
        f"the scores are divided by the square root of {width}. A head has {each} numbers.": (
            attended(*map(split, (q * scale, k, v))).transpose(0, 1).flatten(1)
        ),
        f"a head should have neighboring numbers, and not each {heads}th one.": attended(*every)
        .permute(1, 2, 0)
        .flatten(1),
    }
    for hint, wrong in mistakes.items():
        require(not is_near(found, wrong), hint)
    require(is_near(found, right), "the shape is right, but the numbers are not.")
    found = shaped(attend(q, k, v, heads, mask), (n, width), asked)
    masked = attended(*map(split, (q, k, v)), mask).transpose(0, 1).flatten(1)
    require(is_near(found, masked), "with a mask it is not right. Give the mask to every head.")
    return "each head attends on its own, and their results are side by side again."


@exercise("causal mask", function)
def causal_mask(causal):
    """A function of n that returns a mask (n, n), to be added to scores, that hides the future. A
    mask of True (may look) and False is accepted, too."""
    import torch

    for n in (4, 7):
        asked = f"The mask of {n} tokens should have the shape {(n, n)}."
        found = causal(n)
        with contextlib.suppress(Hint):
            found = tensor(found, asked)
        if getattr(found, "dtype", None) == torch.bool:
            require(
                not found.equal(torch.ones(n, n, dtype=torch.bool).triu(1)),
                "True is where a token may not look. Here, and in scaled_dot_product_attention, "
                "True is where it may; or return 0 and −∞.",
            )
            found = torch.zeros(found.shape).masked_fill(~found, float("-inf"))
        found = shaped(found, (n, n), asked)
        require(
            not found.isnan().any(),
            "the mask has NaN: 0 times −∞ is not a number. Fill the places with −∞ directly.",
        )
        require(
            not (found == float("-inf")).all(-1).any(),
            "some token may look at nothing, not even at itself.",
        )
        weights = found.softmax(-1)
        seen, right = weights > 1e-4, torch.ones(n, n, dtype=torch.bool).tril()
        hides = not seen.all()
        require(hides, "this hides nothing. What is hidden needs −∞: softmax makes 0 of it.")
        require(
            not seen.equal(right.T),
            "the past is hidden and the future is seen. Row i should see the columns up to i.",
        )
        require(not seen.equal(right.tril(-1)), "a token may look at itself.")
        require(
            not seen.equal(right.logical_not().triu(2).logical_not()),
            "each token sees the next one.",
        )
        later = (seen & ~right).any(-1)
        require(not later.any(), f"token {int(later.int().argmax())} sees what comes after it.")
        require(seen.equal(right), "a token should see all that comes before it.")
        require(
            is_near(weights, right / right.sum(-1, keepdim=True)),
            "where a token may look, the mask should add 0.",
        )
    return "each token sees itself and what came before it."


@exercise("merging", function)
def merging(merge):
    """A function of embedded tokens (n, width), their ids (n,), the id of the placeholder and the
    visual tokens (m, width), which go in the places of the m placeholders, in their order."""
    import torch

    for ids in ([5, 1, 1, 1, 7, 8], [1, 1, 5, 6, 1, 1, 2]):
        ids = torch.tensor(ids)
        places, n = ids == 1, len(ids)
        words, visual = random(n, 3, seed=n), random(int(places.sum()), 3, seed=n + 1)
        asked = f"{n} tokens go in, so {n} should come out: the shape should be {(n, 3)}."
        found = merge(words.clone(), ids.clone(), 1, visual.clone())
        if getattr(found, "shape", None) == (n + len(visual), 3):
            raise Hint(f"the placeholders are still there. Replace them. {asked}")
        found, right, turned = shaped(found, (n, 3), asked), words.clone(), words.clone()
        right[places], turned[places] = visual, visual.flip(0)
        first = torch.cat([visual, words[~places]])
        require(not is_near(found, words), "nothing was replaced.")
        require(not is_near(found, turned), "the visual tokens are in reverse order.")
        require(
            not is_near(found, first) or is_near(first, right),
            "the visual tokens are at the beginning. They belong where ids has the placeholder.",
        )
        wrong = [i for i in range(n) if not is_near(found[i], right[i])]
        require(not wrong, f"the token at position {wrong[:1]} of ids = {ids.tolist()} is wrong.")
    return "in front of a question, and for two pictures in one prompt."


END, ALPHABET = 0, 11


def following(tokens):
    """The next token of a toy model: it depends on all tokens, and their number."""
    return sum((place + 3) ** 2 * (token + 1) for place, token in enumerate(tokens)) % ALPHABET


def scored(tokens):
    import torch

    return torch.nn.functional.one_hot(torch.tensor(following(tokens)), ALPHABET).float()


def written(prompt, most):
    """What the toy model writes after a prompt, without END."""
    new = []
    while len(new) < most and (token := following([*prompt, *new])) != END:
        new.append(token)
    return new


PROMPTS = [[start, 4] for start in range(1, ALPHABET)]
"""Some of them end early, some do not."""
MOST = 5


def tokens_of(found, should="your function should return"):
    """The token numbers that a function returned, or was given, as a list of int."""
    try:
        return [int(token) for token in found]
    except Exception:
        raise Hint(f"{should} a list of tokens, not {kind(found)}.") from None


def judge_tokens(found, prompt):
    right, found = written(prompt, MOST), tokens_of(found)
    if found == right:
        return
    require(
        found[: len(prompt)] != prompt or found[len(prompt) :] != right,
        "return only the new tokens, without the prompt.",
    )
    require(found != [*right, END], "leave out the token `end` itself.")
    require(len(found) <= MOST, f"{len(found)} new tokens; `most` is {MOST}.")
    require(END not in found, "it writes on after the token `end`.")
    require(found != right[:1] or len(right) < 2, "it stops after the first token.")
    raise Hint(f"after {prompt} the toy model writes {right}, and yours {found}.")


@exercise("greedy", function)
def greedy(generate):
    """A function of scores(tokens), a prompt, the token that ends an answer and the most new
    tokens: the new tokens, each the one of the highest score."""
    for prompt in PROMPTS:
        calls = []

        def scores(tokens, calls=calls):
            tokens = tokens_of(tokens, "`scores` should be given")
            calls.append(tokens)
            require(len(calls) <= 2 * MOST, f"it does not stop after {MOST} new tokens.")
            return scored(tokens)

        found = generate(scores, list(prompt), END, MOST)
        require(found is not None, "your function returns nothing.")
        for call in calls[1:]:
            require(len(call) > 1, "the model sees only the last token. It needs all of them.")
            require(call != prompt, "the model sees the prompt again, without the new tokens.")
        judge_tokens(found, prompt)
    return f"{len(PROMPTS)} prompts; it stops at `end`, and after `most` tokens."


@exercise("attention with a cache", function)
def attention_with_a_cache(attend):
    """A function of the query, key and value of one new token, each (1, d), and a cache {"k", "v"}
    of those before, (t, d): it adds to the cache and returns the new token's attention (1, d)."""
    import torch

    n, d = 6, 8
    q, k, v = (random(n, d, seed=seed) for seed in (4, 5, 6))
    right = attended(q, k, v, torch.full((n, n), float("-inf")).triu(1))
    cache = {"k": torch.empty(0, d), "v": torch.empty(0, d)}
    for t in range(n):
        now, asked = slice(t, t + 1), f"The attention of one token has the shape {(1, d)}."
        found = shaped(attend(q[now].clone(), k[now].clone(), v[now].clone(), cache), (1, d), asked)
        rows = {name: len(cache[name]) for name in "kv"}
        for name, count in rows.items():
            require(
                count != t or t == 0 and count,
                f'cache["{name}"] has {count} rows after {t + 1} tokens. Add the new one to it: '
                f'the next token needs it. (Assign to cache["{name}"]. A new dict with the name '
                "cache is not seen outside of your function.)",
            )
            require(
                count == t + 1,
                f'cache["{name}"] has {count} rows after {t + 1} tokens, not {t + 1}.',
            )
        alone = "a token also looks at itself: add it to the cache, then attend."
        require(t or is_near(found, right[now]), alone)
        if t:
            before = attended(q[now], k[:t], v[:t])
            require(not is_near(found, before), alone)
            require(not is_near(found, v[now]), "the new token sees only itself.")
            plain = (q[now] @ k[: t + 1].T).softmax(-1) @ v[: t + 1]
            require(
                not is_near(found, plain), "the scores are not divided by the square root of d."
            )
        require(
            is_near(found, right[now])
            or all(is_near(cache[name], of[: t + 1]) for name, of in (("k", k), ("v", v))),
            "keys and values in the cache do not fit together. Add each new row at the end.",
        )
        require(
            is_near(found, right[now]), f"token {t} is not what attention without a cache gives."
        )
    return f"{n} tokens one by one give the same as all of them at once under a causal mask."


@exercise("greedy with a cache", function)
def greedy_with_a_cache(generate):
    """A function of step(tokens, cache), which returns scores and the new cache, a prompt, the
    token that ends an answer and the most new tokens: the new tokens."""
    for prompt in PROMPTS:
        calls = []

        def step(tokens, cache, calls=calls, prompt=prompt):
            tokens = tokens_of(tokens, "`step` should be given")
            known = tuple(cache or ())
            require(len(calls) <= 2 * MOST, f"it does not stop after {MOST} new tokens.")
            if calls:
                whole = tokens[: len(prompt)] == prompt
                require(
                    known or not whole,
                    "each call begins without a cache. Give it what the last call returned.",
                )
                require(known, "the new token comes without a cache, so the model knows no prompt.")
                require(
                    not whole,
                    "the whole prompt is given again. Its keys and values are in the cache: give "
                    "only the new token.",
                )
                require(
                    len(tokens) == 1, f"{len(tokens)} tokens are given after the prompt; give one."
                )
                require(
                    known == calls[-1],
                    "this is an old cache. Take the one that the last call returned.",
                )
            else:
                require(tokens == prompt, f"the first call should get the prompt, not {tokens}.")
            calls.append((*known, *tokens))
            return scored(calls[-1]), calls[-1]

        found = generate(step, list(prompt), END, MOST)
        require(found is not None, "your function returns nothing.")
        judge_tokens(found, prompt)
    return "the prompt goes through the model once, and then each new token once."
