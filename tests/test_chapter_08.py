"""Chapter 08: its claims about the recorded results are true. nbval runs the chapter itself.

After a change of pebble's weights, `make benchmark-domains` records again. The tests that then fail
say which claims of the chapter are no longer true.
"""

import pandas as pd
import pytest

import vlmkit as vk
from vlmkit.evaluation.statistics import paired_interval

BENCHMARK = "domains.py"
VISION, PROJECTOR, LANGUAGE = "vision_encoder", "projector", "language_model"
BOTH, ALONE = f"{VISION} 5 + {LANGUAGE} 1", (f"{VISION} 7", f"{PROJECTOR} full", f"{LANGUAGE} 3")


@pytest.fixture(scope="module")
def runs(recorded):
    return recorded.fillna({"format": ""})


@pytest.fixture(scope="module")
def counts(runs):
    """{whether the questions are the domain's own: counts by domain and by what was trained}."""
    rows = runs[runs["part"] == "domains"]
    rows = rows.assign(new=rows["task"] == rows["domain"])
    return rows.groupby(["new", "domain", "trained"])[["n", "before", "after"]].sum()


@pytest.fixture(scope="module")
def learned(counts):
    """learned(domain, trained): the percentage that is right, of the new domain's questions."""

    def share(domain, trained, when="after"):
        row = counts.loc[(True, domain, trained)]
        return 100 * row[when] / row["n"]

    return share


def test_the_record_is_complete(benchmark, runs):
    label, more = benchmark["label"], benchmark["MORE"]
    expected = {(d, label(r), "") for r in benchmark["EQUAL"] for d in benchmark["DOMAINS"]}
    expected |= {(domain, label(ranks), "") for domain, ranks in more.items()}
    for component, format, rank in benchmark["ROUNDED"]:
        expected |= {("own", label({component: rank}), f) for f in (format, "")}
    groups = runs.groupby(["domain", "trained", "format"])
    assert set(groups.groups) == expected
    for (domain, _, _), rows in groups:
        own = benchmark["OWN"] if domain == "own" else (domain, *vk.tasks.TASKS)
        assert tuple(rows["task"]) == own
    assert (runs["before"] - runs["regressions"] + runs["fixes"] == runs["after"]).all()
    assert (runs["after"] <= runs["n"]).all()


def test_equal_numbers_of_parameters_are_trained(benchmark, runs):
    """As recorded and as `add_adapters` counts them: within some percent of the projector's."""
    model, _ = vk.load("pebble", "fp32", processor=False)
    projector = vk.anatomy("pebble")[PROJECTOR].parameters
    modules = dict(model.named_modules())
    for ranks in benchmark["EQUAL"]:
        count = 0
        for target in vk.finetuning.targets(model, benchmark["training"](ranks)):
            for name in target.modules:
                out, into = modules[name].weight.shape
                full = sum(p.numel() for p in modules[name].parameters())
                count += target.lora.r * (out + into) if target.lora else full
        rows = runs[runs["trained"] == benchmark["label"](ranks)]
        assert set(rows["parameters"]) == {count}
        assert 1 <= count / projector <= 1.1


def test_claims_about_clocks(learned, states):
    """No component reads clocks alone; the vision encoder reads none; larger adapters read most."""
    alone = [learned("clock", one) for one in ALONE]
    assert max(alone) < 5 and alone[0] == 0
    assert learned("clock", BOTH) > max(alone)
    states(f"{learned('clock', BOTH):.0f}")
    assert learned("clock", f"{VISION} 16 + {PROJECTOR} full + {LANGUAGE} 16") > 80


def test_claims_about_dutch(learned, states):
    """The language model alone comes furthest; the vision encoder alone unlearns the numbers."""
    best, before = learned("dutch", ALONE[2]), learned("dutch", ALONE[2], "before")
    assert all(best > learned("dutch", one) for one in (*ALONE[:2], BOTH))
    assert learned("dutch", ALONE[0]) < before / 3
    larger = [learned(domain, f"{LANGUAGE} 16") for domain in ("dutch", "dutch_throughout")]
    states(*(f"{share:.0f}" for share in (best, before, *larger)))


def test_claims_about_forgetting(counts, states):
    """Every training ruins at least half of what pebble could do before."""
    old = counts.loc[False]
    (before,) = set((100 * old["before"] / old["n"]).round(1))
    states(before)
    assert (old["after"] / old["n"]).max() < 0.5


@pytest.mark.parametrize(
    ("trained", "format", "low", "high"),
    [
        (f"{LANGUAGE} 8", "int2", 0.6, 0.9),  # gets back most of what it lost
        (f"{VISION} 8", "int2-asym", 0.25, 0.4),  # about a third
    ],
)
def test_claims_about_recovery(runs, trained, format, low, high):
    """The control, the same training without rounding, changes nothing beyond chance."""
    rows = runs[(runs["part"] == "recovery") & (runs["trained"] == trained)]
    columns = ["n", "unrounded", "before", "after", "regressions", "fixes"]
    sums = rows.groupby("format")[columns].sum()
    run, control = sums.loc[format], sums.loc[""]
    assert low < (run["after"] - run["before"]) / (run["unrounded"] - run["before"]) < high
    interval = paired_interval(control["regressions"], control["fixes"], control["n"])
    assert interval[0] <= 0 <= interval[1]


def test_pebbles_own_answers_have_no_colon_and_no_small_letter_alone():
    _, processor = vk.load("pebble", "fp32")
    encode = processor.tokenizer.encode
    used = set()
    for task, recipe in vk.tasks.RECIPES.items():
        for kind in recipe.kinds:
            for index in range(60):
                rng = vk.tasks.generator("spoken", task, kind, index)
                used |= set(encode(f" {recipe.example(kind, rng)[2]}"))
    tokens = {t: processor.tokenizer.convert_tokens_to_ids(t) for t in "RD7rd:"}
    assert {t for t, number in tokens.items() if number in used} == set("RD7")


@pytest.mark.slow
def test_the_benchmark_counts_answers_as_evaluate_does(benchmark, tmp_path, monkeypatch):
    """With few questions and steps; what the file has already is not trained again."""
    output, main = tmp_path / "new" / "trial.csv", benchmark["main"]
    small = {"DOMAINS": ("clock",), "MORE": {"clock": {PROJECTOR: "full"}}, "EQUAL": ()}
    small["ROUNDED"] = ((PROJECTOR, "int2", 4),)
    for name, value in small.items():
        monkeypatch.setitem(main.__globals__, name, value)
    options = ["--steps", "2", "2", "2", "--n", "12", "--output", str(output)]
    main(options)
    first = output.read_text()
    table = pd.read_csv(output, keep_default_na=False)
    assert len(table) == 7 + 4 + 4 and set(table["steps"]) == {2}
    model, processor = vk.load("pebble", "fp32")
    questions = vk.tasks.dataset(list(benchmark["OWN"]), n=12, seed=benchmark["SEED"])
    with vk.sensitivity.quantized(model, PROJECTOR, "int2"):
        right = vk.evaluate(model, processor, questions).answers["correct"].sum()
    rounded = table[table["format"] == "int2"]
    assert rounded["before"].sum() == right
    assert set(rounded["parameters"]) == {4 * (128 + 192 + 192 + 192)}
    monkeypatch.setitem(main.__globals__, "load", None)  # would fail if it were called
    main(options)
    assert output.read_text() == first
