"""Chapter 07: says what is so, of what was recorded and of what it shows.

That it runs and prints what is stored in it is nbval's part (`make test`), and that its own
training reads clocks is an assertion in it. What it says of the recorded results is held against
them here. With other weights of pebble, `make benchmark-domains` records anew, and the tests that
then fail name the sentences that are not so.
"""

from pathlib import Path

import chapters
import pandas as pd
import pytest

import vlmkit as vk

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "domains.py"
VISION, PROJECTOR, LANGUAGE = "vision_encoder", "projector", "language_model"


@pytest.fixture
def notebook():
    return chapters.read("07_lora_on_vqa.ipynb")


@pytest.fixture(scope="module")
def recorded(benchmark):
    return pd.read_csv(benchmark["OUTPUT"], keep_default_na=False)


def test_keeps_to_the_measure_of_a_chapter(notebook):
    # LoRA written out, and held against peft, comes on top of the usual measure.
    chapters.check_measure(notebook, middle=8, lines=150 + 20)


def test_every_figure_has_a_caption(notebook):
    chapters.check_captions(notebook)


def test_what_is_recorded_is_of_this_pebble_and_complete(benchmark, recorded):
    """Fails after pebble's weights were exchanged: `make benchmark-domains` records anew."""
    assert set(recorded["weights"]) == {benchmark["digest"]()}
    label, more = benchmark["label"], benchmark["MORE"]
    expected = {(d, label(r), "") for r in benchmark["EQUAL"] for d in benchmark["DOMAINS"]}
    expected |= {(domain, label(ranks), "") for domain, ranks in more.items()}
    for component, format, rank in benchmark["ROUNDED"]:
        expected |= {("own", label({component: rank}), f) for f in (format, "")}
    runs = recorded.groupby(["domain", "trained", "format"])
    assert set(runs.groups) == expected
    for (domain, _, _), rows in runs:
        own = benchmark["OWN"] if domain == "own" else (domain, *vk.tasks.TASKS)
        assert tuple(rows["task"]) == own
    assert (recorded["before"] - recorded["lost"] + recorded["gained"] == recorded["after"]).all()
    assert (recorded["after"] <= recorded["n"]).all()


def test_as_many_parameters_are_trained_in_each_case(benchmark, recorded):
    """As recorded, and as `add_adapters` has it: within some per cent of the projector's."""
    model, _ = vk.load("pebble", "fp32", processor=False)
    projector = vk.anatomy("pebble")[PROJECTOR].parameters
    for ranks in benchmark["EQUAL"]:
        found = vk.finetuning.targets(model, benchmark["training"](ranks))
        modules = dict(model.named_modules())
        count = 0
        for target in found:
            for name in target.modules:
                out, into = modules[name].weight.shape
                if target.lora:
                    count += target.lora.r * (out + into)
                else:
                    count += sum(p.numel() for p in modules[name].parameters())
        rows = recorded[recorded["trained"] == benchmark["label"](ranks)]
        assert set(rows["parameters"]) == {count}
        assert 1 <= count / projector <= 1.1


def test_the_benchmark_counts_answers_as_evaluate_does(benchmark, tmp_path, monkeypatch):
    """On few questions and steps; what is in the file is not trained again."""
    output, main = tmp_path / "new" / "trial.csv", benchmark["main"]
    small = {"DOMAINS": ("clock",), "MORE": {"clock": {PROJECTOR: "full"}}, "EQUAL": ()}
    small["ROUNDED"] = ((PROJECTOR, "int2", 4),)
    for name, value in small.items():
        monkeypatch.setitem(main.__globals__, name, value)
    main(["--steps", "2", "2", "2", "--n", "12", "--output", str(output)])
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
    main(["--steps", "2", "2", "2", "--n", "12", "--output", str(output)])
    assert output.read_text() == first


class Learnt:
    """learnt(domain, trained): the share in % that is right after training, of the domain's
    questions; .own of pebble's own."""

    def __init__(self, rows):
        rows = rows[rows["part"] == "domains"]
        new = rows["task"] == rows["domain"]
        counts = [
            r.groupby(["domain", "trained"])[["n", "before", "after"]].sum()
            for r in (rows[new], rows[~new])
        ]
        self.new, self.old = counts

    def __call__(self, domain, trained, when="after"):
        row = self.new.loc[(domain, trained)]
        return 100 * row[when] / row["n"]


@pytest.fixture(scope="module")
def learnt(recorded):
    return Learnt(recorded)


BOTH, ALONE = f"{VISION} 5 + {LANGUAGE} 1", (f"{VISION} 7", f"{PROJECTOR} full", f"{LANGUAGE} 3")


def test_what_is_said_of_clocks_is_so(said, learnt):
    assert "**no component reads clocks alone**" in said and "not one right" in said
    assert max(learnt("clock", one) for one in ALONE) < 5 and learnt("clock", ALONE[0]) == 0
    assert "Adapters on both ends get furthest, to 10%" in said
    assert round(learnt("clock", BOTH)) == 10 > max(learnt("clock", one) for one in ALONE)
    assert "What reads them live also has nine times the numbers" in said
    assert learnt("clock", f"{VISION} 16 + {PROJECTOR} full + {LANGUAGE} 16") > 80


def test_what_is_said_of_dutch_is_so(said, learnt):
    assert "comes furthest**, to 63% from 33%" in said
    first = ALONE[2]
    assert round(learnt("dutch", first)) == 63 and round(learnt("dutch", first, "before")) == 33
    assert all(learnt("dutch", first) > learnt("dutch", one) for one in (*ALONE[:2], BOTH))
    assert "the vision encoder alone unlearns the numbers" in said
    assert learnt("dutch", ALONE[0]) < 33 / 3
    assert "With five times the numbers and the steps, **Dutch comes to 90%**" in said
    assert 90 <= learnt("dutch", f"{LANGUAGE} 16") < 91
    assert "to be read before they are answered: 64%" in said
    assert round(learnt("dutch_throughout", f"{LANGUAGE} 16")) == 64


def test_what_is_said_of_forgetting_is_so(said, learnt):
    assert "what is left of pebble's own tasks (97.7% before)" in said
    assert set((100 * learnt.old["before"] / learnt.old["n"]).round(1)) == {97.7}
    assert "Every training ruins what pebble could do before" in said
    assert (learnt.old["after"] / learnt.old["n"]).max() < 0.5


def test_what_is_said_of_recovery_is_so(said, recorded):
    rows = recorded[recorded["part"] == "recovery"]
    runs = rows.groupby(["trained", "format"])
    sums = runs[["n", "unrounded", "before", "after", "lost", "gained"]].sum()
    assert "The control changes nothing that can be told from chance" in said
    for trained, format, low, high in (
        (f"{LANGUAGE} 8", "int2", 0.6, 0.9),  # "most of what it lost"
        (f"{VISION} 8", "int2-asym", 0.25, 0.4),  # "about a third"
    ):
        run, control = sums.loc[(trained, format)], sums.loc[(trained, "")]
        share = (run["after"] - run["before"]) / (run["unrounded"] - run["before"])
        assert low < share < high
        ends = vk.sensitivity.paired_interval(control["lost"], control["gained"], control["n"])
        assert ends[0] <= 0 <= ends[1]
    assert "gets back most of what it lost, the vision encoder about a third" in said


def test_what_is_said_of_the_head_is_so(notebook, said):
    """pebble's own answers hold no colon and no small letter by itself."""
    _, processor = vk.load("pebble", "fp32")
    encode = processor.tokenizer.encode
    spoken = set()
    for task, recipe in vk.tasks.RECIPES.items():
        for kind in recipe.kinds:
            for index in range(60):
                rng = vk.tasks.generator("spoken", task, kind, index)
                spoken |= set(encode(f" {recipe.example(kind, rng)[2]}"))
    letters = {t: processor.tokenizer.convert_tokens_to_ids(t) for t in "RD7rd:"}
    assert {t for t, i in letters.items() if i in spoken} == set("RD7")
