"""Chapter 03. nbval runs it on pebble; here it runs on another family, and its numbers are true."""

import math
import re
from statistics import NormalDist

import bitsandbytes as bnb
import chapters
import pandas as pd
import pytest
import torch
from chapters import cell

import vlmkit as vk


def said(notebook, start):
    """What a cell printed, or showed as text."""
    outputs = cell(notebook, start).outputs
    return "".join(o.get("text") or o["data"]["text/plain"] for o in outputs)


@pytest.fixture
def scope(notebook):
    """The reader's variables once a weight is packed."""
    scope = {"torch": torch, "vk": vk, "pd": pd, "bnb": bnb}
    for start in ("import bitsandbytes", "normal = ", "scaled = "):
        exec(cell(notebook, start).source, scope)
    return scope


@pytest.mark.slow  # chapter 01 covers this kind of test
def test_runs_to_its_end_on_another_family(notebook, other_family, monkeypatch):
    """With fewer questions."""
    chapters.replace(notebook, ("n=300", "n=6"))
    assert "model.connector" in chapters.run(notebook, other_family, monkeypatch)


def test_levels_are_bitsandbytes_values_to_the_last_bit(notebook):
    """If probabilities are in fp32 and quantiles in fp64, as in bitsandbytes."""
    (offset,) = re.findall(r"^offset = ([\d.]+)", cell(notebook, "offset = ").source)
    assert float(offset) == round(1 - (1 / 32 + 1 / 30) / 2, 7)
    steps = (torch.linspace(float(offset), 0.5, n)[:-1].double() for n in (9, 8))
    up, down = (torch.special.ndtri(step).float() for step in steps)
    levels = torch.cat([up, -down, torch.zeros(1)]).sort().values
    assert torch.equal(levels / levels.max(), torch.tensor(vk.formats.NF4))


def test_what_the_exponent_of_a_tenth_stores(states):
    fraction, exponent = math.frexp(0.1)  # 0.8 × 2^-3, which is 1.6 × 2^-4
    for dtype, constant, stored in ((torch.float32, 127, 123), (torch.float16, 15, 11)):
        assert round(1 - math.log2(torch.finfo(dtype).tiny)) == constant
        assert exponent - 1 + constant == stored
        states(f"{2 * fraction:.1f}", constant, stored)


def test_tables_of_skip_lists(notebook, states):
    """How many rows the museum shows, and how many tensors the audit's message is about."""
    recorded = pd.read_csv(chapters.FOLDER.parent / "benchmarks" / "results" / "skip_lists.csv")
    shown = recorded[recorded["method"] != "nvfp4"]["list"].nunique()
    assert shown == recorded["list"].nunique() - 1
    states(shown, recorded["model"].nunique())
    old = recorded[recorded["method"].isin(["bitsandbytes", "awq"])]
    kept = old[old["vision_encoder_kept"] > 0]
    assert set(kept["vision_encoder_kept"]) == {1}  # one layer of so many
    states(*set(kept["vision_encoder"]))
    row = chapters.shown(cell(notebook, "parts, rows = "))["short names"]
    wrong = [int(row[place]) for place in (0, 1, 3)]
    message = cell(notebook, 'try:\n    vk.audit(loaded["short names"]').outputs[0].text
    assert f" {sum(wrong)} of " in message
    states(*wrong, sum(wrong))


def test_the_levels_in_the_middle_are_used_five_times_as_often(scope, states):
    used = scope["used"]
    states(f"{used.max() / used.iloc[[0, -1]].mean():.0f}")


def test_bits_of_a_weight(states):
    names = "nf4", "nf4-dq"
    parts = {name: 8 * sum(vk.formats.FORMATS[name].parts((2**14, 2**14))) for name in names}
    states(f"{parts['nf4'] / 2**28:.1f}", f"{parts['nf4-dq'] / 2**28:.3f}")
    states(vk.formats.NESTED_CELLS, vk.formats.NESTED_BLOCK, vk.formats.BLOCK)


def test_what_compute_dtypes_cost(notebook, scope, states):
    for start in ("def library_layer", "tokens = "):
        exec(cell(notebook, start).source, scope)
    tokens, normal, restored = (scope[name] for name in ("tokens", "normal", "restored"))
    of_rounded = tokens.double() @ restored.double().T
    exact = tokens.double() @ normal.double().T
    x = scope["library_layer"](normal, torch.bfloat16)(tokens)
    states(f"{100 * (of_rounded - exact).norm() / exact.norm():.0f}")
    states(f"{100 * (x.double() - of_rounded).norm() / of_rounded.norm():.1f}")
    states(f"{torch.finfo(torch.float16).max:.0f}", f"{1 + torch.finfo(torch.bfloat16).eps:.4f}")
    shown = said(notebook, 'print("default:"')
    assert "default: torch.float32" in shown
    lost = [int(count) for count in re.findall(r"not finite: (\d+)", shown)]
    assert lost == [0, 0, normal.shape[0]]  # all of one token, in fp16 alone


def test_paired_examples(notebook, states):
    table = chapters.shown(cell(notebook, "rows = {}\nfor label, score"))
    assert table["fp4"][1:3] == ["5", "0"]
    p = {label: float(row[3]) for label, row in table.items() if label}
    assert [label for label in p if p[label] < 0.05] == ["2 bits in groups"]
    states("0.0625", "0.031")
    assert vk.evaluation.mcnemar(5, 0) == 0.0625
    assert round(vk.evaluation.mcnemar(6, 0), 3) == 0.031


def test_one_column_sets_the_error_of_the_others(notebook):
    scope = {"torch": torch}
    exec(cell(notebook, "def error_of_others").source, scope)
    larger = scope["larger"]
    assert larger[10] > 3 and larger[60] > 5 * larger[10]  # in step with the column
    ordinary = torch.randn(2000, 256, generator=torch.manual_seed(0))
    largest = ordinary.abs().amax(1).mean()
    assert largest == pytest.approx(3, abs=0.1) and 60 / largest == pytest.approx(20, abs=0.5)


def test_one_outlier_column_makes_most_of_the_error(notebook, states):
    """As recorded from cobble; the cell runs on pebble where cobble is not fetched."""
    shown = said(notebook, "exact = x.double()")
    every, without = (float(share) for share in re.findall(r"([\d.]+)% off", shown))
    assert without < every / 2
    (count, columns) = re.findall(r"outlier columns: (\d+) of (\d+)", shown)[0]
    states(columns)
    assert count == "1"


def test_sizes_of_both_models(states):
    """The outlier column is cobble's: no input of pebble's attention reaches the threshold."""
    states(f"{vk.anatomy('cobble').total / 1e6:.0f}")
    model, processor = vk.load("pebble", "bf16")
    row, largest = vk.course.pictures.FIRST.draw(), []
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(
            lambda _, given: largest.append(given[0].abs().max().item())
        )
    vk.ask(model, processor, row["images"][0], row["question"])
    assert len(largest) >= 6 and max(largest) < 6


def test_table_of_errors_and_formats(notebook):
    """One bit is 6 dB; NF4 is above FP4 and below integers of the same size."""
    table = chapters.shown(cell(notebook, 'found = pd.DataFrame({"bits"'))
    normal = {label: float(row[1]) for label, row in table.items() if label}
    assert normal["fp4"] + 2 < normal["nf4"] < normal["4 bits in groups"]
    assert 5.5 < (normal["8 bits in groups"] - normal["3 bits in groups"]) / 5 < 6.5
    assert normal["nf4"] - normal["nf4-dq"] < 0.1


def one_by_one(offset):
    """From the largest on each side; a list."""
    peak = NormalDist().inv_cdf(offset)

    def quantiles(n):
        step = (offset - 0.5) / n
        return [NormalDist().inv_cdf(offset - i * step) / peak for i in range(n)]

    return [-value for value in quantiles(7)] + [0.0] + quantiles(8)[::-1]


def in_a_loop(weights, levels):
    """Blocks one by one, each weight compared with all levels; lists in place of tensors."""
    codes, absmax = [], []
    for block in weights.flatten().split(64):
        largest = max(block.max().item(), -block.min().item())
        absmax.append(largest)
        codes += [(weight - largest * levels).abs().argmin().item() for weight in block]
    return codes, absmax


def by_halves(packed, absmax, levels, shape):
    weights = torch.zeros(2 * len(packed))
    weights[::2], weights[1::2] = levels[packed.int() // 16], levels[packed.int() % 16]
    blocks = (absmax[i] * block for i, block in enumerate(weights.split(64)))
    return torch.cat(list(blocks))[: torch.Size(shape).numel()].view(shape)


def whole_numbers(x, weight):
    """Integers are multiplied as int32."""
    scales = [127 / rows.abs().amax(1).clamp(min=1e-9) for rows in (x, weight)]
    ints = [(r * s[:, None]).round().int() for r, s in zip((x, weight), scales, strict=True)]
    return (ints[0] @ ints[1].T) / scales[0][:, None] / scales[1]


def library_int8(x, weight, threshold):
    layer = bnb.nn.Linear8bitLt(*weight.T.shape, False, False, threshold)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    return layer.to("cpu").eval()(x.half())


def library_4bit(x, weight, compute_dtype):
    return torch.nn.functional.linear(
        x.to(compute_dtype), vk.formats.dequantize(weight).to(compute_dtype)
    ).to(x)


def in_blocks_of_256(absmax, values):
    mean = absmax.mean().item()
    largest = torch.stack([block.abs().max() for block in (absmax - mean).split(256)])
    each = largest.repeat_interleave(256)[: len(absmax)]
    return ((absmax - mean)[:, None] - each[:, None] * values).abs().argmin(1), largest, mean


OTHERWISE = {
    "NF4 levels": one_by_one,
    "blocks of 64": in_a_loop,
    "two codes a byte": lambda codes: torch.tensor(
        [16 * int(c[0]) + int(c[-1]) for c in codes.split(2)], dtype=torch.uint8
    ),
    "back to numbers": by_halves,
    "scales of scales": lambda absmax, values: in_blocks_of_256(absmax.double(), values.double()),
    "a 4-bit layer": library_4bit,
    "8-bit rows": whole_numbers,
    "outlier columns": library_int8,
}
"""A right answer to each exercise in which the reader writes a function, in another form."""


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_right_answer_in_another_form_is_accepted(name):
    found = vk.course.exercises.verdict(name, OTHERWISE[name])
    assert found.right, found
