"""Exercises of the workshop on 4 and 8 bits: what the reader wrote runs on weights that it has not
seen, and its results are compared with those of bitsandbytes and `vk.formats`."""

import itertools
import math

from vlmkit.course.exercises.answers import Hint, exercise, function, kind, require, tensor
from vlmkit.formats import BLOCK, NESTED_BLOCK, NF4, dynamic_code
from vlmkit.formats.reference import dequantize_scales
from vlmkit.formats.reference import quantize_scales as reference_scales

CODES = len(NF4)
LARGEST = 127  # the largest number that LLM.int8 uses; -128 is left out


# --- running what the reader wrote ---------------------------------------------------------------


def _several(found, *what):
    """The tensors of a result that has one for each of `what`."""
    require(found is not None, "your function returns None: is the `return` missing?")
    fits = isinstance(found, (tuple, list)) and len(found) == len(what)
    require(fits, f"your function should return {' and '.join(what)}; it returns {kind(found)}.")
    return [tensor(one, name) for one, name in zip(found, what, strict=True)]


def _on(label, judge, *arguments):
    """judge(*arguments), whose hints begin with the weights that they are about."""
    try:
        return judge(*arguments)
    except Hint as hint:
        raise Hint(f"with {label}: {hint}") from None


def _weights():
    """{what is special: weights}, never those of the chapter."""
    import torch

    draw = torch.manual_seed(303)
    negative = torch.randn(2, 64, generator=draw)
    negative[1, 5] = -9
    zeros = torch.randn(3, 64, generator=draw)
    zeros[1] = 0
    return {
        "two blocks of 64": torch.randn(2, 64, generator=draw),
        "a block whose largest weight is negative": negative,
        "a block of zeros": zeros,
        "shape (5, 100), 500 weights": torch.randn(5, 100, generator=draw) / 30,
        "shape (3, 37), 111 weights": torch.randn(3, 37, generator=draw),
    }


def _distance(one, other):
    """The relative distance of two tensors, in the norm."""
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


# --- NF4 ------------------------------------------------------------------------------------------


@exercise("NF4 levels", function)
def nf4_levels(levels):
    """A function of the offset that gives the 16 values of NF4, in order."""
    import torch

    def right(offset):
        steps = (torch.linspace(offset, 0.5, n)[:-1].double() for n in (9, 8))
        up, down = (torch.special.ndtri(step).float() for step in steps)
        found = torch.cat([up, -down, torch.zeros(1)]).sort().values
        return found / found.max()

    for offset in (0.9677083, 0.93):
        mine, wanted = tensor(levels(offset), "the result").flatten().float(), right(offset)
        require(
            mine.isfinite().all(),
            "some values are not finite. The quantile of probability 1 is infinite: begin at "
            "`offset`.",
        )
        counts = {
            15: "15 values: is the zero missing?",
            17: "17 values: both sides have a value at the median. Leave it out of both, and add "
            "one zero.",
            18: "18 values: both sides end with a value at the median, probability 0.5.",
        }
        count = len(mine)
        require(count == CODES, counts.get(count, f"there should be 16 values; here are {count}."))
        require((mine.diff() > 0).all(), "the values should go up from -1 to 1: sort them.")
        require(
            (mine == 0).any(),
            "no value is exactly zero. A weight of zero should stay zero, so zero is one of the "
            "16.",
        )
        require(
            mine.abs().max() <= 1.0001,
            f"the largest is {mine.abs().max():.3f}. Divide all by the largest, so that they end "
            "at 1.",
        )
        require(
            not torch.allclose(mine, -wanted.flip(0), atol=1e-4),
            "eight values are negative and seven positive; in NF4 it is the other way round.",
        )
        even = torch.allclose(mine[mine > 0].diff(), mine[mine > 0].diff().mean(), atol=1e-3)
        require(not even, "the values are evenly spaced. The *probabilities* are; `ndtri` follows.")
        require(
            torch.allclose(mine, wanted, atol=1e-4),
            f"with offset {offset} the second value should be {wanted[1]:.4f}; it is {mine[1]:.4f}."
            " Do the probabilities run from `offset` to 0.5, in 9 and in 8 steps?",
        )
    return "with the offset 0.9677083 these are the 16 values that bitsandbytes has."


@exercise("blocks of 64", function)
def blocks_of_64(quantize):
    """A function of weights and levels that gives the code of each weight and the absmax of each
    block."""
    import torch

    levels = torch.tensor(NF4)

    def judge(weights):
        n = weights.numel()
        codes, absmax = _several(quantize(weights.clone(), levels.clone()), "codes", "absmax")
        codes, absmax = codes.flatten(), absmax.flatten().float()
        blocks = math.ceil(n / BLOCK)
        counts = {
            1: "there is one absmax for all weights; each block of 64 has its own.",
            n // BLOCK: "the last block is shorter than 64, and its absmax is missing.",
            len(weights): "there is an absmax for each row. Blocks are cut from the flattened "
            "weights, and rows do not matter.",
        }
        hint = counts.get(len(absmax), f"{blocks} blocks, but {len(absmax)} absmax.")
        require(len(absmax) == blocks, hint)
        padded = torch.nn.functional.pad(weights.flatten(), (0, -n % BLOCK)).reshape(-1, BLOCK)
        largest = padded.abs().amax(1)
        require(
            not torch.equal(absmax, padded.amax(1)) or torch.equal(absmax, largest),
            "absmax is the largest weight. It should be the largest magnitude: take `.abs()` "
            "first.",
        )
        require(
            not torch.allclose(absmax[largest > 0], largest[largest > 0])
            or torch.allclose(absmax, largest),
            "the absmax of a block of zeros is 0. Only the division needs another number.",
        )
        require(torch.allclose(absmax, largest), "the absmax is not the largest magnitude.")
        require(
            len(codes) != len(padded) * BLOCK or len(codes) == n,
            f"{len(codes)} codes for {n} weights. Cut off those of the zeros that fill up the "
            "last block.",
        )
        require(len(codes) == n, f"{len(codes)} codes for {n} weights.")
        whole = codes.float() == codes.float().round()
        require(whole.all(), "these are values. A code is a value's place in `levels`, 0 to 15.")
        require(codes.min() >= 0 and codes.max() < CODES, "a code goes from 0 to 15.")
        scales = largest.repeat_interleave(BLOCK)[:n]
        scaled = weights.flatten() / scales.clamp(min=1e-38)
        off = (levels[codes.long()] - scaled).abs()
        best = (levels - scaled[:, None]).abs().amin(1)
        above = torch.bucketize(scaled, levels)
        wrong = (off > best + 1e-6) & (scales > 0)
        require(
            not wrong.any() or not torch.equal(codes.long(), above),
            "each weight gets the next level above it. The nearest one changes at the midpoints "
            "between levels.",
        )
        require(not wrong.any(), f"{int(wrong.sum())} of {n} codes are not of the nearest level.")
        return n

    weights = sum(_on(label, judge, weights) for label, weights in _weights().items())
    return f"{weights} fresh weights got the codes and the absmax that bitsandbytes gives them."


@exercise("two codes a byte", function)
def two_codes_a_byte(pack):
    """A function of codes that puts two of them into each byte."""
    import torch

    def judge(n):
        codes = torch.randint(CODES, (n,), generator=torch.manual_seed(n))
        found = pack(codes.clone())
        if isinstance(found, (bytes, bytearray)):
            found = torch.tensor(list(found), dtype=torch.uint8)
        found, wanted = tensor(found, "the result").flatten(), (n + 1) // 2
        require(len(found) != n, f"{n} bytes. Two codes share a byte.")
        require(
            len(found) == wanted,
            f"{len(found)} bytes; there should be {wanted}. If the number of codes is odd, "
            "the last byte is half empty.",
        )
        size = found.element_size()
        require(
            found.dtype == torch.uint8,
            f"each number is {found.dtype} and takes {size} byte{'s' * (size > 1)}: end with "
            "`.to(torch.uint8)`.",
        )
        high, low = found >> 4, found & 15
        swapped = torch.equal(low[: n // 2].long(), codes[: n - n % 2 : 2])
        require(
            not swapped or torch.equal(high, low),
            "the two halves are swapped: the first code goes into the upper four bits.",
        )
        right = torch.equal(high.long(), codes[::2]) and torch.equal(
            low[: n // 2].long(), codes[1::2]
        )
        require(right, "a byte should be 16 × the first code + the second code.")

    for n in (256, 7):
        _on(f"{n} codes", judge, n)
    return "these are the bytes that bitsandbytes keeps."


@exercise("back to numbers", function)
def back_to_numbers(dequantize):
    """A function of (packed, absmax, levels, shape) that gives the weights back, rounded."""
    import torch

    from vlmkit import formats

    def judge(weights):
        packed = formats.quantize(weights, "nf4")
        shape, wanted = packed.shape, formats.dequantize(packed)
        given = packed.data.clone(), packed.state["absmax"].clone(), torch.tensor(NF4)
        found = tensor(dequantize(*given, shape), "the result").float()
        require(tuple(found.shape) == shape, f"the shape is {(*found.shape,)}, not {shape}.")
        flat, right = found.flatten(), wanted.flatten()
        pairs = right[: right.numel() // 2 * 2].reshape(-1, 2)
        require(
            not torch.allclose(flat[: pairs.numel()].reshape(-1, 2), pairs.flip(1))
            or torch.allclose(flat, right),
            "neighbors are swapped: the upper four bits are the first weight.",
        )
        uppers = torch.cat([packed.data >> 4, packed.data & 15]).long()[: flat.numel()]
        scales = packed.state["absmax"].repeat_interleave(BLOCK)[: flat.numel()]
        require(
            not torch.allclose(flat, given[2][uppers] * scales),
            "first come all upper halves, then all lower ones. They should take turns: the two "
            "halves of a byte are neighbors.",
        )
        require(
            not torch.allclose(flat * scales, right),
            "these are the levels. Each has to be multiplied by the absmax of its block.",
        )
        close = torch.allclose(found, wanted, atol=1e-6)
        off = (found - wanted).abs().max()
        require(close, f"a weight is off by {off:.3f}. Has each block its own absmax?")

    for label, weights in _weights().items():
        _on(label, judge, weights)
    return "these are the numbers that a 4-bit layer computes with."


@exercise("scales of scales", function)
def scales_of_scales(quantize_scales):
    """A function of (absmax, values) that gives codes, a scale for each 256 of them, and the mean:
    double quantization."""
    import torch

    values = torch.tensor(dynamic_code())
    draw = torch.manual_seed(11)

    def judge(absmax):
        given = absmax.clone(), values.clone()
        what = "codes", "largest", "mean"
        codes, largest, mean = _several(quantize_scales(*given), *what)
        codes, largest, mean = codes.flatten(), largest.flatten().float(), mean.flatten().float()
        n, blocks = len(absmax), math.ceil(len(absmax) / NESTED_BLOCK)
        require(
            len(mean) == 1 and torch.allclose(mean, absmax.mean(), rtol=1e-4),
            "the mean is that of all absmax: one number. All absmax are positive, so without it "
            "the negative half of the values would be unused.",
        )
        counts = {
            1: "there is one scale for all; each block of 256 has its own.",
            math.ceil(n / BLOCK): "the scales are for blocks of 64. Here a block has 256.",
        }
        hint = counts.get(len(largest), f"{blocks} blocks of 256, but {len(largest)} scales.")
        require(len(largest) == blocks, hint)
        require(len(codes) == n, f"{len(codes)} codes for {n} absmax.")
        require(largest.isfinite().all(), "a scale is not finite.")
        whole, codes = (codes.float() == codes.float().round()).all(), codes.long()
        require(whole and codes.min() >= 0 and codes.max() < 256, "a code goes from 0 to 255.")
        found = values[codes.long()] * largest.repeat_interleave(NESTED_BLOCK)[:n] + mean
        wanted = dequantize_scales(reference_scales(absmax))
        error, best = (((one - absmax).norm()).item() for one in (found, wanted))
        hint = f"the error is {error / max(best, 1e-12):.1f} times that of the nearest values."
        require(error <= 1.05 * best + 1e-5, f"{hint} Is the mean taken off before the division?")

    cases = {
        "256 absmax": torch.rand(256, generator=draw) + 1,
        "1,000 absmax": torch.rand(1000, generator=draw) + 0.5,
        "300 absmax that are all equal": torch.full((300,), 0.25),
    }
    for label, absmax in cases.items():
        _on(label, judge, absmax)
    return "8 bits for each absmax instead of 32: NF4 takes 4.13 bits a weight instead of 4.5."


# --- how a layer computes -------------------------------------------------------------------------


@exercise("a 4-bit layer", function)
def four_bit_layer(layer):
    """A function of (x, weight, compute_dtype): the product of x and a Packed weight, computed in
    compute_dtype and returned in the dtype of x."""
    import torch

    from vlmkit import formats

    fp32, bf16 = torch.float32, torch.bfloat16

    def product(x, weight, dtype):
        return (x.to(dtype) @ formats.dequantize(weight).to(dtype).T).to(x.dtype)

    draw = torch.manual_seed(5)
    for (rows, columns), dtype, compute in (
        ((48, 128), fp32, fp32),
        ((33, 100), fp32, bf16),
        ((96, 320), bf16, fp32),
    ):
        x = torch.randn(7, columns, generator=draw).to(dtype)
        weight = formats.quantize(torch.randn(rows, columns, generator=draw), "nf4")
        wanted = product(x, weight, compute)
        label = f"x in {str(dtype)[6:]} and compute_dtype {str(compute)[6:]}: "
        found = tensor(layer(x.clone(), weight, compute), "the result")
        shape, right = (*found.shape,), (*wanted.shape,)
        require(shape == right, f"{label}the shape is {shape}; it should be {right}.")
        require(
            found.dtype == dtype,
            f"{label}the result is {found.dtype}. It goes to the next layer: give it the dtype "
            "of x.",
        )
        other = product(x, weight, bf16 if compute == fp32 else fp32)
        require(
            _distance(found, other) > _distance(found, wanted) or compute == dtype,
            f"{label}it was not computed in compute_dtype. Cast both x and the weights to it "
            "before they are multiplied.",
        )
        off = _distance(found, wanted)
        allowed = 1e-2 if compute == bf16 else 1e-3  # in bf16 a loop adds up less exactly
        require(off < allowed, f"{label}the result is {off:.1%} off. Is the weight dequantized?")
    return "that is Linear4bit of bitsandbytes: dequantize, cast, multiply, cast back."


def _rounded(rows, largest=LARGEST, magnitude=True, whole="round"):
    """Rows rounded to 8 bits with a scale each: the numbers that they then stand for. The other
    arguments make mistakes."""
    sizes = rows.abs() if magnitude else rows
    step = sizes.amax(1, keepdim=True).clamp(min=1e-30) / largest
    return getattr(rows / step, whole)().clamp(max=LARGEST) * step


def _tokens(draw, tokens, width):
    """Inputs of a layer: tokens of very different sizes."""
    import torch

    sizes = torch.logspace(-1, 0.2, tokens)[:, None]
    return (torch.randn(tokens, width, generator=draw) * sizes).clamp(-2.5, 2.5)


@exercise("8-bit rows", function)
def eight_bit_rows(layer):
    """A function of (x, weight) that rounds the rows of both to 8 bits, each row with a scale of
    its own, multiplies, and scales back."""
    import torch

    draw = torch.manual_seed(8)

    def whole(tensor):
        return _rounded(tensor.reshape(1, -1)).reshape(tensor.shape)

    for tokens, inputs, outputs in ((6, 64, 40), (9, 131, 17)):
        x = _tokens(draw, tokens, inputs)
        x[2] = 0  # padding can look like this
        sizes = torch.logspace(-1, 0, outputs)[:, None]
        weight = torch.randn(outputs, inputs, generator=draw) * sizes
        exact = x @ weight.T
        found = tensor(layer(x.clone(), weight.clone()), "the result").float()
        shape, right = (*found.shape,), (*exact.shape,)
        require(shape == right, f"the shape is {shape}; it should be {right}, tokens × outputs.")
        require(
            found.isfinite().all(),
            "the result has NaN or infinity. A token that is all zeros has the scale 0, and 0/0 "
            "is NaN: `clamp(min=...)` the scale.",
        )
        qx, qw = _rounded(x), _rounded(weight)
        wanted = qx @ qw.T
        mistakes = {
            "nothing was rounded to whole numbers.": exact,
            "the inputs were not rounded. In LLM.int8 they are in 8 bits, too.": x @ qw.T,
            "the weights were not rounded.": qx @ weight.T,
            "x has one scale for all tokens; each row has its own.": whole(x) @ qw.T,
            "the weights have one scale for all; each row has its own.": qx @ whole(weight).T,
            "x and weights each have one scale; each row has its own.": whole(x) @ whole(weight).T,
            "the scales belong to columns; they should be for each row.": _rounded(x.T).T
            @ _rounded(weight.T),
            "the largest of a row goes to 128; it should go to 127.": _rounded(x, 128)
            @ _rounded(weight, 128).T,
            "the scale is the largest number of a row. It should be the largest magnitude: take "
            "`.abs()` first.": _rounded(x, magnitude=False) @ _rounded(weight, magnitude=False).T,
            "the fractions were cut off. Round to the nearest whole number.": _rounded(
                x, whole="trunc"
            )
            @ _rounded(weight, whole="trunc").T,
        }
        allowed = 0.1 * _distance(wanted, exact)
        if _distance(found, wanted) > allowed:
            for hint, wrong in mistakes.items():
                require(_distance(found, wrong) > allowed, hint)
            raise Hint(
                f"the result is {_distance(found, exact):.1%} off; rounding alone costs "
                f"{_distance(wanted, exact):.1%}. Is it multiplied by both scales at the end? "
                "Products of 8-bit numbers do not fit into 8 bits: multiply floats or int32."
            )
    return f"rounding both to 8 bits costs {_distance(wanted, exact):.1%} here."


def _split(x, weight, kept, inside, scaled=None):
    """The columns `kept` of x unrounded, by the weights `inside`, and the rest in 8 bits.

    scaled: all of x as rounded, if its scales come from somewhere else than the rest.
    """
    rest = _rounded(x * ~kept) if scaled is None else scaled * ~kept
    return rest @ (_rounded(weight) * ~kept).T + (x * kept) @ (inside * kept).T


def _in_bf16(one, other):
    return (one.bfloat16() @ other.bfloat16().T).float()


@exercise("outlier columns", function)
def outlier_columns(layer):
    """A function of (x, weight, threshold): as for "8-bit rows", but columns of x with a magnitude
    of at least `threshold` are multiplied without rounding."""
    import torch

    draw = torch.manual_seed(80)
    for threshold, outliers in ((6.0, True), (3.5, True), (6.0, False)):
        x, weight = _tokens(draw, 8, 96), torch.randn(50, 96, generator=draw)
        if outliers:
            x[2:, 17] = 9 + torch.randn(6, generator=draw)
            some = torch.arange(30)
            x[some % 8, 50 + some] = -1.5 * threshold  # negative, and each in one token
        x, weight = x.half().float(), weight.half().float()  # as bitsandbytes would cast them
        large = x.abs() >= threshold
        column = large.any(0)
        exact, qw = x @ weight.T, _rounded(weight)
        found = tensor(layer(x.clone(), weight.clone(), threshold), "the result").float()
        shape, right = (*found.shape,), (*exact.shape,)
        require(shape == right, f"the shape is {shape}; it should be {right}, tokens × outputs.")
        require(
            found.isfinite().all(),
            "the result has NaN or infinity. What if no column is an outlier, or a row is zero?",
        )

        step = (x * ~large).abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
        theirs = (x / step).round() * step  # bitsandbytes takes only the outliers from the scale
        w = _rounded(weight * ~column)  # with the scales of what is left of a row
        left = [_rounded(x * ~column) @ (qw * ~column).T, _rounded(x * ~column) @ w.T]
        pairs = [(x * column, inside * column) for inside in (qw, weight)]
        around = [a @ b.T for a, b in pairs] + [_in_bf16(a, b) for a, b in pairs]
        rests = [*left, (theirs * ~column) @ (qw * ~column).T]
        variants = [rest + large for rest, large in itertools.product(rests, around)]
        positive, fixed = (x >= threshold).any(0), (x.abs() >= 6).any(0)
        single = _rounded(x * ~large) @ qw.T
        sign = f"only positive outliers were found; {-1.5 * threshold:g} is one, too."
        given = f"the threshold is {threshold} here. Take the one that your function is given."
        single = "single numbers were taken out. LLM.int8 takes whole columns."
        late = "the scale of a row still comes from its outlier. Take the columns out first."
        small = _rounded(x * ~large) @ qw.T
        mistakes = [
            ("nothing was rounded.", exact),
            *(("the outlier columns were taken out and never added back.", one) for one in left),
            *(("the outlier columns count twice.", _rounded(x) @ qw.T + one) for one in around),
            (late, _rounded(x) @ qw.T),
            *((given, _split(x, weight, fixed, inside)) for inside in (qw, weight)),
            (given, _rounded(x * ~fixed) @ _rounded(weight * ~fixed).T + (x * fixed) @ weight.T),
            *((late, _split(x, weight, column, inside, _rounded(x))) for inside in (qw, weight)),
            *((sign, _split(x, weight, positive, inside)) for inside in (qw, weight)),
            *((single, small + (x * large) @ inside.T) for inside in (qw, weight)),
        ]
        allowed = 0.2 * min(_distance(one, exact) for one in variants)  # fp16 alone makes a tenth
        if min(_distance(found, one) for one in variants) > allowed:
            for hint, wrong in mistakes:
                require(_distance(found, wrong) > allowed, hint)
            raise Hint(
                f"the result is {_distance(found, exact):.1%} off; LLM.int8 is "
                f"{_distance(variants[0], exact):.1%} off. Columns whose largest magnitude "
                "reaches the threshold go around the rounding, all others through it."
            )
    return "that is LLM.int8: most columns in 8 bits, and the few large ones in 16."
